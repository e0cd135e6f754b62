"""The sentences at the top say what the records say."""

import pytest

from cllm.bench.compare import compare
from cllm.bench.matrix import Obstacle
from cllm.bench.matrix_results import CellRecord
from cllm.report.summary import summary_of
from tests.bench.records import AR, BLOCK, VLLM, failed_record, make_record, make_results
from tests.report.measured import cell, record, spider_results


def summary(*records: CellRecord, **changed: object) -> list[str]:
    results = make_results(*records, **changed)
    return summary_of(compare(results.records), results)


def test_it_states_hardware_gain_accuracy_and_load():
    results = spider_results()
    assert summary(*results.records) == [
        "Measured on Test GPU: 15 cells, each answers 4 held-out prompts once, and some of them 3 times for its speed, "
        "which is the median.",
        "Tokens a second of the CLLM over AR decoding of the same weights, one request in flight, by "
        f"{BLOCK.label}: 3.50 (2.86 to 4.28) on spider-small, with 3.50 tokens a forward.",
        "Over vLLM's AR decoding of the same weights, one request in flight: 4.38 (3.58 to 5.35) on spider-small.",
        "Accuracy of that decoding against the teacher by AR: +0.0 points (-32.7 to +32.7, within noise) on "
        "spider-small, where it reaches 50.0% execution accuracy.",
        f"At the highest number of requests in flight, by {BLOCK.label}: 2.00 (1.64 to 2.44) over AR and "
        "2.50 (2.05 to 3.06) over vLLM's with 8 on spider-small.",
    ]


def test_the_fastest_method_speaks_for_the_cllm_and_says_of_how_many():
    slower = BLOCK.model_copy(update={"refill": "sliding"})
    found = summary(*(record("cllm", method, 1, speed) for method, speed in ((AR, 100), (slower, 200), (BLOCK, 300))))
    assert f"by {BLOCK.label}, the fastest of 2 methods: 3.00" in found[1]
    assert found[3].endswith("not known on spider-small, where it reaches 50.0% execution accuracy.")  # no teacher
    unscored = [record("cllm", method, 1, speed, scores=()) for method, speed in ((AR, 100), (BLOCK, 300))]
    assert summary(*unscored)[3].endswith("not scored on spider-small.")


def test_runs_and_test_sets_are_told_apart_and_named_by_their_own_method():
    slower = BLOCK.model_copy(update={"window": 8})
    other = [record("cllm", method, 1, speed) for method, speed in ((AR, 100), (slower, 250))]
    found = summary(
        record("cllm", AR, 1, 100),
        record("cllm", BLOCK, 1, 300),
        *(make_record(cell("cllm", one.cell.method, 1, task="gsm8k"), one.result) for one in other),
    )
    assert f"2.50 (2.05 to 3.06) on spider-small/gsm8k by {slower.label}, with" in found[1]
    assert f"on spider-small/spider by {BLOCK.label}, with 3.50 tokens a forward" in found[1]


@pytest.mark.parametrize("known", ["cannot run", "failed", "not asked for"])
def test_why_there_is_no_vllm(known: str):
    records = [record("cllm", AR, 1, 100), record("cllm", BLOCK, 1, 300)]
    if known == "failed":
        records.append(failed_record(cell("cllm", VLLM, 1), "out of memory"))
    obstacles = (Obstacle(run="spider-small", method="vllm ar", why="vLLM is not installed"),)
    found = summary(*records, cannot_run=obstacles if known == "cannot run" else ())
    why = {
        "cannot run": "vLLM is not installed",
        "failed": "out of memory",
        "not asked for": "no cell of its AR decoding is among these results",
    }
    assert found[2] == f"How it compares with vLLM is not known here: {why[known]}."


def test_without_a_student_there_is_no_gain():
    found = summary(record("teacher", AR, 1, 100), record("teacher", BLOCK, 1, 105))
    assert found[1:] == ["No CLLM was measured by Jacobi or lookahead decoding, so there is no gain to state."]
    assert summary() == []
