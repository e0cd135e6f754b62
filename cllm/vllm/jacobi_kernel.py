"""What the Jacobi sampler does behind vLLM's own draw, in one launch: verify, commit, and refill the window.

`cllm.vllm.jacobi` says the same in plain torch, in some forty launches; on a small model the host's time for these is a
third of a step. Guesses by n-gram are left to it.

Shapes: as in `cllm.vllm.jacobi`.
"""

import torch
import triton
import triton.language as tl

from cllm.vllm.jacobi import Committed, Rows, Slots


def commit_and_refill(rows: Rows, slots: Slots, histogram: torch.Tensor, pad_id: int | None) -> Committed:
    """Verify every row, leave its next guesses in its slot, and count what it committed.

    Args:
        histogram: int64 [(W + 1) ** 2]; entry w (W + 1) + a counts the rows of w logits that committed a tokens.
        pad_id: the guess where no prediction is left over, or None for random tokens of the row's prompt.
    """
    batch, window = rows.slots_B.shape[0], slots.draft_tokens_SG.shape[1] + 1
    new = rows.predictions_F.new_empty
    tokens_BW, counts_B = new((batch, window)), new(batch, dtype=torch.int32)
    rejected_B = torch.empty_like(counts_B)
    _kernel[(batch,)](
        *rows,
        *slots,
        tokens_BW,
        counts_B,
        rejected_B,
        histogram,
        slots.draft_tokens_SG.stride(0),
        slots.tokens_SL.stride(0),
        pad_id or 0,
        PROMPT=pad_id is None,
        WINDOW=window,
        BLOCK=triton.next_power_of_2(window),
        num_warps=1,
    )
    return Committed(tokens_BW, counts_B, rejected_B)


@triton.jit
def _hash(seed: tl.tensor, position_W: tl.tensor) -> tl.tensor:
    """uint32, as `cllm.decoding.guess.Guesser` draws."""
    x_W = (seed.to(tl.uint32) * 0x9E3779B1) ^ (position_W.to(tl.uint32) * 0x85EBCA77)
    x_W = (x_W ^ (x_W >> 16)) * 0x21F0AAAD
    x_W = (x_W ^ (x_W >> 15)) * 0x735A2D97
    return x_W ^ (x_W >> 15)


@triton.jit(do_not_specialize=["pad_id"])
def _kernel(
    predictions_ptr: tl.tensor,
    num_sampled_ptr: tl.tensor,
    inputs_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    logits_indices_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    drafts_ptr: tl.tensor,
    prefill_lengths_ptr: tl.tensor,
    prompt_lengths_ptr: tl.tensor,
    seeds_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    out_tokens_ptr: tl.tensor,
    out_counts_ptr: tl.tensor,
    out_rejected_ptr: tl.tensor,
    histogram_ptr: tl.tensor,
    drafts_stride: tl.tensor,
    tokens_stride: tl.tensor,
    pad_id: tl.tensor,
    PROMPT: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Grid (B,). Arguments as the fields of `Rows`, `Slots` and `Committed`; BLOCK is a power of 2, at least WINDOW."""
    row = tl.program_id(0)
    start = tl.load(offsets_ptr + row)
    width = tl.load(offsets_ptr + row + 1) - start
    slot = tl.load(slots_ptr + row).to(tl.int64)
    is_decoding = tl.load(num_sampled_ptr + row) > 0
    w_W = tl.arange(0, BLOCK)
    is_own_W = w_W < width

    predictions_ptr += start
    tokens_W = tl.load(predictions_ptr + w_W, mask=is_own_W, other=0)
    before_W = tl.load(predictions_ptr + w_W - 1, mask=is_own_W & (w_W > 0), other=0)
    places_W = tl.load(logits_indices_ptr + start + w_W, mask=is_own_W, other=0)
    inputs_W = tl.load(inputs_ptr + places_W, mask=is_own_W, other=0).to(tl.int64)
    holds_W = is_own_W & ((w_W == 0) | (inputs_W == before_W))
    count = tl.min(tl.where(holds_W, BLOCK, w_W), 0)  # the first place that does not hold
    committed = tl.where(is_decoding, count, 0)
    tl.store(out_tokens_ptr + row * WINDOW + w_W, tokens_W, mask=w_W < WINDOW)
    tl.store(out_counts_ptr + row, committed)
    tl.store(out_rejected_ptr + row, tl.where(is_decoding, width - count, 0))
    tl.atomic_add(histogram_ptr + width * (WINDOW + 1) + committed, is_decoding.to(tl.int64))

    if slot >= 0:
        seed_position = tl.load(positions_ptr + tl.load(logits_indices_ptr + start))
        # a row that has just read its prompt has no old guesses
        num_old = tl.where(seed_position < tl.load(prefill_lengths_ptr + slot), 0, WINDOW - 1)
        drafts_ptr += slot * drafts_stride
        next_W = count + w_W  # the place in this step's window that each next guess stands for
        is_carried_W = next_W < width
        is_old_W = next_W < num_old
        carried_W = tl.load(predictions_ptr + next_W, mask=is_carried_W, other=0)
        old_W = tl.load(drafts_ptr + next_W, mask=is_old_W, other=0)
        if PROMPT:
            x_W = _hash(tl.load(seeds_ptr + slot), seed_position + 1 + next_W)
            length = tl.maximum(tl.load(prompt_lengths_ptr + slot), 1).to(tl.uint32)
            fresh_W = tl.load(tokens_ptr + slot * tokens_stride + (x_W % length).to(tl.int64)).to(tl.int64)
        else:
            fresh_W = tl.full((BLOCK,), pad_id, tl.int64)
        tl.debug_barrier()  # all threads have read the old guesses
        guesses_W = tl.where(is_carried_W, carried_W, tl.where(is_old_W, old_W, fresh_W))
        tl.store(drafts_ptr + w_W, guesses_W, mask=w_W < WINDOW - 1)
