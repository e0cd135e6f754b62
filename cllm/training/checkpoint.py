"""Training state on disk, to resume at the exact step; all workers write it together (torch.distributed.checkpoint)."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from cllm.errors import InputError
from cllm.training.early_stopping import TRAINED, EarlyStopping, copied_weights
from cllm.training.trainer import Trainer

_PROGRESS = "progress.json"
_BEST = "best"  # of early stopping


def save_checkpoint(trainer: Trainer, folder: Path, stopping: EarlyStopping | None = None) -> None:
    """Save trained weights, optimiser, place in the data, and the best weights so far; every worker calls it, with its
    own or a shared folder."""
    model_state, optimizer_state = get_state_dict(trainer.objective, trainer.optimizers, options=TRAINED)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    progress: dict[str, Any] = {"step": trainer.step, "stream": trainer.feed.state}
    if stopping is not None:
        state[_BEST], progress[_BEST] = stopping.weights, stopping.progress
    with _quiet():
        dcp.save(state, checkpoint_id=folder, no_dist=trainer.worker.world == 1)
    if trainer.worker.rank == 0:
        (folder / _PROGRESS).write_text(json.dumps(progress))


def load_checkpoint(trainer: Trainer, folder: Path, stopping: EarlyStopping | None = None) -> None:
    """Restore what `save_checkpoint` wrote, on the same or another number of workers.

    Raises:
        InputError: the checkpoint is incomplete or of another model.
    """
    model_state, optimizer_state = get_state_dict(trainer.objective, trainer.optimizers, options=TRAINED)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    try:
        progress = json.loads((folder / _PROGRESS).read_text())
        best = progress.get(_BEST) if stopping is not None else None
        if best is not None and best["step"] > 0:
            state[_BEST] = copied_weights(trainer.objective)  # to be read into
        with _quiet():
            dcp.load(state, checkpoint_id=folder, no_dist=trainer.worker.world == 1)
    except (Exception, CheckpointException) as error:  # the latter is no Exception; dcp raises many kinds
        raise InputError(f"{folder}: not a usable training checkpoint: {str(error).splitlines()[0]}") from error
    set_state_dict(
        trainer.objective,
        trainer.optimizers,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=TRAINED,
    )
    if stopping is not None and best is not None:
        stopping.resume(best, state.get(_BEST, {}))
    trainer.step = progress["step"]
    trainer.feed.restore(progress["stream"])


def full_model_state(trainer: Trainer) -> dict[str, Any]:
    """All weights of what is trained on the CPU of rank 0 (empty elsewhere); every worker must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(trainer.model, options=options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a single process saves alone, which `no_dist` has just told it to do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
