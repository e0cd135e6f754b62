"""Tensor parallelism: one process and engine a GPU, each with its share of the weights, all in lockstep.

The engines are deterministic, and after every all-reduce all ranks hold the same numbers; so it is enough that they are
told the same requests, aborts and windows in the same order. Rank 0 decides, the others repeat.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from cllm.decoding.records import Commit, DecodeRequest, DecodeResult
from cllm.decoding.stats import BackendStats, StepStats
from cllm.engine.engine import Engine, added, run_to_end
from cllm.engine.model import Shard

_IDLE_TIMEOUT = timedelta(days=7)  # followers wait for the next step of an idle engine


class Group:
    """The processes of one engine, made after `torch.distributed.init_process_group` (NCCL on GPUs, gloo on CPUs)."""

    def __init__(self) -> None:
        self.shard = Shard(dist.get_rank(), dist.get_world_size())
        self._control = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)

    @property
    def leads(self) -> bool:
        return self.shard.rank == 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place. NCCL's can be captured in a CUDA graph."""
        dist.all_reduce(x)
        return x

    def broadcast(self, message: Any) -> Any:
        """Rank 0's message, on every rank."""
        box = [message]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def smallest(self, number: int) -> int:
        """The least of the ranks' numbers, on every rank."""
        box = torch.tensor(number)
        dist.all_reduce(box, dist.ReduceOp.MIN, group=self._control)
        return int(box)


class Leader:
    """The engine of rank 0. What it is told and does, the followers repeat."""

    def __init__(self, engine: Engine, group: Group) -> None:
        self.engine = engine
        self.group = group
        self._news: list[DecodeRequest | int] = []  # requests added and keys aborted since the last step

    @property
    def num_unfinished(self) -> int:
        return self.engine.num_unfinished

    @property
    def last_step(self) -> StepStats | None:
        return self.engine.last_step

    def add(self, request: DecodeRequest) -> int:
        """As `Engine.add`; a request that it refuses never reaches the followers."""
        key = self.engine.add(request)
        self._news.append(request)
        return key

    def abort(self, key: int) -> None:
        """As `Engine.abort`."""
        self.engine.abort(key)
        self._news.append(key)

    def step(self) -> list[Commit]:
        """As `Engine.step`, on all ranks."""
        window = self.engine.next_window()
        self.group.broadcast((self._news, window))
        self._news = []
        return self.engine.step(window)

    def generate(self, requests: Sequence[DecodeRequest]) -> list[DecodeResult]:
        """As `Engine.generate`."""
        with added(self, requests) as keys:
            return run_to_end(self.engine, keys, self.step)

    def stats(self) -> BackendStats:
        """As `Engine.stats`; the memory is rank 0's."""
        return self.engine.stats()

    def close(self) -> None:
        """Send the followers home."""
        self.group.broadcast(None)


def follow(engine: Engine, group: Group) -> None:
    """Repeat what the leader does until it closes."""
    while (message := group.broadcast(None)) is not None:
        news, window = message
        for item in news:
            if isinstance(item, DecodeRequest):
                engine.add(item)
            else:
                engine.abort(item)
        engine.step(window)
