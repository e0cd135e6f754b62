"""What one model makes of a chunk of prompts, small enough to be sent around: responses by a method, or likelihood."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from cllm.decoding.records import DecodeResult
from cllm.evaluation.decode import Engines, Method, MethodName, decode
from cllm.evaluation.perplexity import NegativeLogLikelihood, reference_nll
from cllm.evaluation.subject import (
    Decodable,
    Subject,
    SubjectName,
    load_decoder,
    load_subject,
    prompt_tokenizer,
)
from cllm.evaluation.trajectory_counts import TrajectoryCounts, count_trajectory
from cllm.models import release_memory
from cllm.recipe import Recipe
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
    """One model's responses to a chunk by one method; `outputs` are in the order of `prompt_ids` (ids, not tokens)."""

    subject: SubjectName
    method: MethodName
    prompt_ids: tuple[str, ...]
    outputs: list[Output]


@dataclass(frozen=True, slots=True)
class ChunkLikelihood:
    """How likely one model finds the reference answers of a chunk."""

    subject: SubjectName
    nll: NegativeLogLikelihood


class Evaluator:
    """Evaluates chunks on one device, holding one model, in one form, and one engine at a time: at 7B two fill a GPU.
    Work should come model by model, and for each its likelihoods first and then method by method.

    Args:
        prompts: of all chunks; the longest decides how much room a row gets.
    """

    def __init__(self, recipe: Recipe, prompts: Sequence[Prompt], device: torch.device) -> None:
        self.recipe = recipe
        self.prompts = prompts
        self.device = device
        self.tokenizer = prompt_tokenizer(recipe)
        self._rater: tuple[SubjectName, Subject] | None = None
        self._engines: tuple[SubjectName, Engines] | None = None

    def rate(self, name: SubjectName, prompts: Sequence[Prompt]) -> ChunkLikelihood:
        """Raises InputError if the model cannot be loaded."""
        if self._rater is None or self._rater[0] != name:
            self._close()
            self._rater = name, load_subject(name, self.recipe, self.device)
        subject, batch_size = self._rater[1], self.recipe.evaluate.batch_size
        nll = reference_nll(subject.model, prompts, batch_size=batch_size, pad_id=subject.pad_id)
        return ChunkLikelihood(name, nll)

    def decode(self, name: SubjectName, method: Method, prompts: Sequence[Prompt]) -> ChunkOutputs:
        """Raises InputError if the model cannot be loaded, or there is no memory for an engine."""
        config = self.recipe.evaluate
        if self._engines is None or self._engines[0] != name:
            self._close()
            subject = load_decoder(name, self.recipe, self.device)
            self._engines = name, Engines(subject, config, self.prompts, rows=config.batch_size, record=True)
        engines = self._engines[1]
        results = decode(engines[method], prompts, config)
        outputs = [_output(result, engines.subject, self.tokenizer) for result in results]
        return ChunkOutputs(name, method.name, tuple(prompt.prompt_id for prompt in prompts), outputs)

    def _close(self) -> None:
        self._rater = self._engines = None
        release_memory(self.device)


def response_text(token_ids: Sequence[int], eos_ids: Collection[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The response as the scorer takes it, without the end token."""
    # Chat models have end tokens that their tokenizer does not call special, so that decoding would keep them.
    visible = token_ids[:-1] if token_ids[-1] in eos_ids else token_ids
    return str(tokenizer.decode(list(visible), skip_special_tokens=True))


def _output(result: DecodeResult, subject: Decodable, tokenizer: PreTrainedTokenizerBase) -> Output:
    text = response_text(result.token_ids, subject.eos_ids, tokenizer)
    counts = count_trajectory(result) if result.trajectory else None
    return Output(text, result.token_ids, result.accepted, counts)
