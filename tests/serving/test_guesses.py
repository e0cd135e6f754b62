"""Guesses on their way from the engine to the client: what the next step checks, and only for who asks."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from cllm.decoding.records import Commit, DecodeRequest
from cllm.engine.load import load_engine
from cllm.models import load_tokenizer
from tests.serving.running import MODEL_NAME, model_entry

WINDOW, TOKENS, PROMPT = 8, 60, "How many"


def commits(folder: Path, window: int) -> Iterator[Commit]:
    """Of one greedy response, a step each."""
    entry = model_entry(folder)
    engine = load_engine(entry.path, entry.options.with_overrides([f"window={window}"]))
    ids = tuple(load_tokenizer(entry.path)(PROMPT).input_ids)
    for step in engine.stream([DecodeRequest(ids, TOKENS)]):
        yield from step


def test_a_step_commits_the_guesses_that_hold_and_one_token_more(model_folder: Path) -> None:
    steps = list(commits(model_folder, WINDOW))
    assert [len(step.token_ids) + len(step.guesses) for step in steps[:-1]] == [WINDOW] * (len(steps) - 1)
    for before, after in pairwise(steps[:-1]):
        held = len(after.token_ids) - 1
        assert before.guesses[:held] == after.token_ids[:held]
        assert before.guesses[held : held + 1] != after.token_ids[held:]  # the first that did not


def test_ar_guesses_nothing(model_folder: Path) -> None:
    assert {step.guesses for step in commits(model_folder, 1)} == {()}


Ask = Callable[..., list[Any]]


@pytest.fixture
def ask(client: OpenAI) -> Ask:
    """The choices of a stream's chunks, by either endpoint."""

    def run(decoding: Any, *, chat: bool) -> list[Any]:
        asked = {"model": MODEL_NAME, "max_tokens": TOKENS, "temperature": 0, "stream": True}
        extra = {"decoding": decoding, "ignore_eos": True}
        if chat:
            messages = [{"role": "user", "content": PROMPT}]
            stream = client.chat.completions.create(**asked, messages=messages, extra_body=extra)
        else:
            stream = client.completions.create(**asked, prompt=PROMPT, extra_body=extra)
        return [chunk.choices[0] for chunk in stream]

    return run


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])
def test_chunks_carry_the_guesses_of_who_asks(ask: Ask, chat: bool) -> None:
    *choices, last = ask("guesses", chat=chat)
    assert all(choice.accepted + len(choice.guesses or []) == WINDOW for choice in choices)
    assert not hasattr(last, "guesses")  # nothing comes behind the end
    assert not any(hasattr(choice, "guesses") for choice in ask(True, chat=chat))
