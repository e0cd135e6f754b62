"""Prompts to responses by a named method."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cllm.decoding.decoder import JacobiDecoder
from cllm.decoding.records import DecodeRequest, DecodeResult, Refill, SamplingParams
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


def make_decoder(subject: Subject, method: Method, config: EvaluateConfig, *, record: bool = False) -> JacobiDecoder:
    return JacobiDecoder(
        subject.model,
        block_size=method.block_size,
        refill=method.refill,
        guess=config.guess,
        eos_ids=subject.eos_ids,
        pad_id=subject.pad_id,
        record=record,
    )


def make_request(prompt: Prompt, config: EvaluateConfig) -> DecodeRequest:
    """Greedy; the seed decides the guesses, so a prompt meets the same ones in every chunk and run."""
    return DecodeRequest(prompt.prompt_ids, config.max_new_tokens, SamplingParams(seed=int(prompt.prompt_id, 16)))


def decode(
    subject: Subject, prompts: Sequence[Prompt], method: Method, config: EvaluateConfig, *, record: bool = False
) -> list[DecodeResult]:
    """Decode in batches of similar prompt length; results in the order of the prompts, whose ids must differ."""
    decoder = make_decoder(subject, method, config, record=record)
    results: dict[str, DecodeResult] = {}
    for batch in by_length(prompts, config.batch_size):
        decoded = decoder.generate([make_request(prompt, config) for prompt in batch])
        results.update(zip((prompt.prompt_id for prompt in batch), decoded, strict=True))
    return [results[prompt.prompt_id] for prompt in prompts]


def by_length(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches of up to `size` prompts of similar length, so that little of a batch is padding."""
    ordered = sorted(prompts, key=lambda prompt: len(prompt.prompt_ids))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]
