"""Two ranks, each with half of every layer, decode what one process decodes; none outlives the other unnoticed."""

import asyncio
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.engine.async_engine import AsyncEngine, EngineStoppedError
from cllm.engine.config import EngineConfig
from cllm.engine.engine import Engine
from cllm.engine.parallel import Group, Leader, follow
from cllm.engine.shards import FollowerLostError, ShardedEngine
from cllm.engine.weights import model_from_transformers
from cllm.errors import InputError
from tests.engine.making import check_books, make_engine
from tests.fakes import EOS, PAD, tiny_model

REQUESTS = [DecodeRequest((3 + i, 4, 5), 20, SamplingParams(temperature=i % 2, seed=i)) for i in range(7)]
SETTINGS = {"window": 5, "max_rows": 4, "max_tokens": 96, "block_tokens": 4, "prefill_tokens": 16, "overlap": True}
LOOKAHEAD = SETTINGS | {"overlap": False, "lookahead": {"window": 3, "ngram": 3, "candidates": 3}}


def load_tiny(*, group: Group, settings: Mapping[str, object] = SETTINGS) -> Engine:
    model = model_from_transformers(tiny_model(3), shard=group.shard, all_reduce=group.all_reduce)
    return Engine(model, EngineConfig.model_validate(settings), eos_ids=[EOS], pad_id=PAD)


def refuse(*, group: Group) -> Engine:
    raise InputError("no such checkpoint")


def die_on_rank_1(*, group: Group) -> Engine:
    if not group.leads:
        os._exit(3)
    group.smallest(0)
    raise AssertionError("the other rank answered")


def decode_on_rank(rank: int, world: int, port: int, path: str, settings: Mapping[str, object]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    group = Group()
    engine = load_tiny(group=group, settings=settings)
    if group.leads:
        leader = Leader(engine, group)
        dropped = leader.add(DecodeRequest((9, 8), 60, SamplingParams(ignore_eos=True)))
        leader.step()
        leader.abort(dropped)
        torch.save([result.token_ids for result in leader.generate(REQUESTS)], path)
        leader.close()
    else:
        follow(engine, group)
    check_books(engine)
    dist.destroy_process_group()


@pytest.mark.parametrize("settings", [SETTINGS, LOOKAHEAD], ids=["jacobi", "lookahead"])
def test_two_ranks_decode_what_one_process_decodes(tmp_path: Path, settings: Mapping[str, object]):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "tokens.pt"
    mp.spawn(decode_on_rank, args=(2, port, str(path), settings), nprocs=2)
    expected = make_engine(tiny_model(3), **settings).generate(REQUESTS)
    assert torch.load(path) == [result.token_ids for result in expected]


@contextmanager
def sharded() -> Iterator[AsyncEngine]:
    front = AsyncEngine(lambda: ShardedEngine(load_tiny, 2))
    try:
        front.wait_ready(120)
        yield front
    finally:
        front.close()
    assert not multiprocessing.active_children()


async def collect(front: AsyncEngine, request: DecodeRequest) -> tuple[int, ...]:
    return tuple([token async for commit in front.stream(request) for token in commit.token_ids])


def kill_follower() -> None:
    (follower,) = multiprocessing.active_children()
    os.kill(follower.pid, signal.SIGKILL)
    follower.join()


def test_processes_of_one_engine_decode_what_one_process_decodes_and_a_death_is_told_while_idle():
    expected = make_engine(tiny_model(3), **SETTINGS).generate(REQUESTS)

    async def run(front: AsyncEngine) -> list[tuple[int, ...]]:
        return await asyncio.gather(*(collect(front, request) for request in REQUESTS))

    with sharded() as front:
        assert asyncio.run(run(front)) == [result.token_ids for result in expected]
        front.check()
        kill_follower()
        with pytest.raises(FollowerLostError, match=r"rank 1 .*exit code -9"):
            front.check()


def test_a_follower_that_dies_under_a_stream_ends_it():
    async def run(front: AsyncEngine) -> None:
        stream = front.stream(DecodeRequest((3, 4), 90, SamplingParams(ignore_eos=True)))
        await anext(stream)
        kill_follower()
        async for _ in stream:
            pass

    with sharded() as front, pytest.raises(EngineStoppedError):
        asyncio.run(run(front))


def test_a_rank_that_refuses_or_dies_while_it_loads_is_told():
    with pytest.raises(InputError, match="no such checkpoint"):
        ShardedEngine(refuse, 2)
    with pytest.raises(FollowerLostError, match=r"rank 1 .*exit code 3"):
        ShardedEngine(die_on_rank_1, 2)
    assert not multiprocessing.active_children()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


LEADER = """
import multiprocessing, signal
from cllm.engine.shards import ShardedEngine
from tests.engine.test_parallel import load_tiny

if __name__ == "__main__":
    engine = ShardedEngine(load_tiny, 2)
    print(multiprocessing.active_children()[0].pid, flush=True)
    signal.pause()
"""


def test_followers_die_with_a_killed_leader(tmp_path: Path):
    (tmp_path / "leader.py").write_text(LEADER)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    leader = subprocess.Popen([sys.executable, tmp_path / "leader.py"], env=environment, stdout=subprocess.PIPE)
    with leader:
        follower = int(leader.stdout.readline())
        assert is_alive(follower)
        leader.kill()
    deadline = time.monotonic() + 30
    while is_alive(follower):
        assert time.monotonic() < deadline, "the follower outlived its leader"
        time.sleep(0.05)
