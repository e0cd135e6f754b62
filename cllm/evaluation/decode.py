"""Prompts to responses by a named method."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cllm.decoding.backend import Backend
from cllm.decoding.records import DecodeRequest, DecodeResult, Refill, SamplingParams
from cllm.engine.config import EngineConfig
from cllm.engine.load import build_engine
from cllm.evaluation.subject import Decodable
from cllm.models import release_memory
from cllm.recipe import EvaluateConfig
from cllm.tasks.prompts import Prompt

MethodName = Literal["ar", "jacobi-block", "jacobi-sliding"]


@dataclass(frozen=True, slots=True)
class Method:
    """A way of greedy decoding; all of them give the same tokens, up to rounding."""

    name: MethodName
    block_size: int
    refill: Refill


def methods(block_size: int) -> tuple[Method, ...]:
    """AR first, for it is what the others are measured against."""
    return (
        Method("ar", 1, "sliding"),
        Method("jacobi-block", block_size, "block"),
        Method("jacobi-sliding", block_size, "sliding"),
    )


class Open(Protocol):
    """Opens a backend that decodes a model by a method."""

    def __call__(
        self, method: Method, subject: Decodable, config: EvaluateConfig, *, rows: int, max_tokens: int, record: bool
    ) -> Backend: ...


def open_engine(
    method: Method, subject: Decodable, config: EvaluateConfig, *, rows: int, max_tokens: int, record: bool
) -> Backend:
    """Our engine; `record` keeps the trajectories where the method has any (refill block)."""
    settings = EngineConfig(
        window=method.block_size,
        refill=method.refill,
        record=record and method.refill == "block",
        guess=config.guess,
        max_rows=rows,
        max_tokens=max_tokens,
    )
    return build_engine(subject.decoder, settings, eos_ids=subject.eos_ids, pad_id=subject.pad_id)


class Engines:
    """A model's engines, one at a time: one is open until another method's is asked for. Each takes as much of a GPU as
    `rows` full rows need, or all there is, so a second one of a large model would find no room.

    Args:
        prompts: all that will be decoded; the longest decides how much room a row gets.
        rows: prompts decoded together.
        record: keep the trajectories where the method has any (refill block) and the engine tells them.
        opens: whose engines; ours if nothing is said.
    """

    def __init__(
        self,
        subject: Decodable,
        config: EvaluateConfig,
        prompts: Sequence[Prompt],
        *,
        rows: int,
        record: bool,
        opens: Open = open_engine,
    ) -> None:
        self.subject = subject
        self._config = config
        self._rows = rows
        self._record = record
        self._max_tokens = max(len(prompt.prompt_ids) for prompt in prompts) + config.max_new_tokens
        self._opens = opens
        self._open: tuple[MethodName, Backend] | None = None

    def __getitem__(self, method: Method) -> Backend:
        if self._open is None or self._open[0] != method.name:
            self._close()
            engine = self._opens(
                method,
                self.subject,
                self._config,
                rows=self._rows,
                max_tokens=self._max_tokens,
                record=self._record,
            )
            self._open = method.name, engine
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None
            release_memory(self.subject.decoder.device)


def make_request(prompt: Prompt, config: EvaluateConfig) -> DecodeRequest:
    """Greedy; the seed decides the guesses, so a prompt meets the same ones in every chunk and run."""
    return DecodeRequest(prompt.prompt_ids, config.max_new_tokens, SamplingParams(seed=int(prompt.prompt_id, 16)))


def decode(engine: Backend, prompts: Sequence[Prompt], config: EvaluateConfig) -> list[DecodeResult]:
    """Responses in the order of the prompts."""
    return engine.generate([make_request(prompt, config) for prompt in prompts])


def by_length(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches of up to `size` prompts of similar length, so that little of a batch is padding."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.prompt_ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
