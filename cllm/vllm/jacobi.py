"""Index algebra of Jacobi decoding inside vLLM. Plain torch: no vLLM, no wait for the device.

vLLM lays the logits of a batch out flat, each row's behind the other's. A row that verifies w - 1 guesses has w of
them, [seed, guesses] -> predictions; a row that reads its prompt has one. Rows may differ in w, up to the window n.

Shapes: B rows, n = W window, G = W - 1 guesses, T inputs of a step, F flat logits, S slots of requests, L positions of
a slot.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

_MASK = 0xFFFFFFFF


class Rows(NamedTuple):
    """A step's batch as vLLM lays it out, and what was drawn from it.

    Attributes:
        predictions_F: int64, the token drawn from each logit.
        num_sampled_B: int32, 0 for a row amid its prompt.
        inputs_T: int32 tokens.
        positions_T: int64, of the inputs in their requests.
        logits_indices_F: which inputs the logits belong to.
        offsets_B1: of the rows in F.
        slots_B: of the rows in `Slots`; below 0 for a row that is none.
    """

    predictions_F: torch.Tensor
    num_sampled_B: torch.Tensor
    inputs_T: torch.Tensor
    positions_T: torch.Tensor
    logits_indices_F: torch.Tensor
    offsets_B1: torch.Tensor
    slots_B: torch.Tensor


class Slots(NamedTuple):
    """What vLLM holds of the requests.

    Attributes:
        draft_tokens_SG: int64 guesses of the next step; written.
        prefill_lengths_S: int32 tokens to read before decoding.
        prompt_lengths_S: int32.
        seeds_S: int64.
        tokens_SL: int32, of the requests, from their prompts on.
    """

    draft_tokens_SG: torch.Tensor
    prefill_lengths_S: torch.Tensor
    prompt_lengths_S: torch.Tensor
    seeds_S: torch.Tensor
    tokens_SL: torch.Tensor


class Committed(NamedTuple):
    """What a step commits.

    Attributes:
        tokens_BW: int64 predictions; the first `counts_B` are committed.
        counts_B: int32, 0 for a row amid its prompt.
        rejected_B: int32, of the row's places.
    """

    tokens_BW: torch.Tensor
    counts_B: torch.Tensor
    rejected_B: torch.Tensor


class Verified(NamedTuple):
    """What one step commits, and what it leaves for the next.

    Attributes:
        tokens_BW: predictions; the first `counts_B` of a row are committed. Behind the row's own they carry no meaning.
        counts_B: int64 in 1..w, w the row's number of logits.
        widths_B: int64, w.
        carried_BG: predictions behind the committed ones: guesses for the places that follow.
        is_carried_BG: where `carried_BG` holds one; a prefix of each row.
    """

    tokens_BW: torch.Tensor
    counts_B: torch.Tensor
    widths_B: torch.Tensor
    carried_BG: torch.Tensor
    is_carried_BG: torch.Tensor


def commit_and_refill(
    rows: Rows, slots: Slots, histogram: torch.Tensor, fresh: Callable[[Verified, torch.Tensor], torch.Tensor]
) -> Committed:
    """Verify every row, leave its next guesses in its slot, and count what it committed.

    Args:
        histogram: int64 [(W + 1) ** 2]; entry w (W + 1) + a counts the rows of w logits that committed a tokens.
        fresh: guesses [B, G] to refill the window with, from what was verified and the seeds' positions [B].
    """
    window = slots.draft_tokens_SG.shape[1] + 1
    verified = verify(rows.predictions_F, rows.inputs_T[rows.logits_indices_F], rows.offsets_B1, window)
    slots_B = rows.slots_B.long()
    seeds_B = rows.positions_T[rows.logits_indices_F[rows.offsets_B1[:-1].long()]]
    is_first_B = seeds_B < slots.prefill_lengths_S[slots_B]
    drafts_SG = slots.draft_tokens_SG
    drafts_SG[slots_B] = next_guesses_BG(verified, drafts_SG[slots_B], fresh(verified, seeds_B), is_first_B)
    is_decoding_B = rows.num_sampled_B > 0
    counts_B = torch.where(is_decoding_B, verified.counts_B, 0)
    histogram.scatter_add_(0, verified.widths_B * (window + 1) + counts_B, is_decoding_B.long())
    rejected_B = torch.where(is_decoding_B, verified.widths_B - counts_B, 0)
    return Committed(verified.tokens_BW, counts_B.int(), rejected_B.int())


def verify(predictions_F: torch.Tensor, inputs_F: torch.Tensor, offsets_B1: torch.Tensor, window: int) -> Verified:
    """Commit each row's first prediction, and every further one while the guess before it holds.

    Args:
        predictions_F: int64, the token drawn from each logit.
        inputs_F: the token fed there: a row's seed, then its guesses.
        offsets_B1: B + 1 increasing offsets of the rows in F.
        window: n, at least the largest number of logits of a row.
    """
    last = predictions_F.shape[0] - 1
    starts_B, ends_B = offsets_B1[:-1].long(), offsets_B1[1:].long()
    places_BW = starts_B[:, None] + torch.arange(window, device=predictions_F.device)
    is_own_BW = places_BW < ends_B[:, None]
    places_BW = places_BW.clamp_max(last)
    tokens_BW = predictions_F[places_BW]
    guesses_BG = inputs_F[places_BW[:, 1:]]
    agree_BG = (guesses_BG == tokens_BW[:, :-1]) & is_own_BW[:, 1:]
    counts_B = 1 + agree_BG.cumprod(1).sum(1)
    widths_B = ends_B - starts_B
    next_BG = counts_B[:, None] + torch.arange(window - 1, device=predictions_F.device)
    carried_BG = tokens_BW.gather(1, next_BG.clamp_max(window - 1))
    return Verified(tokens_BW, counts_B, widths_B, carried_BG, next_BG < widths_B[:, None])


def next_guesses_BG(
    verified: Verified, old_BG: torch.Tensor, fresh_BG: torch.Tensor, is_first_B: torch.Tensor
) -> torch.Tensor:
    """Guesses for the G places behind the committed tokens.

    A prediction left over from this step; else, where the step was narrower than the window, what was guessed for the
    place before; else the fresh guess.

    Args:
        old_BG: the guesses that stood ready for this step, all of them.
        fresh_BG: guesses to refill the window with.
        is_first_B: the row has read its prompt, so its old guesses mean nothing.
    """
    places_BG = verified.counts_B[:, None] + torch.arange(old_BG.shape[1], device=old_BG.device)
    is_old_BG = (places_BG < old_BG.shape[1]) & ~is_first_B[:, None]
    old_BG = old_BG.gather(1, places_BG.clamp_max(old_BG.shape[1] - 1))
    return torch.where(verified.is_carried_BG, verified.carried_BG, torch.where(is_old_BG, old_BG, fresh_BG))


def prompt_guesses_BG(
    tokens_SL: torch.Tensor,
    prompt_lengths_B: torch.Tensor,
    slots_B: torch.Tensor,
    seeds_B: torch.Tensor,
    positions_BG: torch.Tensor,
) -> torch.Tensor:
    """A random token of each row's prompt for every position, the one that `cllm.decoding.guess.Guesser` draws."""
    x_BG = (seeds_B.long()[:, None] * 0x9E3779B1 ^ positions_BG.long() * 0x85EBCA77) & _MASK
    x_BG = ((x_BG ^ (x_BG >> 16)) * 0x21F0AAAD) & _MASK
    x_BG = ((x_BG ^ (x_BG >> 15)) * 0x735A2D97) & _MASK
    x_BG = x_BG ^ (x_BG >> 15)
    return tokens_SL[slots_B[:, None], x_BG % prompt_lengths_B.long().clamp_min(1)[:, None]].long()


