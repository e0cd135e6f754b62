"""What one way of decoding adds to the engine's loop. No tensors."""

from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Protocol

from cllm.decoding.records import DecodeRequest
from cllm.engine.sequence import Recorder, Sequence
from cllm.engine.state import Entry
from cllm.engine.step import Launched, Step


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step says of one row.

    Attributes:
        row: that it was launched for, and that still waits for it.
        place: of the row in the step.
        predictions: of the tokens behind the row's.
        count: how many of them hold, from the first on.
        columns: where the step's log-probabilities have those that hold.
    """

    row: Sequence
    place: int
    predictions: list[int]
    count: int
    columns: Many[int]


class Mode(Protocol):
    """What is kept of each request, fed to a step, and made of its result.

    Attributes:
        name: as in `BackendStats.method`.
        overlaps: a step may be launched before the one before it was read.
    """

    overlaps: bool

    @property
    def name(self) -> str: ...

    def check(self, request: DecodeRequest) -> None:
        """Raise InputError if the request asks for what this mode does not do."""

    def recorder(self, request: DecodeRequest) -> Recorder | None:
        """Keeps the request's trajectory, where that is asked for."""

    def add(self, row: Sequence) -> None:
        """A request comes; it need not be the next one to get a slot."""

    def forget(self, key: int) -> None:
        """It goes."""

    def entry(self, row: Sequence) -> Entry:
        """What the device is to know of a row that gets a slot, for the first time or again."""

    def step(self, width: int) -> Step:
        """The step with windows of `width` tokens."""

    def inputs(self, rows: Many[Sequence]) -> list[list[int]]:
        """What to feed to a step of these rows, besides what the device knows."""

    def read(self, launched: Launched) -> list[Outcome]:
        """Wait for a step; what it says of the rows that still wait for it. Device and mode are ready for the next
        step then, if the caller commits what holds.
        """
