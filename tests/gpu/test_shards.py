"""Tensor parallelism over NCCL, all-reduces captured in the steps' graphs."""

import pytest
import torch

from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.engine.backends import attention_for, ops_for
from cllm.engine.config import EngineConfig
from cllm.engine.engine import Engine
from cllm.engine.load import build_engine
from cllm.engine.model import Shard
from cllm.engine.parallel import Group
from cllm.engine.shards import ShardedEngine
from cllm.engine.weights import model_from_transformers
from tests.engine.making import check_books
from tests.fakes import EOS, PAD, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
SETTINGS = {"window": 8, "max_rows": 5, "max_tokens": 96, "block_tokens": 16, "guess": "pad"}


def requests() -> list[DecodeRequest]:
    """Greedy and sampled ones, more than there are rows."""
    return [
        DecodeRequest((3 + i, *range(4, 4 + 3 * i)), 30, SamplingParams(seed=i, temperature=0.9 if i % 3 == 2 else 0.0))
        for i in range(8)
    ]


def load(policy: str = "fixed", *, group: Group | None = None) -> Engine:
    device, dtype = torch.device("cuda"), torch.float32
    torch.backends.cuda.matmul.allow_tf32 = False
    model = model_from_transformers(
        tiny_model(3, hidden=64).to(device, dtype),
        ops=ops_for(device, dtype),
        attention=attention_for(device, dtype),
        shard=Shard() if group is None else group.shard,
        all_reduce=None if group is None else group.all_reduce,
    )
    config = EngineConfig.model_validate(SETTINGS | {"policy": policy})
    return build_engine(model, config, eos_ids=[EOS], pad_id=PAD, group=group)


def load_adaptive(*, group: Group) -> Engine:
    return load("adaptive", group=group)


@pytest.mark.parametrize("load_rank", [load, load_adaptive])
def test_two_gpus_decode_what_one_decodes(load_rank) -> None:
    expected = [result.token_ids for result in load().generate(requests())]
    sharded = ShardedEngine(load_rank, 2)
    try:
        assert sharded.engine.runner._graphs, "captured before the first request"
        assert [result.token_ids for result in sharded.generate(requests())] == expected
        sharded.check()
        check_books(sharded.engine)
    finally:
        sharded.close()
