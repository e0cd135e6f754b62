"""The models under evaluation: loading them, and checking that they read the prompts' token ids."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.engine.backends import attention_for, ops_for
from cllm.engine.model import DecoderModel
from cllm.engine.weights import load_model as load_decoder_model
from cllm.engine.weights import model_from_transformers
from cllm.layout import RunLayout, teacher_path, teacher_revision
from cllm.models import (
    check_tokenizer_fits,
    eos_token_ids,
    load_generation_config,
    load_model,
    load_tokenizer,
    pad_token_id,
    resolve_dtype,
    weights_revision,
)
from cllm.recipe import Recipe
from cllm.tasks.prompts import check_tokenizer

SubjectName = Literal["teacher", "cllm"]
SUBJECTS: tuple[SubjectName, ...] = ("teacher", "cllm")


class Decodable(Protocol):
    """What engines are built from: a model in their form, on its device, and its tokens of special meaning."""

    @property
    def decoder(self) -> DecoderModel:
        """The model."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""

    @property
    def pad_id(self) -> int:
        """The guess of kind "pad"."""


@dataclass(frozen=True, slots=True)
class DecodedSubject:
    """A model for engines alone: half the memory of a `Subject`."""

    decoder: DecoderModel
    eos_ids: tuple[int, ...]
    pad_id: int


@dataclass(frozen=True)
class Subject:
    """A transformers model in eval mode on its device, and its tokens of special meaning."""

    model: PreTrainedModel
    eos_ids: tuple[int, ...]
    pad_id: int

    @cached_property
    def decoder(self) -> DecoderModel:
        """A copy of the weights for the engine."""
        device, dtype = self.model.device, self.model.dtype
        return model_from_transformers(self.model, ops=ops_for(device, dtype), attention=attention_for(device, dtype))


def load_subject(name: SubjectName, recipe: Recipe, device: torch.device) -> Subject:
    """The run's teacher or student, with the prompts' tokenizer.

    Raises:
        InputError: no usable checkpoint, or one with fewer embeddings than the tokenizer has tokens.
    """
    path, revision = checkpoint(name, recipe)
    tokenizer = prompt_tokenizer(recipe)
    dtype = resolve_dtype(recipe.evaluate.precision, device)
    model = load_model(path, revision=revision, dtype=dtype, device=device)
    check_tokenizer_fits(model.config.vocab_size, tokenizer, path)
    return Subject(model, eos_token_ids(model.generation_config, tokenizer), pad_token_id(tokenizer))


def load_decoder(name: SubjectName, recipe: Recipe, device: torch.device) -> DecodedSubject:
    """The same for engines alone.

    Raises:
        InputError: as `load_subject`.
    """
    path, revision = checkpoint(name, recipe)
    tokenizer = prompt_tokenizer(recipe)
    dtype = resolve_dtype(recipe.evaluate.precision, device)
    ops, attention = ops_for(device, dtype), attention_for(device, dtype)
    decoder = load_decoder_model(path, dtype, device, revision=revision, ops=ops, attention=attention)
    check_tokenizer_fits(decoder.shape.vocab_size, tokenizer, path)
    eos_ids = eos_token_ids(load_generation_config(path, revision), tokenizer)
    return DecodedSubject(decoder, eos_ids, pad_token_id(tokenizer))


def prompt_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that made the prompts."""
    return load_tokenizer(str(RunLayout.of(recipe).tokenizer))


def check_tokenizers(recipe: Recipe) -> None:
    """Check that both checkpoints carry the tokenizer that made the prompts.

    Raises:
        InputError: they do not; the checkpoint and the prompts' file are named.
    """
    for name in SUBJECTS:
        path, revision = checkpoint(name, recipe)
        check_tokenizer(RunLayout.of(recipe).prompts_file, load_tokenizer(path, revision), path)


def checkpoint_revision(name: SubjectName, recipe: Recipe) -> str:
    """What identifies the weights (`cllm.models.weights_revision`)."""
    return weights_revision(*checkpoint(name, recipe))


def checkpoint(name: SubjectName, recipe: Recipe) -> tuple[str, str | None]:
    """Folder or Hugging Face id, and the revision."""
    if name == "teacher":
        return teacher_path(recipe), teacher_revision(recipe)
    return str(RunLayout.of(recipe).student), None
