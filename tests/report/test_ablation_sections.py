"""The paper's ablations from an ablation's document."""

from pathlib import Path

import pytest

from cllm.ablation.document import AblationDocument, read_document
from cllm.ablation.grid import students
from cllm.report.ablation_page import ablation_page
from cllm.report.ablation_sections import ablation_sections
from cllm.report.page import Absent, Section, Table
from cllm.report.sources import Sources
from tests.report.ablations import GRID, made_up_ablation, true_tpf, write_ablation


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> AblationDocument:
    return read_document(write_ablation(tmp_path_factory.mktemp("a")) / "ablation.json")


def sections_of(document: AblationDocument) -> list[Section | Absent]:
    return ablation_sections([document], Sources.of(ablations=[document]))


def tables(document: AblationDocument) -> dict[str, list[list[str]]]:
    """Section -> the rows of its first table."""
    found = {}
    for section in sections_of(document):
        assert isinstance(section, Section)
        table, *_ = [part for part in section.parts if isinstance(part, Table)]
        found[section.title.partition(":")[0]] = [[value.text for value in row] for row in table.rows]
    return found


def test_data_against_length_is_all_from_students(document: AblationDocument):
    rows = tables(document)["The paper's Table 4"]
    assert [row[0] for row in rows] == ["0.0625", "0.25", "1.0"]
    for data, row in zip((0.0625, 0.25, 1.0), rows, strict=True):
        for n, text in zip((8, 16, 32), row[1:], strict=True):
            assert float(text.partition(",")[0]) == pytest.approx(true_tpf({"data": data, "n": n}), abs=0.03)


def test_without_its_student_a_cell_is_a_sum_of_effects_in_brackets(document: AblationDocument):
    rest = [row for row in document.rows if not row.settings.items() >= {("data", 0.0625), ("n", 32)}]
    rows = tables(document.model_copy(update={"rows": tuple(rest)}))["The paper's Table 4"]
    bracketed = {
        (row[0], n): text for row in rows for n, text in zip((8, 16, 32), row[1:], strict=True) if text[0] == "("
    }
    assert bracketed.keys() == {("0.0625", 32)}
    (text,) = bracketed.values()
    assert float(text.strip("(").partition(",")[0]) == pytest.approx(2.7, abs=0.03)


def test_students_decode_with_other_lengths_too(document: AblationDocument):
    section = sections_of(document)[0]
    assert isinstance(section, Section)
    _, table = section.parts
    assert isinstance(table, Table)
    assert len(table.rows) == 9
    for data, trained, *figures in ([value.text for value in row] for row in table.rows):
        true = true_tpf({"data": float(data), "n": int(trained)}) + 0.02
        for window, text in zip((8, 16, 32), figures, strict=True):
            cost = 0.0 if window == int(trained) else 0.2
            assert float(text.partition(",")[0]) == pytest.approx(true - cost, abs=0.006)


def test_length_comes_with_an_interval_around_the_truth(document: AblationDocument):
    rows = tables(document)["The paper's Figure 3"]
    assert [row[0] for row in rows] == ["8", "16", "32"]
    for n, row in zip((8, 32), (rows[0], rows[2]), strict=True):
        low, _, high = row[1].partition("(")[2].strip(")").partition(" to ")
        assert float(low) - 0.03 <= true_tpf({"data": 1.0, "n": n}) <= float(high) + 0.03


def test_the_loss_ablation_marks_what_is_noise(document: AblationDocument):
    section = sections_of(document)[2]
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
    assert len(rows) == len(document.rows) + len(document.decoded) == 39 + 18
    assert {(row[7], row[-1]) for row in rows} == {("0", "1"), ("1", "2")}  # each seed has its own source


def test_with_students_missing_only_what_was_measured_is_shown(tmp_path: Path):
    ablation = made_up_ablation(students(GRID)[:5], missing=["data=0.25: no disk"])
    document = read_document(write_ablation(tmp_path, ablation) / "ablation.json")
    by_size, by_length, losses, everyone = sections_of(document)
    assert isinstance(by_size, Section)
    assert isinstance(by_length, Absent)
    assert isinstance(losses, Absent)
    assert "students of the grid are missing" in losses.why
    assert isinstance(everyone, Section)
    assert everyone.notes == ("Missing: data=0.25: no disk",)
    (table,) = by_size.parts
    assert isinstance(table, Table)
    assert not any(value.text.startswith("(") for row in table.rows for value in row)
    page = ablation_page(document, "effects.svg")
    assert "5 students" in page
    assert "- data=0.25: no disk" in page
    assert "effects.svg" not in page


def test_the_page_of_an_ablation_is_the_reports_sections(document: AblationDocument):
    page = ablation_page(document, "effects.svg")
    assert "![Main effects](effects.svg)" in page
    for section in sections_of(document):
        assert f"## {section.title}\n" in page
    assert "loss=local (-3.0)" in page
    assert "fedcba987654" in page  # the commit of the second job


def test_a_mean_over_seeds_has_no_narrower_interval_than_its_students(document: AblationDocument):
    centre = document.at()
    text = tables(document)["The paper's Table 4"][2][2]
    assert len(centre) == 2
    low = min(row.speedup_low for row in centre)
    high = max(row.speedup_high for row in centre)
    assert f"2.38 ({low:.2f}–{high:.2f}) × AR" in text
    narrowest = min(100 * (row.accuracy_high - row.accuracy_low) for row in centre)
    bounds = text.rpartition("(")[2].rstrip(")").split("–")
    assert float(bounds[1]) - float(bounds[0]) >= narrowest - 0.1
