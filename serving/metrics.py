"""What a replica tells Prometheus, through Ray's metrics agent of its node.

Names get the prefix `ray_`; inside a replica Serve adds the labels application, deployment and replica. Of a histogram
the agent gets the buckets only, and makes its sum from their middles: where a mean has to be right, divide counters.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray.serve import metrics

from cllm.decoding.stats import StepStats
from serving.messages import Chunk

_SECONDS: list[float] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120]
# Buckets around whole numbers, so that quantiles and middles are the numbers themselves.
_TOKENS: list[float] = [0.5, *(n + 0.5 for n in range(1, 17)), 24.5, 32.5, 48.5, 64.5, 128.5, 256.5]
_RATIOS: list[float] = [0.99, 1.01, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10, 12, 16, 24, 32, 64]


class StepMetrics:
    """Of the engine's steps; called on its thread."""

    def __init__(self, model: str) -> None:
        self._rows = _gauge("cllm_batch_rows", "Rows decoded in the latest step", model)
        self._waiting = _gauge("cllm_waiting_requests", "Requests in the engine that wait for a row", model)
        self._window = _gauge("cllm_window_tokens", "Window n of the latest step", model)
        self._cache = _gauge("cllm_cache_used_ratio", "Share of the cache's blocks that hold running requests", model)
        self._seconds = _histogram("cllm_step_seconds", "Time from step to step", _SECONDS, model)
        self._latest: StepStats | None = None  # of the steps since the engine was last idle

    def observe(self, stats: StepStats) -> None:
        self._window.set(stats.window)
        self._load(stats)
        if self._latest is not None:  # else the time since the step before is that of waiting for a request
            self._seconds.observe(stats.milliseconds / 1000)
        self._latest = stats

    def rest(self) -> None:
        """The engine has nothing to decode any more."""
        if self._latest is not None:
            waiting = None if self._latest.waiting is None else 0
            cache_used = None if self._latest.cache_used is None else 0.0
            self._load(replace(self._latest, rows=0, waiting=waiting, cache_used=cache_used))
        self._latest = None

    def _load(self, stats: StepStats) -> None:
        self._rows.set(stats.rows)
        if stats.waiting is not None:
            self._waiting.set(stats.waiting)
        if stats.cache_used is not None:
            self._cache.set(stats.cache_used)


class RequestMetrics:
    """Of a replica's requests."""

    def __init__(self, model: str) -> None:
        self._requests = _counter("cllm_requests_total", "Requests by how they ended", model, "outcome")
        self._tokens = _counter("cllm_tokens_total", "Tokens given to clients", model)
        self._queue = _histogram("cllm_queue_seconds", "From the client's asking to the replica", _SECONDS, model)
        self._first = _histogram("cllm_first_token_seconds", "From the client's asking to its tokens", _SECONDS, model)
        self._between = _histogram("cllm_inter_token_seconds", "Time between chunks, a token", _SECONDS, model)
        self._accepted = _histogram("cllm_accepted_tokens", "Tokens that a step commits to a row", _TOKENS, model)
        self._per_forward = _histogram("cllm_tokens_per_forward", "TPF of whole responses", _RATIOS, model)

    def follow(self, arrived_at: float, *, resumed: bool) -> "RequestTimer":
        """A timer of a request that has just come; with `resumed` it goes on with a response of another replica."""
        if not resumed:
            self._queue.observe(max(0.0, time.time() - arrived_at))  # clocks of two nodes may differ
        return RequestTimer(self, None if resumed else arrived_at)

    def note_first(self, seconds: float) -> None:
        self._first.observe(max(0.0, seconds))

    def note_chunk(self, accepted: Sequence[int], seconds: float | None) -> None:
        self._tokens.inc(sum(accepted))
        for num_tokens in accepted:
            self._accepted.observe(num_tokens)
        if seconds is not None:
            self._between.observe(seconds / sum(accepted))

    def note_end(self, outcome: str, num_tokens: int, num_steps: int) -> None:
        self._requests.inc(tags={"outcome": outcome})
        if num_steps:
            self._per_forward.observe(num_tokens / num_steps)


class RequestTimer:
    """One request on its way.

    Args:
        arrived_at: None: the client has its first token already.
    """

    def __init__(self, metrics: RequestMetrics, arrived_at: float | None) -> None:
        self._metrics = metrics
        self._arrived_at = arrived_at
        self._last: float | None = None
        self._num_tokens = 0
        self._num_steps = 0

    def note(self, chunk: Chunk) -> None:
        now, last = time.perf_counter(), self._last
        if last is None and self._arrived_at is not None:
            self._metrics.note_first(time.time() - self._arrived_at)
        if chunk.token_ids:
            self._metrics.note_chunk(chunk.accepted, None if last is None else now - last)
            self._num_tokens += len(chunk.token_ids)
            self._num_steps += len(chunk.accepted)
        self._last = now

    def end(self, outcome: str) -> None:
        self._metrics.note_end(outcome, self._num_tokens, self._num_steps)


def _gauge(name: str, text: str, model: str) -> metrics.Gauge:
    gauge = metrics.Gauge(name, description=text, tag_keys=("model",))
    gauge.set_default_tags({"model": model})
    return gauge


def _counter(name: str, text: str, model: str, *tags: str) -> metrics.Counter:
    keys: Any = ("model", *tags)  # Ray's annotation says one key only
    counter = metrics.Counter(name, description=text, tag_keys=keys)
    counter.set_default_tags({"model": model})
    return counter


def _histogram(name: str, text: str, boundaries: list[float], model: str) -> metrics.Histogram:
    histogram = metrics.Histogram(name, description=text, boundaries=boundaries, tag_keys=("model",))
    histogram.set_default_tags({"model": model})
    return histogram
