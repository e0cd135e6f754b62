"""One engine over several processes of a machine: rank 0 in this one, the other ranks in its children.

A child ends when its parent does, however that ends; a child that dies is told by `check`.
"""

import multiprocessing
import time
from typing import Protocol

import torch
import torch.distributed as dist

from cllm.engine.children import live_with_parent
from cllm.engine.engine import Engine
from cllm.engine.parallel import Group, Leader, follow
from cllm.errors import InputError

_HOST = "127.0.0.1"
_POLL_S = 0.05
_FAREWELL_S = 10  # for followers that were sent home
_LAST_WORDS_S = 1  # from a broken connection to the exit code of who broke it


class LoadShard(Protocol):
    """Loads one rank's engine. It travels to the other processes, so it must be picklable."""

    def __call__(self, *, group: Group) -> Engine: ...


class FollowerLostError(RuntimeError):
    """A process that holds a part of the model has died."""


class ShardedEngine(Leader):
    """An engine whose model is divided among `world` processes: one a GPU (NCCL), or on the CPU (gloo).

    Args:
        load: called on every rank.
        world: processes, this one included.

    Raises:
        InputError: what `load` refuses, or fewer GPUs than processes.
        FollowerLostError: a process died before its engine was ready.
    """

    def __init__(self, load: LoadShard, world: int) -> None:
        _check_devices(world)
        store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        self._followers = _Followers(load, world, store.port)
        try:
            self._followers.wait_until_up(store)
            group = _join(store, 0, world)
            super().__init__(load(group=group), group)
        except InputError:  # all ranks refuse alike
            self._end()
            raise
        except Exception as error:
            self._followers.wait(_LAST_WORDS_S)
            lost = self._followers.lost()
            self._end()
            if lost is None:
                raise
            raise FollowerLostError(lost) from error

    def check(self) -> None:
        """Raise FollowerLostError if one of the other processes has died. Any thread may ask."""
        lost = self._followers.lost()
        if lost is not None:
            raise FollowerLostError(lost)

    def close(self) -> None:
        """End the other processes."""
        if self._followers.lost() is None:
            super().close()
            self._followers.wait(_FAREWELL_S)
        self._end()

    def _end(self) -> None:
        self._followers.kill()
        if dist.is_initialized():
            dist.destroy_process_group()


class _Followers:
    """The processes of ranks 1 and up."""

    def __init__(self, load: LoadShard, world: int, port: int) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._processes = [
            context.Process(target=_follow, args=(load, rank, world, port), name=f"rank {rank}", daemon=True)
            for rank in range(1, world)
        ]
        for process in self._processes:
            process.start()

    def wait_until_up(self, store: dist.Store) -> None:
        """Return when every process can take part in a collective; those that follow notice a death by themselves."""
        for process in self._processes:
            while not store.check([process.name]):
                if not process.is_alive():
                    raise FollowerLostError(f"{process.name} did not start")
                time.sleep(_POLL_S)

    def lost(self) -> str | None:
        """What to say of the first process that is dead; None if all live."""
        for process in self._processes:
            if not process.is_alive():
                return f"{process.name} of the engine has died (exit code {process.exitcode}); the log says why"
        return None

    def wait(self, patience_s: float) -> None:
        """For them to end by themselves."""
        deadline = time.monotonic() + patience_s
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _follow(load: LoadShard, rank: int, world: int, port: int) -> None:
    """The life of a follower."""
    live_with_parent()
    store = dist.TCPStore(_HOST, port, is_master=False)
    store.set(multiprocessing.current_process().name, "up")
    group = _join(store, rank, world)
    try:
        follow(load(group=group), group)
    except InputError as error:
        raise SystemExit(f"rank {rank}: {error}") from None
    dist.destroy_process_group()


def _join(store: dist.Store, rank: int, world: int) -> Group:
    """Make this process and thread that of a rank."""
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    return Group()


def _check_devices(world: int) -> None:
    if torch.cuda.is_available() and torch.cuda.device_count() < world:
        found = torch.cuda.device_count()
        raise InputError(f"a model divided among {world} processes needs {world} GPUs, this machine shows {found}")
