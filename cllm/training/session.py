"""Everything a training worker needs, built from a recipe: model, data, trainer. Knows nothing of the cluster."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cllm.decoding.trajectories import Trajectory, read_table
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
from cllm.recipe import FinetuneConfig, LoraConfig, OptimConfig, Recipe, TrainConfig
from cllm.tasks.prompts import read_prompts, tokenizer_hash
from cllm.training.batches import RowOfDocuments, RowStream
from cllm.training.early_stopping import EarlyStopping
from cllm.training.forward import PackedObjective
from cllm.training.on_policy import Refiner
from cllm.training.sources import DocumentSource, ReferenceDocuments, TrajectoryDocuments, WindowGuess
from cllm.training.store import stored_trajectories
from cllm.training.trainer import Trainer
from cllm.training.worker import Worker

HELD_OUT_SHARE = 0.03  # of the trajectories, for validation during distillation
MAX_VALIDATION_ROWS = 64


@dataclass(slots=True)
class Session:
    """A trainer with its validation rows and how to export the result.

    Attributes:
        validation: packed rows, a multiple of the number of workers; empty if there is nothing to validate on.
        validate_every: steps between validations; None: at the end only.
        stopping: ends the training early, and keeps its best weights; None: the last step ends it.
        peft: the adapter wrapper around the trained model, if there is one.
    """

    trainer: Trainer
    validation: Sequence[RowOfDocuments]
    validate_every: int | None
    stopping: EarlyStopping | None
    tokenizer: PreTrainedTokenizerBase
    peft: PeftModel | None = None

    @property
    def is_validation_due(self) -> bool:
        """Whether to validate now, between two steps."""
        step, steps = self.trainer.step, self.trainer.config.steps
        due = step == steps or (self.validate_every is not None and step % self.validate_every == 0)
        return due and bool(self.validation)

    def export(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        """Write a plain Hugging Face checkpoint of `state` (`full_model_state`); adapters are merged into it."""
        model, peft = self.trainer.objective.model, self.peft
        if self.trainer.worker.world > 1:
            model, peft = unsharded(model, state, peft)
        save_model(folder, model if peft is None else peft.merge_and_unload(), self.tokenizer)


def unsharded(
    model: PreTrainedModel, state: dict[str, torch.Tensor], peft: PeftModel | None = None
) -> tuple[PreTrainedModel, PeftModel | None]:
    """A model like `model`, whole and on the CPU, of weights gathered from all workers; and the wrapper of its
    adapters, if it has any. It is to be saved: what a checkpoint does not hold (positions' frequencies) it lacks."""
    with torch.device("meta"):
        whole: PreTrainedModel = type(model)(model.config)
        wrapper = None if peft is None else get_peft_model(whole, peft.peft_config["default"])
    whole.load_state_dict(state, assign=True)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    assert wrapper is None or isinstance(wrapper, PeftModel)
    return whole, wrapper


def finetune_session(recipe: Recipe, worker: Worker) -> Session:
    """AR fine-tuning of the teacher on the reference answers of the train split."""
    assert recipe.finetune is not None
    config, layout = recipe.finetune, RunLayout.of(recipe)
    tokenizer = load_tokenizer(str(layout.tokenizer))
    model = _base_model(recipe, tokenizer, worker)
    peft = _prepared(model, config, recipe.seed)
    source = ReferenceDocuments(read_prompts(layout.prompts_file, "train"))
    trainer = Trainer(
        PackedObjective(model, "forward_kl"),
        RowStream(source, config.optim.row_tokens, recipe.seed),
        config.optim,
        ar_weight=1.0,
        dtype=resolve_training_dtype(config.precision, worker.device),
        pad_id=pad_token_id(tokenizer),
        worker=worker,
        compile_layers=recipe.resources.compile,
        seed=recipe.seed,
    )
    held_out = ReferenceDocuments(read_prompts(layout.prompts_file, "validation"))
    validation = validation_rows(held_out, config.optim, recipe.seed, worker)
    return Session(trainer, validation, config.validate_every, None, tokenizer, peft)


def distill_session(recipe: Recipe, worker: Worker, seed: int | None = None) -> Session:
    """Consistency distillation of the teacher into a CLLM.

    Args:
        seed: of the order of documents, the draws of their states and all noise of training; None: the recipe's.

    Raises:
        InputError: the teacher or the trajectories cannot be used; or early stopping has nothing to validate on.
    """
    config, layout = recipe.train, RunLayout.of(recipe)
    tokenizer = load_tokenizer(str(layout.tokenizer))
    rows = read_trajectories(recipe, states=config.loss.states == "trajectory")
    drawing = recipe if seed is None else recipe.model_copy(update={"seed": seed})
    model = load_for(worker, teacher_path(recipe), teacher_revision(recipe))
    peft = _prepared(model, config, drawing.seed)
    guess = WindowGuess(recipe.collect.guess, recipe.collect.block_size, pad_token_id(tokenizer))
    iterations = config.loss.on_policy_iterations
    held_out, train_rows = hold_out(rows)
    trainer = Trainer(
        PackedObjective(model, config.loss.divergence),
        RowStream(trajectory_documents(train_rows, drawing, guess), config.optim.row_tokens, drawing.seed),
        config.optim,
        ar_weight=config.loss.ar_weight,
        dtype=resolve_training_dtype(config.precision, worker.device),
        pad_id=pad_token_id(tokenizer),
        worker=worker,
        refiner=Refiner(iterations, guess, drawing.seed) if iterations else None,
        compile_layers=recipe.resources.compile,
        seed=drawing.seed,
    )
    validation = validation_rows(trajectory_documents(held_out, recipe, guess), config.optim, recipe.seed, worker)
    if config.patience is not None and not validation:
        raise InputError(f"train.patience: {len(rows)} trajectories are too few to hold some out for validation")
    stopping = None if config.patience is None else EarlyStopping(config.patience)
    return Session(trainer, validation, config.validate_every, stopping, tokenizer, peft)


def hold_out(rows: Sequence[Trajectory]) -> tuple[Sequence[Trajectory], Sequence[Trajectory]]:
    """A fixed share of the rows for validation, and the others; all responses to one prompt are on one side.

    It is held out whether or not anybody validates, so that the CLLM and what it is compared with learn from the same.
    """
    end = round(HELD_OUT_SHARE * len(rows))
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


def read_trajectories(recipe: Recipe, *, states: bool = True) -> Sequence[Trajectory]:
    """The run's trajectories, ordered by prompt id (a hash, so that any prefix is a random draw), each made when it is
    asked for; without `states` they have no blocks.

    Raises:
        InputError: trajectories of another teacher, tokenizer or block size than the recipe's.
    """
    return stored_trajectories(_trajectory_tables(recipe), states=states)


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


def _base_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, worker: Worker) -> PreTrainedModel:
    if recipe.teacher.scratch is not None:
        model: PreTrainedModel = create_model(recipe.teacher.scratch, tokenizer, recipe.seed)
        model.set_attn_implementation(packed_attention(worker))
        return model
    assert recipe.teacher.path is not None
    model = load_for(worker, recipe.teacher.path, recipe.teacher.revision)
    check_tokenizer_fits(model.config.vocab_size, tokenizer, recipe.teacher.path)
    return model


