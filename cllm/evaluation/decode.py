"""Prompts to responses by a named method."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cllm.decoding.records import DecodeRequest, DecodeResult, Refill, SamplingParams
from cllm.engine.config import EngineConfig
from cllm.engine.engine import Engine
from cllm.engine.load import build_engine
from cllm.evaluation.subject import Subject
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


class Engines:
    """A model's engines, one for each method, built when they are first asked for.

    Args:
        prompts: all that will be decoded; the longest decides how much room a row gets.
        rows: prompts decoded together.
        record: keep the trajectories where the method has any (refill block).
    """

    def __init__(
        self, subject: Subject, config: EvaluateConfig, prompts: Sequence[Prompt], *, rows: int, record: bool
    ) -> None:
        self.subject = subject
        self.config = config
        self.rows = rows
        self.record = record
        self.max_tokens = max(len(prompt.prompt_ids) for prompt in prompts) + config.max_new_tokens
        self._engines: dict[MethodName, Engine] = {}

    def __getitem__(self, method: Method) -> Engine:
        if method.name not in self._engines:
            self._engines[method.name] = self._build(method)
        return self._engines[method.name]

    def _build(self, method: Method) -> Engine:
        config = EngineConfig(
            window=method.block_size,
            refill=method.refill,
            record=self.record and method.refill == "block",
            guess=self.config.guess,
            max_rows=self.rows,
            max_tokens=self.max_tokens,
        )
        subject = self.subject
        return build_engine(subject.decoder, config, eos_ids=subject.eos_ids, pad_id=subject.pad_id)


def make_request(prompt: Prompt, config: EvaluateConfig) -> DecodeRequest:
    """Greedy; the seed decides the guesses, so a prompt meets the same ones in every chunk and run."""
    return DecodeRequest(prompt.prompt_ids, config.max_new_tokens, SamplingParams(seed=int(prompt.prompt_id, 16)))


def decode(engine: Engine, prompts: Sequence[Prompt], config: EvaluateConfig) -> list[DecodeResult]:
    """Responses in the order of the prompts."""
    return engine.generate([make_request(prompt, config) for prompt in prompts])


def by_length(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches of up to `size` prompts of similar length, so that little of a batch is padding."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.prompt_ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
