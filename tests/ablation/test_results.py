"""The document and the figure say what the students' figures say."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cllm.ablation.document import RESULTS_NAME, SCHEMA_VERSION, AblationDocument, read_document, write_document
from cllm.ablation.figure import plot_effects
from cllm.ablation.grid import decoded_further, students
from cllm.ablation.grids import get_grid
from cllm.ablation.summary import sentences
from cllm.bench.matrix import RunConfig
from cllm.errors import InputError
from cllm.provenance import collect_provenance
from tests.ablation.rows import made_up
from tests.bench.records import PROVENANCE
from tests.report.ablations import LATER, made_up_ablation

GRID = get_grid("demo").model_copy(
    update={"output": "/somewhere/private", "base": RunConfig(recipe="demo", overrides=("output=/home/me/run",))}
)


@pytest.fixture(scope="module")
def ablation() -> AblationDocument:
    return made_up(
        GRID,
        lambda settings: 3.0 - 0.5 * (settings["data"] == 0.25),
        noise=lambda seed: 0.01 if seed else -0.01,
        provenance=collect_provenance(["jobs/ablate.py", "--set", "output=/home/me/x"]),
    )


def test_the_document_has_a_row_a_student_and_the_base(ablation: AblationDocument) -> None:
    assert ablation.schema_version == SCHEMA_VERSION
    assert len(ablation.rows) == 39
    centre = {"data": 1.0, "n": 16, "ar_weight": 2.5, "context": "clean", "loss": "global"}
    assert centre.items() <= ablation.base.settings.items()
    first = ablation.rows[0]
    assert (first.settings, first.seed, first.window) == (ablation.base.settings, 0, 16)
    assert (first.tpf, first.accuracy) == (2.99, 1.0)
    assert first.accuracy_low < first.accuracy <= first.accuracy_high


def test_what_is_written_is_read_again_but_for_folders(ablation: AblationDocument, tmp_path: Path) -> None:
    write_document(tmp_path, ablation)
    text = (tmp_path / RESULTS_NAME).read_text()
    assert "private" not in text
    assert "/home" not in text
    found = read_document(tmp_path / RESULTS_NAME)
    assert (found.rows, found.effects, found.factors) == (ablation.rows, ablation.effects, ablation.factors)
    assert {(type(row.settings["data"]), type(row.settings["n"])) for row in found.rows} == {(float, int)}


def test_every_student_says_which_job_made_it() -> None:
    """Seed 1 was made by a later job from another commit; the time alone makes no source of its own."""
    found = made_up_ablation()
    commits = {"fedcba9876543210" if row.seed else "0123456789abcdef" for row in found.rows}
    assert {source["commit"] for source in found.sources} == commits
    for row in (*found.rows, *found.decoded):
        assert found.sources[row.source]["commit"] == (LATER if row.seed else PROVENANCE)["commit"]


def test_a_document_of_an_earlier_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / RESULTS_NAME).write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(InputError, match=r"schema version 1, this code reads 2; run jobs/ablate\.py again"):
        read_document(tmp_path / RESULTS_NAME)


def test_sentences_name_what_matters(ablation: AblationDocument) -> None:
    lines = sentences(ablation.effects)
    assert lines[0].startswith("tokens/forward: data=0.25 (-0.50)")
    assert "× AR: data=0.25 (-0.25)" in lines[1]
    assert "context" not in lines[0]


def test_accuracy_and_perplexity_have_their_own_units(ablation: AblationDocument) -> None:
    """One of four scores is lost unless n is the centre's; perplexity is 2 with all of the data and 3 without."""
    lost, ratio = ablation.effect("accuracy", "n", 8), ablation.effect("reference_perplexity", "data", 0.25)
    assert lost is not None
    assert lost.value == pytest.approx(-0.25)
    assert ratio is not None
    assert ratio.value == pytest.approx(1.5)
    text = "; ".join(sentences(ablation.effects))
    assert "n=8 (-25.0)" in text
    assert "data=0.25 (1.50)" in text


def test_effects_wait_for_all_students_but_not_for_their_other_decodings() -> None:
    own = students(get_grid("demo"))
    further = decoded_further(get_grid("demo"), own)
    assert made_up_ablation(own[1:]).effects == {}
    assert made_up_ablation([*own, *further[1:]], missing=["centre: lost"]).effects != {}


def test_the_figure_shows_every_level_and_is_reproducible(ablation: AblationDocument, tmp_path: Path) -> None:
    plot_effects(ablation, tmp_path / "one.svg")
    plot_effects(ablation, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    comments = ElementTree.TreeBuilder(insert_comments=True)  # text is drawn as outlines, with the words in comments
    root = ElementTree.parse(tmp_path / "one.svg", ElementTree.XMLParser(target=comments)).getroot()
    words = [(node.text or "").strip() for node in root.iter() if node.tag is ElementTree.Comment]
    for factor in GRID.factors:
        assert factor.name in words
        assert {str(value) for value in factor.values} <= set(words)
    assert "tokens per forward" in words
