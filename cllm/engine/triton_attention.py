"""Attention over the paged cache with our own Triton kernel: for every NVIDIA GPU, window and head size.

Shapes: B rows, W tokens of a window, T = B * W tokens, M blocks of a table, H query heads, K key-value heads,
D head size, N cache blocks, S tokens of a block.
"""

import math
from dataclasses import dataclass

import torch
import triton

from cllm.engine.attention import Windows
from cllm.engine.kernels.paged_attention import paged_attention_kernel
from cllm.engine.ops import Pages
from cllm.errors import InputError

_MAX_HEAD_SIZE = 256
_MOST_KEYS = 64  # of a step: one word of a mask
_KEY_TILE_BYTES = 16_384  # two of keys and two of values at a time: 64 KB of shared memory
_ACCUMULATORS = 128 * 128  # float32 sums of one program: 64 registers of each thread of 8 warps


@dataclass(frozen=True, slots=True)
class _Tiles:
    """How a launch is cut into programs."""

    rows: int
    keys: int
    head_size: int  # padded
    per_head: int  # tiles of one row and key-value head
    split_keys: int
    num_splits: int
    num_warps: int
    num_stages: int
    merge_stages: int


class TritonAttention:
    """One launch a call, without a host synchronisation: may be captured in a CUDA graph.

    Calls must follow each other on one stream, since they share the counters of `kernels.paged_attention`.

    Args:
        device: where the tensors of all calls are.
        num_programs: programs that a launch should have: where there are fewer tiles, their keys are shared out. 256 is
            two for each processor of an A100 or H100.
        split_keys: fewest keys worth a program of their own. Parts of 64 keys take longer to merge than they save:
            with 1,400 tokens, a 7B shape's step takes 5% longer so.
        pdl: start while the kernel before is ending and let the next one do so, where the GPU can.
    """

    def __init__(
        self, device: torch.device, *, num_programs: int = 256, split_keys: int = 256, pdl: bool = True
    ) -> None:
        self._num_programs = num_programs
        self._split_keys = split_keys
        self._pdl = pdl and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        # Never more than these are in use, and graphs hold their address: allocated once.
        self._arrivals = torch.zeros(num_programs, dtype=torch.int32, device=device)

    def prepare(self, windows: Windows, num_heads: int, pages: Pages) -> Windows:
        """Nothing is shared by layers."""
        return windows

    def __call__(self, q_THD: torch.Tensor, pages: Pages, windows: Windows) -> torch.Tensor:
        """Implements `Attention`.

        Args:
            q_THD: bfloat16, float16 or float32; the head dimension contiguous. The pages have the same dtype.

        Raises:
            InputError: shapes, dtypes or strides that the kernel would misread.
        """
        _check(q_THD, pages, windows)
        batch, width, mask = len(windows.starts_B), windows.width, windows.mask
        (num_tokens, num_heads, head_size), (_, block_tokens, num_kv, _) = q_THD.shape, pages.keys_NSKD.shape
        out_THD = torch.empty(num_tokens, num_heads, head_size, dtype=q_THD.dtype, device=q_THD.device)
        group = num_heads // num_kv
        tiles = self._cut(q_THD, batch * num_kv, width * group, windows.tables_BM.shape[1] * block_tokens)
        shared = batch * num_kv * tiles.per_head * tiles.num_splits * tiles.rows if tiles.num_splits > 1 else 0
        partial = torch.empty(shared * head_size, dtype=torch.float32, device=q_THD.device)
        stats = torch.empty(shared * 2, dtype=torch.float32, device=q_THD.device)
        paged_attention_kernel[(tiles.per_head * tiles.num_splits, num_kv, batch)](
            q_THD,
            pages.keys_NSKD,
            pages.values_NSKD,
            out_THD,
            windows.starts_B,
            windows.tables_BM,
            windows.starts_B if mask is None else mask.bits_WX,
            partial,
            stats,
            self._arrivals,
            math.log2(math.e) / math.sqrt(head_size),
            width,
            0 if mask is None else mask.bits_WX.stride(0),
            tiles.num_splits,
            windows.tables_BM.stride(0),
            *q_THD.stride()[:2],
            *pages.keys_NSKD.stride()[:3],
            GROUP=group,
            HEAD_SIZE=head_size,
            BLOCK_TOKENS=block_tokens,
            SPLIT_KEYS=tiles.split_keys,
            BLOCK_M=tiles.rows,
            BLOCK_N=tiles.keys,
            BLOCK_D=tiles.head_size,
            MERGE_STAGES=tiles.merge_stages,
            MASKED=mask is not None,
            PDL=self._pdl,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            **({"launch_pdl": True} if self._pdl else {}),
        )
        return out_THD

    def _cut(self, q_THD: torch.Tensor, num_heads: int, num_rows: int, max_keys: int) -> _Tiles:
        """Cut `num_heads` key-value heads (of all rows) that have `num_rows` query rows and up to `max_keys` keys."""
        head_size = max(16, triton.next_power_of_2(q_THD.shape[-1]))
        keys = min(_MOST_KEYS, max(16, _KEY_TILE_BYTES // (head_size * q_THD.element_size())))
        rows = max(16, triton.next_power_of_2(num_rows))
        if q_THD.dtype == torch.float32:
            rows = 16  # multiplied without tensor cores, from registers
        elif rows > 64:
            # The largest tiles pay where there are enough of them, as in a prompt.
            largest = _ACCUMULATORS // head_size
            rows = min(largest, 128) if 2 * num_heads * triton.cdiv(num_rows, 128) >= self._num_programs else 64
        per_head = triton.cdiv(num_rows, rows)
        # One program merges all parts, reading `rows` rows of each: a part should save it more than that.
        split_keys = max(self._split_keys, keys, 2 * rows)
        num_splits = min(self._num_programs // (num_heads * per_head), triton.cdiv(max_keys, split_keys))
        # One stage is for the block numbers, whose arrival the loads of keys and values wait for; two each for both.
        # Where programs queue for the GPU, one each lets twice as many run, which hides more of the waiting.
        crowded = 2 * num_heads * per_head > 3 * self._num_programs and rows == 16
        return _Tiles(
            rows=rows,
            keys=keys,
            head_size=head_size,
            per_head=per_head,
            split_keys=split_keys,
            num_splits=max(1, num_splits),
            num_warps=8 if rows * head_size >= _ACCUMULATORS else 4,
            num_stages=3 if crowded else 5,
            merge_stages=1 + min(4, _ACCUMULATORS // (rows * head_size)),
        )


def _check(q_THD: torch.Tensor, pages: Pages, windows: Windows) -> None:
    keys_NSKD, values_NSKD = pages.keys_NSKD, pages.values_NSKD
    tokens, heads, size = q_THD.shape
    if tokens != len(windows.starts_B) * windows.width:
        raise InputError(f"q_THD: {tokens} tokens, but {len(windows.starts_B)} rows of windows of {windows.width}")
    if heads % keys_NSKD.shape[2] or size != keys_NSKD.shape[3]:
        raise InputError(f"q_THD: {heads} heads of size {size} do not fit pages of shape {list(keys_NSKD.shape)}")
    if size > _MAX_HEAD_SIZE:
        raise InputError(f"q_THD: heads of size {size}, at most {_MAX_HEAD_SIZE} are possible")
    if keys_NSKD.shape != values_NSKD.shape or keys_NSKD.stride() != values_NSKD.stride():
        raise InputError("pages: keys and values differ in shape or strides")
    if not q_THD.dtype == keys_NSKD.dtype == values_NSKD.dtype:
        raise InputError(f"pages: dtype {keys_NSKD.dtype} and {values_NSKD.dtype}, queries {q_THD.dtype}")
    if windows.starts_B.dtype != torch.int32 or windows.tables_BM.dtype != torch.int32:
        raise InputError("windows: starts and tables must be int32")
    if windows.tables_BM.shape[0] != len(windows.starts_B):
        raise InputError(f"windows: {len(windows.starts_B)} starts, but {windows.tables_BM.shape[0]} tables")
    if windows.mask is not None and len(windows.mask.visible_WW) != windows.width:
        raise InputError(f"windows: mask of {len(windows.mask.visible_WW)} tokens, windows of {windows.width}")
    contiguous = (q_THD, keys_NSKD, windows.starts_B, windows.tables_BM)
    if any(tensor.stride(-1) != 1 for tensor in contiguous if tensor.shape[-1] != 1):
        raise InputError("q_THD, pages and windows: the last dimension must be contiguous")
