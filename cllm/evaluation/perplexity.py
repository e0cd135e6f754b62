"""Perplexity of a model on the reference answers, given the prompts.

Shapes: B rows, L padded length, E hidden size, T reference tokens of one row, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from cllm.evaluation.decode import by_length
from cllm.tasks.prompts import Prompt


@dataclass(frozen=True, slots=True)
class NegativeLogLikelihood:
    """Sum over reference tokens, in nats. Sums of several chunks add up."""

    nats: float
    num_tokens: int

    def __add__(self, other: "NegativeLogLikelihood") -> "NegativeLogLikelihood":
        return NegativeLogLikelihood(self.nats + other.nats, self.num_tokens + other.num_tokens)

    @property
    def perplexity(self) -> float | None:
        """exp of the mean per token; None where a broken model gives no finite number."""
        mean = self.nats / self.num_tokens
        return math.exp(mean) if mean < 700 else None  # NaN compares false; exp overflows from 710 on


def reference_nll(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, batch_size: int, pad_id: int
) -> NegativeLogLikelihood:
    """Likelihood of the prompts' reference answers, end token included."""
    total = NegativeLogLikelihood(0.0, 0)
    for batch in by_length(prompts, batch_size):
        total += _batch_nll(model, batch, pad_id)
    return total


@torch.inference_mode()
def _batch_nll(model: PreTrainedModel, prompts: Sequence[Prompt], pad_id: int) -> NegativeLogLikelihood:
    # The last token is predicted and never fed. Right padding needs no mask: causal attention never looks behind.
    rows = [[*prompt.prompt_ids, *prompt.reference_ids[:-1]] for prompt in prompts]
    width = max(map(len, rows))
    tokens_BL = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=model.device)
    hidden_BLE = model.base_model(input_ids=tokens_BL, use_cache=False).last_hidden_state
    head = model.get_output_embeddings()
    assert head is not None
    nats = 0.0
    # Row by row, because the logits of a whole batch over a large vocabulary would take gigabytes.
    for prompt, hidden_LE in zip(prompts, hidden_BLE, strict=True):
        first, count = len(prompt.prompt_ids) - 1, len(prompt.reference_ids)
        logits_TV = head(hidden_LE[first : first + count]).float()
        target_T = torch.tensor(prompt.reference_ids, device=model.device)
        nats += float(cross_entropy(logits_TV, target_T, reduction="sum"))
    return NegativeLogLikelihood(nats, sum(len(prompt.reference_ids) for prompt in prompts))
