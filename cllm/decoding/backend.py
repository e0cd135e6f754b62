"""The one contract of engines that decode requests step by step, whoever made them.

Ours is a `Backend` in this process (`cllm.engine.engine.Engine`), in one of its own (`cllm.engine.process`) or in
several (`cllm.engine.shards`), vLLM is one (`cllm.vllm.llm.VllmBackend`), and so are decoders that take one request at
a time (`cllm.bench.one_by_one`). Benchmarks, evaluation and serving know nothing else of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from cllm.decoding.records import Commit, DecodeRequest, DecodeResult, FinishReason
from cllm.decoding.stats import BackendStats, StepStats
from cllm.errors import InputError


class RequestFailedError(RuntimeError):
    """The engine gave up one request; it goes on with the others.

    Attributes:
        key: of the request.
        commits: what the step committed to the others.
        refusal: what is wrong with the request, where the engine could not say so when it was added.
    """

    def __init__(self, key: int, reason: str, commits: Sequence[Commit], refusal: InputError | None = None) -> None:
        super().__init__(f"the engine gave up a request: {reason}")
        self.key = key
        self.reason = reason
        self.commits = list(commits)
        self.refusal = refusal


class Backend(Protocol):
    """Something that decodes requests. Loading is construction.

    Not thread-safe: one thread calls everything but `check` (`cllm.engine.async_engine` has one of its own).
    """

    @property
    def num_unfinished(self) -> int:
        """Requests added, and neither finished nor aborted."""

    @property
    def last_step(self) -> StepStats | None:
        """What the latest `step` did; None if it finished nothing, or the engine does not tell."""

    def add(self, request: DecodeRequest) -> int:
        """Queue a request; the key that names it in `step` and `abort`.

        Raises:
            InputError: the engine refuses it. One in another process says so in a later `step`.
        """

    def abort(self, key: int) -> None:
        """Forget a request; nothing if it is finished."""

    def step(self) -> list[Commit]:
        """Decode on; what was committed, one entry a request and forward pass, `row` being the request's key.

        Raises:
            RequestFailedError: a request came to no good end; the others go on.
        """

    def generate(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        """Decode all requests together; results in their order."""

    def stats(self) -> BackendStats:
        """What it is, and how guesses fared since it started."""

    def check(self) -> None:
        """Raise what ended the engine without a step telling, such as the death of a process that it depends on.

        Any thread may ask.
        """

    def close(self) -> None:
        """End the processes that the engine depends on, with the memory that they hold; nothing is called later."""


def stream(backend: Backend, requests: Sequence[DecodeRequest]) -> Iterator[list[Commit]]:
    """Decode requests, yielding after every step what it committed; rows are numbered as in `requests`.

    Closing the iterator aborts what is unfinished.
    """
    row_of: dict[int, int] = {}
    unfinished: set[int] = set()
    try:
        for row, request in enumerate(requests):
            key = backend.add(request)
            row_of[key] = row
            unfinished.add(key)
        while unfinished:
            commits = [commit for commit in backend.step() if commit.row in row_of]
            unfinished -= {commit.row for commit in commits if commit.finish_reason is not None}
            if commits:
                yield [replace(commit, row=row_of[commit.row]) for commit in commits]
    finally:
        for key in unfinished:
            backend.abort(key)


def generate(backend: Backend, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
    """`Backend.generate` by its steps; no trajectories, for steps do not tell them."""
    tokens: list[list[int]] = [[] for _ in requests]
    accepted: list[list[int]] = [[] for _ in requests]
    reasons: dict[int, FinishReason] = {}
    for commits in stream(backend, requests):
        for commit in commits:
            tokens[commit.row] += commit.token_ids
            if commit.token_ids:
                accepted[commit.row].append(len(commit.token_ids))
            if commit.finish_reason is not None:
                reasons[commit.row] = commit.finish_reason
    return [
        DecodeResult(tuple(tokens[row]), reasons[row], accepted=tuple(accepted[row])) for row in range(len(requests))
    ]
