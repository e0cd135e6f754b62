"""The optimiser step over packed rows, on one device or sharded by FSDP2 over several."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from cllm.errors import InputError
from cllm.recipe import OptimConfig
from cllm.training.batches import RowOfDocuments, RowStream
from cllm.training.forward import PackedObjective
from cllm.training.losses import Divergence, LossSums
from cllm.training.on_policy import Refiner
from cllm.training.optim import build_optimizers, learning_rate_at
from cllm.training.packing import PackedRows, pack


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """This process among those that train together. `rank` of `world` processes, each with one device."""

    device: torch.device
    rank: int = 0
    world: int = 1


@dataclass(frozen=True, slots=True)
class StepLosses:
    """Mean losses in nats a token over all workers, and the number of packed tokens (padding included)."""

    ar: float
    consistency: float
    num_tokens: int
    grad_norm: float
    learning_rate: float


class Trainer:
    """Trains a model on a stream of packed rows.

    Loss = consistency + ar_weight * AR, each the mean over its tokens of the whole step, whatever the number of workers
    and accumulation steps: both counts are known before the forward, because every worker sees the whole stream. With
    on-policy states the consistency mean is over the drawn tokens, though refinement may settle some of them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stream: RowStream,
        config: OptimConfig,
        *,
        ar_weight: float,
        divergence: Divergence,
        dtype: torch.dtype,
        pad_id: int,
        worker: Worker,
        refiner: Refiner | None = None,
    ) -> None:
        parts = worker.world * config.accumulation
        if config.rows_per_step % parts:
            raise ValueError(f"rows_per_step {config.rows_per_step} is no multiple of workers x accumulation {parts}")
        if config.optimizer == "muon" and worker.world > 1:
            raise InputError("optim.optimizer: muon trains on one worker only; use adamw")
        self.config = config
        self.stream = stream
        self.worker = worker
        self.ar_weight = ar_weight
        self.pad_id = pad_id
        self.refiner = refiner
        self.step = 0
        self.model = model
        self.objective = PackedObjective(model, divergence).to(worker.device).train()
        if worker.world > 1:
            _shard(self.objective, dtype)
        self._autocast = torch.autocast(worker.device.type, dtype, enabled=worker.world == 1 and dtype != torch.float32)
        self.optimizers = build_optimizers(model, config)

    def train_step(self) -> StepLosses:
        """One optimiser step; raises RuntimeError if the loss is not finite (nothing is updated then)."""
        rows = self.stream.take(self.config.rows_per_step)
        num_ar, num_consistency = count_labels(rows)
        ar, consistency, num_tokens = self._backward(rows, num_ar, num_consistency)
        grad_norm = torch.nn.utils.clip_grad_norm_(self.objective.parameters(), self.config.max_grad_norm)
        norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
        if not norm < float("inf"):
            raise RuntimeError(f"step {self.step}: gradient norm {norm}; lower the learning rate")
        learning_rate = learning_rate_at(self.step, self.config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        sums = self._sum_over_workers(torch.stack([ar, consistency]))
        return StepLosses(sums[0] / max(1, num_ar), sums[1] / max(1, num_consistency), num_tokens, norm, learning_rate)

    @torch.no_grad()
    def validate(self, rows: Sequence[RowOfDocuments]) -> tuple[float, float]:
        """Mean AR and consistency loss over `rows`, whose number must be a multiple of the workers'."""
        self.objective.eval()
        totals = torch.zeros(2, device=self.worker.device)
        for row in rows[self.worker.rank :: self.worker.world]:
            sums = self._losses([row])
            totals += torch.stack([sums.ar, sums.consistency])
        self.objective.train()
        num_ar, num_consistency = count_labels(rows)
        ar, consistency = self._sum_over_workers(totals)
        return ar / max(1, num_ar), consistency / max(1, num_consistency)

    def _backward(
        self, rows: Sequence[RowOfDocuments], num_ar: int, num_consistency: int
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        mine = rows[self.worker.rank :: self.worker.world]
        size = len(mine) // self.config.accumulation
        ar = consistency = torch.zeros((), device=self.worker.device)
        for start in range(0, len(mine), size):
            if isinstance(self.objective, FSDPModule):
                self.objective.set_requires_gradient_sync(start + size == len(mine))
            sums = self._losses(mine[start : start + size], refine=True)
            loss = self.ar_weight * sums.ar / max(1, num_ar) + sums.consistency / max(1, num_consistency)
            (
                loss * self.worker.world
            ).backward()  # FSDP averages gradients over workers; these losses are parts of a sum
            ar, consistency = ar + sums.ar.detach(), consistency + sums.consistency.detach()
        return ar, consistency, len(rows) * self.config.row_tokens

    def _losses(self, rows: Sequence[RowOfDocuments], refine: bool = False) -> LossSums:
        packed = self._pack(rows)
        with self._autocast:
            if refine and self.refiner is not None:
                for _ in range(self.refiner.iterations_at(self.step)):
                    rows = self.refiner.advance(self.objective, rows, packed)
                    packed = self._pack(rows)
            sums: LossSums = self.objective(packed)
        return sums

    def _pack(self, rows: Sequence[RowOfDocuments]) -> PackedRows:
        return pack(rows, self.config.row_tokens, self.pad_id).to(self.worker.device)

    def _sum_over_workers(self, values: torch.Tensor) -> list[float]:
        if self.worker.world > 1:
            dist.all_reduce(values)
        return values.tolist()


def count_labels(rows: Sequence[RowOfDocuments]) -> tuple[int, int]:
    """Tokens that bear an AR loss and a consistency loss."""
    documents = [document for row in rows for document in row]
    return sum(d.num_ar_labels for d in documents), sum(d.num_consistency_labels for d in documents)


def _shard(objective: PackedObjective, dtype: torch.dtype) -> None:
    """FSDP2: every decoder layer is a unit, and the rest (embeddings, norm, output projection) is one with the root."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = objective.model.base_model.layers
    assert isinstance(layers, torch.nn.ModuleList)
    for layer in layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(objective, mp_policy=policy)