def load_for(worker: Worker, path: str, revision: str | None) -> PreTrainedModel:
    """A checkpoint for training: its weights on the CPU of rank 0, and its structure alone on the other workers."""
    return load_model(path, revision=revision, attention=packed_attention(worker), empty=worker.rank > 0)


def packed_attention(worker: Worker) -> str:
    """FlexAttention skips what the packed mask hides, but is compiled for GPUs only; SDPA takes the dense mask."""
    return "flex_attention" if worker.device.type == "cuda" else "sdpa"


def _prepared(model: PreTrainedModel, config: FinetuneConfig | TrainConfig, seed: int) -> PeftModel | None:
    """Turn on what the section asks for; returns the wrapper of the adapters, if it asks for any."""
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return None if config.lora is None else _with_adapters(model, config.lora, seed)


def _with_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Adapters put into `model` in place; the wrapper is needed only to merge them."""
    peft_config = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)  # adapters begin with random weights
    wrapped = get_peft_model(model, peft_config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def validation_rows(source: DocumentSource, optim: OptimConfig, seed: int, worker: Worker) -> Sequence[RowOfDocuments]:
    """The first rows of `source`, packed as in training, a multiple of the number of workers; none if nothing fits."""
    rows = list(islice(RowStream(source, optim.row_tokens, seed).epoch_rows(0), MAX_VALIDATION_ROWS))
    return rows[: len(rows) // worker.world * worker.world]
