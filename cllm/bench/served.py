"""What a decoder gives under closed-loop load, request by request."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cllm.bench.closed_loop import Load, closed_loop
from cllm.decoding.backend import Backend
from cllm.decoding.records import Commit, DecodeRequest

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Served:
    """What closed loops gave, one after the other, in the order of their requests.

    Attributes:
        tokens: the responses.
        forwards: forward passes that committed tokens of each response.
        seconds: from a request's start to its last token.
    """

    load: Load
    tokens: tuple[tuple[int, ...], ...]
    forwards: tuple[int, ...]
    seconds: tuple[float, ...]

    def __add__(self, other: "Served") -> "Served":
        """Both, the other one after this one."""
        one, two = self.load, other.load
        load = Load(one.seconds + two.seconds, one.tokens + two.tokens, one.advances + two.advances, None)
        return Served(load, self.tokens + other.tokens, self.forwards + other.forwards, self.seconds + other.seconds)


@dataclass(slots=True)
class _Answer:
    """One request on its way."""

    started: float
    seconds: float = 0.0
    forwards: int = 0
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Answers:
    """The answers of a closed loop by the requests' keys, in the order of the requests."""

    by_key: dict[int, _Answer] = field(default_factory=dict)

    def added(self, key: int, time: float) -> None:
        self.by_key[key] = _Answer(time)

    def committed(self, commit: Commit, time: float) -> None:
        answer = self.by_key[commit.row]
        answer.tokens += commit.token_ids
        answer.forwards += 1
        if commit.finish_reason is not None:
            answer.seconds = time - answer.started


def serve(
    backend: Backend, requests: Sequence[DecodeRequest], concurrency: int, clock: Clock = time.perf_counter
) -> Served:
    """Serve all requests, at most `concurrency` at a time."""
    watched = _Answers()
    load = closed_loop(backend, requests, concurrency, clock, watched)
    answers = watched.by_key.values()
    return Served(
        load,
        tokens=tuple(tuple(answer.tokens) for answer in answers),
        forwards=tuple(answer.forwards for answer in answers),
        seconds=tuple(answer.seconds for answer in answers),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of 100 of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]
