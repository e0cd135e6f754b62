"""Training sessions of the baselines, draft model and Medusa heads, on the responses that the CLLM learns from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.errors import InputError
from cllm.layout import RunLayout, teacher_path, teacher_revision
from cllm.models import (
    check_context_fits,
    create_model,
    load_tokenizer,
    pad_token_id,
    resolve_training_dtype,
    save_model,
    vocabulary_size,
)
from cllm.recipe import BaselinesConfig, DraftConfig, MedusaConfig, Recipe
from cllm.training.batches import RowOfDocuments, RowStream
from cllm.training.draft import DraftObjective
from cllm.training.medusa import MedusaHeads, MedusaObjective, save_heads
from cllm.training.objective import Objective
from cllm.training.session import (
    Session,
    hold_out,
    load_for,
    packed_attention,
    read_trajectories,
    unsharded,
    validation_rows,
)
from cllm.training.sources import ResponseDocuments
from cllm.training.trainer import Trainer
from cllm.training.worker import Worker

MEDUSA_MODEL = "model"  # folder of the model that Medusa-2 trains, beside the heads


@dataclass(slots=True)
class MedusaSession(Session):
    """A session that exports Medusa heads, and in `model/` the model that Medusa-2 trains with them."""

    def export(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        objective = self.trainer.objective
        assert isinstance(objective, MedusaObjective)
        if objective.variant == 1:
            save_heads(folder, state)
            return
        save_heads(folder, _below("heads.", state))
        model, _ = unsharded(objective.model, _below("model.", state))
        save_model(folder / MEDUSA_MODEL, model, self.tokenizer)


def draft_session(recipe: Recipe, worker: Worker) -> Session:
    """Distillation of the teacher into a small draft model."""
    config = _section(recipe).draft
    assert config is not None
    tokenizer, teacher = _tokenizer(recipe), _teacher(recipe, worker)
    model = _draft_model(config, tokenizer, teacher.config.vocab_size, recipe.seed, worker)
    objective = DraftObjective(model, teacher, config.divergence)
    trainer, validation = _trainer(recipe, config, objective, config.ar_weight, tokenizer, worker)
    return Session(trainer, validation, config.validate_every, None, tokenizer)


def medusa_session(recipe: Recipe, worker: Worker) -> MedusaSession:
    """Medusa heads on the frozen teacher (Medusa-1), or trained together with it (Medusa-2)."""
    config = _section(recipe).medusa
    assert config is not None
    tokenizer, model = _tokenizer(recipe), _teacher(recipe, worker)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rate = config.optim.learning_rate
    objective = MedusaObjective(
        model,
        MedusaHeads.of(model, config.num_heads),
        variant=config.variant,
        decay=config.decay,
        model_scale=(config.teacher_learning_rate or rate / 4) / rate,
    )
    ar_weight = config.ar_weight if config.variant == 2 else 0.0
    trainer, validation = _trainer(recipe, config, objective, ar_weight, tokenizer, worker)
    return MedusaSession(trainer, validation, config.validate_every, None, tokenizer)


def check_draft_source(recipe: Recipe) -> None:
    """Check a draft model that is loaded, before any worker starts.

    Raises:
        InputError: there is none, its vocabulary is not the teacher's, or it reads fewer tokens than there will be.
    """
    draft = _section(recipe).draft
    if draft is None or draft.path is None:
        return
    where = f"baselines.draft.path {draft.path}"
    ours = vocabulary_size(draft.path, draft.revision)
    theirs = vocabulary_size(teacher_path(recipe), teacher_revision(recipe))
    if ours != theirs:
        raise InputError(f"{where}: vocab_size is {ours}, the teacher's is {theirs}")
    if load_tokenizer(draft.path, draft.revision).get_vocab() != _tokenizer(recipe).get_vocab():
        raise InputError(f"{where}: its tokenizer has other tokens than the teacher's")
    new = max(recipe.collect.max_new_tokens, recipe.evaluate.max_new_tokens)
    check_context_fits(draft.path, draft.revision, prompt_tokens=recipe.prompts.max_prompt_tokens, new_tokens=new)


def _section(recipe: Recipe) -> BaselinesConfig:
    assert recipe.baselines is not None
    return recipe.baselines


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    return load_tokenizer(str(RunLayout.of(recipe).tokenizer))


def _teacher(recipe: Recipe, worker: Worker) -> PreTrainedModel:
    return load_for(worker, teacher_path(recipe), teacher_revision(recipe))


def _draft_model(
    config: DraftConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int, seed: int, worker: Worker
) -> PreTrainedModel:
    """With as many embeddings as the teacher has, those without a token included: speculative decoding needs it."""
    if config.path is not None:
        return load_for(worker, config.path, config.revision)
    assert config.scratch is not None
    model: PreTrainedModel = create_model(config.scratch, tokenizer, seed, vocab_size=vocab_size)
    model.set_attn_implementation(packed_attention(worker))
    return model


def _trainer(
    recipe: Recipe,
    config: DraftConfig | MedusaConfig,
    objective: Objective,
    ar_weight: float,
    tokenizer: PreTrainedTokenizerBase,
    worker: Worker,
) -> tuple[Trainer, Sequence[RowOfDocuments]]:
    """The trainer on the run's responses, and the rows to validate on; the CLLM learns from the same, and is validated
    on the same."""
    held_out, rest = hold_out(read_trajectories(recipe, states=False))
    trainer = Trainer(
        objective,
        RowStream(ResponseDocuments(rest), config.optim.row_tokens, recipe.seed),
        config.optim,
        ar_weight=ar_weight,
        dtype=resolve_training_dtype(config.precision, worker.device),
        pad_id=pad_token_id(tokenizer),
        worker=worker,
        compile_layers=recipe.resources.compile,
        seed=recipe.seed,
    )
    return trainer, validation_rows(ResponseDocuments(held_out), config.optim, recipe.seed, worker)


def _below(prefix: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
