"""Closed-loop load: a fixed number of requests in flight, a new one for each that finishes."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Protocol

from cllm.decoding.backend import Backend
from cllm.decoding.records import Commit, DecodeRequest


class Watcher(Protocol):
    """Notes what happens to each request of a closed loop; times are those of its clock, in seconds."""

    def added(self, key: int, time: float) -> None:
        """A request is about to be served."""

    def committed(self, commit: Commit, time: float) -> None:
        """A step gave a request these tokens."""


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
    backend: Backend,
    requests: Sequence[DecodeRequest],
    concurrency: int,
    clock: Callable[[], float] = time.perf_counter,
    watcher: Watcher | None = None,
) -> Load:
    """Serve all requests, at most `concurrency` at a time."""
    waiting = iter(requests)
    in_flight = tokens = advances = 0
    step_times = []
    start = last = clock()
    while True:
        for request in islice(waiting, concurrency - in_flight):
            began = clock()
            key = backend.add(request)
            in_flight += 1
            if watcher is not None:
                watcher.added(key, began)
        if in_flight == 0:
            break
        commits = backend.step()
        now = clock()
        if watcher is not None:
            for commit in commits:
                watcher.committed(commit, now)
        if commits:
            if len(commits) == concurrency:
                step_times.append(now - last)
            last = now
        advances += len(commits)
        tokens += sum(len(commit.token_ids) for commit in commits)
        in_flight -= sum(commit.finish_reason is not None for commit in commits)
    return Load(last - start, tokens, advances, 1000 * median(step_times) if step_times else None)
