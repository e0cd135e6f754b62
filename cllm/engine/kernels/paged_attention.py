"""Attention of windows over a paged cache in one launch: flash-decoding that also tiles over long windows.

A program holds one tile: up to `BLOCK_M` query rows of one cache row and one key-value head. The query heads that share
the key-value head lie side by side in the tile (row r is token r // GROUP, head r % GROUP), so that a page is read once
for all of them. It walks the keys its last row may see, `BLOCK_N` at a time, with the softmax carried along in float32.

Where tiles are too few to fill the GPU, several programs share one tile's keys. How many of them work is decided here,
from the row's length: a short row keeps a single program, which writes its result; the others leave at once. With more,
each leaves a partial result, and the last to arrive merges them in the order of the keys, so that the outcome does not
depend on who was last, and sets the counter back to zero for the next launch.

Shapes: M rows of a tile, N keys of a step, D head size.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["width", "mask_stride", "num_splits", "table_stride"])
def paged_attention_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    out_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    mask_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    arrivals_ptr: tl.tensor,
    scale: tl.tensor,
    width: tl.tensor,
    mask_stride: tl.tensor,
    num_splits: tl.tensor,
    table_stride: tl.tensor,
    token_stride: tl.tensor,
    query_stride: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    head_stride: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (tiles * num_splits, key-value heads, rows).

    Args:
        q_ptr: queries [T, H, D], strides `token_stride` and `query_stride`.
        k_ptr, v_ptr: pages [N, S, K, D], strides `block_stride`, `slot_stride` and `head_stride`.
        out_ptr: contiguous [T, H, D].
        starts_ptr, tables_ptr: int32 [B] and [B, M], as in `Windows`; with PDL the kernel just in front must not be the
            one that writes them.
        mask_ptr: int64 [W, X] with row stride `mask_stride`, as in `WindowMask`; read with MASKED only.
        partial_ptr: float32 scratch [tiles of all heads and rows, num_splits, BLOCK_M, HEAD_SIZE].
        stats_ptr: float32 scratch [tiles of all heads and rows, num_splits, 2, BLOCK_M].
        arrivals_ptr: int32 [tiles of all heads and rows], zero before and after the launch. Like the scratch it is not
            touched with `num_splits` 1.
        scale: softmax scale times log2(e), because the kernel works with powers of two.
        SPLIT_KEYS: a tile's keys are not shared out into parts smaller than this.
        MASKED: within the window the mask says who sees whom; otherwise attention is causal.
        MERGE_STAGES: one more than the partial results that are on their way while another is merged.
        PDL: programmatic dependent launch: start while the kernel before this one ends, and let the next one do so.
    """
    if PDL:
        gdc_launch_dependents()
    # The last tiles see most keys, so they start first.
    tile = tl.num_programs(0) // num_splits - 1 - tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    head, row = tl.program_id(1), tl.program_id(2)

    rows_M = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    used_M = rows_M < width * GROUP
    tokens_M = tl.minimum(rows_M // GROUP, width - 1)
    start = tl.load(starts_ptr + row)
    last = width - 1 if MASKED else tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, width - 1)
    num_keys = start + last + 1

    working = tl.minimum(num_splits, tl.cdiv(num_keys, SPLIT_KEYS))
    split_keys = tl.cdiv(tl.cdiv(num_keys, working), BLOCK_N) * BLOCK_N
    working = tl.cdiv(num_keys, split_keys)
    if split >= working:
        return

    table_ptr = tables_ptr + row.to(tl.int64) * table_stride
    if PDL:
        # Of the keys only the window's own are written by the kernel in front; the others may come to the L2 cache.
        keys_N = split * split_keys + tl.arange(0, BLOCK_N)
        blocks_N = tl.load(table_ptr + keys_N // BLOCK_TOKENS, mask=keys_N < num_keys, other=0).to(tl.int64)
        offsets_N = blocks_N * block_stride + keys_N % BLOCK_TOKENS * slot_stride + head * head_stride
        _prefetch(k_ptr, offsets_N, HEAD_SIZE, BLOCK_D)
        _prefetch(v_ptr, offsets_N, HEAD_SIZE, BLOCK_D)
        gdc_wait()
    dims_D = tl.arange(0, BLOCK_D)
    heads_M = head * GROUP + rows_M % GROUP
    token_rows_M = (row * width + tokens_M).to(tl.int64)
    q_pointers = q_ptr + (token_rows_M * token_stride + heads_M * query_stride)[:, None] + dims_D[None, :]
    q_MD = tl.load(q_pointers, mask=used_M[:, None] & (dims_D < HEAD_SIZE)[None, :], other=0.0)
    max_M, sum_M, acc_MD = _attend(
        q_MD,
        start,
        tokens_M,
        mask_ptr,
        mask_stride,
        k_ptr + head * head_stride,
        v_ptr + head * head_stride,
        table_ptr,
        split * split_keys,
        tl.minimum((split + 1) * split_keys, num_keys),
        scale,
        block_stride,
        slot_stride,
        HEAD_SIZE,
        BLOCK_TOKENS,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        MASKED,
    )

    num_heads = tl.num_programs(1) * GROUP
    out_M = (token_rows_M * num_heads + heads_M) * HEAD_SIZE
    mask_MD = used_M[:, None] & (dims_D < HEAD_SIZE)[None, :]
    if working == 1:
        _write(out_ptr, out_M, dims_D, acc_MD / sum_M[:, None], mask_MD)
    else:
        place = (row * tl.num_programs(1) + head) * (tl.num_programs(0) // num_splits) + tile
        first = place * num_splits
        rows_in_tile_M = tl.arange(0, BLOCK_M)
        stats_M = stats_ptr + (first + split) * 2 * BLOCK_M + rows_in_tile_M
        tl.store(stats_M, max_M, mask=used_M)
        tl.store(stats_M + BLOCK_M, sum_M, mask=used_M)
        partial_M = ((first + split) * BLOCK_M + rows_in_tile_M) * HEAD_SIZE
        _write(partial_ptr, partial_M, dims_D, acc_MD, mask_MD)
        # One thread raises the counter: the stores of all must lie before it. Raising releases them and acquires those
        # of the programs that came earlier.
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + place, 1, sem="acq_rel", scope="gpu") == working - 1:
            tl.store(arrivals_ptr + place, 0)
            merged_MD = _merge(
                partial_ptr, stats_ptr, first, working, used_M, mask_MD, HEAD_SIZE, BLOCK_M, BLOCK_D, MERGE_STAGES
            )
            _write(out_ptr, out_M, dims_D, merged_MD, mask_MD)


@triton.jit
def _prefetch(base_ptr: tl.tensor, offsets_N: tl.tensor, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr) -> None:
    """Ask for the cache lines of these vectors without waiting for them."""
    LINE: tl.constexpr = 1024 // base_ptr.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (BLOCK_D + LINE - 1) // LINE
    places_L = tl.minimum(tl.arange(0, LINES) * LINE, HEAD_SIZE - 1)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0 is unused",
        "=r,l",
        [base_ptr + offsets_N[:, None] + places_L[None, :]],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _attend(
    q_MD: tl.tensor,
    start: tl.tensor,
    tokens_M: tl.tensor,
    mask_ptr: tl.tensor,
    mask_stride: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    scale: tl.tensor,
    block_stride: tl.tensor,
    slot_stride: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of the keys `begin` to `end`: the largest score, and relative to it the sums of weights and weighted values."""
    dims_D = tl.arange(0, BLOCK_D)
    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        keys_N = first + tl.arange(0, BLOCK_N)
        # Behind the row's end its last block was never written: it may hold NaN, which a weight of 0 does not hide.
        mask_ND = (keys_N < end)[:, None] & (dims_D < HEAD_SIZE)[None, :]
        blocks_N = tl.load(table_ptr + keys_N // BLOCK_TOKENS, mask=keys_N < end, other=0).to(tl.int64)
        offsets_ND = (blocks_N * block_stride + keys_N % BLOCK_TOKENS * slot_stride)[:, None] + dims_D[None, :]
        k_ND = tl.load(k_ptr + offsets_ND, mask=mask_ND, other=0.0)
        scores_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
        if MASKED:
            # Bits `first - start + 64` and on of each token's mask; in front of them there are only ones.
            bit = tl.maximum(first - start + 64, 0)
            shift = (bit % 64).to(tl.uint64)
            words_M = mask_ptr + tokens_M * mask_stride + bit // 64
            low_M = tl.load(words_M).to(tl.uint64, bitcast=True) >> shift
            high_M = tl.load(words_M + 1).to(tl.uint64, bitcast=True) << 1 << (63 - shift)
            places_N = tl.arange(0, BLOCK_N).to(tl.uint64)
            seen_MN = (((low_M | high_M)[:, None] >> places_N[None, :]) & 1) != 0
        else:
            # Only the last part of a tile's keys may end inside a step, and no row sees a key from that end on.
            seen_MN = keys_N[None, :] <= (start + tokens_M)[:, None]
        scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(scores_MN, 1))
        # A row that has seen no key yet has maximum -inf, and -inf - -inf would be NaN.
        shift_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
        weights_MN = tl.exp2(scores_MN - shift_M[:, None])
        decay_M = tl.exp2(max_M - shift_M)
        sum_M = sum_M * decay_M + tl.sum(weights_MN, 1)
        v_ND = tl.load(v_ptr + offsets_ND, mask=mask_ND, other=0.0)
        acc_MD = tl.dot(weights_MN.to(v_ND.dtype), v_ND, acc_MD * decay_M[:, None], input_precision="ieee")
        max_M = new_max_M
    return max_M, sum_M, acc_MD


@triton.jit
def _merge(
    partial_ptr: tl.tensor,
    stats_ptr: tl.tensor,
    first: tl.tensor,
    working: tl.tensor,
    used_M: tl.tensor,
    mask_MD: tl.tensor,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MERGE_STAGES: tl.constexpr,
) -> tl.tensor:
    """The tile's output from its partial results, number `first` and on. Every row sees a key of the first one."""
    rows_M = tl.arange(0, BLOCK_M)
    dims_D = tl.arange(0, BLOCK_D)
    max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    acc_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Waiting for one after the other would take longer than all the rest.
    for part in tl.range(first, first + working, num_stages=MERGE_STAGES):
        stats_M = stats_ptr + part * 2 * BLOCK_M + rows_M
        part_max_M = tl.load(stats_M, mask=used_M, other=0.0)
        part_sum_M = tl.load(stats_M + BLOCK_M, mask=used_M, other=1.0)
        part_offsets_MD = ((part * BLOCK_M + rows_M) * HEAD_SIZE)[:, None] + dims_D[None, :]
        part_MD = tl.load(partial_ptr + part_offsets_MD, mask=mask_MD, other=0.0)
        new_max_M = tl.maximum(max_M, part_max_M)
        decay_M = tl.exp2(max_M - new_max_M)
        weight_M = tl.exp2(part_max_M - new_max_M)
        sum_M = sum_M * decay_M + part_sum_M * weight_M
        acc_MD = acc_MD * decay_M[:, None] + part_MD * weight_M[:, None]
        max_M = new_max_M
    return acc_MD / sum_M[:, None]


@triton.jit
def _write(base_ptr: tl.tensor, offsets_M: tl.tensor, dims_D: tl.tensor, x_MD: tl.tensor, mask_MD: tl.tensor) -> None:
    pointers_MD = base_ptr + offsets_M[:, None] + dims_D[None, :]
    tl.store(pointers_MD, x_MD.to(base_ptr.dtype.element_ty), mask=mask_MD)
