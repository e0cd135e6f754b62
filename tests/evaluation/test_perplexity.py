"""Perplexity against transformers' own loss."""

import math

import pytest
import torch

from cllm.evaluation.perplexity import NegativeLogLikelihood, reference_nll
from tests.evaluation.runs import make_prompt
from tests.fakes import EOS, FAMILIES, PAD, tiny_model

PROMPTS = [
    make_prompt(0, (3, 4, 5), (6, 7, EOS)),
    make_prompt(1, (8,), (9, 10, 11, 12, 13, EOS)),
    make_prompt(2, tuple(range(2, 20)), (EOS,)),
    make_prompt(3, (5, 5), (5, 5, EOS)),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_equals_the_loss_of_transformers(family: str, batch_size: int) -> None:
    model = tiny_model(1, family=family)
    nats = tokens = 0.0
    for prompt in PROMPTS:
        ids = torch.tensor([[*prompt.prompt_ids, *prompt.reference_ids]])
        labels = ids.clone()
        labels[:, : len(prompt.prompt_ids)] = -100
        with torch.inference_mode():
            nats += float(model(input_ids=ids, labels=labels).loss) * len(prompt.reference_ids)
        tokens += len(prompt.reference_ids)
    found = reference_nll(model, PROMPTS, batch_size=batch_size, pad_id=PAD)
    assert found.num_tokens == tokens
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_a_broken_model_has_none() -> None:
    assert NegativeLogLikelihood(float("nan"), 3).perplexity is None
    assert NegativeLogLikelihood(1e6, 3).perplexity is None
    assert NegativeLogLikelihood(3 * math.log(2), 3).perplexity == pytest.approx(2)
