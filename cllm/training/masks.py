"""The packed attention mask in the form that the model's attention wants: dense for SDPA, sparse for FlexAttention."""

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from cllm.training.packing import PackedRows, visible_RLL


def attention_mask(rows: PackedRows, implementation: str) -> torch.Tensor | BlockMask:
    """The mask of `visible_RLL` for `implementation` ("sdpa" or "flex_attention").

    SDPA gets bool [R, 1, L, L]; FlexAttention gets a block mask, whose cost grows with what is visible instead of L^2.
    """
    if implementation == "sdpa":
        return visible_RLL(rows)[:, None]
    if implementation != "flex_attention":
        raise ValueError(f"packed training needs sdpa or flex_attention, not {implementation}")
    document, group, position, context = rows.document_RL, rows.group_RL, rows.positions_RL, rows.context_RL

    def visible(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        same_document = document[row, query] == document[row, key]
        clean_context = (group[row, key] == 0) & (position[row, key] < context[row, query])
        own_group = (group[row, query] == group[row, key]) & (position[row, key] <= position[row, query])
        return same_document & (clean_context | own_group)

    num_rows, length = rows.tokens_RL.shape
    device = str(rows.tokens_RL.device)
    return create_block_mask(visible, B=num_rows, H=None, Q_LEN=length, KV_LEN=length, device=device)
