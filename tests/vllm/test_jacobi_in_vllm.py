"""Jacobi decoding inside real vLLM: its model runner V2, scheduler and our worker, on the CPU (see `interpreted`).

One start of the engine runs with every `make test`; the others are slow.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cllm.decoding.guess import Guesser
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.models import load_tokenizer
from cllm.tasks.tokenizer import train_tokenizer
from cllm.vllm.window import window_widths
from tests.fakes import FAMILIES, tiny_model
from tests.vllm.making import PROMPTS, greedy

pytest.importorskip("vllm", reason="vLLM is not installed: pip install -e .[cpu]")

ROOT = Path(__file__).resolve().parents[2]
Request = tuple[tuple[int, ...], int, Mapping[str, object]]  # prompt, tokens to add, sampling
GUESSES, COUNT = 7, 24
GREEDY = {"ignore_eos": True}


def repeating_model(folder: Path, family: str = "llama") -> PreTrainedModel:
    """Small weights: its answers repeat themselves, so that guesses hold now and then. Grammars need the tokenizer."""
    tokenizer = train_tokenizer(("ab", "ba") * 4, 300)
    model = tiny_model(0, family=family, vocab_size=len(tokenizer), hidden=128, scale=0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("checkpoints") / "target"
    return folder, repeating_model(folder)


def run(
    folder: Path,
    tmp_path: Path,
    requests: Sequence[Request],
    *,
    more: Mapping[str, object] | None = None,
    bound: tuple[str, Sequence[Sequence[int]]] | None = None,
    **settings: object,
) -> dict[str, Any]:
    """Decode in a process of its own."""
    config = {
        "method": "jacobi",
        "model": str(folder),
        "dtype": "float32",
        "guesses": GUESSES,
        "max_tokens": 96,
        "max_rows": 4,
        "cache_bytes": 64 << 20,
        "cuda_graphs": False,
        "tokenizer": bound is not None,
    }
    job = {"config": config | settings, "more": dict(more or {}), "requests": requests, "bound": bound}
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.vllm.interpreted", str(tmp_path / "job.json")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def answers(result: dict[str, Any]) -> list[tuple[int, ...]]:
    return [tuple(token for step in row for token in step) for row in result["steps"]]


@torch.inference_mode()
def expected_steps(model: PreTrainedModel, prompt: tuple[int, ...], count: int, seed: int) -> list[list[int]]:
    """Sliding Jacobi decoding in plain Python, as vLLM lays it out: the prompt's forward commits one token."""

    @cache
    def predict(tokens: tuple[int, ...]) -> int:
        return int(model(torch.tensor([tokens])).logits[0, -1].argmax())

    guesser = Guesser("prompt", prompt, 0, seed)
    tokens = [*prompt, predict(prompt)]
    steps, known = [tokens[-1:]], dict[int, int]()
    while len(tokens) < len(prompt) + count:
        start = len(tokens)
        places = range(start, start + GUESSES)
        guesses = [known.get(p, guesser.guess(p, 1)[0]) for p in places]
        predictions = [predict((*tokens, *guesses[:i])) for i in range(GUESSES + 1)]
        held = next((i for i in range(GUESSES) if guesses[i] != predictions[i]), GUESSES)
        known |= {start + i: token for i, token in enumerate(predictions)}
        commit = predictions[: held + 1][: len(prompt) + count - start]
        tokens += commit
        steps.append(commit)
    return steps


