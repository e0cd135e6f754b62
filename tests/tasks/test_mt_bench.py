"""Conversations: the first question is the example, the second waits in the context for the model's own answer."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import InputError
from cllm.recipe import PromptConfig
from cllm.tasks.base import JUDGED
from cllm.tasks.mt_bench import MtBench, MtBenchConfig
from cllm.tasks.prompts import second_turn, second_turn_id, tokenize
from cllm.tasks.tokenizer import train_tokenizer

MATH = {"question_id": 1, "category": "math", "turns": ["What is 2 + 2?", "And twice that?"], "reference": ["5", "9"]}
STEM = {"question_id": 2, "category": "stem", "turns": ["What is a cell?", "Why?"], "reference": ["hint", "hint"]}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def write(folder: Path, *rows: dict[str, Any]) -> MtBench:
    (folder / "question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return MtBench(MtBenchConfig(source=str(folder)))


def test_questions_and_what_a_judge_may_see(tmp_path: Path) -> None:
    math, stem = write(tmp_path, MATH, STEM).examples()
    assert (math.split, math.turns[0].content, math.response) == ("test", "What is 2 + 2?", "5")
    assert math.context == {
        "category": "math",
        "question": "What is 2 + 2?",
        "follow_up": "And twice that?",
        "reference": "5",
        "follow_up_reference": "9",
    }
    # Outside mathematics, reasoning and coding a reference is no measure of an answer.
    assert (stem.response, stem.context.keys()) == ("", {"category", "question", "follow_up"})


def test_answers_of_fastchats_folder_come_first(tmp_path: Path) -> None:
    folder = tmp_path / "reference_answer"
    folder.mkdir()
    answer = {"question_id": 1, "choices": [{"turns": ["4", "8"]}]}
    (folder / "gpt-4.jsonl").write_text(json.dumps(answer))
    math, _ = write(tmp_path, MATH, STEM).examples()
    assert (math.context["reference"], math.context["follow_up_reference"]) == ("4", "8")


def test_rows_of_the_hub(tmp_path: Path) -> None:
    row = {"prompt_id": 1, "category": "coding", "prompt": ["Write f.", "Faster."], "reference": []}
    (example,) = write(tmp_path, row).examples()
    assert example.context == {"category": "coding", "question": "Write f.", "follow_up": "Faster."}


def test_nothing_is_scored_without_a_judge(tmp_path: Path) -> None:
    task = write(tmp_path, MATH)
    assert task.metric == JUDGED
    assert task.score(["4"], ["5"], [{}]) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"category": "math"}, r"question\.jsonl:1: no key 'turns' or 'prompt'"),
        ({"category": "math", "turns": ["one"]}, r"question\.jsonl:1: turns: expected two questions, got 1"),
        ({"category": "math", "turns": ["one", 2]}, r"question\.jsonl:1: turns: expected a list of strings"),
        ({"turns": ["one", "two"]}, r"question\.jsonl:1: no key 'category'"),
        ({**MATH, "reference": "5"}, r"question\.jsonl:1: reference: expected a list of strings"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(write(tmp_path, row).examples())


def test_the_second_turn_holds_the_models_own_answer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["What is 2 + 2?"], 300)
    tokenizer.chat_template = TEMPLATE
    config = PromptConfig(template="chat")
    (first,), _ = tokenize(write(tmp_path, MATH).examples(), tokenizer, config, task_name="mt_bench")
    assert first.prompt_text == "<user>What is 2 + 2?<assistant>"
    later = second_turn(first, "Three.", tokenizer, config)
    assert later.prompt_text == "<user>What is 2 + 2?<assistant>Three.<user>And twice that?<assistant>"
    assert tokenizer.decode(later.prompt_ids) == later.prompt_text
    assert (later.reference_text, later.context["category"]) == ("9", "math")
    assert "follow_up" not in later.context
    # The id does not depend on the answer, so that methods with other answers are compared turn by turn.
    assert later.prompt_id == second_turn(first, "Four.", tokenizer, config).prompt_id
    assert later.prompt_id == second_turn_id(first.prompt_id) != first.prompt_id
    assert int(later.prompt_id, 16) >= 0
    with pytest.raises(InputError, match=r"question\.jsonl:1: prompt of [0-9]+ .*max_prompt_tokens=30"):
        second_turn(first, "Three." * 20, tokenizer, config.model_copy(update={"max_prompt_tokens": 30}))


@pytest.mark.skipif("CLLM_DATA" not in os.environ, reason="CLLM_DATA names no folder with mt_bench/")
def test_the_published_questions() -> None:
    source = str(Path(os.environ["CLLM_DATA"]) / "mt_bench")
    examples = list(MtBench(MtBenchConfig(source=source)).examples())
    assert len(examples) == 80
    assert set(Counter(e.context["category"] for e in examples).values()) == {10}
    assert sum("reference" in e.context for e in examples) == 30
