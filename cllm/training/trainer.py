"""The optimiser step over packed rows, on one device or sharded by FSDP2 over several."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from cllm.errors import InputError
from cllm.recipe import OptimConfig
from cllm.training.batches import RowOfDocuments, RowStream
from cllm.training.feed import Step, StepFeed
from cllm.training.forward import PackedObjective
from cllm.training.losses import LossSums
from cllm.training.objective import Objective
from cllm.training.on_policy import Refiner
from cllm.training.optim import learning_rate_at
from cllm.training.packing import PackedRows
from cllm.training.sharding import decoder_layers, shard
from cllm.training.worker import Worker


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Mean losses in nats a token over all workers, and the number of packed tokens (padding included).

    Attributes:
        second: the objective's other loss, which `Objective.second_loss` names.
        refinements: forward passes of these tokens without gradient, before the one with it.
    """

    ar: float
    second: float
    num_tokens: int
    refinements: int
    grad_norm: float
    learning_rate: float


class Trainer:
    """Trains an objective's model on a stream of packed rows.

    Loss = consistency (or another second loss) + ar_weight * AR, each the mean over its tokens of the whole step,
    whatever the number of workers and accumulation steps: both counts are known before the forward, because every
    worker sees the whole stream. With on-policy states the consistency mean is over the drawn tokens, though refinement
    may settle some of them.

    Args:
        objective: with several workers, its weights are those of rank 0 (`cllm.training.sharding`).
        compile_layers: decoder layers run through torch.compile; losses differ by rounding.
        seed: of dropout's noise, which is a function of it, the step and the worker: a resumed run repeats it.

    Raises:
        InputError: workers and accumulation do not divide the rows of a step, or an optimizer for one worker only.
    """

    def __init__(
        self,
        objective: Objective,
        stream: RowStream,
        config: OptimConfig,
        *,
        ar_weight: float,
        dtype: torch.dtype,
        pad_id: int,
        worker: Worker,
        refiner: Refiner | None = None,
        compile_layers: bool = False,
        seed: int = 0,
    ) -> None:
        parts, rows = worker.world * config.accumulation, config.rows_per_step
        if rows % parts:
            raise InputError(f"optim.rows_per_step: {rows} is no multiple of workers x accumulation, {parts}")
        if config.optimizer == "muon" and worker.world > 1:
            raise InputError("optim.optimizer: muon trains on one worker only; use adamw")
        self.config = config
        self.stream = stream
        self.feed = StepFeed(stream, config, pad_id, worker, objective.count_labels)
        self.worker = worker
        self.ar_weight = ar_weight
        self.refiner = refiner
        self.seed = seed
        self.step = 0
        self.model = objective.trained
        self.objective = objective.train()
        if compile_layers:
            for model in objective.models:
                compile_decoder_layers(model)
        if worker.world > 1:
            shard(objective, dtype, worker)
        else:
            objective.to(worker.device)
        self._autocast = torch.autocast(worker.device.type, dtype, enabled=worker.world == 1 and dtype != torch.float32)
        self.optimizers = objective.build_optimizers(config)

    def train_step(self) -> StepLosses:
        """One optimiser step.

        Raises:
            InputError: the gradient is not finite; nothing is updated then.
        """
        torch.manual_seed(random.Random(f"{self.seed}/noise/{self.step}/{self.worker.rank}").getrandbits(63))
        step = self.feed.take()
        refinements = 0 if self.refiner is None else self.refiner.iterations_at(self.step)
        sums = self._backward(step, refinements)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.max_grad_norm)
        if self.step + 1 < self.config.steps:
            self.feed.prepare()  # while the GPU is at work: it is asked for a value only below
        ar, second = self._sum_over_workers(sums)
        norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
        if not norm < float("inf"):
            raise InputError(f"step {self.step}: gradient norm {norm}; lower optim.learning_rate")
        learning_rate = learning_rate_at(self.step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("scale", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return StepLosses(
            ar=ar / max(1, step.num_ar),
            second=second / max(1, step.num_second),
            num_tokens=self.config.rows_per_step * self.config.row_tokens,
            refinements=refinements,
            grad_norm=norm,
            learning_rate=learning_rate,
        )

    @torch.no_grad()
    def validate(self, rows: Sequence[RowOfDocuments]) -> tuple[float, float]:
        """Mean AR and second loss over `rows`, whose number must be a multiple of the workers'.

        They are the mean of what training on `rows` would see: with on-policy states, over all numbers of iterations.
        """
        refinements = 0 if self.refiner is None else self.refiner.max_iterations
        totals = torch.zeros(2, device=self.worker.device)
        self.objective.eval()
        for row in rows[self.worker.rank :: self.worker.world]:
            documents: Sequence[RowOfDocuments] = [row]
            packed = self.feed.pack(documents)
            totals += self._losses(packed).stacked
            for _ in range(refinements):
                documents, packed = self._refined(documents, packed, 1)
                totals += self._losses(packed).stacked
        self.objective.train()
        num_ar, num_second = self.objective.count_labels(rows)
        ar, second = self._sum_over_workers(totals / (1 + refinements))
        return ar / max(1, num_ar), second / max(1, num_second)

    def _backward(self, step: Step, refinements: int) -> torch.Tensor:
        """Adds the gradient of this worker's rows; returns the sums of their AR and second loss, float32 [2]."""
        totals = torch.zeros(2, device=self.worker.device)
        for number, (rows, packed) in enumerate(step.parts, start=1):
            if isinstance(self.objective, FSDPModule):
                self.objective.set_requires_gradient_sync(number == len(step.parts))
            sums = self._losses(self._refined(rows, packed, refinements)[1])
            loss = self.ar_weight * sums.ar / max(1, step.num_ar) + sums.second / max(1, step.num_second)
            # FSDP averages gradients over workers; these losses are parts of a sum.
            (loss * self.worker.world).backward()
            totals += sums.stacked
        return totals

    def _refined(
        self, rows: Sequence[RowOfDocuments], packed: PackedRows, iterations: int
    ) -> tuple[Sequence[RowOfDocuments], PackedRows]:
        """The rows after so many of the student's iterations on their spans, and packed again."""
        for _ in range(iterations):
            assert self.refiner is not None
            assert isinstance(self.objective, PackedObjective)
            with self._autocast:
                rows = self.refiner.advance(self.objective, rows, packed)
            packed = self.feed.pack(rows)
        return rows, packed

    def _losses(self, packed: PackedRows) -> LossSums:
        with self._autocast:
            sums: LossSums = self.objective(packed)
        return sums

    def _sum_over_workers(self, values: torch.Tensor) -> list[float]:
        if self.worker.world > 1:
            dist.all_reduce(values)
        return values.tolist()


def compile_decoder_layers(model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """torch.compile in place: names of parameters stay as they are. All layers share the code that the first compiles,
    and a new mask does not compile it again; rows of another shape do."""
    for layer in decoder_layers(model):
        layer.compile(backend=backend, dynamic=False)
