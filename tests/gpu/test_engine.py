"""The engine on a GPU: graphs, overlap and paged attention change no token."""

from dataclasses import replace

import pytest
import torch

from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.decoding.reference import autoregressive
from cllm.engine.backends import attention_for, ops_for
from cllm.engine.config import EngineConfig
from cllm.engine.load import build_engine
from cllm.engine.ops import TorchOps
from cllm.engine.weights import model_from_transformers
from tests.engine.making import check_books
from tests.fakes import EOS, FAMILIES, PAD, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
SETTINGS = {"window": 8, "max_rows": 5, "max_tokens": 96, "block_tokens": 16, "prefill_tokens": 16, "guess": "pad"}


def requests() -> list[DecodeRequest]:
    sampled = {"temperature": 0.9, "top_k": 5, "frequency_penalty": 0.5}
    return [
        DecodeRequest((3 + i, *range(4, 4 + 3 * i)), 30, SamplingParams(seed=i, **(sampled if i % 3 == 2 else {})))
        for i in range(6)
    ]


def engine_for(model, dtype=torch.float32, **settings):
    model = model.to(CUDA, dtype)
    lean = model_from_transformers(model, ops=ops_for(CUDA, dtype), attention=attention_for(CUDA, dtype))
    config = EngineConfig.model_validate(SETTINGS | settings)
    return build_engine(lean, config, eos_ids=[EOS], pad_id=PAD)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("refill", ["block", "sliding"])
def test_greedy_tokens_are_those_of_ar_on_the_cpu(family, graphs, refill):
    torch.backends.cuda.matmul.allow_tf32 = False
    greedy = [request for request in requests() if request.sampling.temperature == 0]
    expected = [autoregressive(tiny_model(3, family=family, hidden=64), request, [EOS]) for request in greedy]
    engine = engine_for(tiny_model(3, family=family, hidden=64), cuda_graphs=graphs, refill=refill)
    assert [list(result.token_ids) for result in engine.generate(greedy)] == expected
    check_books(engine)


@pytest.mark.parametrize("graphs", [True, False])
def test_lookahead_gives_the_tokens_of_ar(graphs):
    """Greedy steps and sampled ones, more requests than rows; penalties are not for lookahead decoding."""
    model = tiny_model(3, hidden=64)
    plain = [replace(r, sampling=replace(r.sampling, frequency_penalty=0.0)) for r in requests()]
    repeating = [replace(r, prompt_ids=r.prompt_ids * 3) for r in plain]  # n-grams to be confirmed, keys to be moved
    ar = engine_for(model, window=1, max_rows=1, cuda_graphs=False, overlap=False).generate(plain + repeating)
    lookahead = {"window": 4, "ngram": 3, "candidates": 4}
    engine = engine_for(model, lookahead=lookahead, cuda_graphs=graphs)
    engine.capture()
    results = engine.generate(plain + repeating)
    assert [result.token_ids for result in results] == [result.token_ids for result in ar]
    assert max(max(result.accepted) for result in results) > 1
    check_books(engine)


def test_sampled_tokens_do_not_depend_on_window_batch_or_graphs():
    one = engine_for(tiny_model(3, hidden=64), window=1, max_rows=1, cuda_graphs=False, overlap=False)
    many = engine_for(tiny_model(3, hidden=64))
    assert [r.token_ids for r in many.generate(requests())] == [r.token_ids for r in one.generate(requests())]


def test_adaptive_window_times_steps_and_changes_no_token():
    engine = engine_for(tiny_model(3, hidden=64), policy="adaptive")
    fixed = engine_for(tiny_model(3, hidden=64))
    assert [r.token_ids for r in engine.generate(requests())] == [r.token_ids for r in fixed.generate(requests())]


def test_fused_kernels_give_the_logits_of_plain_torch():
    model = tiny_model(3, family="qwen3", hidden=128, scale=0.1).to(CUDA, torch.bfloat16)
    request = DecodeRequest(tuple(range(2, 22)), 1, SamplingParams(logprobs=5))
    found = []
    for ops in (ops_for(CUDA), TorchOps()):
        lean = model_from_transformers(model, ops=ops, attention=attention_for(CUDA))
        engine = build_engine(lean, EngineConfig.model_validate(SETTINGS), eos_ids=[EOS], pad_id=PAD)
        ((commit,),) = list(engine.stream([request]))
        found.append(dict(commit.logprobs[0].top))
    for token in found[0].keys() & found[1].keys():
        assert found[0][token] == pytest.approx(found[1][token], abs=0.05)
    assert len(found[0].keys() & found[1].keys()) >= 3
