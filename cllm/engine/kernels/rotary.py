"""Queries and keys normed (where the model does that) and rotated, keys and values stored into the pages: one launch.

A program has up to BLOCK_X of the stacked heads of one token: H query heads, then K key heads, then K value heads. Each
head is held as its two halves, since rotation pairs element d of the first with element d of the second.

Shapes: T tokens, X stacked heads, H query heads, K key-value heads, D head size, P positions.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def rotate_and_store_kernel(
    qkv_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cos_sin_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    q_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    qkv_stride: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    q_eps: tl.tensor,
    k_eps: tl.tensor,
    NUM_QUERIES: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (T, blocks of heads).

    Args:
        qkv_ptr: [T, (H + 2 K) D], rows `qkv_stride` apart.
        q_norm_ptr, k_norm_ptr: [D]; touched with HAS_NORM only.
        cos_sin_ptr: contiguous float32 [P, D].
        positions_ptr, slots_ptr: int64 [T]; with PDL the kernel just in front must not be the one that writes them.
        q_ptr: contiguous [T, H, D].
        keys_ptr, values_ptr: pages; the [K, D] of consecutive slots are `key_stride` and `value_stride` apart.
        BLOCK_HALF: a power of 2, at least D / 2.
    """
    HALF: tl.constexpr = HEAD_SIZE // 2
    token = tl.program_id(0).to(tl.int64)
    x_X1 = (tl.program_id(1) * BLOCK_X + tl.arange(0, BLOCK_X))[:, None]
    d_1D = tl.arange(0, BLOCK_HALF)[None, :]
    in_half_1D = d_1D < HALF
    mask_XD = (x_X1 < NUM_QUERIES + 2 * NUM_KV) & in_half_1D
    is_query_X1 = x_X1 < NUM_QUERIES
    is_value_X1 = x_X1 >= NUM_QUERIES + NUM_KV
    if PDL:
        gdc_launch_dependents()
    # Where tokens are was known before the forward began: it is read while the projection in front still runs.
    slot = tl.load(slots_ptr + token)
    cos_sin_ptr += tl.load(positions_ptr + token) * HEAD_SIZE
    cos_1D = tl.load(cos_sin_ptr + d_1D, mask=in_half_1D, other=0.0)
    sin_1D = tl.load(cos_sin_ptr + HALF + d_1D, mask=in_half_1D, other=0.0)
    if PDL:
        gdc_wait()
    head_ptrs_XD = qkv_ptr + token * qkv_stride + x_X1 * HEAD_SIZE + d_1D
    first_XD = tl.load(head_ptrs_XD, mask=mask_XD, other=0.0).to(tl.float32)
    second_XD = tl.load(head_ptrs_XD + HALF, mask=mask_XD, other=0.0).to(tl.float32)
    if HAS_NORM:
        mean_X1 = tl.sum(first_XD * first_XD + second_XD * second_XD, axis=1, keep_dims=True) / HEAD_SIZE
        scale_X1 = tl.rsqrt(mean_X1 + tl.where(is_query_X1, q_eps, k_eps))
        weight_ptrs_XD = tl.where(is_query_X1, q_norm_ptr, k_norm_ptr) + d_1D
        first_weight_XD = tl.load(weight_ptrs_XD, mask=mask_XD, other=0.0).to(tl.float32)
        second_weight_XD = tl.load(weight_ptrs_XD + HALF, mask=mask_XD, other=0.0).to(tl.float32)
        first_XD = tl.where(is_value_X1, first_XD, first_XD * scale_X1 * first_weight_XD)
        second_XD = tl.where(is_value_X1, second_XD, second_XD * scale_X1 * second_weight_XD)
    cos_XD = tl.where(is_value_X1, 1.0, cos_1D)
    sin_XD = tl.where(is_value_X1, 0.0, sin_1D)
    dtype = q_ptr.dtype.element_ty
    out_first_XD = (first_XD * cos_XD - second_XD * sin_XD).to(dtype)
    out_second_XD = (second_XD * cos_XD + first_XD * sin_XD).to(dtype)
    # A head has one destination, so one store of each half serves all three kinds.
    query_ptrs_XD = q_ptr + (token * NUM_QUERIES + x_X1) * HEAD_SIZE + d_1D
    key_ptrs_XD = keys_ptr + slot * key_stride + (x_X1 - NUM_QUERIES) * HEAD_SIZE + d_1D
    value_ptrs_XD = values_ptr + slot * value_stride + (x_X1 - NUM_QUERIES - NUM_KV) * HEAD_SIZE + d_1D
    out_ptrs_XD = tl.where(is_query_X1, query_ptrs_XD, tl.where(is_value_X1, value_ptrs_XD, key_ptrs_XD))
    tl.store(out_ptrs_XD, out_first_XD, mask=mask_XD)
    tl.store(out_ptrs_XD + HALF, out_second_XD, mask=mask_XD)
