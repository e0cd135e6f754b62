"""The ends of a step in one launch each: where its windows lie, and which of its predictions hold.

Both do for a row what some twenty operations of torch do, whose launches a step of few rows would wait for.

Shapes: as in `cllm.engine.state`; X entries of a result, 1 + W.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_blocks"])
def window_kernel(
    slots_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    length_ptr: tl.tensor,
    window_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    stored_ptr: tl.tensor,
    out_tables_ptr: tl.tensor,
    slots_stride: tl.tensor,
    buffer_tokens: tl.tensor,
    table_blocks: tl.tensor,
    num_blocks: tl.tensor,
    BLOCK_TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Grid (B,).

    Args:
        slots_ptr: int64 [B], `slots_stride` apart.
        tokens_ptr: int64 [R, buffer_tokens].
        tables_ptr: int32 [R, table_blocks].
        length_ptr: int64 [R].
        window_ptr, positions_ptr, stored_ptr: int64 [B, WIDTH], written.
        starts_ptr, out_tables_ptr: int32 [B] and [B, num_blocks], written.
        BLOCK_W: a power of 2, at least WIDTH.
        BLOCK_M: entries of a table copied at a time.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row * slots_stride)
    start = tl.load(length_ptr + slot) - 1
    tl.store(starts_ptr + row, start.to(tl.int32))

    w_W = tl.arange(0, BLOCK_W)
    mask_W = w_W < WIDTH
    positions_W = tl.minimum(start + w_W, buffer_tokens - 1)
    tokens_W = tl.load(tokens_ptr + slot * buffer_tokens + positions_W, mask=mask_W, other=0)
    index_W = tl.minimum(positions_W // BLOCK_TOKENS, num_blocks - 1)
    table_ptr = tables_ptr + slot * table_blocks
    blocks_W = tl.load(table_ptr + index_W, mask=mask_W & (index_W < table_blocks), other=0).to(tl.int64)
    out_W = row * WIDTH + w_W
    tl.store(window_ptr + out_W, tokens_W, mask=mask_W)
    tl.store(positions_ptr + out_W, positions_W, mask=mask_W)
    tl.store(stored_ptr + out_W, blocks_W * BLOCK_TOKENS + positions_W % BLOCK_TOKENS, mask=mask_W)

    for first in range(0, num_blocks, BLOCK_M):
        m_M = first + tl.arange(0, BLOCK_M)
        entries_M = tl.load(table_ptr + m_M, mask=m_M < tl.minimum(table_blocks, num_blocks), other=0)
        tl.store(out_tables_ptr + row * num_blocks + m_M, entries_M, mask=m_M < num_blocks)


@triton.jit
def accept_kernel(
    slots_ptr: tl.tensor,
    window_ptr: tl.tensor,
    predictions_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    length_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    block_end_ptr: tl.tensor,
    block_size_ptr: tl.tensor,
    result_ptr: tl.tensor,
    slots_stride: tl.tensor,
    window_stride: tl.tensor,
    buffer_tokens: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
) -> None:
    """Grid (B,), one warp each: what the row's numbers were is read before any of them is written.

    Args:
        slots_ptr: int64 [B], `slots_stride` apart.
        window_ptr: int64 [B, WIDTH], rows `window_stride` apart.
        predictions_ptr: contiguous int64 [B, WIDTH].
        tokens_ptr, length_ptr, limit_ptr, block_end_ptr, block_size_ptr: int64, the state of all slots.
        result_ptr: int64 [B, 1 + WIDTH], written.
        BLOCK_W: a power of 2, at least WIDTH.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row * slots_stride)
    length = tl.load(length_ptr + slot)
    end = tl.load(block_end_ptr + slot)
    room = tl.minimum(end, tl.load(limit_ptr + slot)) - length
    size = tl.load(block_size_ptr + slot)

    w_W = tl.arange(0, BLOCK_W)
    mask_W = w_W < WIDTH
    predictions_W = tl.load(predictions_ptr + row * WIDTH + w_W, mask=mask_W, other=0)
    guesses_W = tl.load(window_ptr + row * window_stride + w_W + 1, mask=w_W < WIDTH - 1, other=0)
    # The first place whose guess behind it does not hold is the last one that is committed.
    is_wrong_W = (w_W >= WIDTH - 1) | (guesses_W != predictions_W)
    count = tl.minimum(1 + tl.min(tl.where(is_wrong_W, w_W, BLOCK_W), 0), room)

    positions_W = length + w_W
    is_open_W = mask_W & (positions_W < tl.minimum(end, buffer_tokens))
    tl.debug_barrier()
    tl.store(tokens_ptr + slot * buffer_tokens + positions_W, predictions_W, mask=is_open_W)
    tl.store(length_ptr + slot, length + count)
    tl.store(block_end_ptr + slot, tl.where(length + count == end, end + size, end))
    result_ptr += row * (WIDTH + 1)
    tl.store(result_ptr, count)
    tl.store(result_ptr + 1 + w_W, predictions_W, mask=mask_W)
