"""Two ranks, each with half of every layer, decode what one process decodes."""

import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.engine.config import EngineConfig
from cllm.engine.engine import Engine
from cllm.engine.parallel import Group, Leader, follow
from cllm.engine.weights import model_from_transformers
from tests.engine.making import check_books, make_engine
from tests.fakes import EOS, PAD, tiny_model

REQUESTS = [DecodeRequest((3 + i, 4, 5), 20, SamplingParams(temperature=i % 2, seed=i)) for i in range(7)]
SETTINGS = {"window": 5, "max_rows": 4, "max_tokens": 96, "block_tokens": 4, "prefill_tokens": 16, "overlap": True}


def decode_on_rank(rank: int, world: int, port: int, path: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    group = Group()
    model = model_from_transformers(tiny_model(3), shard=group.shard, all_reduce=group.all_reduce)
    engine = Engine(model, EngineConfig.model_validate(SETTINGS), eos_ids=[EOS], pad_id=PAD)
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


def test_two_ranks_decode_what_one_process_decodes(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "tokens.pt"
    mp.spawn(decode_on_rank, args=(2, port, str(path)), nprocs=2)
    expected = make_engine(tiny_model(3), **SETTINGS).generate(REQUESTS)
    assert torch.load(path) == [result.token_ids for result in expected]
