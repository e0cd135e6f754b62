"""What one model makes of a chunk of prompts, small enough to be sent around: responses by method, likelihood."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cllm.decoding.records import DecodeResult
from cllm.evaluation.decode import Engines, MethodName, decode, methods
from cllm.evaluation.perplexity import NegativeLogLikelihood, reference_nll
from cllm.evaluation.subject import Subject, SubjectName
from cllm.evaluation.trajectory_counts import TrajectoryCounts, count_trajectory
from cllm.recipe import EvaluateConfig
from cllm.tasks.prompts import Prompt


@dataclass(frozen=True, slots=True)
class Output:
    """One response.

    Attributes:
        text: without the end token, as the scorer takes it.
        token_ids: with the end token, if one was produced.
        accepted: tokens committed by each forward pass.
        counts: of the recorded trajectory (block refill only).
    """

    text: str
    token_ids: tuple[int, ...]
    accepted: tuple[int, ...]
    counts: TrajectoryCounts | None = None


@dataclass(frozen=True, slots=True)
class ChunkOutputs:
    """All responses of one model to a chunk; the lists are in the order of `prompt_ids` (ids, not tokens)."""

    subject: SubjectName
    prompt_ids: tuple[str, ...]
    outputs: dict[MethodName, list[Output]]
    nll: NegativeLogLikelihood


def run_chunk(
    name: SubjectName,
    engines: Engines,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    config: EvaluateConfig,
) -> ChunkOutputs:
    """Decode the prompts by every method, and rate their reference answers."""
    subject = engines.subject
    outputs = {
        method.name: [_output(result, subject, tokenizer) for result in decode(engines[method], prompts, config)]
        for method in methods(config.block_size)
    }
    nll = reference_nll(subject.model, prompts, batch_size=config.batch_size, pad_id=subject.pad_id)
    return ChunkOutputs(name, tuple(prompt.prompt_id for prompt in prompts), outputs, nll)


def response_text(token_ids: Sequence[int], eos_ids: Collection[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The response as the scorer takes it, without the end token."""
    # Chat models have end tokens that their tokenizer does not call special, so that decoding would keep them.
    visible = token_ids[:-1] if token_ids[-1] in eos_ids else token_ids
    return str(tokenizer.decode(list(visible), skip_special_tokens=True))


def _output(result: DecodeResult, subject: Subject, tokenizer: PreTrainedTokenizerBase) -> Output:
    text = response_text(result.token_ids, subject.eos_ids, tokenizer)
    counts = count_trajectory(result) if result.trajectory else None
    return Output(text, result.token_ids, result.accepted, counts)
