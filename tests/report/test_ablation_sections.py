"""The paper's ablations from an ablation's document."""

from pathlib import Path

import pytest

from cllm.ablation.grid import students
from cllm.ablation.grids import get_grid
from cllm.ablation.results import Ablation, make_row
from cllm.report.ablation import AblationDocument
from cllm.report.ablation_sections import ablation_sections
from cllm.report.documents import read_ablation
from cllm.report.page import Absent, Section, Table
from tests.report.ablations import PROMPTS, figures_of, true_tpf, write_ablation


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> AblationDocument:
    return read_ablation(write_ablation(tmp_path_factory.mktemp("a")) / "ablation.json")


def tables(document: AblationDocument) -> dict[str, list[list[str]]]:
    """Section -> the rows of its table."""
    found = {}
    for section in ablation_sections([document]):
        assert isinstance(section, Section)
        (table,) = [part for part in section.parts if isinstance(part, Table)]
        found[section.title.partition(":")[0]] = [[value.text for value in row] for row in table.rows]
    return found


def test_data_against_length_with_fitted_values_in_brackets(document: AblationDocument):
    rows = tables(document)["The paper's Table 4"]
    assert [row[0] for row in rows] == ["0.0625", "0.25", "1.0"]
    for data, row in zip((0.0625, 0.25, 1.0), rows, strict=True):
        for n, text in zip((8, 16, 32), row[1:], strict=True):
            settings = {"data": data, "n": n}
            trained = bool(document.at(**settings))
            assert text.startswith("(") is not trained
            assert float(text.strip("(").partition(",")[0]) == pytest.approx(true_tpf(settings), abs=0.03)
    assert any(not text.startswith("(") for row in rows for text in row[1:])


def test_length_comes_with_an_interval_around_the_truth(document: AblationDocument):
    rows = tables(document)["The paper's Figure 3"]
    assert [row[0] for row in rows] == ["8", "16", "32"]
    for n, row in zip((8, 32), (rows[0], rows[2]), strict=True):
        low, _, high = row[1].partition("(")[2].strip(")").partition(" to ")
        assert float(low) - 0.03 <= true_tpf({"data": 1.0, "n": n}) <= float(high) + 0.03


def test_the_loss_ablation_marks_what_is_noise(document: AblationDocument):
    section = ablation_sections([document])[2]
    assert isinstance(section, Section)
    (table,) = [part for part in section.parts if isinstance(part, Table)]
    accuracy = table.columns.index("accuracy, points")
    cells = {(row[0].text, row[1].text): row[accuracy] for row in table.rows}
    assert cells["loss", "local, not global"].text.startswith("-3.0 (")
    assert not cells["loss", "local, not global"].noise
    assert cells["ar_weight", "10.0, not 2.5"].text.startswith("+2.0 (")
    assert cells["context", "noisy, not clean"].noise
    assert any("loss=local (-3.0)" in text for text in section.text)


def test_every_student_is_listed(document: AblationDocument):
    rows = tables(document)["All students of the ablation"]
    assert len(rows) == len(document.rows) == 34


def test_with_students_missing_only_what_was_measured_is_shown(tmp_path: Path):
    grid = get_grid("demo")
    rows = tuple(make_row(student, "0", figures_of(student.settings, student.seed)) for student in students(grid)[:5])
    ablation = Ablation(grid, rows, {}, ("data=0.25: no disk",), "execution accuracy", PROMPTS)
    document = read_ablation(write_ablation(tmp_path, ablation) / "ablation.json")
    by_size, by_length, losses, everyone = ablation_sections([document])
    assert isinstance(by_size, Section)
    assert isinstance(by_length, Absent)
    assert isinstance(losses, Absent)
    assert "students of the grid are missing" in losses.why
    assert isinstance(everyone, Section)
    assert everyone.notes == ("Missing: data=0.25: no disk",)
    (table,) = by_size.parts
    assert isinstance(table, Table)
    assert not any(value.text.startswith("(") for row in table.rows for value in row)
