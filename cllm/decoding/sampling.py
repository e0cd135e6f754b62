"""Exact sampling as an argmax: noise that is a pure function of (seed, position, token).

With Gumbel noise G, argmax(log p + G) is a draw from p. Because G depends on nothing but the request's seed and the
token's position, the draw at a position is a deterministic function of the context: the Jacobi fixed point under this
noise is the AR sample under the same noise, acceptance stays an equality test, and greedy decoding is the case of no
noise (the idea of reparametrised predictive sampling, Wiggers & Hoogeboom 2020).

Shapes: P places (requests, or slots of an engine), B rows of a batch, W positions of a row (Q of a decoder),
R = B * W rows of logits, V vocabulary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import NamedTuple

import torch

from cllm.decoding.records import SamplingParams
from cllm.errors import InputError

_MASK = 0xFFFFFFFF
_COLDEST = 1e-5  # temperature below which float32 leaves nothing of the noise
_DRAW_FIELDS = frozenset({"temperature", "top_k", "top_p", "min_p", "seed"})


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
    # a row without top-p loses nothing to the rounding of the sum, so it may share a batch with rows that have it
    reach_R1 = torch.where(top_p_R < 1, top_p_R, torch.inf)[:, None]
    sorted_RV = sorted_RV.masked_fill((mass_before_RV >= reach_R1) & (rank_V > 0), -torch.inf)
    return torch.full_like(logits_RV, -torch.inf).scatter(-1, order_RV, sorted_RV)


def filter_min_p_RV(logits_RV: torch.Tensor, min_p_R: torch.Tensor) -> torch.Tensor:
    """Set logits of tokens less than min_p times as likely as the likeliest to -inf."""
    least_R1 = logits_RV.max(-1, keepdim=True).values + min_p_R.log()[:, None]
    return logits_RV.masked_fill(logits_RV < least_R1, -torch.inf)


def write_place(table: Iterable[torch.Tensor], place: int, row: Iterable[torch.Tensor]) -> None:
    """Entry `place` of every [P] tensor becomes the row's, a [1] tensor on the CPU; nothing waits for the device."""
    for column_P, value_1 in zip(table, row, strict=True):
        column_P[place].fill_(value_1.item())


class DrawParams(NamedTuple):
    """What a draw depends on, one entry for each place."""

    seeds_P: torch.Tensor  # int64
    temperature_P: torch.Tensor  # 0: argmax
    top_k_P: torch.Tensor  # int64
    top_p_P: torch.Tensor
    min_p_P: torch.Tensor

    @classmethod
    def of(cls, params: Sequence[SamplingParams], device: torch.device) -> "DrawParams":
        def floats(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        return cls(
            torch.tensor([p.signed_seed for p in params], dtype=torch.long, device=device),
            floats([max(p.temperature, _COLDEST) if p.temperature > 0 else 0.0 for p in params]),
            torch.tensor([p.top_k for p in params], dtype=torch.long, device=device),
            floats([p.top_p for p in params]),
            floats([p.min_p for p in params]),
        )


class Draws:
    """Maps logits to tokens for a table of places: argmax, plus noise where the place's parameters ask for it.

    The parameters lie on the device and are changed in place; from their copy on the host follows which work no place
    needs.
    """

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        self._table = DrawParams.of(params, device)
        self._sampled: set[int] = set()
        self._cut: set[int] = set()  # sampled places with top-k or top-p
        self._min_p: set[int] = set()
        for place, row in enumerate(params):
            self._note(place, row)

    def set(self, place: int, params: SamplingParams) -> None:
        write_place(self._table, place, DrawParams.of([params], torch.device("cpu")))
        self._note(place, params)

    def samples(self, places: Iterable[int]) -> bool:
        """Whether any of the places needs more than argmax."""
        return not self._sampled.isdisjoint(places)

    def pick_BW(self, logits_BWV: torch.Tensor, positions_BW: torch.Tensor, places_B: torch.Tensor) -> torch.Tensor:
        """The token at each of `positions_BW` (integers, those being predicted), int64 [B, W]."""
        greedy_BW = logits_BWV.argmax(-1)
        if not self._sampled:
            return greedy_BW
        places_R = places_B.repeat_interleave(positions_BW.shape[1])
        seeds_R, temperature_R, top_k_R, top_p_R, min_p_R = (column_P[places_R] for column_P in self._table)
        is_sampled_R = temperature_R > 0
        scaled_RV = logits_BWV.flatten(0, 1).float() / torch.where(is_sampled_R, temperature_R, 1.0)[:, None]
        if self._cut:
            scaled_RV = filter_logits_RV(scaled_RV, top_k_R, top_p_R)
        if self._min_p:
            scaled_RV = filter_min_p_RV(scaled_RV, min_p_R)
        noise_RV = gumbel_noise_RV(seeds_R, positions_BW.flatten().long(), logits_BWV.shape[-1])
        sampled_R = (scaled_RV + noise_RV).argmax(-1)
        return torch.where(is_sampled_R, sampled_R, greedy_BW.flatten()).view_as(greedy_BW)

    def _note(self, place: int, params: SamplingParams) -> None:
        sampled = params.temperature > 0
        for group, member in (
            (self._sampled, sampled),
            (self._cut, sampled and (params.top_k > 0 or params.top_p < 1)),
            (self._min_p, sampled and params.min_p > 0),
        ):
            (group.add if member else group.discard)(place)


class TokenPicker:
    """The draws of a fixed batch of requests.

    Raises:
        InputError: a parameter that does more than shape the draw; those need the engine.
    """

    def __init__(self, params: Sequence[SamplingParams], device: torch.device) -> None:
        for row in params:
            _require_draw_only(row)
        self._draws = Draws(params, device)

    def pick_BQ(self, logits_BQV: torch.Tensor, positions_BQ: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """The token at each of `positions_BQ` (those being predicted), int64 [B, Q]; `rows` are batch indices."""
        if not self._draws.samples(rows):
            return logits_BQV.argmax(-1)
        return self._draws.pick_BW(logits_BQV, positions_BQ, torch.tensor(list(rows), device=logits_BQV.device))


def _require_draw_only(params: SamplingParams) -> None:
    for field in fields(params):
        if field.name not in _DRAW_FIELDS and getattr(params, field.name) != field.default:
            raise InputError(f"{field.name}: this decoder does not support it, the engine does")
