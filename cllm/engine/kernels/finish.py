"""What follows a projection, in the kernel that adds its partial sums: bias, the gate, or residual and RMS norm.

The partial sums are float32 [P, T, columns] as `kernels.projection` leaves them; a tile has at most P of them and the
places behind its last are not written. A finished tensor [T, columns] is the case P = 1.

Shapes: T tokens, O outputs (of a gated projection: of one half), E hidden size.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from cllm.engine.kernels.projection import owner


@triton.jit
def _count_parts(
    o_O: tl.tensor, chunks: tl.tensor, base: tl.tensor, extra: tl.tensor, TILE: tl.constexpr, PARTS: tl.constexpr
) -> tl.tensor:
    """How many partial sums each output has."""
    if PARTS == 1:
        return tl.full(o_O.shape, 1, tl.int32)
    step_O = o_O // TILE * chunks
    return owner(step_O + chunks - 1, base, extra) - owner(step_O, base, extra) + 1


@triton.jit
def _add_parts(
    parts_ptr: tl.tensor,
    columns_O: tl.tensor,
    counts_O: tl.tensor,
    mask_O: tl.tensor,
    tokens: tl.tensor,
    stride: tl.tensor,
    PARTS: tl.constexpr,
) -> tl.tensor:
    """Sum of one token's partial sums, in float32; `parts_ptr` is at the token's row of the first part."""
    total_O = tl.zeros(columns_O.shape, tl.float32)
    for part in tl.static_range(PARTS):
        pointers_O = parts_ptr + (part * tokens).to(tl.int64) * stride + columns_O
        total_O += tl.load(pointers_O, mask=mask_O & (part < counts_O), other=0.0).to(tl.float32)
    return total_O


@triton.jit(do_not_specialize=["tokens", "chunks", "base", "extra"])
def sum_kernel(
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    stride: tl.tensor,
    chunks: tl.tensor,
    base: tl.tensor,
    extra: tl.tensor,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (T, blocks of O). out[T, O] = sum + bias, or with GATED silu(gate) * up of the two halves of the columns.

    Args:
        parts_ptr: [P, T, O or 2 O], rows `stride` apart.
        bias_ptr: [O or 2 O]; touched with HAS_BIAS only.
        chunks, base, extra, TILE: how the projection was cut; not used with PARTS 1.
    """
    token = tl.program_id(0)
    o_O = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask_O = o_O < outputs
    counts_O = _count_parts(o_O, chunks, base, extra, TILE, PARTS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    parts_ptr += token.to(tl.int64) * stride
    total_O = _add_parts(parts_ptr, o_O, counts_O, mask_O, tokens, stride, PARTS)
    if HAS_BIAS:
        total_O += tl.load(bias_ptr + o_O, mask=mask_O, other=0.0).to(tl.float32)
    if GATED:
        up_O = _add_parts(parts_ptr, outputs + o_O, counts_O, mask_O, tokens, stride, PARTS)
        if HAS_BIAS:
            up_O += tl.load(bias_ptr + outputs + o_O, mask=mask_O, other=0.0).to(tl.float32)
        total_O = total_O * tl.sigmoid(total_O) * up_O
    tl.store(out_ptr + token.to(tl.int64) * outputs + o_O, total_O.to(out_ptr.dtype.element_ty), mask=mask_O)


@triton.jit(do_not_specialize=["tokens", "chunks", "base", "extra"])
def norm_kernel(
    parts_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    chunks: tl.tensor,
    base: tl.tensor,
    extra: tl.tensor,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (T,). sum = parts + bias + residual; out = weight * sum / rms(sum).

    Args:
        parts_ptr: [P, T, E], rows `stride` apart.
        bias_ptr, weight_ptr: [E]; the bias is touched with HAS_BIAS only.
        residual_ptr, sum_ptr: [T, E], the residual's rows `residual_stride` apart; touched with HAS_RESIDUAL only.
        out_ptr: contiguous [T, E].
        chunks, base, extra, TILE: how the projection was cut; not used with PARTS 1.
        BLOCK: a power of 2, at least E.
    """
    token = tl.program_id(0).to(tl.int64)
    e_E = tl.arange(0, BLOCK)
    mask_E = e_E < size
    counts_E = _count_parts(e_E, chunks, base, extra, TILE, PARTS)
    weight_E = tl.load(weight_ptr + e_E, mask=mask_E, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total_E = _add_parts(parts_ptr + token * stride, e_E, counts_E, mask_E, tokens, stride, PARTS)
    if HAS_BIAS:
        total_E += tl.load(bias_ptr + e_E, mask=mask_E, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total_E += tl.load(residual_ptr + token * residual_stride + e_E, mask=mask_E, other=0.0).to(tl.float32)
        rounded_E = total_E.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + token * size + e_E, rounded_E, mask=mask_E)
        total_E = rounded_E.to(tl.float32)  # the norm sees what the next layer's residual sees
    scale = tl.rsqrt(tl.sum(total_E * total_E) / size + eps)
    dtype = out_ptr.dtype.element_ty
    normed_E = (total_E * scale).to(dtype).to(tl.float32)  # rounded before the weight, as in transformers' modules
    tl.store(out_ptr + token * size + e_E, (weight_E * normed_E).to(dtype), mask=mask_E)