def test_every_step_is_that_of_sliding_jacobi_decoding(target: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    """The same answers by vLLM's own `generate`; and rows with a grammar beside them, which keep to it."""
    requests: list[Request] = [(prompt, COUNT, {**GREEDY, "seed": seed}) for seed, prompt in enumerate(PROMPTS)]
    # one token is allowed everywhere, and the guesses, which are tokens of the prompt, are that token: they would hold
    a_token = load_tokenizer(str(target[0])).convert_tokens_to_ids("a")
    bound = "a{12}", [(a_token,) * 5]
    result = run(target[0], tmp_path, requests, jacobi={"policy": "fixed"}, bound=bound, max_rows=8)
    wanted = [expected_steps(target[1], prompt, COUNT, seed) for seed, prompt in enumerate(PROMPTS)]
    assert result["steps"] == wanted
    assert set(result["windows"]) == {1, GUESSES + 1}  # the prompts' step has no guesses
    stats = result["stats"]
    assert (stats["runner"], stats["guesses"]) == ("V2", GUESSES)
    assert stats["guesses_steps"] == sum(len(row) - 1 for row in wanted)
    assert stats["tokens_per_step"] > 1.2, "no guess ever held: the test shows nothing"

    *own, kept = result["answers"]
    assert [tuple(answer["tokens"]) for answer in own] == answers(result)
    assert (kept["text"], kept["reason"]) == ("a" * 12, "stop")


@pytest.mark.slow
@pytest.mark.parametrize("guess", ["prompt", "pad", "ngram"])
def test_chunked_prompts_waiting_rows_and_any_guess_give_the_greedy_answer(
    target: tuple[Path, PreTrainedModel], tmp_path: Path, guess: str
) -> None:
    """Two rows at a time and 16 tokens a step: prompts are read in pieces, the window narrows near the budget."""
    requests: list[Request] = [(prompt, COUNT + 5 * i, GREEDY) for i, prompt in enumerate(PROMPTS)]
    more = {"max_num_batched_tokens": 16}
    jacobi = {"guess": guess, "pad_id": 3, "policy": "fixed"}
    result = run(target[0], tmp_path, requests, more=more, max_rows=2, jacobi=jacobi)
    wanted = [greedy(target[1], DecodeRequest(prompt, n, SamplingParams())) for prompt, n, _ in requests]
    assert answers(result) == wanted
    assert result["stats"]["tokens_per_step"] > 1


@pytest.mark.slow
def test_the_window_follows_step_times_that_were_measured(target: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    requests: list[Request] = [(prompt, COUNT, GREEDY) for prompt in PROMPTS]
    result = run(target[0], tmp_path, requests)
    wanted = [greedy(target[1], DecodeRequest(prompt, n, SamplingParams())) for prompt, n, _ in requests]
    assert answers(result) == wanted
    costs = result["costs"]
    assert (len(costs), len(costs[0])) == (3, 4)  # 1, 2 and 4 rows; windows of 1, 2, 4 and 8
    assert costs[-1][-1] > costs[0][0] > 0
    assert set(result["windows"]) <= set(window_widths(GUESSES + 1))
    for step, window in enumerate(result["windows"]):
        assert all(len(row[step]) <= window for row in result["steps"] if step < len(row))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"llama"}))
def test_other_architectures(family: str, tmp_path: Path) -> None:
    model = repeating_model(tmp_path / "target", family)
    requests: list[Request] = [(prompt, COUNT, GREEDY) for prompt in PROMPTS[:2]]
    result = run(tmp_path / "target", tmp_path, requests, jacobi={"policy": "fixed"})
    assert answers(result) == [greedy(model, DecodeRequest(p, n, SamplingParams())) for p, n, _ in requests]
    assert result["stats"]["tokens_per_step"] > 1


@pytest.mark.slow
def test_sampled_requests_get_the_tokens_that_ar_draws_with_their_seed(
    target: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    requests: list[Request] = [
        (PROMPTS[0], COUNT, {**GREEDY, "temperature": 1.0, "seed": 1}),
        (PROMPTS[1], COUNT, {**GREEDY, "temperature": 0.5, "seed": 2, "min_p": 0.05}),
        (PROMPTS[2], COUNT, {**GREEDY, "temperature": 0.7, "seed": 3, "repetition_penalty": 1.3, "min_tokens": 4}),
        (PROMPTS[3], COUNT, {**GREEDY, "temperature": 0.05, "seed": 4}),
    ]
    # the other noise calls a CUDA library, which the interpreter cannot; nor can it run the kernel of top-k and top-p
    more = {"use_fp64_gumbel": True}
    jacobi = run(target[0], tmp_path, requests, more=more, jacobi={"policy": "fixed"})
    ar = run(target[0], tmp_path, requests, more=more, method="ar")
    assert answers(jacobi) == answers(ar)
    assert jacobi["stats"]["tokens_per_step"] > 1
    assert all(len(step) == 1 for row in ar["steps"] for step in row)
    assert len(set(answers(ar))) == len(requests)
