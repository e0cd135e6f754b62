"""Jacobi decoding gives AR's tokens: every block size, both refills, ragged batches, end and length inside a block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.decoding.decoder import JacobiDecoder
from cllm.decoding.guess import Guesser
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.decoding.reference import autoregressive, jacobi_trajectories
from tests.fakes import EOS, FAMILIES, PAD, tiny_model

REFILLS = ("block", "sliding")


def make_decoder(model, n, refill="sliding", guess="prompt", record=False):
    return JacobiDecoder(model, block_size=n, refill=refill, guess=guess, eos_ids=[EOS], pad_id=PAD, record=record)


@st.composite
def batches(draw):
    size = draw(st.integers(1, 5))
    return [
        DecodeRequest(
            tuple(draw(st.lists(st.integers(2, 23), min_size=1, max_size=12))),
            draw(st.integers(1, 24)),
            SamplingParams(
                temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.3])),
                top_k=draw(st.sampled_from([0, 3])),
                top_p=draw(st.sampled_from([1.0, 0.8])),
                seed=draw(st.integers(0, 2**63)),
            ),
        )
        for _ in range(size)
    ]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    model_seed=st.integers(0, 7),
    requests=batches(),
    n=st.sampled_from([1, 2, 3, 5, 8, 16, 33]),
    refill=st.sampled_from(REFILLS),
    guess=st.sampled_from(["prompt", "pad"]),
    batch_size=st.sampled_from([None, 1, 2, 3]),
)
def test_any_batch_equals_autoregressive(model_seed, requests, n, refill, guess, batch_size):
    model = tiny_model(model_seed)
    results = make_decoder(model, n, refill, guess).generate(requests, batch_size)
    for request, result in zip(requests, results, strict=True):
        expected = autoregressive(model, request, [EOS])
        assert list(result.token_ids) == expected
        assert sum(result.accepted) == len(expected)
        assert result.num_forwards <= len(expected)
        assert result.finish_reason == ("stop" if expected[-1] == EOS else "length")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_autoregressive(family):
    model = tiny_model(3, family=family)
    requests = [DecodeRequest((5, 6, 7), 20), DecodeRequest((9,), 11), DecodeRequest(tuple(range(2, 20)), 17)]
    for refill in REFILLS:
        results = make_decoder(model, 6, refill).generate(requests)
        assert [list(r.token_ids) for r in results] == [autoregressive(model, r, [EOS]) for r in requests]


def test_block_size_one_is_one_forward_per_token():
    result = make_decoder(tiny_model(1), 1).generate([DecodeRequest((4, 5), 15)])[0]
    assert result.accepted == (1,) * len(result.token_ids)


def test_a_perfect_guess_commits_whole_windows():
    """A model that repeats its input agrees with guesses from a prompt of one token: each forward commits a window."""
    model = tiny_model(0)
    with torch.no_grad():
        model.model.layers = torch.nn.ModuleList()
        model.config.num_hidden_layers = 0
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    result = make_decoder(model, 8, guess="prompt").generate([DecodeRequest((7,), 24)])[0]
    assert result.token_ids == (7,) * 24
    assert result.accepted == (8, 8, 8)


@pytest.mark.parametrize("n", [2, 5, 8])
def test_recorded_trajectories_equal_the_slow_twin(n):
    model = tiny_model(2)
    request = DecodeRequest((3, 9, 4, 11), 21)
    recorded = make_decoder(model, n, "block", record=True).generate([request, DecodeRequest((8,), 30)])[0].trajectory
    slow = jacobi_trajectories(model, request, Guesser("prompt", request.prompt_ids, PAD, 0), n, [EOS])
    assert len(recorded) == len(slow)
    for fast_block, slow_block in zip(recorded, slow, strict=True):
        until = fast_block.fixed_point.index(EOS) + 1 if EOS in fast_block.fixed_point else n
        assert fast_block.fixed_point[:until] == slow_block.fixed_point[:until]
        for fast_state, slow_state in zip(fast_block.states, slow_block.states, strict=False):
            assert fast_state[:until] == slow_state[:until]


def test_stream_concatenates_to_the_result():
    model = tiny_model(4)
    requests = [DecodeRequest((3, 4), 13), DecodeRequest((5, 6, 7), 30)]
    decoder = make_decoder(model, 5)
    streamed: list[list[int]] = [[], []]
    finished = [None, None]
    for commits in decoder.stream(requests):
        for commit in commits:
            assert finished[commit.row] is None
            streamed[commit.row] += commit.token_ids
            finished[commit.row] = commit.finish_reason
    results = decoder.generate(requests)
    assert [tuple(s) for s in streamed] == [r.token_ids for r in results]
    assert finished == [r.finish_reason for r in results]


def test_requests_are_validated():
    with pytest.raises(ValueError, match="at least one token"):
        DecodeRequest((), 3)
    with pytest.raises(ValueError, match="block_size"):
        make_decoder(tiny_model(0), 0)
    with pytest.raises(ValueError, match="refill 'block' only"):
        make_decoder(tiny_model(0), 4, "sliding", record=True)
