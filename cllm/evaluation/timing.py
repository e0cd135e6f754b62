"""Wall-clock speed, one prompt at a time."""

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch

from cllm.decoding.backend import Backend
from cllm.decoding.records import DecodeRequest
from cllm.evaluation.decode import Engines, Method, make_request
from cllm.evaluation.subject import Decodable
from cllm.recipe import EvaluateConfig
from cllm.tasks.prompts import Prompt

WARM_UP_PROMPTS = 3  # not timed: the first calls allocate memory and choose kernels

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Timing:
    """Speed in new tokens per second, one figure for each repeat: total tokens over total seconds of its prompts."""

    repeats: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        return median(self.repeats)

    @property
    def spread(self) -> tuple[float, float]:
        """Slowest and fastest repeat."""
        return min(self.repeats), max(self.repeats)

    def speedup_over(self, baseline: "Timing") -> float:
        """Median over repeats of the ratio within a repeat, in which both met the same state of the machine."""
        return median(mine / other for mine, other in zip(self.repeats, baseline.repeats, strict=True))


def time_methods(
    candidates: Mapping[_Key, tuple[Decodable, Method]], prompts: Sequence[Prompt], config: EvaluateConfig
) -> dict[_Key, Timing]:
    """Time every candidate on the same prompts, `config.speed_repeats` times over.

    The candidates take turns prompt by prompt, each time from another one on, so that a machine that slows down or
    is disturbed for a while treats all alike.
    """
    engines = {
        key: Engines(subject, config, prompts, rows=1, record=False)[method]
        for key, (subject, method) in candidates.items()
    }
    requests = [make_request(prompt, config) for prompt in prompts]
    for engine in engines.values():
        for request in requests[:WARM_UP_PROMPTS]:
            engine.generate([request])
    repeats = [_time_round(engines, requests) for _ in range(config.speed_repeats)]
    return {key: Timing(tuple(speeds[key] for speeds in repeats)) for key in engines}


def _time_round(engines: Mapping[_Key, Backend], requests: Sequence[DecodeRequest]) -> dict[_Key, float]:
    """Tokens per second of each engine over all requests, in turns."""
    keys = list(engines)
    tokens, seconds = dict.fromkeys(keys, 0), dict.fromkeys(keys, 0.0)
    for turn, request in enumerate(requests):
        first = turn % len(keys)
        for key in keys[first:] + keys[:first]:
            count, duration = _time_one(engines[key], request)
            tokens[key] += count
            seconds[key] += duration
    return {key: tokens[key] / seconds[key] for key in keys}


def _time_one(engine: Backend, request: DecodeRequest) -> tuple[int, float]:
    _synchronise()
    start = time.perf_counter()
    (result,) = engine.generate([request])
    _synchronise()
    return len(result.token_ids), time.perf_counter() - start


def _synchronise() -> None:
    """Wait for what an engine that plans ahead has launched already."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
