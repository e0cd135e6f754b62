"""The engine as it is served on a GPU: bfloat16, fused kernels, FlashAttention-3 where there is one, captured graphs.

Judged by transformers in float32 on the tokens that the engine chose: every log-probability that it reports, over whole
responses.
"""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from cllm.bench.agreement import compare
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.engine.backends import attention_for, ops_for, triton_attention
from cllm.engine.config import EngineConfig
from cllm.engine.engine import Engine
from cllm.engine.load import build_engine, cache_blocks
from cllm.engine.weights import model_from_transformers
from cllm.errors import InputError
from tests.engine.making import check_books
from tests.fakes import EOS, FAMILIES, PAD, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
SETTINGS = {"window": 8, "max_rows": 5, "max_tokens": 160, "block_tokens": 16, "guess": "pad"}


def model_of(family: str = "llama") -> PreTrainedModel:
    """Heads of 64, as production models have at least, and logits of a natural spread."""
    return tiny_model(3, family=family, hidden=256, scale=0.08)


def engine_for(
    model: PreTrainedModel, *, attention: str = "best", dtype: torch.dtype = torch.bfloat16, **settings: object
) -> Engine:
    options = {"quantization": settings.pop("quantization")} if "quantization" in settings else {}
    lean = model_from_transformers(
        model.to(CUDA, dtype),
        ops=ops_for(CUDA, dtype),
        attention=triton_attention(CUDA) if attention == "triton" else attention_for(CUDA, dtype),
        **options,
    )
    return build_engine(lean, EngineConfig.model_validate(SETTINGS | settings), eos_ids=[EOS], pad_id=PAD)


def requests(**sampling: object) -> list[DecodeRequest]:
    params = SamplingParams(logprobs=5, ignore_eos=True, **sampling)
    return [DecodeRequest((3 + i, *range(4, 5 + 3 * i)), 30, replace(params, seed=i)) for i in range(7)]


@torch.no_grad()
def largest_error(model: PreTrainedModel, engine: Engine, asked: list[DecodeRequest]) -> float:
    """Of all log-probabilities that the engine reports, those of the five likeliest tokens included; nats."""
    tokens, found = [[] for _ in asked], [[] for _ in asked]
    for commits in engine.stream(asked):
        for commit in commits:
            tokens[commit.row] += commit.token_ids
            found[commit.row] += commit.logprobs
    worst = 0.0
    for request, response, reported in zip(asked, tokens, found, strict=True):
        assert len(response) == len(reported) == request.max_new_tokens
        row_1L = torch.tensor([[*request.prompt_ids, *response]], device=model.device)
        start = len(request.prompt_ids) - 1
        expected_LV = model(row_1L).logits[0, start:-1].float().log_softmax(-1)
        for token, one, expected_V in zip(response, reported, expected_LV, strict=True):
            pairs = [(token, one.logprob), *one.top]
            worst = max([worst, *(abs(logprob - float(expected_V[each])) for each, logprob in pairs)])
    check_books(engine)
    return worst


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["best", "triton"])
@pytest.mark.parametrize("window", [1, 8])
def test_log_probabilities_over_whole_responses(family: str, attention: str, window: int) -> None:
    engine = engine_for(model_of(family), attention=attention, window=window)
    assert largest_error(model_of(family).to(CUDA), engine, requests()) < 0.1


def test_sampled_responses_as_well() -> None:
    engine = engine_for(model_of())
    asked = requests(temperature=0.9, top_p=0.9, frequency_penalty=0.4, min_tokens=5)
    assert largest_error(model_of().to(CUDA), engine, asked) < 0.1


def test_int8_weights() -> None:
    """Forwards of few tokens, where plain weights would go through our own kernels, and prompts of more than 64."""
    pytest.importorskip("torchao")
    engine = engine_for(model_of(), quantization="int8")
    asked = [*requests(), replace(requests()[0], prompt_ids=tuple(2 + i % 20 for i in range(100)))]
    assert largest_error(model_of().to(CUDA), engine, asked) < 0.5


def test_jacobi_differs_from_ar_in_near_ties_only() -> None:
    asked = [DecodeRequest((2 + i % 22, 3 + i // 22), 40) for i in range(200)]
    one, many = (engine_for(model_of(), window=n, max_rows=64).generate(asked) for n in (1, 8))
    judge = engine_for(model_of(), dtype=torch.float32, window=1, max_rows=64)
    agreement = compare(judge, asked, one, many)
    assert agreement.identical > 0.6  # a random model: tokens are near ties everywhere
    assert max(agreement.margins, default=0.0) < 0.1


@pytest.mark.parametrize("attention", ["best", "triton"])
def test_padding_behind_a_late_chunk_near_the_limit(attention: str) -> None:
    """The first prompt's end is read together with a longer piece of another: its padding ends behind the table."""
    engine = engine_for(model_of(), attention=attention, window=1, prefill_tokens=160, max_tokens=160)
    long, new = tuple(2 + i % 22 for i in range(158)), tuple(3 + i % 19 for i in range(80))
    engine.generate([DecodeRequest(long[:113], 1)])
    params = SamplingParams(logprobs=5, ignore_eos=True)
    asked = [DecodeRequest(long, 2, params), DecodeRequest(new, 20, params)]
    assert largest_error(model_of().to(CUDA), engine, asked) < 0.1


@pytest.mark.parametrize("policy", ["fixed", "adaptive"])
def test_no_request_waits_for_a_capture(policy: str) -> None:
    engine = engine_for(model_of(), policy=policy)
    captured = dict(engine.runner._graphs)
    assert {greedy for _, _, greedy in captured} == {True, False}
    for asked in (requests(), requests(temperature=1.0), requests(temperature=1.0, top_k=3)):
        engine.generate(asked)
    assert engine.runner._graphs == captured
    drawn = [graph for (_, _, greedy), graph in captured.items() if not greedy]
    assert len({graph.logits_BPV.data_ptr() for graph in drawn}) == 1, "sampled steps share one place for logits"


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made() -> None:
    lean = model_from_transformers(model_of().to(CUDA, torch.bfloat16))
    config = EngineConfig.model_validate(SETTINGS | {"cache_blocks": 1 << 30})
    with pytest.raises(InputError, match="cache_blocks: 1073741824 blocks take"):
        cache_blocks(lean, config)
