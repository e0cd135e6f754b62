"""Attention over the paged cache with FlashAttention-3, on Hopper GPUs.

Two builds of it are known: the flash-attn-3 package (module `flash_attn_interface`) and the one that comes with vLLM.

Shapes: B rows, W tokens of a window, T = B * W tokens, M blocks of a table, H query heads, K key-value heads,
D head size, N cache blocks, S tokens of a block.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cllm.engine.attention import Attention, TorchAttention, Windows
from cllm.engine.ops import Pages
from cllm.errors import InputError

DTYPES = (torch.bfloat16, torch.float16)
_TILE_ROWS = 128  # query rows of one of its programs
_NARROW_ROWS = 64  # of a key-value head


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashWindows(Windows):
    """Windows with what FlashAttention-3 derives from them, which is the same in every layer of a forward.

    Attributes:
        lengths_B: int32, keys of each row.
        offsets_P: int32 [B + 1], first token of each row, and T.
        num_splits: most programs that share a row's keys; 0: FlashAttention's own choice.
        schedule: its division of the work, computed on the device.
    """

    lengths_B: torch.Tensor
    offsets_P: torch.Tensor
    num_splits: int
    schedule: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Build:
    """The functions of one build; `attend` takes queries, pages and windows."""

    schedule: Callable[..., torch.Tensor]
    attend: Callable[[torch.Tensor, Pages, FlashWindows], torch.Tensor]


class FlashAttention3:
    """Without host synchronisation: may be captured in a CUDA graph.

    Args:
        masked: takes over where the windows have a mask, which FlashAttention-3 does not read; None: plain torch.
        narrow: takes over where a key-value head has so few query rows that reading the keys is all the work, or where
            tiles fill a fraction of the GPU: FlashAttention-3 shares out their keys then, and merges them in a second
            launch; neither launch starts before the one in front has ended. None: it stays.

    Raises:
        InputError: FlashAttention-3 is not available for the device.
    """

    def __init__(
        self, device: torch.device, *, masked: Attention | None = None, narrow: Attention | None = None
    ) -> None:
        build = _load() if _is_hopper(device) else None
        if build is None:
            raise InputError(f"device: FlashAttention-3 needs a Hopper GPU and its package or vLLM, got {device}")
        self._build = build
        self._masked = masked or TorchAttention()
        self._narrow = narrow
        self._num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        self._offsets: dict[tuple[int, int], torch.Tensor] = {}

    @staticmethod
    def available(device: torch.device) -> bool:
        """Whether `device` is a Hopper GPU and one of the builds can be imported."""
        return _is_hopper(device) and _load() is not None

    def prepare(self, windows: Windows, num_heads: int, pages: Pages) -> Windows:
        """With the division of the work, so that not every layer computes it."""
        other = self._substitute(windows, num_heads, pages)
        return self._planned(windows, num_heads, pages) if other is None else other.prepare(windows, num_heads, pages)

    def _substitute(self, windows: Windows, num_heads: int, pages: Pages) -> Attention | None:
        """Who computes attention of such windows instead."""
        if windows.mask is not None:
            return self._masked
        num_kv = pages.keys_NSKD.shape[2]
        rows = windows.width * (num_heads // num_kv)
        tiles = len(windows.starts_B) * num_kv * -(-rows // _TILE_ROWS)
        return self._narrow if rows <= _NARROW_ROWS or 4 * tiles <= self._num_processors else None

    def _planned(self, windows: Windows, num_heads: int, pages: Pages) -> FlashWindows:
        batch, max_blocks = windows.tables_BM.shape
        _, block_tokens, num_kv, head_size = pages.keys_NSKD.shape
        # Sharing out a row's keys costs a second launch and scratch: only where processors would idle.
        num_splits = 0 if batch * num_kv < self._num_processors else 1
        lengths_B = windows.starts_B + windows.width
        offsets_P = self._row_offsets(batch, windows.width, lengths_B.device)
        schedule = self._build.schedule(
            batch_size=batch,
            max_seqlen_q=windows.width,
            max_seqlen_k=max_blocks * block_tokens,
            num_heads_q=num_heads,
            num_heads_kv=num_kv,
            headdim=head_size,
            cache_seqlens=lengths_B,
            qkv_dtype=pages.keys_NSKD.dtype,
            cu_seqlens_q=offsets_P,
            page_size=block_tokens,
            causal=True,
            num_splits=num_splits,
        )
        return FlashWindows(
            starts_B=windows.starts_B,
            tables_BM=windows.tables_BM,
            width=windows.width,
            lengths_B=lengths_B,
            offsets_P=offsets_P,
            num_splits=num_splits,
            schedule=schedule,
        )

    def __call__(self, q_THD: torch.Tensor, pages: Pages, windows: Windows) -> torch.Tensor:
        """Implements `Attention`, for heads of up to 256.

        Raises:
            InputError: the queries are neither bfloat16 nor float16.
        """
        other = self._substitute(windows, q_THD.shape[1], pages)
        if other is not None:
            return other(q_THD, pages, windows)
        if q_THD.dtype not in DTYPES:
            raise InputError(f"q_THD: FlashAttention-3 takes bfloat16 and float16, not {q_THD.dtype}")
        if not isinstance(windows, FlashWindows):
            windows = self._planned(windows, q_THD.shape[1], pages)
        return self._build.attend(q_THD, pages, windows)

    def _row_offsets(self, batch: int, width: int, device: torch.device) -> torch.Tensor:
        known = self._offsets.get((batch, width))
        if known is not None:
            return known
        offsets_P = torch.arange(0, batch * width + 1, width, dtype=torch.int32, device=device)
        # A tensor made during a capture is empty until the graph runs, and lives in its memory: not for anyone else.
        if not torch.cuda.is_current_stream_capturing():
            self._offsets[batch, width] = offsets_P
        return offsets_P


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _load() -> _Build | None:
    return _load_package() or _load_vllm()


def _load_package() -> _Build | None:
    try:
        module = importlib.import_module("flash_attn_interface")
    except ImportError:
        return None

    def attend(q_THD: torch.Tensor, pages: Pages, windows: FlashWindows) -> torch.Tensor:
        return module.flash_attn_with_kvcache(
            q_THD,
            pages.keys_NSKD,
            pages.values_NSKD,
            cache_seqlens=windows.lengths_B,
            page_table=windows.tables_BM,
            cu_seqlens_q=windows.offsets_P,
            max_seqlen_q=windows.width,
            causal=True,
            scheduler_metadata=windows.schedule,
            num_splits=windows.num_splits,
        )

    return _Build(module.get_scheduler_metadata, attend)


def _load_vllm() -> _Build | None:
    try:
        module = importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    except ImportError:
        return None
    if not module.FA3_AVAILABLE:
        return None

    def attend(q_THD: torch.Tensor, pages: Pages, windows: FlashWindows) -> torch.Tensor:
        return module.flash_attn_varlen_func(
            q_THD,
            pages.keys_NSKD,
            pages.values_NSKD,
            max_seqlen_q=windows.width,
            cu_seqlens_q=windows.offsets_P,
            max_seqlen_k=windows.tables_BM.shape[1] * pages.keys_NSKD.shape[1],
            seqused_k=windows.lengths_B,
            block_table=windows.tables_BM,
            causal=True,
            scheduler_metadata=windows.schedule,
            num_splits=windows.num_splits,
            fa_version=3,
        )

    return _Build(module.get_scheduler_metadata, attend)
