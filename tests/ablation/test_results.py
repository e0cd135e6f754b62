"""The document, the page and the figure say what the students' figures say."""

import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

from cllm.ablation.figure import plot_effects
from cllm.ablation.grids import get_grid
from cllm.ablation.results import RESULTS_NAME, SCHEMA_VERSION, write_document
from cllm.ablation.summary import sentences, summary
from cllm.bench.matrix import RunConfig
from cllm.provenance import collect_provenance
from tests.ablation.rows import made_up

GRID = get_grid("demo").model_copy(
    update={"output": "/somewhere/private", "base": RunConfig(recipe="demo", overrides=("output=/home/me/run",))}
)
ABLATION = made_up(
    GRID, lambda settings: 3.0 - 0.5 * (settings["data"] == 0.25), noise=lambda seed: 0.01 if seed else -0.01
)
KEYS = {
    "tpf", "speedup", "accuracy", "accuracy_low", "accuracy_high", "reference_perplexity", "train_seconds",
    "train_tokens",
}  # fmt: skip


def test_the_document_has_a_row_a_student_and_the_base(tmp_path: Path) -> None:
    write_document(tmp_path, ABLATION, collect_provenance(["jobs/ablate.py"]))
    document = json.loads((tmp_path / RESULTS_NAME).read_text())
    assert document["schema_version"] == SCHEMA_VERSION
    assert len(document["rows"]) == 34
    centre = {"data": 1.0, "n": 16, "ar_weight": 2.5, "context": "clean", "loss": "global"}
    assert centre.items() <= document["base"]["settings"].items()
    for row in document["rows"]:
        assert row.keys() >= KEYS
        assert row["settings"].keys() == document["factors"].keys()
        assert (type(row["settings"]["data"]), type(row["settings"]["n"])) == (float, int)
    first = document["rows"][0]
    assert (first["settings"], first["seed"]) == (document["base"]["settings"], 0)
    assert (first["tpf"], first["accuracy"]) == (2.99, 1.0)
    assert first["accuracy_low"] < first["accuracy"] <= first["accuracy_high"]


def test_the_document_names_no_folder(tmp_path: Path) -> None:
    write_document(tmp_path, ABLATION, collect_provenance(["jobs/ablate.py", "--set", "output=/home/me/x"]))
    text = (tmp_path / RESULTS_NAME).read_text()
    assert "private" not in text
    assert "/home" not in text


def test_the_page_names_what_matters() -> None:
    page = summary(ABLATION, "effects.svg")
    lines = sentences(ABLATION.effects)
    assert lines[0].startswith("tokens/forward: data=0.25 (-0.50)")
    assert "× AR: data=0.25 (-0.25)" in lines[1]
    assert all(line in page for line in lines)
    (row,) = [line for line in page.splitlines() if line.startswith("| data | 0.25 |")]
    assert re.search(r"\| \*\*-0\.50\*\* \(-0\.5\d to -0\.4\d\) \|", row)
    (row,) = [line for line in page.splitlines() if line.startswith("| context | noisy |")]
    assert "**" not in row.split("|")[3]
    assert page.count("\n| 1.0 | 16 | 2.5 | clean | global |") == 2 + 3 * 2  # centre, and its divergences and states


def test_accuracy_and_perplexity_have_their_own_units() -> None:
    """One of four scores is lost unless n is the centre's; perplexity is 2 with all of the data and 3 without."""
    effects = {(e.factor, e.level): e for e in ABLATION.effects["accuracy"].effects}
    assert abs(effects["n", 8].value + 0.25) < 1e-9
    ratios = {(e.factor, e.level): e for e in ABLATION.effects["reference_perplexity"].effects}
    assert abs(ratios["data", 0.25].value - 1.5) < 1e-9
    page = summary(ABLATION, "effects.svg")
    assert "n=8 (-25.0)" in page
    assert "data=0.25 (1.5)" in page


def test_missing_students_are_named_and_leave_no_effects() -> None:
    missing = replace(ABLATION, rows=ABLATION.rows[1:], effects={}, missing=("n=8: out of memory",))
    page = summary(missing, "effects.svg")
    assert "33 students" in page
    assert "- n=8: out of memory" in page
    assert "effects.svg" not in page


def test_the_figure_shows_every_level_and_is_reproducible(tmp_path: Path) -> None:
    plot_effects(ABLATION, tmp_path / "one.svg")
    plot_effects(ABLATION, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    comments = ElementTree.TreeBuilder(insert_comments=True)  # text is drawn as outlines, with the words in comments
    root = ElementTree.parse(tmp_path / "one.svg", ElementTree.XMLParser(target=comments)).getroot()
    words = [(node.text or "").strip() for node in root.iter() if node.tag is ElementTree.Comment]
    for factor in GRID.factors:
        assert factor.name in words
        assert {str(value) for value in factor.values} <= set(words)
    assert "tokens per forward" in words
