"""A key-value cache whose rows have their own lengths, for transformers models.

Shapes: B rows, Q new tokens, S capacity, H key-value heads, D head size.
"""

from collections.abc import Sequence

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from cllm.errors import InputError


class _Cursor:
    """Where the next forward writes. One object is shared by all layers of a cache."""

    def __init__(self) -> None:
        self.rows_B1 = torch.empty(0, 1, dtype=torch.long)
        self.positions_BQ = torch.empty(0, 0, dtype=torch.long)
        self.visible = 0  # keys returned: one more than the largest position in use


class _RowLayer(CacheLayerMixin):
    """One layer's keys and values, stored [B, S, H, D] so that a token's write is contiguous."""

    def __init__(self, cursor: _Cursor, capacity: int) -> None:
        super().__init__()
        self.cursor = cursor
        self.capacity = capacity

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch, heads, _, size = key_states.shape
        self.keys = key_states.new_zeros(batch, self.capacity, heads, size)
        self.values = value_states.new_zeros(batch, self.capacity, heads, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [B, H, Q, D] at the cursor's positions; return all visible keys and values as [B, H, S', D] views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        at = (self.cursor.rows_B1, self.cursor.positions_BQ)
        self.keys[at] = key_states.transpose(1, 2)
        self.values[at] = value_states.transpose(1, 2)
        end = self.cursor.visible
        return self.keys[:, :end].transpose(1, 2), self.values[:, :end].transpose(1, 2)

    def select(self, rows: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def move(self, from_slots: torch.Tensor, to_slots: torch.Tensor) -> None:
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, to_slots], self.values[:, to_slots] = self.keys[:, from_slots], self.values[:, from_slots]

    def append(self, other: "_RowLayer") -> None:
        assert other.keys is not None
        assert other.values is not None
        if self.keys is None or self.values is None:
            self.keys, self.values = other.keys, other.values
        else:
            self.keys, self.values = torch.cat([self.keys, other.keys]), torch.cat([self.values, other.values])
        self.is_initialized = True

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.visible, 0

    def get_seq_length(self) -> int:
        return self.cursor.visible

    def get_max_length(self) -> int:
        return self.capacity

    def get_max_cache_shape(self) -> int:  # the name of get_max_length before transformers 5.20
        return self.capacity


class RowCache(Cache):
    """Preallocated cache addressed by absolute token position.

    A token at position p is stored in slot p of its row, and a query at position p sees slots 0..p. Truncation
    therefore needs no operation: stale entries behind a row's committed length are overwritten before any query reaches
    them.
    """

    def __init__(self, config: PretrainedConfig, capacity: int) -> None:
        window = getattr(config, "sliding_window", None)
        if window is not None and getattr(config, "use_sliding_window", True) and capacity > window:
            raise InputError(f"context of {capacity} tokens exceeds the model's sliding attention window of {window}")
        self.cursor = _Cursor()
        self.capacity = capacity
        self.row_layers = [_RowLayer(self.cursor, capacity) for _ in range(config.num_hidden_layers)]
        super().__init__(layers=list(self.row_layers))

    def place(self, positions_BQ: torch.Tensor, visible: int) -> torch.Tensor:
        """Point the next forward at `positions_BQ` (int64); return its attention mask, bool [B, 1, Q, visible]."""
        assert visible <= self.capacity, f"{visible} tokens in a cache of {self.capacity}"
        batch = positions_BQ.shape[0]
        self.cursor.rows_B1 = torch.arange(batch, device=positions_BQ.device)[:, None]
        self.cursor.positions_BQ = positions_BQ
        self.cursor.visible = visible
        keys_S = torch.arange(visible, device=positions_BQ.device)
        return (keys_S <= positions_BQ[:, :, None])[:, None]

    def append(self, other: "RowCache") -> None:
        """Add the rows of a cache of the same capacity behind this one's."""
        assert other.capacity == self.capacity
        for layer, other_layer in zip(self.row_layers, other.row_layers, strict=True):
            layer.append(other_layer)

    def move(self, from_slots: torch.Tensor, to_slots: torch.Tensor) -> None:
        """Copy every row's entries of some slots to others; int64 [slots] each."""
        for layer in self.row_layers:
            layer.move(from_slots, to_slots)

    def keep_rows(self, rows: Sequence[int], device: torch.device) -> None:
        """Drop all rows but these; row i of the cache becomes what row `rows[i]` was."""
        index = torch.tensor(rows, dtype=torch.long, device=device)
        for layer in self.row_layers:
            layer.select(index)
