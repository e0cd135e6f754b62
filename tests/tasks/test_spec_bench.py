"""Six categories, one or two questions a row, and no score."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import InputError
from cllm.tasks.spec_bench import CATEGORIES, SpecBench, SpecBenchConfig

ROWS: list[dict[str, Any]] = [
    {"category": "roleplay", "turns": ["Be a pirate.", "Now a king."]},
    {"category": "qa", "turns": ["Who?"], "reference": [["me", "you"]]},
    {"category": "translation", "turns": ["Translate: ja"], "reference": ["yes"]},
]


def write(folder: Path, *rows: dict[str, Any], **settings: Any) -> SpecBench:
    (folder / "question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return SpecBench(SpecBenchConfig(source=str(folder), **settings))


def test_rows_with_their_categories(tmp_path: Path) -> None:
    examples = list(write(tmp_path, *ROWS).examples())
    assert [e.context["category"] for e in examples] == ["mt_bench", "qa", "translation"]
    assert [e.context.get("follow_up") for e in examples] == ["Now a king.", None, None]
    assert [e.response for e in examples] == ["", "", "yes"]  # a list of short answers is no reference text
    assert {e.split for e in examples} == {"test"}


def test_conversations_may_end_after_one_answer(tmp_path: Path) -> None:
    examples = list(write(tmp_path, *ROWS, turns="first").examples())
    assert examples[0].turns[0].content == "Be a pirate."
    assert all("follow_up" not in e.context for e in examples)


def test_nothing_is_scored(tmp_path: Path) -> None:
    assert write(tmp_path, *ROWS).score(["yes"], ["yes"], [{}]) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"category": "chess", "turns": ["e4"]}, r"question\.jsonl:1: category: 'chess' is none of mt_bench"),
        ({"category": "qa", "turns": []}, r"question\.jsonl:1: turns: expected one or two questions, got 0"),
        ({"category": "qa", "turns": "Who?"}, r"question\.jsonl:1: turns: expected list"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(write(tmp_path, row).examples())


@pytest.mark.skipif("CLLM_DATA" not in os.environ, reason="CLLM_DATA names no folder with spec_bench/")
def test_the_published_questions() -> None:
    source = str(Path(os.environ["CLLM_DATA"]) / "spec_bench")
    examples = list(SpecBench(SpecBenchConfig(source=source)).examples())
    assert Counter(e.context["category"] for e in examples) == dict.fromkeys(CATEGORIES, 80)
    assert sum("follow_up" in e.context for e in examples) == 80
