"""Attention of windows of tokens over a paged cache.

Shapes: B rows, W tokens of a row's window, T = B * W tokens, M blocks of a row's table, H query heads, K key-value
heads, D head size, N cache blocks, S tokens of a block.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from cllm.engine.ops import Pages


@dataclass(frozen=True, slots=True)
class Windows:
    """Which tokens a forward holds: of each row `width` ones, from position `starts_B` on.

    Attributes:
        starts_B: int32 position of each row's first token.
        tables_BM: int32 block numbers; entry i holds the row's tokens i * S to (i + 1) * S - 1. Entries behind the
            row's last block are 0.
        width: W.
    """

    starts_B: torch.Tensor
    tables_BM: torch.Tensor
    width: int


class Attention(Protocol):
    """Causal attention. The keys and values of the window's own tokens are in the cache already."""

    def __call__(self, q_THD: torch.Tensor, pages: Pages, windows: Windows) -> torch.Tensor:
        """[T, H, D]; the token at position p of a row sees positions 0..p of that row. Tokens lie row by row."""


class TorchAttention:
    """Gathers each row's blocks and calls torch's scaled dot product attention: the readable twin, for every device."""

    def __call__(self, q_THD: torch.Tensor, pages: Pages, windows: Windows) -> torch.Tensor:
        batch, width = len(windows.starts_B), windows.width
        tables_BM = windows.tables_BM.long()
        k_BKLD = pages.keys_NSKD[tables_BM].flatten(1, 2).transpose(1, 2)
        v_BKLD = pages.values_NSKD[tables_BM].flatten(1, 2).transpose(1, 2)
        positions_BW = windows.starts_B[:, None] + torch.arange(width, device=q_THD.device)
        keys_L = torch.arange(k_BKLD.shape[2], device=q_THD.device)
        mask_B1WL = (keys_L <= positions_BW[:, :, None])[:, None]
        q_BHWD = q_THD.view(batch, width, *q_THD.shape[1:]).transpose(1, 2)
        out_BHWD = F.scaled_dot_product_attention(q_BHWD, k_BKLD, v_BKLD, attn_mask=mask_B1WL, enable_gqa=True)
        return out_BHWD.transpose(1, 2).flatten(0, 1)
