"""What a trainer minimises: packed rows to loss sums."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from cllm.recipe import OptimConfig
from cllm.training.batches import RowOfDocuments
from cllm.training.feed import count_labels
from cllm.training.optim import build_optimizers


class Objective(torch.nn.Module):
    """A model with its losses, as one module: FSDP shards it whole, output projection and frozen models included.

    `forward` takes `PackedRows` and returns `LossSums`: of the AR loss, and of a second one, for a CLLM consistency.
    Each is divided by its count (`count_labels`) over the whole step.

    Attributes:
        model: the model that the loss reads from.
        second_loss: the second loss's name in logs.
    """

    model: PreTrainedModel
    second_loss = "consistency"

    @property
    def trained(self) -> torch.nn.Module:
        """What training makes, to be exported."""
        return self.model

    @property
    def models(self) -> Sequence[PreTrainedModel]:
        """All models whose decoder layers are sharded and compiled, those without gradient included."""
        return (self.model,)

    def count_labels(self, rows: Sequence[RowOfDocuments]) -> tuple[int, int]:
        """By how many tokens the sums of the AR and of the second loss are divided."""
        return count_labels(rows)

    def build_optimizers(self, config: OptimConfig) -> list[torch.optim.Optimizer]:
        """Optimisers that cover each trainable parameter once. They follow the schedule of `config`, times the entry
        `scale` of a parameter group where there is one."""
        return build_optimizers(self.model, config)


def count_responses(rows: Sequence[RowOfDocuments]) -> tuple[int, int]:
    """Counts for a second loss that, like the AR loss, has a term for each response token."""
    num_ar, _ = count_labels(rows)
    return num_ar, num_ar
