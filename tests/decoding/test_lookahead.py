"""Lookahead decoding gives AR's tokens with any window and n-grams, and saves forwards where text repeats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.decoding.branches import Branches, CandidatePool
from cllm.decoding.cache import RowCache
from cllm.decoding.lookahead import LookaheadDecoder
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.decoding.reference import autoregressive
from cllm.decoding.step import masked_logits_BWV
from cllm.errors import InputError
from tests.fakes import EOS, FAMILIES, PAD, tiny_model


def make_decoder(model, window=4, ngram=3, candidates=3, eos_ids=(EOS,), **kwargs):
    return LookaheadDecoder(
        model, window=window, ngram=ngram, candidates=candidates, eos_ids=eos_ids, pad_id=PAD, **kwargs
    )


def cycle_model(period, seed=0):
    """A model whose next token is a fixed function of the last one: tokens 2 .. period + 1 in a circle.

    Without layers and with orthogonal embeddings, each token's logit is largest for its successor.
    """
    model = tiny_model(seed)
    vocab, hidden = model.get_input_embeddings().weight.shape
    successor = torch.arange(vocab)
    successor[2 : 2 + period] = 2 + (torch.arange(period) + 1) % period
    with torch.no_grad():
        basis, _ = torch.linalg.qr(torch.randn(hidden, hidden))
        model.model.layers = torch.nn.ModuleList()
        model.config.num_hidden_layers = 0
        model.model.embed_tokens.weight.copy_(basis[:vocab])
        model.lm_head.weight[successor] = basis[:vocab]
    return model


@st.composite
def requests(draw):
    return DecodeRequest(
        tuple(draw(st.lists(st.integers(2, 23), min_size=1, max_size=12))),
        draw(st.integers(1, 24)),
        SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.3])),
            top_k=draw(st.sampled_from([0, 3])),
            top_p=draw(st.sampled_from([1.0, 0.8])),
            seed=draw(st.integers(0, 2**63)),
        ),
    )


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    model_seed=st.integers(0, 7),
    batch=st.lists(requests(), min_size=1, max_size=2),
    window=st.integers(1, 7),
    ngram=st.integers(2, 5),
    candidates=st.integers(1, 4),
    guess=st.sampled_from(["prompt", "pad"]),
    pool_text=st.booleans(),
)
def test_any_request_equals_autoregressive(model_seed, batch, window, ngram, candidates, guess, pool_text):
    model = tiny_model(model_seed)
    decoder = make_decoder(model, window, ngram, candidates, guess=guess, pool_text=pool_text)
    for request, result in zip(batch, decoder.generate(batch), strict=True):
        expected = autoregressive(model, request, [EOS])
        assert list(result.token_ids) == expected
        assert sum(result.accepted) == len(expected)
        assert all(1 <= accepted <= ngram for accepted in result.accepted)
        assert result.finish_reason == ("stop" if expected[-1] == EOS else "length")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    model_seed=st.integers(0, 7),
    prompt=st.lists(st.integers(2, 23), min_size=1, max_size=6),
    limit=st.integers(1, 40),
    ngram=st.integers(2, 5),
    end=st.integers(0, 39),
    temperature=st.sampled_from([0.0, 0.4]),
)
def test_accepted_ngrams_end_where_autoregression_ends(model_seed, prompt, limit, ngram, end, temperature):
    """A prompt that holds AR's own answer makes long n-grams hold, so ends fall inside them; any token is the end."""
    model = tiny_model(model_seed)
    sampling = SamplingParams(temperature=temperature, seed=5)
    answer = autoregressive(model, DecodeRequest(tuple(prompt), 40, sampling), [])
    request = DecodeRequest(tuple(prompt), limit, sampling)
    eos_ids = [answer[end]]
    decoder = make_decoder(model, 3, ngram, 4, eos_ids=eos_ids)
    row = decoder._open(request)
    row.state.pool.add([prompt[-1], *answer])
    for _ in decoder._run(row, request):
        pass
    result = row.result()
    assert list(result.token_ids) == autoregressive(model, request, eos_ids)
    assert result.finish_reason == ("stop" if result.token_ids[-1] == eos_ids[0] else "length")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_autoregressive(family):
    model = tiny_model(3, family=family)
    batch = [DecodeRequest((5, 6, 7), 20), DecodeRequest((9,), 11), DecodeRequest(tuple(range(2, 20)), 17)]
    results = make_decoder(model).generate(batch)
    assert [list(r.token_ids) for r in results] == [autoregressive(model, r, [EOS]) for r in batch]


