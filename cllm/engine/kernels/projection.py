"""y = x W^T for a few tokens: the weight is streamed through the GPU once, at the speed of its memory.

The weight is cut into tiles of BLOCK_O rows, a tile into chunks of BLOCK_I columns. All chunks of all tiles, in order,
are the steps of the job, and the programs share them out evenly: program g has a contiguous range of steps. So any
number of programs gets equal work, whatever the shape, which a grid of whole tiles would not give on 132 processors.

Where every program has just one whole tile, it writes the result. Otherwise each leaves the float32 partial sums of the
tiles that it touched, and `kernels.finish` adds those of a tile in a fixed order: there are no atomics, and the same
input gives the same bits.

A tile of W is the left operand of the matrix product and x^T the right one, because a tensor core wants 64 rows on the
left but is content with 8 columns on the right. Eviction policies would be in vain: Triton's pipelined loads drop them.

Programmatic dependent launch: a program allows the next kernel to start once it has asked for its last weights, and
brings its own first weights to the L2 cache while the kernel before it still runs.

Shapes: T tokens, I inputs, O outputs (of a gated projection: of one half), P most partial sums of a tile.
"""

import bisect
import functools
from dataclasses import dataclass

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@dataclass(frozen=True, slots=True)
class Share:
    """How the steps of a projection are shared out: the first `extra` programs have base + 1 steps, the others base."""

    programs: int
    tiles: int
    chunks: int  # of a tile
    base: int
    extra: int
    parts: int  # P, the most programs that have steps of one tile
    direct: bool  # each program has one tile, and all of it


@functools.cache
def share_out(programs: int, tiles: int, chunks: int) -> Share:
    """At most one program a step; the same arithmetic as `first_step` and `owner`."""
    programs = min(programs, tiles * chunks)
    base, extra = divmod(tiles * chunks, programs)
    ends = [program * base + min(program, extra) for program in range(1, programs + 1)]
    first = [bisect.bisect_right(ends, tile * chunks) for tile in range(tiles)]
    last = [bisect.bisect_right(ends, tile * chunks + chunks - 1) for tile in range(tiles)]
    parts = max(end - begin + 1 for begin, end in zip(first, last, strict=True))
    return Share(programs, tiles, chunks, base, extra, parts, direct=programs == tiles)


@triton.jit
def first_step(program: tl.tensor, base: tl.tensor, extra: tl.tensor) -> tl.tensor:
    return program * base + tl.minimum(program, extra)


