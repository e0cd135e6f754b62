"""Exact sampling as an argmax: noise that is a pure function of (seed, position, token).

With Gumbel noise G, argmax(log p + G) is a draw from p. Because G depends on nothing but the request's seed and the
token's position, the draw at a position is a deterministic function of the context: the Jacobi fixed point under this
noise is the AR sample under the same noise, acceptance stays an equality test, and greedy decoding is the case of no
noise (the idea of reparametrised predictive sampling, Wiggers & Hoogeboom 2020).

Shapes: R rows of logits, V vocabulary.
"""

from collections.abc import Sequence

import torch

from cllm.decoding.records import SamplingParams

_MASK = 0xFFFFFFFF


def _mix(x: torch.Tensor) -> torch.Tensor:
    """A bijective 32-bit integer hash (xorshift-multiply, full avalanche), on int64 tensors holding 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _MASK
    x = ((x ^ (x >> 15)) * 0x735A2D97) & _MASK
    return x ^ (x >> 15)


def hash_uniform(seeds: torch.Tensor, positions: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """Uniform float32 in (0, 1) for every broadcast triple of int64 (seed, position, item), equal on every device."""
    high, low = (seeds >> 32) & _MASK, seeds & _MASK
    state = _mix(_mix(_mix(low) ^ high) ^ (positions & _MASK))
    bits = _mix(_mix((items + 0x9E3779B9) & _MASK) ^ state)
    return ((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23


def gumbel_noise_RV(seeds_R: torch.Tensor, positions_R: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Standard Gumbel noise, float32 [R, V]."""
    items_V = torch.arange(vocab_size, device=seeds_R.device)
    uniform_RV = hash_uniform(seeds_R[:, None], positions_R[:, None], items_V[None, :])
    return -torch.log(-torch.log(uniform_RV))


def filter_logits_RV(logits_RV: torch.Tensor, top_k_R: torch.Tensor, top_p_R: torch.Tensor) -> torch.Tensor:
    """Set logits outside the top-k set, and then outside the top-p nucleus of the rest, to -inf.

    The nucleus is the smallest set of likeliest tokens whose mass reaches top_p; the token that crosses it is kept.
    """
    sorted_RV, order_RV = logits_RV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(logits_RV.shape[-1], device=logits_RV.device)
    limit_R1 = torch.where(top_k_R > 0, top_k_R, logits_RV.shape[-1])[:, None]
    sorted_RV = sorted_RV.masked_fill(rank_V >= limit_R1, -torch.inf)
    probs_RV = sorted_RV.softmax(-1)
    mass_before_RV = probs_RV.cumsum(-1) - probs_RV
    sorted_RV = sorted_RV.masked_fill((mass_before_RV >= top_p_R[:, None]) & (rank_V > 0), -torch.inf)
    return torch.full_like(logits_RV, -torch.inf).scatter(-1, order_RV, sorted_RV)


class TokenPicker:
    """Maps logits to tokens for a fixed batch of requests: argmax, plus noise where the request asks for it."""

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        self._sampled = [p.temperature > 0 for p in params]
        self._filtered = any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) for p in params)
        # 64-bit seeds wrap into torch's signed integers; every bit still counts
        seeds = [((p.seed + 2**63) % 2**64) - 2**63 for p in params]
        self._seeds_B = torch.tensor(seeds, dtype=torch.long, device=device)
        self._temperature_B = torch.tensor([p.temperature or 1.0 for p in params], device=device)
        self._top_k_B = torch.tensor([p.top_k for p in params], device=device)
        self._top_p_B = torch.tensor([p.top_p for p in params], device=device)
        self._is_sampled_B = torch.tensor(self._sampled, device=device)

    def pick_BQ(self, logits_BQV: torch.Tensor, positions_BQ: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """The token at each of `positions_BQ` (those being predicted), int64 [B, Q]; `rows` are batch indices."""
        greedy_BQ = logits_BQV.argmax(-1)
        if not any(self._sampled[row] for row in rows):
            return greedy_BQ
        index_B = torch.tensor(list(rows), device=logits_BQV.device)
        batch, queries, vocab = logits_BQV.shape
        index_R = index_B.repeat_interleave(queries)
        scaled_RV = logits_BQV.float().reshape(-1, vocab) / self._temperature_B[index_R][:, None]
        if self._filtered:
            scaled_RV = filter_logits_RV(scaled_RV, self._top_k_B[index_R], self._top_p_B[index_R])
        noise_RV = gumbel_noise_RV(self._seeds_B[index_R], positions_BQ.reshape(-1), vocab)
        sampled_BQ = (scaled_RV + noise_RV).argmax(-1).view(batch, queries)
        return torch.where(self._is_sampled_B[index_B][:, None], sampled_BQ, greedy_BQ)
