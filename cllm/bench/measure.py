"""One cell measured: responses and their scores, then the same load again for its speed.

The prompts are answered once for accuracy, tokens a forward and equality with other methods, which also warms up what
is timed afterwards: `speed_prompts` of them, `repeats` times over, in a closed loop at the cell's concurrency.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig

from cllm.bench.bandwidth import copy_bandwidth, weight_bytes_of
from cllm.bench.closed_loop import Decoder, Load, closed_loop
from cllm.bench.engines import memory_in_use, release
from cllm.bench.matrix import Cell, drawn_prompts, requests_of
from cllm.bench.methods import JacobiMethod, Room, VllmMethod, open_decoder, open_engine, open_vllm
from cllm.config import digest
from cllm.decoding.records import Commit, DecodeRequest
from cllm.evaluation.outputs import response_text
from cllm.evaluation.perplexity import reference_nll
from cllm.evaluation.subject import Subject, SubjectName, checkpoint, load_subject, prompt_tokenizer
from cllm.evaluation.trajectory_counts import add_counts, count_trajectory
from cllm.models import default_device, eos_token_ids, load_generation_config, resolve_dtype
from cllm.recipe import Recipe
from cllm.tasks.prompts import Prompt
from cllm.tasks.registry import load_task

Clock = Callable[[], float]
_BATCH = 32  # rows decoded together where no time is taken


@dataclass(frozen=True, slots=True)
class Served:
    """What a closed loop gave, in the order of its requests.

    Attributes:
        tokens: the responses.
        seconds: from a request's start to its last token.
    """

    load: Load
    tokens: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]


@dataclass(slots=True)
class _Watched:
    """A decoder whose tokens and times are noted."""

    decoder: Decoder
    clock: Clock
    started: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def add(self, request: DecodeRequest) -> int:
        start = self.clock()
        key = self.decoder.add(request)
        self.started[key], self.tokens[key] = start, []
        return key

    def step(self) -> Sequence[Commit]:
        commits = self.decoder.step()
        now = self.clock()
        for commit in commits:
            self.tokens[commit.row] += commit.token_ids
            if commit.finish_reason is not None:
                self.seconds[commit.row] = now - self.started[commit.row]
        return commits


def serve(
    decoder: Decoder, requests: Sequence[DecodeRequest], concurrency: int, clock: Clock = time.perf_counter
) -> Served:
    """Serve all requests, at most `concurrency` at a time."""
    watched = _Watched(decoder, clock)
    load = closed_loop(watched, requests, concurrency, clock)
    keys = watched.started  # in the order of the requests
    return Served(load, tuple(tuple(watched.tokens[key]) for key in keys), tuple(watched.seconds[key] for key in keys))


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of 100 of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


class Workbench:
    """Measures cells one after the other and keeps the model between cells that share it."""

    def __init__(self) -> None:
        self.device = default_device()
        self._loaded: tuple[tuple[str, str, bool], Subject] | None = None
        self._bandwidth: float | None = None

    def measure(self, cell: Cell, recipe: Recipe) -> dict[str, Any]:
        """The figures of a cell, plain data.

        Raises:
            InputError: the model cannot be loaded or cannot keep the cell's settings.
        """
        prompts = drawn_prompts(recipe, cell.load.num_prompts)
        requests = requests_of(cell, prompts)
        room = Room(cell.concurrency, max(len(r.prompt_ids) + r.max_new_tokens for r in requests))
        if isinstance(cell.method, VllmMethod):
            figures = self._measure_vllm(cell.method, cell, recipe, requests, room)
        else:
            figures = self._measure_ours(cell, recipe, prompts, requests, room)
        responses = figures.pop("responses")
        return {
            **figures,
            "floor_ms": 1000 * self._weight_bytes(cell.model, recipe) / self._copy_bandwidth(),
            **_quality(responses, prompts, recipe, self._eos_ids(cell.model, recipe)),
        }

    def _measure_ours(
        self, cell: Cell, recipe: Recipe, prompts: Sequence[Prompt], requests: Sequence[DecodeRequest], room: Room
    ) -> dict[str, Any]:
        subject = self._subject(cell, recipe)
        figures = _speeds(open_decoder(cell.method, subject, room), requests, cell, self.device)
        release(self.device)
        figures["parameters"] = subject.model.num_parameters()
        if isinstance(cell.method, JacobiMethod) and cell.method.is_paper:
            figures |= _trajectory_counts(cell.method, subject, requests, room)
        if cell.method.kind == "ar":
            likelihood = reference_nll(subject.model, prompts, batch_size=_BATCH, pad_id=subject.pad_id)
            figures["reference_perplexity"] = likelihood.perplexity
        return figures

    def _measure_vllm(
        self, method: VllmMethod, cell: Cell, recipe: Recipe, requests: Sequence[DecodeRequest], room: Room
    ) -> dict[str, Any]:
        self._loaded = None  # vLLM wants the memory
        release(self.device)
        dtype, path = resolve_dtype(cell.precision, self.device), checkpoint(cell.model, recipe)[0]
        eos_ids = self._eos_ids(cell.model, recipe)
        with closing(open_vllm(method, path, room, eos_ids=eos_ids, dtype=dtype)) as decoder:
            return _speeds(decoder, requests, cell, self.device)

    def _subject(self, cell: Cell, recipe: Recipe) -> Subject:
        if self._loaded is None or self._loaded[0] != cell.group:
            self._loaded = None  # two models may not fit into memory
            release(self.device)
            self._loaded = cell.group, load_subject(cell.model, recipe, self.device)
        return self._loaded[1]

    def _eos_ids(self, model: SubjectName, recipe: Recipe) -> tuple[int, ...]:
        return eos_token_ids(load_generation_config(*checkpoint(model, recipe)), prompt_tokenizer(recipe))

    def _weight_bytes(self, model: SubjectName, recipe: Recipe) -> int:
        dtype = resolve_dtype(recipe.evaluate.precision, self.device)
        path, revision = checkpoint(model, recipe)
        config = AutoConfig.from_pretrained(path, revision=revision)
        return weight_bytes_of(config) * dtype.itemsize // torch.bfloat16.itemsize

    def _copy_bandwidth(self) -> float:
        if self._bandwidth is None:
            self._bandwidth = copy_bandwidth(self.device)
        return self._bandwidth


def _speeds(decoder: Decoder, requests: Sequence[DecodeRequest], cell: Cell, device: torch.device) -> dict[str, Any]:
    first = serve(decoder, requests, cell.concurrency)
    timed = requests[: cell.load.speed_prompts]
    repeats = [serve(decoder, timed, cell.concurrency) for _ in range(cell.load.repeats)]
    seconds = [value for repeat in repeats for value in repeat.seconds]
    return {
        "responses": first.tokens,
        "tpf": first.load.tokens_per_forward,
        "tokens_per_s": [repeat.load.tokens_per_s for repeat in repeats],
        "latency_ms": {f"p{percent}": 1000 * percentile(seconds, percent) for percent in (50, 90, 99)},
        "memory_gib": memory_in_use(device),
    }


def _trajectory_counts(
    method: JacobiMethod, subject: Subject, requests: Sequence[DecodeRequest], room: Room
) -> dict[str, Any]:
    """Fast-forwarded and stationary tokens (paper section 4.2), from a pass that is recorded and not timed."""
    engine = open_engine(method, subject, Room(_BATCH, room.tokens), record=True)
    counts = add_counts(count_trajectory(result) for result in engine.generate(requests))
    return {"fast_forwarded": counts.fast_forwarded, "stationary": counts.stationary_per_block}


def _quality(
    responses: Sequence[tuple[int, ...]], prompts: Sequence[Prompt], recipe: Recipe, eos_ids: Sequence[int]
) -> dict[str, Any]:
    """The task's scores, and what identifies each response."""
    task, tokenizer = load_task(recipe.placed_task), prompt_tokenizer(recipe)
    texts = [response_text(tokens, eos_ids, tokenizer) for tokens in responses]
    references, contexts = [p.reference_text for p in prompts], [p.context for p in prompts]
    return {
        "metric": task.metric,
        "prompt_ids": [prompt.prompt_id for prompt in prompts],
        "scores": task.score(texts, references, contexts),
        "response_digests": [digest(tokens) for tokens in responses],
        "mean_response_tokens": sum(map(len, responses)) / len(responses),
    }