def prompt_refill_BG(rows: Rows, slots: Slots, verified: Verified, seeds_B: torch.Tensor) -> torch.Tensor:
    """`prompt_guesses_BG` for the places behind what each row has committed, its seed being at `seeds_B`."""
    slots_B = rows.slots_B.long()
    ahead_G = torch.arange(slots.draft_tokens_SG.shape[1], device=slots_B.device)
    positions_BG = (seeds_B + 1 + verified.counts_B)[:, None] + ahead_G
    return prompt_guesses_BG(
        slots.tokens_SL, slots.prompt_lengths_S[slots_B], slots_B, slots.seeds_S[slots_B], positions_BG
    )


def ngram_guesses_BG(known_BL: torch.Tensor, lengths_B: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What followed the last time that the two last tokens, or else the last one, stood in the same row.

    A continuation that reaches the row's end goes on with its own beginning.

    Args:
        known_BL: tokens; those from `lengths_B` on are ignored.
        lengths_B: 2 at least.

    Returns:
        Guesses [B, count], int64, and whether the row has any, bool [B].
    """
    width = known_BL.shape[1]
    places_L = torch.arange(width, device=known_BL.device)
    last_B1 = known_BL.gather(1, lengths_B[:, None] - 1)
    before_B1 = known_BL.gather(1, (lengths_B[:, None] - 2).clamp_min(0))
    one_back_BL, two_back_BL = known_BL.roll(1, dims=1), known_BL.roll(2, dims=1)
    follows_BL = (one_back_BL == last_B1) & (places_L >= 1) & (places_L < lengths_B[:, None])
    is_longer_BL = follows_BL & (two_back_BL == before_B1) & (places_L >= 2)
    score_BL = torch.where(follows_BL, places_L + width * is_longer_BL, -1)
    best_B1, source_B1 = score_BL.max(1, keepdim=True)
    ahead_BG = torch.arange(count, device=known_BL.device) % (lengths_B[:, None] - source_B1).clamp_min(1)
    return known_BL.gather(1, (source_B1 + ahead_BG).clamp_max(width - 1)).long(), best_B1[:, 0] >= 0


def append_predictions(
    known_BL: torch.Tensor, seed_positions_B: torch.Tensor, verified: Verified
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' tokens with this step's predictions, committed and carried, behind their seeds; and their new lengths.

    `known_BL` has room for them: L is at least W more than any seed's position, plus one.
    """
    ahead_W = torch.arange(verified.tokens_BW.shape[1], device=known_BL.device)
    is_own_BW = ahead_W < verified.widths_B[:, None]
    places_BW = seed_positions_B[:, None] + 1 + ahead_W
    kept_BW = torch.where(is_own_BW, verified.tokens_BW, known_BL.gather(1, places_BW).long())
    lengths_B = seed_positions_B + 1 + verified.widths_B
    return known_BL.scatter(1, places_BW, kept_BW.to(known_BL.dtype)), lengths_B
