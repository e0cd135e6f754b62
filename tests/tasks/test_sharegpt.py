"""Conversations become questions with the turns before them."""

import json
from pathlib import Path
from typing import Any

import pytest

from cllm.errors import InputError
from cllm.tasks.base import Example
from cllm.tasks.sharegpt import ShareGpt, ShareGptConfig

TALK = [("system", "Be brief."), ("human", "Hi"), ("gpt", "Hello"), ("user", "Who?"), ("chatgpt", "Me")]


def task_of(folder: Path, *talks: list[tuple[str, str]], **options: Any) -> ShareGpt:
    rows = [{"id": i, "conversations": [{"from": f, "value": v} for f, v in talk]} for i, talk in enumerate(talks)]
    path = folder / "talks.json"
    path.write_text(json.dumps(rows))
    return ShareGpt(ShareGptConfig(source=str(path), **options))


def examples(folder: Path, *talks: list[tuple[str, str]], **options: Any) -> list[Example]:
    return list(task_of(folder, *talks, **options).examples())


def spoken(example: Example) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in example.turns] + [("assistant", example.response)]


def test_first_takes_the_first_answer_only(tmp_path: Path) -> None:
    (example,) = examples(tmp_path, TALK)
    assert spoken(example) == [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
    assert example.group == "0"


def test_all_takes_every_answer_with_the_turns_before_it(tmp_path: Path) -> None:
    first, second = examples(tmp_path, TALK, turns="all")
    assert spoken(second) == [*spoken(first), ("user", "Who?"), ("assistant", "Me")]
    assert first.group == second.group
    assert first.split == second.split


def test_long_prompts_are_left_out(tmp_path: Path) -> None:
    assert len(examples(tmp_path, TALK, turns="all", max_prompt_chars=len("Be brief.Hi"))) == 1
    assert examples(tmp_path, TALK, max_prompt_chars=len("Be brief.Hi") - 1) == []


def test_answers_without_a_question_are_left_out(tmp_path: Path) -> None:
    (example,) = examples(tmp_path, [("gpt", "as I said"), *TALK[1:3]])
    assert spoken(example) == [("user", "Hi"), ("assistant", "Hello")]


def test_a_conversation_ends_where_the_speakers_no_longer_take_turns(tmp_path: Path) -> None:
    talk = [("human", "a"), ("gpt", "b"), ("gpt", "c"), ("human", "d"), ("gpt", "e")]
    assert [spoken(e)[-1][1] for e in examples(tmp_path, talk, turns="all")] == ["b"]
    assert examples(tmp_path, [("human", "a"), ("human", "b"), ("gpt", "c")]) == []


def test_other_roles_are_skipped_and_counted_or_refused(tmp_path: Path) -> None:
    tools = [("human", "a"), ("function_call", "{}"), ("observation", "{}"), ("gpt", "b")]
    task = task_of(tmp_path, tools, TALK, tools)
    assert len(list(task.examples())) == 1
    assert task.counts == {"other_roles": 2}
    with pytest.raises(InputError, match=r"talks\.json:1: conversations: role 'function_call' is none of"):
        examples(tmp_path, tools, other_roles="error")


def test_the_split_depends_on_the_conversation_alone(tmp_path: Path) -> None:
    talks = [[("human", f"q{i}"), ("gpt", "a")] for i in range(300)]
    many = {e.group: e.split for e in examples(tmp_path, *talks, test_fraction=0.2)}
    few = {e.group: e.split for e in examples(tmp_path, *talks[:50], test_fraction=0.2)}
    assert few.items() <= many.items()
    assert 30 <= sum(split == "test" for split in many.values()) <= 90


def test_a_conversation_without_id_is_named_by_its_content(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    other = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}]}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (row, row, other)))
    one, same, different = (e.group for e in ShareGpt(ShareGptConfig(source=str(path))).examples())
    assert one == same != different


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "no key 'conversations'"),
        ({"conversations": []}, "conversations: is empty"),
        ({"conversations": ["x"]}, r"conversations\[0\]: expected an object, got str"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: no key 'value'"),
        ({"conversations": [{"from": 1, "value": "x"}]}, r"conversations\[0\]: from: expected str, got int"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(InputError, match=rf"a\.jsonl:1: {message}"):
        list(ShareGpt(ShareGptConfig(source=str(path))).examples())


def test_agreement_is_equality(tmp_path: Path) -> None:
    task = ShareGpt(ShareGptConfig(source=str(tmp_path)))
    assert task.score(["Hello ", "hello"], ["Hello", "Hello"], [{}, {}]) == [1, 0]
