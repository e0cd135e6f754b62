"""The paper's tables beside our figures."""

from pathlib import Path

import pytest

from cllm.bench.judged import JudgedCell, JudgeResults, JudgeSettings
from cllm.report.published import TASKS
from tests.bench.records import BLOCK, PROVENANCE, make_record, make_result, make_results
from tests.report.measured import DRAFT, cell, record, spider_results
from tests.report.reading import Reader, page_of


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return page_of(spider_results(), tmp_path_factory.mktemp("report"))[0]


def test_published_values_stand_beside_ours_where_they_are_the_same_quantity(page: Reader):
    rows = {(row["task"], row["model"], row["method"]): row for row in page.table("our tok/s")}
    assert len(rows) == 16
    row = rows["Spider", "CLLM", "Jacobi"]
    assert (row["tok/s"], row["× AR"], row["metric"], row["sure?"]) == ("127.4", "3.4", "69.3", "F")
    assert (row["our tok/s"], row["our × AR"]) == ("350 (315–385)", "3.50 (2.86–4.28)")
    assert (row["our metric"], row["our size"], row["source"]) == ("50.0% (15.0–85.0)", "1.9M", "1")
    assert row["our method"] == BLOCK.label
    assert rows["Spider", "target", "Jacobi"]["× transformers"] == "2.10 (1.72–2.57)"
    assert rows["Spider", "target", "Medusa-2"]["our tok/s"] == "–"
    assert rows["CodeSearchNet-Python", "CLLM", "Jacobi"]["our tok/s"] == "–"
    assert "Ours: Test GPU, models of 1.9M parameters" in page.text
    assert "No run of CodeSearchNet-Python is among these results" in page.text


def test_a_draft_model_stands_beside_the_papers_and_adds_to_the_size(page: Reader):
    (row,) = [r for r in page.table("our tok/s") if r["task"] == "Spider" and r["method"].startswith("speculative")]
    assert (row["our tok/s"], row["our × AR"], row["our size"]) == ("160 (144–176)", "2.00 (1.64–2.44)", "2.4M")
    assert "heads on a fixed model" in page.text


def test_token_counts_are_held_against_the_target_model(page: Reader):
    rows = page.table("fast-forwarded an iteration")
    assert [list(row.values())[1:] for row in rows] == [
        ["teacher", BLOCK.label, "1.10", "1.00", "0.50", "1.0", "1"],
        ["cllm", BLOCK.label, "3.30", "3.00", "2.00", "4.0", "1"],
    ]


def test_perplexity_of_corpora_and_of_reference_answers(page: Reader):
    rows = page.table("ptb, per token")
    assert [list(row.values())[1:] for row in rows] == [
        ["teacher", "40.125", "1,234.5", "1.2500", "1"],
        ["cllm", "40.125", "1,234.5", "1.2500", "1"],
    ]


def test_what_a_method_needs_is_what_the_code_knows(page: Reader):
    rows = {(row["model"], row["method"]): row for row in page.table("draft or heads")}
    wanted = {name: (row["training"], row["draft or heads"], row["trained parameters"]) for name, row in rows.items()}
    assert wanted["teacher", "ar"] == ("none", "none", "0")
    assert wanted["teacher", DRAFT.label] == ("of the draft", "draft_model", "500.0K")
    assert wanted["cllm", BLOCK.label] == ("distilled", "none", "1.9M")


def test_a_judges_score_stands_beside_the_published_one(tmp_path: Path):
    record = make_record(cell("cllm", BLOCK, 1, task="mt_bench"), make_result(scores=(), metric="judged"))
    page, _ = page_of(make_results(record), tmp_path, judged=[judged(record.key)])
    (row,) = [row for row in page.table("our tok/s") if row["our tok/s"] != "–"]
    assert (row["task"], row["metric"]) == ("ShareGPT", "6.4")
    # Conversations of 7 + 5 and 7 + 6 points over two turns each, by hand: 6.25 and 1.96 * sqrt(2 * 2 * 0.5**2) / 4.
    assert row["our metric"] == single_score(page) == "6.25 (5.76–6.74)"
    (single,) = page.table("turn 1", "math")
    assert "our method" in row
    (pair,) = page.table("win rate (95% CI)")
    assert pair["win rate (95% CI)"].startswith("62.5% (")
    assert (single["turn 1"], single["turn 2"], single["math"]) == ("7.00", "5.50", "6.25")


def single_score(page: Reader) -> str:
    (single,) = page.table("score (95% CI)")
    return single["score (95% CI)"]


def test_methods_that_differ_in_their_window_are_told_apart(tmp_path: Path):
    """Two windows of the paper's Jacobi decoding stand beside the same published row."""
    wider = BLOCK.model_copy(update={"window": 32})
    records = [record("cllm", method, 1, speed) for method, speed in ((BLOCK, 300), (wider, 350))]
    page, _ = page_of(make_results(*records), tmp_path)
    found = [row["our method"] for row in page.table("our tok/s") if row["our tok/s"] != "–"]
    assert sorted(found) == sorted([BLOCK.label, wider.label])


def judged(key: str) -> JudgeResults:
    """A cell of our CLLM, judged alone and against the teacher."""
    names = {"key": key, "run": "chat", "task": "mt_bench", "model": "cllm", "method": BLOCK.label}
    fields = {**names, "concurrency": 1, "seed": 0, "judged": 4, "unparsed": 0, "silent": ()}
    single = {
        "mode": "single",
        "score": 6.25,
        "by_turn": (7.0, 5.5),
        "by_category": {"math": 6.25},
        "ratings": (7.0, 5.0, 7.0, 6.0),
    }
    pairwise = {"mode": "pairwise", "baseline": "b", "wins": 2, "ties": 1, "losses": 1, "win_rate": 0.625}
    return JudgeResults(
        judge=JudgeSettings(model="judge", endpoint="local"),
        cells=(JudgedCell(**fields | single), JudgedCell(**fields | pairwise)),
        not_judged=(),
        judgments=(),
        provenance=PROVENANCE,
    )


def test_published_speedups_fit_their_speeds():
    """Guards against slips in copying: each speed-up is the ratio to the target model's AR, to the digit it has."""
    for task in TASKS:
        baseline = next(row for row in task.rows if (row.model, row.method) == ("target", "AR"))
        for row in task.rows:
            assert row.tokens_per_s / baseline.tokens_per_s == pytest.approx(row.speedup, abs=0.1), (task.title, row)