@triton.jit
def owner(step: tl.tensor, base: tl.tensor, extra: tl.tensor) -> tl.tensor:
    """The program that a step belongs to; the inverse of `first_step`."""
    in_long = extra * (base + 1)
    return tl.where(step < in_long, step // (base + 1), extra + (step - in_long) // base)


@triton.jit
def _prefetch(
    w_ptr: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    BLOCK_O: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
) -> None:
    """Ask for the first LINES cache lines, of LINE elements, of each row of a tile, without waiting for them."""
    rows_O = tl.minimum(row + tl.arange(0, BLOCK_O), outputs - 1)
    columns_I = tl.minimum(column + tl.arange(0, LINES) * LINE, inputs - 1)
    pointers_OI = w_ptr + rows_O[:, None].to(tl.int64) * inputs + columns_I[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // $0 is unused", "=r,l", [pointers_OI], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _load_weights(pointers_OI: tl.tensor, inside_I: tl.tensor, EVEN_I: tl.constexpr) -> tl.tensor:
    return tl.load(pointers_OI) if EVEN_I else tl.load(pointers_OI, mask=inside_I[None, :], other=0.0)


@triton.jit
def _store(
    out_ptr: tl.tensor,
    acc_OT: tl.tensor,
    first_row: tl.tensor,
    o_O: tl.tensor,
    t_T: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    row_size: tl.tensor,
) -> None:
    """Write a tile to columns o_O of rows first_row + t_T of a matrix with `row_size` columns."""
    mask_OT = (o_O[:, None] < outputs) & (t_T[None, :] < tokens)
    pointers_OT = out_ptr + (first_row + t_T[None, :]).to(tl.int64) * row_size + o_O[:, None]
    tl.store(pointers_OT, acc_OT.to(out_ptr.dtype.element_ty), mask=mask_OT)


@triton.jit(do_not_specialize=["tokens", "chunks", "base", "extra"])
def projection_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    inputs: tl.tensor,
    x_stride: tl.tensor,
    chunks: tl.tensor,
    base: tl.tensor,
    extra: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    EVEN_I: tl.constexpr,
    DIRECT: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """Grid (programs,).

    Args:
        x_ptr: [T, I], rows `x_stride` apart.
        w_ptr: contiguous [O, I], or with GATED [2 O, I]: the gate's rows, then the others.
        bias_ptr: as many elements as the weight has rows; touched with HAS_BIAS and DIRECT only.
        out_ptr: with DIRECT [T, O]: the projection, or with GATED silu(gate) * up; else float32 [P, T, weight rows].
        tokens: T, at most BLOCK_T.
        chunks, base, extra: of the `Share`.
        PREFETCH: steps whose weights are brought to L2 ahead of the start; a power of 2, only with PDL.
        EVEN_I: I is a multiple of BLOCK_I.
    """
    program = tl.program_id(0)
    begin = first_step(program, base, extra)
    end = first_step(program + 1, base, extra)
    o_O = tl.arange(0, BLOCK_O)
    t_T = tl.arange(0, BLOCK_T)
    if PDL:
        LINE: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = PREFETCH * BLOCK_I // LINE
        row = begin // chunks * BLOCK_O
        _prefetch(w_ptr, row, begin % chunks * BLOCK_I, outputs, inputs, BLOCK_O, LINES, LINE)
        if GATED:
            half_ptr = w_ptr + outputs.to(tl.int64) * inputs
            _prefetch(half_ptr, row, begin % chunks * BLOCK_I, outputs, inputs, BLOCK_O, LINES, LINE)
        gdc_wait()
    acc_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    up_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        tile = program if DIRECT else step // chunks
        i_I = (step - tile * chunks) * BLOCK_I + tl.arange(0, BLOCK_I)
        # The last tile may hang over the end: it reads the last row again, and `_store` drops what comes of that.
        rows_O = tl.minimum(o_O, outputs - 1 - tile * BLOCK_O)
        w_ptrs_OI = w_ptr + (tile * BLOCK_O).to(tl.int64) * inputs + (rows_O[:, None] * inputs + i_I[None, :])
        x_ptrs_IT = x_ptr + (t_T[None, :] * x_stride + i_I[:, None])
        inside_I = i_I < inputs
        inside_T = t_T[None, :] < tokens
        x_IT = tl.load(x_ptrs_IT, mask=inside_T if EVEN_I else inside_T & inside_I[:, None], other=0.0)
        w_OI = _load_weights(w_ptrs_OI, inside_I, EVEN_I)
        acc_OT = tl.dot(w_OI, x_IT, acc_OT, input_precision="ieee")
        if GATED:
            up_w_OI = _load_weights(w_ptrs_OI + outputs.to(tl.int64) * inputs, inside_I, EVEN_I)
            up_OT = tl.dot(up_w_OI, x_IT, up_OT, input_precision="ieee")
        if PDL and step == tl.maximum(end - STAGES, begin):
            gdc_launch_dependents()
        if not DIRECT and (step == end - 1) | (step == (tile + 1) * chunks - 1):
            part = program - owner(tile * chunks, base, extra)
            row_size = outputs * 2 if GATED else outputs
            _store(out_ptr, acc_OT, part * tokens, tile * BLOCK_O + o_O, t_T, tokens, outputs, row_size)
            acc_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
            if GATED:
                up_out_ptr = out_ptr + outputs
                _store(up_out_ptr, up_OT, part * tokens, tile * BLOCK_O + o_O, t_T, tokens, outputs, row_size)
                up_OT = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    if DIRECT:
        o_O += program * BLOCK_O
        if HAS_BIAS:
            acc_OT += tl.load(bias_ptr + o_O, mask=o_O < outputs, other=0.0).to(tl.float32)[:, None]
        if GATED:
            if HAS_BIAS:
                up_OT += tl.load(bias_ptr + outputs + o_O, mask=o_O < outputs, other=0.0).to(tl.float32)[:, None]
            acc_OT = acc_OT * tl.sigmoid(acc_OT) * up_OT
        _store(out_ptr, acc_OT, 0, o_O, t_T, tokens, outputs, outputs)
