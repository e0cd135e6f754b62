"""Closed-loop load: a fixed number of requests in flight, a new one for each that finishes."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from cllm.decoding.records import DecodeRequest


class Server(Protocol):
    """An engine under load; ours and vLLM's behind one interface."""

    def add(self, request: DecodeRequest) -> None:
        """Queue a request."""

    def step(self) -> Iterable[tuple[int, bool]]:
        """Decode on; for each request that advanced its new tokens, and whether it is finished."""


@dataclass(frozen=True, slots=True)
class Load:
    """What a closed loop saw.

    Attributes:
        seconds: from the first request to the last token.
        tokens: new tokens of all requests.
        step_ms: median milliseconds between steps in which all requests in flight advanced; None if there were none.
        advances: how often a request advanced; tokens / advances is the mean number of tokens a forward.
    """

    seconds: float
    tokens: int
    advances: int
    step_ms: float | None

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.advances


def closed_loop(
    server: Server, requests: Sequence[DecodeRequest], concurrency: int, clock: Callable[[], float] = time.perf_counter
) -> Load:
    """Serve all requests, at most `concurrency` at a time."""
    waiting = iter(requests)
    in_flight = tokens = advances = 0
    step_times = []
    start = last = clock()
    while True:
        for request in _take(waiting, concurrency - in_flight):
            server.add(request)
            in_flight += 1
        if in_flight == 0:
            break
        advanced = list(server.step())
        now = clock()
        if advanced:
            if len(advanced) == concurrency:
                step_times.append(now - last)
            last = now
        advances += len(advanced)
        tokens += sum(count for count, _ in advanced)
        in_flight -= sum(finished for _, finished in advanced)
    return Load(last - start, tokens, advances, 1000 * median(step_times) if step_times else None)


def _take(requests: Iterable[DecodeRequest], most: int) -> Iterable[DecodeRequest]:
    for _, request in zip(range(most), requests, strict=False):
        yield request
