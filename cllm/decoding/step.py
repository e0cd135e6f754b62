"""The step: one forward pass over [seed, guesses], and how many tokens it commits.

With committed tokens c (the last one, the seed, is not yet in the cache) and guesses g_1..g_{W-1}, a forward over
[seed, g_1..g_{W-1}] predicts p_1..p_W. p_1 is right for free; p_{i+1} is right as well while g_i == p_i. AR decoding is
W = 1.

Shapes: B rows, Q inputs of a forward, W window, V vocabulary.
"""

import torch
from transformers import PreTrainedModel

from cllm.decoding.cache import RowCache


def forward_logits_BWV(
    model: PreTrainedModel,
    cache: RowCache,
    tokens_BQ: torch.Tensor,
    positions_BQ: torch.Tensor,
    window_BW: torch.Tensor,
    visible: int,
) -> torch.Tensor:
    """Feed the inputs at their positions; logits of the inputs whose indices are `window_BW`.

    Only the window goes through the vocabulary projection, so a long prompt costs no logits. `visible` is one more than
    the largest position fed.
    """
    return masked_logits_BWV(model, cache, tokens_BQ, positions_BQ, cache.place(positions_BQ, visible), window_BW)


def masked_logits_BWV(
    model: PreTrainedModel,
    cache: RowCache,
    tokens_BQ: torch.Tensor,
    positions_BQ: torch.Tensor,
    mask: torch.Tensor,
    window_BW: torch.Tensor,
) -> torch.Tensor:
    """The same with a mask of the caller's, bool [B, 1, Q, visible], who has called `cache.place`."""
    hidden_BQE = model.base_model(
        input_ids=tokens_BQ, position_ids=positions_BQ, attention_mask=mask, past_key_values=cache, use_cache=True
    ).last_hidden_state
    if window_BW.shape[1] < hidden_BQE.shape[1]:
        hidden_BQE = hidden_BQE.gather(1, window_BW[:, :, None].expand(-1, -1, hidden_BQE.shape[-1]))
    head = model.get_output_embeddings()
    assert head is not None
    return head(hidden_BQE)


def accepted_B(guesses_BG: torch.Tensor, predictions_BW: torch.Tensor) -> torch.Tensor:
    """How many predictions each row commits: 1 + the length of the agreeing prefix. G = W - 1; int64 in 1..W."""
    agree_BG = guesses_BG == predictions_BW[:, :-1]
    return 1 + agree_BG.cumprod(1).sum(1)
