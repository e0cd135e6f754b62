"""A completion scores only if its tests pass."""

import json
import os
from pathlib import Path

import pytest

from cllm.errors import InputError
from cllm.tasks.humaneval import HumanEval, HumanEvalConfig, complete

ROW = {
    "task_id": "Fixture/0",
    "prompt": 'from typing import List\n\n\ndef total(xs: List[int]) -> int:\n    """Sum of xs."""\n',
    "entry_point": "total",
    "canonical_solution": "    return sum(xs)\n",
    "test": "\n\ndef check(candidate):\n    assert candidate([1, 2]) == 3\n    assert candidate([]) == 0\n",
}
BODY, PROMPT = ROW["canonical_solution"], ROW["prompt"]


def task(folder: Path, row: dict[str, str] = ROW) -> HumanEval:
    path = folder / "HumanEval.jsonl"
    path.write_text(json.dumps(row))
    return HumanEval(HumanEvalConfig(source=str(path), seconds=20.0))


@pytest.mark.parametrize(
    ("response", "score"),
    [
        (BODY, 1),
        (BODY + "\n\ndef other():\n    return 1 / 0\n\nother()\n", 1),
        (BODY + "\nprint(total([1]))\nassert 0", 1),
        (BODY + "```\nand some words", 1),
        (f"Sure:\n```python\n{PROMPT}{BODY}```\nIt sums.", 1),
        (f"```python\n{PROMPT}{BODY}", 1),
        ("```\ndef total(xs: List[int]):\n    return sum(xs)\n```", 1),
        (f"```python\n{BODY}```", 1),
        ("    return sum(xs) + 1\n", 0),
        ("    return 3\n", 0),
        ("", 0),
        ("total", 0),
        ("    return sum(xs", 0),
        ("    import sys; sys.exit(0)\n", 0),
        ("    import os; os._exit(0)\n", 0),
        ("    print('passed')\n", 0),
        ('    return 0\n    """', 0),
        ("    return 0\n    '''\n", 0),
        ("    globals()['check'] = print\n", 0),
        ("    raise SystemExit\n", 0),
    ],
)
def test_score_is_whether_the_tests_pass(tmp_path: Path, response: str, score: int) -> None:
    (example,) = task(tmp_path).examples()
    assert task(tmp_path).score([response], [example.response], [example.context]) == [score]


def test_examples_are_test_rows_with_all_that_scoring_needs(tmp_path: Path) -> None:
    (example,) = task(tmp_path).examples()
    assert (example.split, example.group, example.response) == ("test", "Fixture/0", BODY)
    assert example.turns[0].content == PROMPT
    assert example.context == {key: ROW[key] for key in ("prompt", "test", "entry_point")}


def test_a_function_of_another_name_is_a_body_cut_short() -> None:
    assert complete(PROMPT, "    return 1\ndef totals(): pass", "total") == PROMPT + "    return 1\n"


def test_a_row_without_tests_is_named(tmp_path: Path) -> None:
    row = {key: value for key, value in ROW.items() if key != "test"}
    with pytest.raises(InputError, match=r"HumanEval\.jsonl:1: no key 'test'"):
        list(task(tmp_path, row).examples())


@pytest.mark.slow
@pytest.mark.skipif("CLLM_DATA" not in os.environ, reason="CLLM_DATA names no folder with humaneval/")
def test_every_reference_passes_and_nothing_else() -> None:
    real = HumanEval(HumanEvalConfig(source=str(Path(os.environ["CLLM_DATA"]) / "humaneval"), seconds=30.0))
    examples = list(real.examples())
    references, contexts = [e.response for e in examples], [e.context for e in examples]
    assert len(examples) == 164
    assert sum(real.score(references, references, contexts)) == 164
    assert sum(real.score(["    return None\n"] * 164, references, contexts)) == 0
