"""Attention of windows of tokens over a paged cache.

Shapes: B rows, W tokens of a row's window, T = B * W tokens, M blocks of a row's table, H query heads, K key-value
heads, D head size, N cache blocks, S tokens of a block, L keys, X words of 64 bits.
"""

from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.nn.functional as F

from cllm.engine.ops import Pages
from cllm.errors import InputError

_WORD = 64  # bits of a mask's words; kernels take no more keys at a time


@dataclass(frozen=True, slots=True)
class WindowMask:
    """Who sees whom within a window, the same for all rows. Everybody sees what lies before the window.

    Attributes:
        visible_WW: bool, whether token [w, :] sees token [:, w].
        bits_WX: int64, the same for kernels. From the lowest bit of a row's first word on: 64 ones, for what lies
            before the window, then the token's row of `visible_WW`, then zeros, 64 at least.
    """

    visible_WW: torch.Tensor
    bits_WX: torch.Tensor

    @classmethod
    def of(cls, visible_WW: torch.Tensor) -> Self:
        """Waits for the device, so make a mask once.

        Raises:
            InputError: it is not square and bool, or a token does not see the window's first one (every part of the
                keys that a kernel starts with must have one that is seen).
        """
        width = len(visible_WW)
        if visible_WW.dtype != torch.bool or visible_WW.shape != (width, width) or not visible_WW[:, 0].all():
            raise InputError("visible_WW: a square of bool is needed, its first column true")
        padding = _WORD + -width % _WORD
        bits_WL = F.pad(F.pad(visible_WW, (_WORD, 0), value=True), (0, padding)).long()
        places = torch.arange(_WORD, device=visible_WW.device)
        return cls(visible_WW, (bits_WL.unflatten(1, (-1, _WORD)) << places).sum(-1))


@dataclass(frozen=True, slots=True)
class Windows:
    """Which tokens a forward holds: of each row `width` ones, from position `starts_B` on.

    Attributes:
        starts_B: int32 position of each row's first token.
        tables_BM: int32 block numbers; entry i holds the row's tokens i * S to (i + 1) * S - 1. Entries behind the
            row's last block are 0; there is one for every token of the windows, of padding as well.
        width: W.
        mask: who sees whom within a window; None: causal.
    """

    starts_B: torch.Tensor
    tables_BM: torch.Tensor
    width: int
    mask: WindowMask | None = None


class Attention(Protocol):
    """Attention of windows. The keys and values of the window's own tokens are in the cache already."""

    def prepare(self, windows: Windows, num_heads: int, pages: Pages) -> Windows:
        """The windows with what all layers of a forward need alike, for `num_heads` query heads and pages like these.

        Calls may be given windows as they are, too.
        """

    def __call__(self, q_THD: torch.Tensor, pages: Pages, windows: Windows) -> torch.Tensor:
        """[T, H, D]; the token at position p of a row sees positions 0..p of that row, or what the mask says.
        Tokens lie row by row.
        """


class TorchAttention:
    """Gathers each row's blocks and calls torch's scaled dot product attention: the readable twin, for every device."""

    def prepare(self, windows: Windows, num_heads: int, pages: Pages) -> Windows:
        return windows

    def __call__(self, q_THD: torch.Tensor, pages: Pages, windows: Windows) -> torch.Tensor:
        batch, width = len(windows.starts_B), windows.width
        k_BKLD = _gathered_BKLD(pages.keys_NSKD, windows.tables_BM)
        v_BKLD = _gathered_BKLD(pages.values_NSKD, windows.tables_BM)
        mask_B1WL = _mask_BWL(windows, k_BKLD.shape[2])[:, None]
        q_BHWD = q_THD.view(batch, width, *q_THD.shape[1:]).transpose(1, 2)
        out_BHWD = F.scaled_dot_product_attention(q_BHWD, k_BKLD, v_BKLD, attn_mask=mask_B1WL, enable_gqa=True)
        return out_BHWD.transpose(1, 2).flatten(0, 1)


def _gathered_BKLD(pages_NSKD: torch.Tensor, tables_BM: torch.Tensor) -> torch.Tensor:
    """Each row's blocks one behind the other. Whole blocks: indexing with the table is several times slower on CPUs."""
    batch, blocks = tables_BM.shape
    gathered = pages_NSKD.flatten(1).index_select(0, tables_BM.flatten())
    return gathered.view(batch, blocks * pages_NSKD.shape[1], *pages_NSKD.shape[2:]).transpose(1, 2)


def _mask_BWL(windows: Windows, num_keys: int) -> torch.Tensor:
    """Which of the first `num_keys` keys of its row each token sees."""
    device, width = windows.starts_B.device, windows.width
    keys_L = torch.arange(num_keys, device=device)
    if windows.mask is None:
        positions_BW = windows.starts_B[:, None] + torch.arange(width, device=device)
        return keys_L <= positions_BW[:, :, None]
    offsets_BL = keys_L - windows.starts_B[:, None]
    is_own_BL = (offsets_BL >= 0) & (offsets_BL < width)
    own_BWL = windows.mask.visible_WW[:, offsets_BL.clamp(0, width - 1)].transpose(0, 1)
    return (offsets_BL < 0)[:, None] | (own_BWL & is_own_BL[:, None])
