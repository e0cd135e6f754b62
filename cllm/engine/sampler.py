"""The engine's draws: penalties, a least length, filters, noise and log-probabilities, for every slot at once.

In a Jacobi window the guesses stand where committed tokens will stand, so prediction i counts the guesses before it as
tokens of the response: while they are right, it is the token that AR decoding draws there.

Shapes: S slots (places of the running batch), B rows of a forward, W window, V vocabulary, K log-probabilities.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from cllm.decoding.records import SamplingParams
from cllm.decoding.sampling import Draws, write_place
from cllm.engine.costs import Work
from cllm.errors import InputError

_WORKS: tuple[Work, ...] = ("greedy", "drawn", "adjusted")  # each includes the ones before
DRAW_BYTES = 1 << 30  # most that a sampler takes for temporary tensors, roughly
_AT_ONCE = DRAW_BYTES // 64  # logits: the longest chain of operations, top-p, takes up to 64 bytes for each


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural log-probabilities under the model's own logits: before penalties, temperature and filters.

    Attributes:
        chosen_BW: float32, of the picked tokens.
        top_BWK: float32, of the likeliest tokens, descending; K is the most that any slot asks for.
        top_ids_BWK: int64, these tokens.
    """

    chosen_BW: torch.Tensor
    top_BWK: torch.Tensor
    top_ids_BWK: torch.Tensor


