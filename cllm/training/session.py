"""Everything a training worker needs, built from a recipe: model, data, trainer. Knows nothing of the cluster."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.decoding.trajectories import Trajectory, from_table, read_table
from cllm.errors import InputError
from cllm.layout import RunLayout, teacher_path, teacher_revision
from cllm.models import (
    check_tokenizer_fits,
    create_model,
    load_model,
    load_tokenizer,
    pad_token_id,
    resolve_training_dtype,
    save_model,
    weights_revision,
)
from cllm.recipe import LoraConfig, OptimConfig, Recipe
from cllm.tasks.prompts import read_prompts, tokenizer_hash
from cllm.training.batches import RowOfDocuments, RowStream
from cllm.training.forward import PackedObjective
from cllm.training.on_policy import Refiner
from cllm.training.sources import DocumentSource, ReferenceDocuments, TrajectoryDocuments, WindowGuess
from cllm.training.trainer import Trainer
from cllm.training.worker import Worker

HELD_OUT_SHARE = 0.03  # of the trajectories, for validation during distillation
MAX_VALIDATION_ROWS = 64


@dataclass(slots=True)
class Session:
    """A trainer with its validation rows and how to export the result.

    Attributes:
        validation: packed rows, a multiple of the number of workers; empty if there is nothing to validate on.
        validate_every: steps between validations; None: never.
        patience: validations without improvement before stopping; None: never stop early.
        peft: the adapter wrapper around the trained model, if there is one.
    """

    trainer: Trainer
    validation: Sequence[RowOfDocuments]
    validate_every: int | None
    patience: int | None
    tokenizer: PreTrainedTokenizerBase
    peft: PeftModel | None = None

    def export(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """Write a plain Hugging Face checkpoint of `state` (`full_model_state`); adapters are merged into it."""
        model = self.trainer.objective.model
        if self.trainer.worker.world > 1:
            model = unsharded(model)
            if self.peft is not None:
                self.peft = get_peft_model(model, self.peft.peft_config["default"])
            model.load_state_dict(state)
        if self.peft is not None:
            model = self.peft.merge_and_unload()
        save_model(folder, model, self.tokenizer)


def unsharded(model: PreTrainedModel) -> PreTrainedModel:
    """A model like `model`, whole and on the CPU, for weights gathered from all workers; its own are random."""
    copy: PreTrainedModel = type(model)(model.config)
    copy.generation_config = model.generation_config
    return copy


def finetune_session(recipe: Recipe, worker: Worker) -> Session:
    """AR fine-tuning of the teacher on the reference answers of the train split."""
    assert recipe.finetune is not None
    config, layout = recipe.finetune, RunLayout.of(recipe)
    tokenizer = load_tokenizer(str(layout.tokenizer))
    model = _base_model(recipe, tokenizer, packed_attention(worker))
    dtype = resolve_training_dtype(config.precision, worker.device)
    source = ReferenceDocuments(read_prompts(layout.prompts_file, "train"))
    trainer = Trainer(
        PackedObjective(model, "forward_kl"),
        RowStream(source, config.optim.row_tokens, recipe.seed),
        config.optim,
        ar_weight=1.0,
        dtype=dtype,
        pad_id=pad_token_id(tokenizer),
        worker=worker,
        compile_layers=recipe.resources.compile,
    )
    held_out = ReferenceDocuments(read_prompts(layout.prompts_file, "validation"))
    validation = validation_rows(held_out, config.optim, recipe.seed, worker)
    return Session(trainer, validation, config.validate_every, None, tokenizer)


def distill_session(recipe: Recipe, worker: Worker, seed: int | None = None) -> Session:
    """Consistency distillation of the teacher into a CLLM.

    Args:
        seed: of the order of documents and of the draws of their states; None: the recipe's.
    """
    config, layout = recipe.train, RunLayout.of(recipe)
    tokenizer = load_tokenizer(str(layout.tokenizer))
    rows = read_trajectories(recipe, states=config.loss.states == "trajectory")
    model = load_model(teacher_path(recipe), revision=teacher_revision(recipe), attention=packed_attention(worker))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    peft = None if config.lora is None else _with_adapters(model, config.lora)
    guess = WindowGuess(recipe.collect.guess, recipe.collect.block_size, pad_token_id(tokenizer))
    iterations = config.loss.on_policy_iterations
    drawing = recipe if seed is None else recipe.model_copy(update={"seed": seed})
    documents = partial(trajectory_documents, recipe=drawing, guess=guess)
    held_out, train_rows = hold_out(rows, HELD_OUT_SHARE if config.validate_every else 0.0)
    trainer = Trainer(
        PackedObjective(model, config.loss.divergence),
        RowStream(documents(train_rows), config.optim.row_tokens, drawing.seed),
        config.optim,
        ar_weight=config.loss.ar_weight,
        dtype=resolve_training_dtype(config.precision, worker.device),
        pad_id=pad_token_id(tokenizer),
        worker=worker,
        refiner=Refiner(iterations, guess, drawing.seed) if iterations else None,
        compile_layers=recipe.resources.compile,
    )
    validation: Sequence[RowOfDocuments] = []
    if held_out:
        validation = validation_rows(documents(held_out), config.optim, recipe.seed, worker)
    return Session(trainer, validation, config.validate_every, config.patience, tokenizer, peft)


def hold_out(rows: Sequence[Trajectory], share: float) -> tuple[Sequence[Trajectory], Sequence[Trajectory]]:
    """The first `share` of the rows, and the others; all responses to one prompt are on one side."""
    end = round(share * len(rows))
    while 0 < end < len(rows) and rows[end].prompt_id == rows[end - 1].prompt_id:
        end += 1
    return rows[:end], rows[end:]


def trajectory_documents(rows: Sequence[Trajectory], recipe: Recipe, guess: WindowGuess) -> TrajectoryDocuments:
    """What distillation by the recipe's loss section reads."""
    references = None
    if recipe.train.loss.ar_labels == "reference":
        prompts = read_prompts(RunLayout.of(recipe).prompts_file, "train")
        references = {prompt.prompt_id: prompt.reference_ids for prompt in prompts}
    return TrajectoryDocuments(rows, recipe.train.loss, recipe.seed, guess, references)


