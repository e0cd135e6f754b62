"""Sampled Jacobi decoding follows the AR law: the noise is right, and the marginal of every position is right."""

import pytest
import torch
from scipy import stats

from cllm.decoding.decoder import JacobiDecoder
from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.decoding.sampling import filter_logits_RV, gumbel_noise_RV, hash_uniform
from tests.fakes import EOS, PAD, tiny_model


def test_uniform_is_uniform_and_uncorrelated():
    seeds, positions, items = torch.arange(40)[:, None, None], torch.arange(50)[None, :, None], torch.arange(60)
    sample = hash_uniform(seeds, positions, items)
    assert stats.kstest(sample.flatten().numpy(), "uniform").pvalue > 1e-3
    for a, b in ((sample[:-1], sample[1:]), (sample[:, :-1], sample[:, 1:]), (sample[..., :-1], sample[..., 1:])):
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 4 / a.numel() ** 0.5


def test_gumbel_argmax_draws_from_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5])
    draws = 30_000
    noise = gumbel_noise_RV(torch.arange(draws) * 7919, torch.full((draws,), 11), 5)
    counts = torch.bincount((logits + noise).argmax(-1), minlength=5)
    assert stats.chisquare(counts.numpy(), (logits.softmax(-1) * draws).numpy()).pvalue > 1e-3


def test_filter_keeps_top_k_and_the_crossing_token_of_the_nucleus():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]])).repeat(4, 1)
    filtered = filter_logits_RV(logits, torch.tensor([0, 2, 0, 1]), torch.tensor([1.0, 1.0, 0.6, 0.01]))
    kept = [set(row.isfinite().nonzero().flatten().tolist()) for row in filtered]
    assert kept == [{0, 1, 2, 3}, {1, 3}, {1, 3}, {1}]


@pytest.mark.parametrize("refill", ["block", "sliding"])
def test_marginals_of_jacobi_samples_follow_the_model(refill):
    """20,000 draws: the law of the first token, and of the second given the first, against the model's own softmax."""
    model = tiny_model(5, vocab_size=8)
    prompt = (3, 4, 5)
    decoder = JacobiDecoder(model, block_size=4, refill=refill, eos_ids=[EOS], pad_id=PAD)
    requests = [DecodeRequest(prompt, 3, SamplingParams(temperature=1.5, top_k=6, seed=seed)) for seed in range(20_000)]
    results = [r for start in range(0, 20_000, 4000) for r in decoder.generate(requests[start : start + 4000])]
    first = torch.tensor([r.token_ids[0] for r in results])
    check_law(model, prompt, first)
    likeliest = int(first.bincount(minlength=8)[2:].argmax()) + 2
    second = torch.tensor([r.token_ids[1] for r in results if r.token_ids[0] == likeliest])
    check_law(model, (*prompt, likeliest), second)


def check_law(model, context, draws):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context])).logits[:, -1] / 1.5
    probs = filter_logits_RV(logits, torch.tensor([6]), torch.tensor([1.0]))[0].softmax(-1)
    counts = draws.bincount(minlength=8)
    assert counts[probs == 0].sum() == 0
    allowed = probs[probs > 0].double()
    assert stats.chisquare(counts[probs > 0].numpy(), (allowed / allowed.sum() * len(draws)).numpy()).pvalue > 1e-3