class _Limits(NamedTuple):
    """What changes a slot's logits before the draw."""

    repetition_S: torch.Tensor
    presence_S: torch.Tensor
    frequency_S: torch.Tensor
    may_end_S: torch.Tensor  # int64, the first position at which the response may end

    @classmethod
    def of(cls, rows: Sequence[tuple[SamplingParams, int]], device: torch.device) -> "_Limits":
        """Of pairs of parameters and prompt length; without min_tokens no position is too early."""

        def floats(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        return cls(
            floats([p.repetition_penalty for p, _ in rows]),
            floats([p.presence_penalty for p, _ in rows]),
            floats([p.frequency_penalty for p, _ in rows]),
            torch.tensor(
                [length + p.min_tokens if p.min_tokens else 0 for p, length in rows], dtype=torch.long, device=device
            ),
        )


class _Counts:
    """Which tokens each slot's prompt holds, and how often its response holds each token."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.in_prompt_SV = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)
        self.output_SV = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)

    def reset(self, slot: int, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        vocab_size, device = self.output_SV.shape[1], self.output_SV.device
        prompt_L, output_L = (torch.tensor(ids, dtype=torch.long) for ids in (prompt_ids, output_ids))
        self.in_prompt_SV[slot] = (torch.bincount(prompt_L, minlength=vocab_size) > 0).to(device)
        self.output_SV[slot] = torch.bincount(output_L, minlength=vocab_size).to(device)

    def add(self, slots_B: torch.Tensor, tokens_BW: torch.Tensor, counts_B: torch.Tensor) -> None:
        vocab_size, width = self.output_SV.shape[1], tokens_BW.shape[1]
        places_BW = slots_B[:, None].long() * vocab_size + tokens_BW
        is_committed_BW = torch.arange(width, device=tokens_BW.device) < counts_B[:, None]
        self.output_SV.view(-1).scatter_add_(0, places_BW.flatten(), is_committed_BW.flatten().int())

    def within_BWV(self, slots_B: torch.Tensor, window_tokens_BW: torch.Tensor) -> torch.Tensor:
        """Counts before each prediction: the committed tokens, the seed among them, and the guesses 1..i."""
        batch, width = window_tokens_BW.shape
        is_before_WW = torch.ones(width, width, dtype=torch.int32, device=slots_B.device).tril()
        is_before_WW[:, 0] = 0
        guesses_BWW = window_tokens_BW[:, None].long().expand(batch, width, width)
        counts_BWV = self.output_SV[slots_B][:, None].repeat(1, width, 1)
        return counts_BWV.scatter_add_(2, guesses_BWW, is_before_WW.expand(batch, width, width))


class Sampler:
    """Picks the tokens of a running batch, each slot with the parameters of the request that holds it.

    Nothing waits for the device, except `set` for a slot with penalties or min_tokens. Tensors of size [S, V] exist
    from the first request on that needs them.

    Args:
        num_slots: S.
        vocab_size: V, the width of the logits.
        eos_ids: the model's end-of-sequence tokens.
        device: of the logits.
        at_once: logits that are worked on together; larger steps are worked off in slices of rows.
    """

    def __init__(
        self,
        num_slots: int,
        vocab_size: int,
        eos_ids: Collection[int],
        device: torch.device,
        *,
        at_once: int = _AT_ONCE,
    ) -> None:
        self._at_once = at_once
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._device = device
        self._params = [SamplingParams()] * num_slots
        self._works = [0] * num_slots  # indices in `_WORKS`
        self._draws = Draws(self._params, device)
        self._limits = _Limits.of([(params, 0) for params in self._params], device)
        self._counts: _Counts | None = None
        self._ends_SV: torch.Tensor | None = None  # tokens that end the response, for slots with min_tokens

    def set(self, slot: int, params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int] = ()) -> None:
        """Give the slot to a request; `output_ids` are tokens that it committed before (in another slot).

        Raises:
            InputError: a stop token outside the vocabulary; the slot then keeps what it had.
        """
        if any(token >= self._vocab_size for token in params.stop_token_ids):
            raise InputError(f"stop_token_ids must be < {self._vocab_size}, got {params.stop_token_ids}")
        self._write(slot, params, len(prompt_ids))
        if params.penalises:
            if self._counts is None:
                self._counts = _Counts(len(self._params), self._vocab_size, self._device)
            self._counts.reset(slot, prompt_ids, output_ids)
        if params.min_tokens > 0:
            if self._ends_SV is None:
                self._ends_SV = torch.zeros(len(self._params), self._vocab_size, dtype=torch.bool, device=self._device)
            ends_V = torch.zeros(self._vocab_size, dtype=torch.bool)
            ends_V[list(params.end_ids(self._eos_ids))] = True
            self._ends_SV[slot] = ends_V.to(self._device)

    def clear(self, slot: int) -> None:
        """Take the slot from its request: it picks by argmax."""
        self._write(slot, SamplingParams(), 0)

    def is_greedy(self, slots: Iterable[int]) -> bool:
        """Whether the argmax of the logits is all that these slots need."""
        return self.work(slots) == "greedy"

    def work(self, slots: Iterable[int]) -> Work:
        """What a step of these slots takes: what the most demanding one does."""
        return _WORKS[max((self._works[slot] for slot in slots), default=0)]

    def pick_BW(
        self,
        logits_BWV: torch.Tensor,
        window_tokens_BW: torch.Tensor,
        positions_BW: torch.Tensor,
        slots_B: torch.Tensor,
    ) -> torch.Tensor:
        """The token at each position, int64 [B, W], as AR decoding draws it if the guesses before it are right.

        Args:
            logits_BWV: floating point; entry i predicts position i.
            window_tokens_BW: integers in [0, V): the last committed token, then the guesses; guess i precedes entry i.
            positions_BW: integers, the positions being predicted; a response starts at its prompt's length.
            slots_B: int32 or int64, the rows' slots.
        """
        num_rows = _num_rows(logits_BWV, self._at_once)
        parts = (x.split(num_rows) for x in (logits_BWV, window_tokens_BW, positions_BW, slots_B))
        return torch.cat([self._pick_BW(*part) for part in zip(*parts, strict=True)])

    def _pick_BW(
        self,
        logits_BWV: torch.Tensor,
        window_tokens_BW: torch.Tensor,
        positions_BW: torch.Tensor,
        slots_B: torch.Tensor,
    ) -> torch.Tensor:
        allowed_BWV = logits_BWV
        if self._counts is not None and any(params.penalises for params in self._params):
            counts_BWV = self._counts.within_BWV(slots_B, window_tokens_BW)
            in_prompt_B1V = self._counts.in_prompt_SV[slots_B][:, None]
            allowed_BWV = self._penalised_BWV(logits_BWV.float(), counts_BWV, in_prompt_B1V, slots_B)
        if self._ends_SV is not None and any(params.min_tokens > 0 for params in self._params):
            is_early_BW = positions_BW < self._limits.may_end_S[slots_B][:, None]
            allowed_BWV = allowed_BWV.masked_fill(is_early_BW[:, :, None] & self._ends_SV[slots_B][:, None], -torch.inf)
        return self._draws.pick_BW(allowed_BWV, positions_BW, slots_B)

    def logprobs(self, logits_BWV: torch.Tensor, tokens_BW: torch.Tensor) -> Logprobs | None:
        """Of the tokens that were picked from these logits; None if no slot asks for any."""
        asked = [params.logprobs for params in self._params if params.logprobs is not None]
        return raw_logprobs(logits_BWV, tokens_BW, max(asked), self._at_once) if asked else None

    def commit(self, slots_B: torch.Tensor, tokens_BW: torch.Tensor, counts_B: torch.Tensor) -> None:
        """Note the first `counts_B` of each row's tokens as committed.

        Args:
            slots_B: int32 or int64.
            tokens_BW: int64 in [0, V), those behind the count included.
            counts_B: integers in 0..W.
        """
        if self._counts is not None and any(params.penalises for params in self._params):
            self._counts.add(slots_B, tokens_BW, counts_B)

    def _write(self, slot: int, params: SamplingParams, prompt_length: int) -> None:
        before, self._works[slot] = self._works[slot], _WORKS.index(_work_of(params))
        self._params[slot] = params
        if before == self._works[slot] == 0:
            return  # the device's columns say so already, and a dozen tiny copies take longer than a small model's step
        self._draws.set(slot, params)
        write_place(self._limits, slot, _Limits.of([(params, prompt_length)], torch.device("cpu")))

    def _penalised_BWV(
        self, logits_BWV: torch.Tensor, counts_BWV: torch.Tensor, in_prompt_B1V: torch.Tensor, slots_B: torch.Tensor
    ) -> torch.Tensor:
        repetition_B11, presence_B11, frequency_B11 = (
            column_S[slots_B][:, None, None] for column_S in self._limits[:3]
        )
        in_output_BWV = counts_BWV > 0
        weaker_BWV = torch.where(logits_BWV > 0, logits_BWV / repetition_B11, logits_BWV * repetition_B11)
        logits_BWV = torch.where(in_output_BWV | in_prompt_B1V, weaker_BWV, logits_BWV)
        return logits_BWV - frequency_B11 * counts_BWV - presence_B11 * in_output_BWV


def _work_of(params: SamplingParams) -> Work:
    is_filtered = params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
    if is_filtered or params.penalises or params.logprobs is not None:
        return "adjusted"
    return "drawn" if params.temperature > 0 or params.min_tokens > 0 else "greedy"


def _num_rows(logits_BWV: torch.Tensor, at_once: int) -> int:
    """B of a slice; a single row is never cut."""
    return max(1, at_once // logits_BWV[0].numel())


def raw_logprobs(logits_BWV: torch.Tensor, tokens_BW: torch.Tensor, num_top: int, at_once: int = _AT_ONCE) -> Logprobs:
    """Of the tokens and of the `num_top` likeliest ones (of all, if the vocabulary is smaller).

    Args:
        at_once: logits that are worked on together.
    """
    num_rows = _num_rows(logits_BWV, at_once)
    parts = zip(logits_BWV.split(num_rows), tokens_BW.split(num_rows), strict=True)
    found = [_raw_logprobs(part_BWV, part_BW, num_top) for part_BWV, part_BW in parts]
    columns = zip(*((part.chosen_BW, part.top_BWK, part.top_ids_BWK) for part in found), strict=True)
    return Logprobs(*map(torch.cat, columns))


def _raw_logprobs(logits_BWV: torch.Tensor, tokens_BW: torch.Tensor, num_top: int) -> Logprobs:
    raw_BWV = logits_BWV.float()
    total_BW1 = raw_BWV.logsumexp(-1, keepdim=True)
    top_BWK, top_ids_BWK = raw_BWV.topk(min(num_top, raw_BWV.shape[-1]), dim=-1)
    chosen_BW = (raw_BWV.gather(-1, tokens_BW[:, :, None]) - total_BW1).squeeze(-1)
    return Logprobs(chosen_BW, top_BWK - total_BW1, top_ids_BWK)