def read_trajectories(recipe: Recipe, *, states: bool = True) -> list[Trajectory]:
    """The run's trajectories, ordered by prompt id (a hash, so that any prefix is a random draw); `states` as in
    `from_table`.

    Raises:
        InputError: trajectories of another teacher, tokenizer or block size than the recipe's.
    """
    rows = [row for table in _trajectory_tables(recipe) for row in from_table(table, states=states)]
    return sorted(rows, key=lambda row: row.prompt_id)


def check_trajectories(recipe: Recipe) -> None:
    """Raise what `read_trajectories` would, without making the rows: the job asks before it starts any worker."""
    if sum(table.num_rows for table in _trajectory_tables(recipe)) == 0:
        raise InputError(f"{RunLayout.of(recipe).trajectories}: no trajectories")


def _trajectory_tables(recipe: Recipe) -> Iterator[pa.Table]:
    layout = RunLayout.of(recipe)
    expected = trajectory_metadata(recipe, load_tokenizer(str(layout.tokenizer)))
    for path in sorted(layout.trajectories.glob("part-*.parquet")):
        table, metadata = read_table(path)
        for key, value in expected.items():
            if metadata.get(key) != value:
                raise InputError(f"{path}: {key} is {metadata.get(key)}, the recipe's is {value}; collect again")
        yield table


def trajectory_metadata(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What trajectories must agree on with the run that trains on them; kept in each of their files."""
    return {
        "teacher": weights_revision(teacher_path(recipe), teacher_revision(recipe)),
        "tokenizer_hash": tokenizer_hash(tokenizer),
        "block_size": str(recipe.collect.block_size),
        "seed": str(recipe.seed),
    }


def _base_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, attention: str) -> PreTrainedModel:
    if recipe.teacher.scratch is not None:
        model: PreTrainedModel = create_model(recipe.teacher.scratch, tokenizer, recipe.seed)
        model.set_attn_implementation(attention)
        return model
    assert recipe.teacher.path is not None
    model = load_model(recipe.teacher.path, revision=recipe.teacher.revision, attention=attention)
    check_tokenizer_fits(model.config.vocab_size, tokenizer, recipe.teacher.path)
    return model


def packed_attention(worker: Worker) -> str:
    """FlexAttention skips what the packed mask hides, but is compiled for GPUs only; SDPA takes the dense mask."""
    return "flex_attention" if worker.device.type == "cuda" else "sdpa"


def _with_adapters(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Adapters put into `model` in place; the wrapper is needed only to merge them."""
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, peft_config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def validation_rows(source: DocumentSource, optim: OptimConfig, seed: int, worker: Worker) -> Sequence[RowOfDocuments]:
    """The first rows of `source`, packed as in training, a multiple of the number of workers."""
    stream = RowStream(source, optim.row_tokens, seed)
    count = min(stream.rows_per_epoch, MAX_VALIDATION_ROWS) // worker.world * worker.world
    return stream.take(count)