@pytest.mark.parametrize(("window", "ngram", "candidates"), [(1, 2, 1), (5, 2, 2), (1, 4, 2), (4, 3, 3), (3, 5, 1)])
def test_every_input_is_predicted_from_its_own_path(window, ngram, candidates):
    """Under the branches' mask, an input's logits are those of a plain forward over what it sees, by position.

    Exact output would not notice a wrong mask in the lookahead branch: it would only collect worse n-grams.
    """
    model, branches = tiny_model(5), Branches(window, ngram, candidates)
    prefix = [4, 9, 3]
    inputs = torch.randint(2, 24, (branches.num_inputs,), generator=torch.Generator().manual_seed(0))
    size, start = len(inputs), len(prefix)
    cache = RowCache(model.config, start + size)
    slots = torch.arange(start + size)[None]
    mask = cache.place(slots, start + size)
    mask[..., start:, start:] &= branches.visible_TT
    positions = torch.cat([torch.arange(start), start + branches.offsets_T])[None]
    tokens = torch.cat([torch.tensor(prefix), inputs])[None]
    with torch.inference_mode():
        logits_1QV = masked_logits_BWV(model, cache, tokens, positions, mask, slots)
        for t in range(size):
            path = branches.visible_TT[t].nonzero()[:, 0]
            path = path[branches.offsets_T[path].argsort()]
            assert branches.offsets_T[path].tolist() == list(range(len(path)))  # no position twice, none left out
            assert path[-1] == t
            plain_V = model(input_ids=torch.cat([torch.tensor(prefix), inputs[path]])[None]).logits[0, -1]
            torch.testing.assert_close(logits_1QV[0, start + t], plain_V, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool_text", [False, True])
def test_a_periodic_text_takes_a_third_of_the_forwards(pool_text):
    """Without the text's own n-grams it is the lookahead branch that finds them."""
    request = DecodeRequest((2, 3), 60)
    model = cycle_model(period=7)
    result = make_decoder(model, window=8, ngram=4, candidates=4, pool_text=pool_text).generate([request])[0]
    assert list(result.token_ids) == [2 + (2 + i) % 7 for i in range(60)]
    assert result.tokens_per_forward > 2.5
    assert max(result.accepted) == 4


def test_an_overfit_model_accepts_several_tokens_a_forward():
    """A real attention model that has learnt one text by heart; the prompt's n-grams are not in the pool."""
    model = tiny_model(0, scale=0.1)
    generator = torch.Generator().manual_seed(1)
    phrase = torch.randint(2, 24, (6,), generator=generator).tolist()
    text = torch.tensor([phrase * 8])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=text, labels=text).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    request = DecodeRequest(tuple(phrase), 36)
    result = make_decoder(model, window=6, ngram=4, candidates=4, pool_text=False).generate([request])[0]
    assert list(result.token_ids) == autoregressive(model, request, [EOS]) == phrase * 6
    assert result.tokens_per_forward > 1.5


def test_stream_concatenates_to_the_result():
    model = tiny_model(4)
    batch = [DecodeRequest((3, 4), 13), DecodeRequest((5, 6, 7), 30)]
    decoder = make_decoder(model)
    streamed: list[list[int]] = [[], []]
    finished = [None, None]
    for (commit,) in decoder.stream(batch):
        assert finished[commit.row] is None
        streamed[commit.row] += commit.token_ids
        finished[commit.row] = commit.finish_reason
    results = decoder.generate(batch)
    assert [tuple(s) for s in streamed] == [r.token_ids for r in results]
    assert finished == [r.finish_reason for r in results]


def test_what_only_the_engine_does_is_refused():
    with pytest.raises(InputError, match="stop_token_ids"):
        make_decoder(tiny_model(0)).generate([DecodeRequest((2, 3), 4, SamplingParams(stop_token_ids=(6,)))])


def test_the_pool_keeps_the_latest_ngrams_of_each_token():
    pool = CandidatePool(ngram=3, size=2)
    pool.add([1, 2, 3, 1, 4, 5, 1, 2, 3])
    assert pool.candidates(1) == [(2, 3), (4, 5)]
    pool.add([1, 6, 7])
    assert pool.candidates(1) == [(6, 7), (2, 3)]
    assert pool.candidates(9) == []


@pytest.mark.parametrize("sizes", [{"window": 0}, {"ngram": 1}, {"candidates": 0}])
def test_sizes_are_checked(sizes):
    with pytest.raises(InputError, match=next(iter(sizes))):
        make_decoder(tiny_model(0), **sizes)
