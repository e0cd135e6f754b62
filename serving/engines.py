"""The kinds of engines that a replica can hold."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from cllm.decoding.records import Commit, DecodeRequest
from cllm.engine.async_engine import AsyncEngine
from cllm.engine.engine import Engine, StepStats
from cllm.engine.load import load_engine
from serving.config import Model
from serving.metrics import StepMetrics


class TokenEngine(Protocol):
    """Tokens in, tokens out."""

    @property
    def steps(self) -> int:
        """Grows as long as the engine works."""

    @property
    def num_unfinished(self) -> int: ...

    def stream(self, request: DecodeRequest) -> AsyncGenerator[Commit, None]: ...

    def check(self) -> None:
        """Raise what ended the engine, if it has failed."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StartedEngine:
    """An engine that is ready.

    Attributes:
        context: tokens of prompt and response together.
    """

    engine: TokenEngine
    context: int


def start_cllm(name: str, model: Model) -> StartedEngine:
    """Load our own engine.

    Raises:
        InputError: no usable checkpoint, or settings that it cannot keep.
        TimeoutError: it takes longer than `model.start_s`.
    """
    metrics = StepMetrics(name)
    made: list[Engine] = []

    def make() -> Engine:
        made.append(
            load_engine(
                model.path,
                model.options,
                revision=model.revision,
                precision=model.precision,
                quantization=model.quantization,
            )
        )
        return made[0]

    def note(stats: StepStats) -> None:
        metrics.observe(made[0], stats)

    engine = AsyncEngine(make, note)
    engine.wait_ready(model.start_s)
    return StartedEngine(engine, model.options.max_tokens)
