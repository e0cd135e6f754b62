"""The best weights so far by validation, and when to stop."""

import math

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)  # what is frozen comes from elsewhere again


class EarlyStopping:
    """Keeps a copy of the trained weights (each worker of its shards, on the CPU) at the best validation.

    Args:
        patience: so many validations in a row without a better one end the training.

    Attributes:
        best_loss, best_step: of the best validation; infinity and 0 before the first.
        stale: validations since then.
        weights: those of `best_step`; empty before the first.
    """

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_loss = math.inf
        self.best_step = 0
        self.stale = 0
        self.weights: dict[str, torch.Tensor] = {}

    @property
    def ended(self) -> bool:
        return self.stale >= self.patience

    def note(self, loss: float, step: int, module: torch.nn.Module) -> None:
        """Take note of the validation loss of `module` after `step` steps; every worker must call it, with one loss."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.stale = loss, step, 0
            self.weights = copied_weights(module)
        else:
            self.stale += 1

    def restore_best(self, module: torch.nn.Module) -> None:
        """Give `module` its best weights back; every worker must call it. Without a validation it stays as it is."""
        if self.weights:
            set_model_state_dict(module, dict(self.weights), options=TRAINED)

    @property
    def progress(self) -> dict[str, float]:
        """All but the weights, for a checkpoint."""
        return {"loss": self.best_loss, "step": self.best_step, "stale": self.stale}

    def resume(self, progress: dict[str, float], weights: dict[str, torch.Tensor]) -> None:
        """Be what had this `progress` and these weights."""
        self.best_loss, self.weights = progress["loss"], weights
        self.best_step, self.stale = int(progress["step"]), int(progress["stale"])


def copied_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the trainable weights on the CPU, sharded as they are."""
    weights = get_model_state_dict(module, options=TRAINED)
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
