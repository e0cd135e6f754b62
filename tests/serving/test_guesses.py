"""Guesses on their way from the engine to the client: what the next step checks, and only for who asks."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from cllm.decoding.records import Commit, DecodeRequest, SamplingParams
from cllm.engine.load import load_engine
from cllm.models import load_tokenizer
from serving.messages import Given
from serving.pieces import Pieces
from serving.protocol import CompletionRequest
from serving.transcript import Transcript
from tests.serving.running import MODEL_NAME, TEXTS, model_entry

WINDOW, TOKENS, PROMPT = 8, 60, "SELECT"  # a prompt by which some guesses hold


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
    all_held = 0
    for before, after in pairwise(steps[:-1]):
        held = len(after.token_ids) - 1
        assert before.guesses[:held] == after.token_ids[:held]
        assert before.guesses[held : held + 1] != after.token_ids[held:]  # the first that did not
        all_held += held
    assert all_held > 0


def test_ar_guesses_nothing(model_folder: Path) -> None:
    assert {step.guesses for step in commits(model_folder, 1)} == {()}


def test_pieces_are_what_tokens_add_to_a_text(model_folder: Path) -> None:
    tokenizer = load_tokenizer(str(model_folder))
    pieces = Pieces(tokenizer)
    for text in TEXTS:
        ids = tokenizer(text).input_ids  # with the special token in front
        joined = "".join(map(pieces.text, ids))
        assert joined == text if text.isascii() else "\ufffd" in joined


def test_guesses_are_told_as_the_response_will_be(model_folder: Path) -> None:
    """Without special tokens; and a guess has the same text whatever stands in front of it."""
    tokenizer = load_tokenizer(str(model_folder))
    how, many = tokenizer("How many", add_special_tokens=False).input_ids[-2:]
    transcript = Transcript(tokenizer, SamplingParams(), 1, Given(), repeats=False, guesses=Pieces(tokenizer))
    told = [
        transcript.add([Commit(0, (token,), guesses=(how, tokenizer.bos_token_id, many))])
        for token in (how, tokenizer.eos_token_id)
    ]
    texts = [tokenizer.decode([token]) for token in (how, many)]
    assert [chunk.guesses for chunk in told if chunk] == 2 * [(texts[0], "", texts[1])]


@pytest.mark.parametrize("stream", [False, True])
def test_only_streams_have_guesses(stream: bool) -> None:
    body = CompletionRequest(model=MODEL_NAME, prompt=PROMPT, decoding="guesses", stream=stream)
    assert body.wants_guesses == stream


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
    assert all(choice.accepted + len(getattr(choice, "guesses", [])) == WINDOW for choice in choices)
    assert not hasattr(last, "guesses")  # nothing comes behind the end
    assert not any(hasattr(choice, "guesses") for choice in ask(True, chat=chat))
