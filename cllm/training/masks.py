"""The packed attention mask in the form that the model's attention wants: dense for SDPA, sparse for FlexAttention.

Shapes: R rows, L row length (tokens), Q and K blocks of queries and keys.
"""

import torch
from torch.nn.attention.flex_attention import BlockMask

from cllm.training.packing import PackedRows, visible_RLL

_BLOCK = 128  # tokens; FlexAttention's own block size


def attention_mask(rows: PackedRows, implementation: str) -> torch.Tensor | BlockMask:
    """The mask of `visible_RLL` for `implementation` ("sdpa" or "flex_attention").

    SDPA gets bool [R, 1, L, L]; FlexAttention gets a block mask, whose cost grows with what is visible instead of L^2.
    """
    if implementation == "sdpa":
        return visible_RLL(rows)[:, None]
    if implementation != "flex_attention":
        raise ValueError(f"packed training needs sdpa or flex_attention, not {implementation}")
    context_start, context_end, own_start = rows.context_start_RL, rows.context_end_RL, rows.own_start_RL

    def visible(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        context = (context_start[row, query] <= key) & (key < context_end[row, query])
        return context | ((own_start[row, query] <= key) & (key <= query))

    pairs_R1QK = visible_pairs_RQK(rows)[:, None]
    full_R1QK = pairs_R1QK == _BLOCK**2
    length = rows.tokens_RL.shape[1]
    return BlockMask.from_kv_blocks(
        *_listed((pairs_R1QK > 0) & ~full_R1QK),
        *_listed(full_R1QK),
        BLOCK_SIZE=_BLOCK,
        mask_mod=visible,
        seq_lengths=(length, length),
    )


def visible_pairs_RQK(rows: PackedRows) -> torch.Tensor:
    """How many pairs of a query and a key that it sees lie in each pair of blocks, int64 [R, Q, K].

    What a query sees are two runs of keys that do not overlap, so that the pairs are counted without listing them:
    `create_block_mask` would evaluate all L^2.
    """
    length = rows.tokens_RL.shape[1]
    edge_K = torch.arange(0, length, _BLOCK, device=rows.tokens_RL.device)
    end_L = torch.arange(1, length + 1, device=rows.tokens_RL.device)
    seen_RLK = _overlap(rows.context_start_RL, rows.context_end_RL, edge_K)
    seen_RLK += _overlap(rows.own_start_RL, end_L.expand_as(rows.own_start_RL), edge_K)
    padded_RLK = torch.nn.functional.pad(seen_RLK, (0, 0, 0, -length % _BLOCK))
    return padded_RLK.unflatten(1, (-1, _BLOCK)).sum(2)


def _overlap(start_RL: torch.Tensor, end_RL: torch.Tensor, edge_K: torch.Tensor) -> torch.Tensor:
    """How many places of each block lie in the runs [start, end)."""
    first_RLK, last_RLK = start_RL[..., None].maximum(edge_K), end_RL[..., None].minimum(edge_K + _BLOCK)
    return (last_RLK - first_RLK).clamp_(min=0)


def _listed(chosen_R1QK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each block of queries the number of chosen blocks of keys, and their indices before those of the others."""
    indices_R1QK = chosen_R1QK.int().argsort(dim=-1, descending=True, stable=True)
    return chosen_R1QK.sum(-1, dtype=torch.int32), indices_R1QK.int()
