"""The optimiser step over packed rows, on one device or sharded by FSDP2 over several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
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
from cllm.training.worker import Worker


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Mean losses in nats a token over all workers, and the number of packed tokens (padding included).

    `consistency` is the objective's second loss, whatever its name.
    """

    ar: float
    consistency: float
    num_tokens: int
    grad_norm: float
    learning_rate: float


class Trainer:
    """Trains an objective's model on a stream of packed rows.

    Loss = consistency (or another second loss) + ar_weight * AR, each the mean over its tokens of the whole step,
    whatever the number of workers and accumulation steps: both counts are known before the forward, because every
    worker sees the whole stream. With on-policy states the consistency mean is over the drawn tokens, though refinement
    may settle some of them.

    Args:
        compile_layers: decoder layers run through torch.compile; losses differ by rounding.
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
    ) -> None:
        parts = worker.world * config.accumulation
        if config.rows_per_step % parts:
            raise ValueError(f"rows_per_step {config.rows_per_step} is no multiple of workers x accumulation {parts}")
        if config.optimizer == "muon" and worker.world > 1:
            raise InputError("optim.optimizer: muon trains on one worker only; use adamw")
        self.config = config
        self.stream = stream
        self.feed = StepFeed(stream, config, pad_id, worker, objective.count_labels)
        self.worker = worker
        self.ar_weight = ar_weight
        self.refiner = refiner
        self.step = 0
        self.model = objective.trained
        self.objective = objective.to(worker.device).train()
        if compile_layers:
            for model in objective.models:
                compile_decoder_layers(model)
        if worker.world > 1:
            _shard(self.objective, dtype)
        self._autocast = torch.autocast(worker.device.type, dtype, enabled=worker.world == 1 and dtype != torch.float32)
        self.optimizers = objective.build_optimizers(config)

    def train_step(self) -> StepLosses:
        """One optimiser step; raises RuntimeError if the loss is not finite (nothing is updated then)."""
        step = self.feed.take()
        sums = self._backward(step)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.max_grad_norm)
        if self.step + 1 < self.config.steps:
            self.feed.prepare()  # while the GPU is at work: it is asked for a value only below
        ar, consistency = self._sum_over_workers(sums)
        norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
        if not norm < float("inf"):
            raise RuntimeError(f"step {self.step}: gradient norm {norm}; lower the learning rate")
        learning_rate = learning_rate_at(self.step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("scale", 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        num_tokens = self.config.rows_per_step * self.config.row_tokens
        return StepLosses(
            ar / max(1, step.num_ar), consistency / max(1, step.num_consistency), num_tokens, norm, learning_rate
        )

    @torch.no_grad()
    def validate(self, rows: Sequence[RowOfDocuments]) -> tuple[float, float]:
        """Mean AR and consistency loss over `rows`, whose number must be a multiple of the workers'."""
        self.objective.eval()
        totals = torch.zeros(2, device=self.worker.device)
        for row in rows[self.worker.rank :: self.worker.world]:
            totals += self._losses([row], self.feed.pack([row])).stacked
        self.objective.train()
        num_ar, num_consistency = self.objective.count_labels(rows)
        ar, consistency = self._sum_over_workers(totals)
        return ar / max(1, num_ar), consistency / max(1, num_consistency)

    def _backward(self, step: Step) -> torch.Tensor:
        """Adds the gradient of this worker's rows; returns their AR and consistency sums, float32 [2]."""
        totals = torch.zeros(2, device=self.worker.device)
        for number, (rows, packed) in enumerate(step.parts, start=1):
            if isinstance(self.objective, FSDPModule):
                self.objective.set_requires_gradient_sync(number == len(step.parts))
            sums = self._losses(rows, packed, refine=True)
            loss = self.ar_weight * sums.ar / max(1, step.num_ar) + sums.consistency / max(1, step.num_consistency)
            # FSDP averages gradients over workers; these losses are parts of a sum.
            (loss * self.worker.world).backward()
            totals += sums.stacked
        return totals

    def _losses(self, rows: Sequence[RowOfDocuments], packed: PackedRows, refine: bool = False) -> LossSums:
        with self._autocast:
            if refine and self.refiner is not None:
                assert isinstance(self.objective, PackedObjective)
                for _ in range(self.refiner.iterations_at(self.step)):
                    rows = self.refiner.advance(self.objective, rows, packed)
                    packed = self.feed.pack(rows)
            sums: LossSums = self.objective(packed)
        return sums

    def _sum_over_workers(self, values: torch.Tensor) -> list[float]:
        if self.worker.world > 1:
            dist.all_reduce(values)
        return values.tolist()


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    layers = model.base_model.layers
    assert isinstance(layers, torch.nn.ModuleList)
    return layers


def compile_decoder_layers(model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """torch.compile in place: names of parameters stay as they are. All layers share the code that the first compiles,
    and a new mask does not compile it again; rows of another shape do."""
    for layer in decoder_layers(model):
        layer.compile(backend=backend, dynamic=False)


def _shard(objective: Objective, dtype: torch.dtype) -> None:
    """FSDP2: every decoder layer is a unit, and the rest (embeddings, norm, output projection) is one with the root."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for model in objective.models:
        for layer in decoder_layers(model):
            fully_shard(layer, mp_policy=policy)
    fully_shard(objective, mp_policy=policy)
