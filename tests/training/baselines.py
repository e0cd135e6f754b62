"""Tiny teachers with their own greedy responses, and trainers of baselines on them."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from cllm.recipe import OptimConfig
from cllm.training.batches import RowStream
from cllm.training.documents import Document
from cllm.training.objective import Objective
from cllm.training.trainer import Trainer
from cllm.training.worker import Worker
from tests.fakes import PAD

ROW_TOKENS = 96
PROMPTS = ((3, 4, 5, 6), (7, 8, 9), (5,), (6, 5, 6, 5, 6), (11, 2), (12, 13, 4))


class Fixed:
    """The same documents in every epoch."""

    def __init__(self, documents: Sequence[Document]) -> None:
        self._documents = list(documents)

    def documents(self, epoch: int) -> list[Document]:
        return self._documents


@torch.inference_mode()
def answered(model: PreTrainedModel, prompts: Sequence[tuple[int, ...]] = PROMPTS, count: int = 16) -> list[Document]:
    """Prompts with the model's greedy responses, by transformers without a cache."""
    documents = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        documents.append(Document(prompt, tuple(tokens[len(prompt) :])))
    return documents


def make_trainer(
    objective: Objective,
    documents: Sequence[Document],
    *,
    ar_weight: float = 0.0,
    worker: Worker = Worker(device=torch.device("cpu")),  # noqa: B008 (it is frozen)
    **optim: object,
) -> Trainer:
    defaults = {"steps": 60, "learning_rate": 1e-2, "row_tokens": ROW_TOKENS, "rows_per_step": 2}
    config = OptimConfig.model_validate(defaults | optim)
    stream = RowStream(Fixed(documents), config.row_tokens, seed=3)
    return Trainer(objective, stream, config, ar_weight=ar_weight, dtype=torch.float32, pad_id=PAD, worker=worker)


def train(trainer: Trainer) -> Trainer:
    """Take all of its steps."""
    while trainer.step < trainer.config.steps:
        trainer.train_step()
    return trainer


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def is_same(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
