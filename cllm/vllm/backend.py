"""One interface behind which our engine and vLLM are interchangeable: in evaluation, benchmarks and serving."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, Protocol

import torch

from cllm.decoding.records import Commit, DecodeRequest, FinishReason
from cllm.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class BackendResult:
    """A finished request.

    Attributes:
        token_ids: the new tokens, the end token included if one was produced.
        num_forwards: forward passes that committed tokens to it, the prompt's included; None: the backend does not say.
    """

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_forwards: int | None = None


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How guesses fared since the backend started, summed over requests and steps.

    Attributes:
        steps: row-steps that verified guesses; each commits one token more than it accepts guesses.
        proposed, accepted: guesses.
        accepted_at: how often the guess at each place of the window was accepted, first place first.
    """

    steps: int
    proposed: int
    accepted: int
    accepted_at: tuple[int, ...]

    @property
    def tokens_per_step(self) -> float:
        """1 if there was no step."""
        return 1 + self.accepted / max(self.steps, 1)


@dataclass(frozen=True, slots=True)
class BackendStats:
    """What a result row states about the backend that made it.

    Attributes:
        method: how it decodes.
        package, version: whose engine.
        runner: vLLM's model runner; they differ in speed, and vLLM chooses by method.
        scheduling: whether the next step is planned while one runs.
        guesses: most guesses a step verifies for a row; 0 is AR decoding.
        memory_bytes: memory of the GPU in use, by all processes; None without a GPU.
        acceptance: None for AR decoding, and where the backend does not count.
    """

    method: str
    package: Literal["cllm", "vllm"]
    version: str
    runner: Literal["V1", "V2"] | None
    scheduling: Literal["async", "sync"]
    guesses: int
    memory_bytes: int | None
    acceptance: Acceptance | None

    def as_row(self) -> dict[str, Any]:
        """Flat and ready for JSON."""
        row = asdict(self)
        counts = row.pop("acceptance") or {}
        mean = self.acceptance.tokens_per_step if self.acceptance else None
        return {**row, **{f"guesses_{name}": value for name, value in counts.items()}, "tokens_per_step": mean}


class Backend(Protocol):
    """Something that decodes requests. Loading is construction."""

    def generate(self, requests: Sequence[DecodeRequest]) -> list[BackendResult]:
        """Decode all requests together; results in their order.

        Raises:
            InputError: a request that the backend cannot serve.
        """

    def stream(self, requests: Sequence[DecodeRequest]) -> Iterator[list[Commit]]:
        """The same, yielding what each step committed; rows are numbered as in `requests`."""

    def stats(self) -> BackendStats: ...

    def close(self) -> None:
        """Free the device. Nothing else may be called afterwards."""


class EngineBackend:
    """Our engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        window = engine.config.window
        self._accepted_at = [0] * (window - 1)
        self._steps = 0
        self._proposed = 0

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "the backend is closed"
        return self._engine

    def generate(self, requests: Sequence[DecodeRequest]) -> list[BackendResult]:
        tokens: list[list[int]] = [[] for _ in requests]
        forwards = [0] * len(requests)
        reasons: list[FinishReason | None] = [None] * len(requests)
        for commits in self.stream(requests):
            for commit in commits:
                tokens[commit.row] += commit.token_ids
                forwards[commit.row] += 1
                reasons[commit.row] = commit.finish_reason
        return [
            BackendResult(tuple(ids), reason or "length", count)
            for ids, reason, count in zip(tokens, reasons, forwards, strict=True)
        ]

    def stream(self, requests: Sequence[DecodeRequest]) -> Iterator[list[Commit]]:
        for commits in self.engine.stream(requests):
            self._count(commits)
            yield commits

    def stats(self) -> BackendStats:
        config = self.engine.config
        accepted_at = tuple(self._accepted_at)
        acceptance = Acceptance(self._steps, self._proposed, sum(accepted_at), accepted_at)
        return BackendStats(
            method="ar" if config.window == 1 else "jacobi",
            package="cllm",
            version=_own_version(),
            runner=None,
            scheduling="async" if self.engine.overlap else "sync",
            guesses=config.window - 1,
            memory_bytes=device_memory_bytes(self.engine.model.device),
            acceptance=acceptance if config.window > 1 else None,
        )

    def close(self) -> None:
        self._engine = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _count(self, commits: Sequence[Commit]) -> None:
        step = self.engine.last_step
        if step is None or step.window == 1:
            return
        self._steps += len(commits)
        self._proposed += len(commits) * (step.window - 1)
        for commit in commits:
            for place in range(len(commit.token_ids) - 1):
                self._accepted_at[place] += 1


def device_memory_bytes(device: torch.device) -> int | None:
    """Memory in use on a GPU, by all processes; None for other devices."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def _own_version() -> str:
    try:
        return version("cllm")
    except PackageNotFoundError:  # run from a source tree
        return "source"
