"""What an engine says of its steps and of itself."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from typing import Any, Literal

import torch

from cllm.decoding.records import Commit

Package = Literal["cllm", "transformers", "vllm"]


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one step did.

    Attributes:
        rows: decoded.
        window: of these rows, the widest; where the engine does not tell, the widest it may have been.
        accepted: tokens committed to them.
        milliseconds: since the step before.
        unfinished: requests in the engine after it.
        waiting: of these, those without a row; None: the engine does not tell.
        cache_used: share of the cache that holds running requests after it; None: the engine does not tell.
    """

    rows: int
    window: int
    accepted: int
    milliseconds: float
    unfinished: int
    waiting: int | None
    cache_used: float | None


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How guesses fared, summed over requests and steps.

    Attributes:
        steps: row-steps that verified guesses; each commits one token more than it accepts guesses.
        proposed, accepted: guesses.
        accepted_at: how often the guess at each place of the window was accepted, first place first.
    """

    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    accepted_at: tuple[int, ...] = ()

    @property
    def tokens_per_step(self) -> float:
        """1 if there was no step."""
        return 1 + self.accepted / max(self.steps, 1)

    def since(self, earlier: "Acceptance") -> "Acceptance":
        """What came after an earlier reading of the same engine."""
        places = zip_longest(self.accepted_at, earlier.accepted_at, fillvalue=0)
        return Acceptance(
            self.steps - earlier.steps,
            self.proposed - earlier.proposed,
            self.accepted - earlier.accepted,
            tuple(now - then for now, then in places),
        )


class AcceptanceCounter:
    """Counts the guesses of an engine whose rows all have the same window in a step.

    Args:
        window: the widest.
    """

    def __init__(self, window: int) -> None:
        self._steps = self._proposed = 0
        self._accepted_at = [0] * (window - 1)

    def note(self, window: int, commits: Sequence[Commit]) -> None:
        """A step's commits; AR steps have no guesses and are left out."""
        if window == 1:
            return
        self._steps += len(commits)
        self._proposed += len(commits) * (window - 1)
        for commit in commits:
            for place in range(len(commit.token_ids) - 1):
                self._accepted_at[place] += 1

    def read(self) -> Acceptance:
        return Acceptance(self._steps, self._proposed, sum(self._accepted_at), tuple(self._accepted_at))


@dataclass(frozen=True, slots=True)
class BackendStats:
    """What a result row states about the engine that made it.

    Attributes:
        method: how it decodes.
        package, version: whose engine.
        runner: vLLM's model runner; they differ in speed, and vLLM chooses by method.
        scheduling: whether the next step is planned while one runs.
        guesses: most guesses a step verifies for a row; 0 is AR decoding.
        memory_bytes: memory of the GPU in use, by all processes; None without a GPU.
        acceptance: since the engine started; None for AR decoding, and where the engine does not count.
    """

    method: str
    package: Package
    version: str
    runner: Literal["V1", "V2"] | None
    scheduling: Literal["async", "sync"]
    guesses: int
    memory_bytes: int | None
    acceptance: Acceptance | None

    def since(self, earlier: "BackendStats") -> "BackendStats":
        """The same, with the acceptance since an earlier reading: an engine serves one measurement after the other."""
        if self.acceptance is None or earlier.acceptance is None:
            return self
        return replace(self, acceptance=self.acceptance.since(earlier.acceptance))

    def as_row(self) -> dict[str, Any]:
        """Flat and ready for JSON."""
        row = asdict(self)
        counts = row.pop("acceptance") or {}
        mean = self.acceptance.tokens_per_step if self.acceptance else None
        return {**row, **{f"guesses_{name}": value for name, value in counts.items()}, "tokens_per_step": mean}


def device_memory_bytes(device: torch.device) -> int | None:
    """Memory in use on a GPU, by all processes; None for other devices."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def package_version(package: Package) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return "source"
