"""What the device knows of the running rows, and the end of a step: which predictions hold.

A row's token buffer holds its committed tokens and behind them its guesses. A step reads a window of the buffer, writes
its predictions over the guesses and moves the length forward: the rest of the predictions are the next guesses where
they stand, and guesses for positions not reached yet were laid out when the row was admitted. So a step needs nothing
from the host, and the next one may start before the host has seen what this one committed.

This file says it in plain torch; on a GPU `cllm.engine.triton_state` does the same in one launch a method.

Shapes: R slots of rows, L tokens of a buffer, M blocks of a table, B rows of a step, W window, A admitted rows, X new
table entries.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from cllm.engine.sequence import Sequence

_NO_END = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Entry:
    """A row to admit. `block_size` is 0 with sliding refill, else its block ends at position `block_end`."""

    sequence: Sequence
    guesses: list[int]
    block_size: int = 0
    block_end: int = _NO_END


@dataclass(frozen=True, slots=True)
class Places:
    """Where windows lie, in their rows and in the cache: of each row W tokens, one behind the other.

    Attributes:
        starts_B: int32 position of each row's first token.
        positions_BW: int64; what would lie behind a row's buffer stays at its end.
        stored_BW: int64 places in the cache, as in `Ops.rotate_and_store`.
        tables_BM: int32 block numbers, as in `Windows`.
    """

    starts_B: torch.Tensor
    positions_BW: torch.Tensor
    stored_BW: torch.Tensor
    tables_BM: torch.Tensor


class DeviceState:
    """Buffers of all slots, and one more that fills up batches: it never commits anything.

    Args:
        num_rows: slots.
        max_tokens: longest row.
        margin: widest window; what it writes behind the longest row needs room, too.
        fill_id: token that stands where nothing was laid out.
    """

    def __init__(
        self, *, num_rows: int, max_tokens: int, margin: int, block_tokens: int, fill_id: int, device: torch.device
    ) -> None:
        self.device = device
        self.block_tokens = block_tokens
        self.idle_slot = num_rows
        blocks = -(-(max_tokens + 2 * margin) // block_tokens)
        rows = num_rows + 1
        self.tokens_RL = torch.full((rows, blocks * block_tokens), fill_id, dtype=torch.long, device=device)
        self.tables_RM = torch.zeros(rows, blocks, dtype=torch.int32, device=device)
        self.length_R = torch.ones(rows, dtype=torch.long, device=device)
        self.limit_R = torch.ones(rows, dtype=torch.long, device=device)
        self.block_end_R = torch.full((rows,), _NO_END, dtype=torch.long, device=device)
        self.block_size_R = torch.zeros(rows, dtype=torch.long, device=device)
        self.fill_id = fill_id

    def rehearse(self, num_rows: int, context: int, width: int, num_blocks: int) -> None:
        """Rows of `context` tokens in the first slots, full, so that steps commit nothing; each has its own blocks, as
        far as a cache of `num_blocks` has enough.
        """
        blocks = -(-(context + width) // self.block_tokens)
        numbers = 1 + torch.arange(num_rows * blocks, dtype=torch.int32, device=self.device) % (num_blocks - 1)
        self.tables_RM[:num_rows, :blocks] = numbers.view(num_rows, blocks)
        self.length_R[:num_rows] = self.limit_R[:num_rows] = context

    def reset(self) -> None:
        """No row is there."""
        self.tables_RM.zero_()
        self.length_R.fill_(1)
        self.limit_R.fill_(1)

    def admit(self, entries: Many[Entry]) -> None:
        """Lay out the rows in their slots."""
        tokens_AL = np.full((len(entries), self.tokens_RL.shape[1]), self.fill_id)
        tables_AM = np.zeros((len(entries), self.tables_RM.shape[1]), dtype=np.int32)
        numbers_A5 = np.empty((len(entries), 5), dtype=np.int64)
        for place, entry in enumerate(entries):
            row = entry.sequence
            known = row.tokens + entry.guesses
            tokens_AL[place, : len(known)] = known
            tables_AM[place, : len(row.blocks)] = row.blocks
            numbers_A5[place] = row.place, len(row.tokens), row.max_length, entry.block_end, entry.block_size
        slots_A, lengths_A, limits_A, ends_A, sizes_A = self.upload(numbers_A5).unbind(1)
        self.tokens_RL[slots_A] = self.upload(tokens_AL)
        self.tables_RM[slots_A] = self.upload(tables_AM)
        self.length_R[slots_A] = lengths_A
        self.limit_R[slots_A] = limits_A
        self.block_end_R[slots_A] = ends_A
        self.block_size_R[slots_A] = sizes_A

    def grow(self, grown: Many[tuple[Sequence, int]]) -> None:
        """Enter the blocks that sequences got, from the given index of their tables on."""
        entries = [
            (sequence.place, index, sequence.blocks[index])
            for sequence, first in grown
            for index in range(first, len(sequence.blocks))
        ]
        slots_X, indices_X, blocks_X = self.upload(entries).unbind(1)
        self.tables_RM[slots_X, indices_X] = blocks_X.int()

    def offer(self, offers: Many[tuple[int, int, int]]) -> None:
        """Replace guesses by better ones: (slot, position, token); a position committed meanwhile stays as it is."""
        slots_X, positions_X, tokens_X = self.upload(offers).unbind(1)
        open_X = positions_X >= self.length_R[slots_X]
        self.tokens_RL[slots_X, positions_X] = torch.where(open_X, tokens_X, self.tokens_RL[slots_X, positions_X])

    def window(self, slots_B: torch.Tensor, width: int, num_blocks: int) -> tuple[torch.Tensor, Places]:
        """Tokens [B, W] of each row's window, its seed first, and where they lie; `num_blocks` as in `places`."""
        places = self.places(slots_B, self.length_R[slots_B] - 1, width, num_blocks)
        return self.tokens_at(slots_B, places.positions_BW), places

    def places(self, slots_B: torch.Tensor, starts_B: torch.Tensor, width: int, num_blocks: int) -> Places:
        """Of windows that start at int64 `starts_B`.

        Args:
            num_blocks: of each row's table, up to the end of every window, padding included; a table that is shorter
                goes on with the null block.
        """
        positions_BW = self.positions(starts_B, width)
        tables_BM = self.tables_RM[slots_B, :num_blocks]
        tables_BM = F.pad(tables_BM, (0, num_blocks - tables_BM.shape[1]))
        index_BW = (positions_BW // self.block_tokens).clamp_max(num_blocks - 1)
        blocks_BW = tables_BM.gather(1, index_BW).long()
        stored_BW = blocks_BW * self.block_tokens + positions_BW % self.block_tokens
        return Places(starts_B.int(), positions_BW, stored_BW, tables_BM)

    def positions(self, starts_B: torch.Tensor, width: int) -> torch.Tensor:
        """Positions [B, W] behind each start; what would lie behind the buffer stays at its end."""
        positions_BW = starts_B[:, None] + torch.arange(width, device=self.device)
        return positions_BW.clamp_max(self.tokens_RL.shape[1] - 1)

    def tokens_at(self, slots_B: torch.Tensor, positions_BW: torch.Tensor) -> torch.Tensor:
        return self.tokens_RL[slots_B[:, None], positions_BW]

    def accept(self, slots_B: torch.Tensor, window_BW: torch.Tensor, predictions_BW: torch.Tensor) -> torch.Tensor:
        """Commit the predictions that hold and leave the rest as guesses; int64 [B, 1 + W]: how many each row
        committed, then the predictions.

        Prediction i + 1 holds while guess i equals prediction i. A row commits nothing behind its limit; with refill
        block nothing is written behind the block, whose initial guesses must stay.
        """
        length_B, end_B = self.length_R[slots_B], self.block_end_R[slots_B]
        agree_BW = window_BW[:, 1:] == predictions_BW[:, :-1]
        room_B = torch.minimum(end_B, self.limit_R[slots_B]) - length_B
        counts_B = torch.minimum(1 + agree_BW.cumprod(1).sum(1), room_B)
        positions_BW = self.positions(length_B, window_BW.shape[1])
        kept_BW = torch.where(positions_BW < end_B[:, None], predictions_BW, self.tokens_at(slots_B, positions_BW))
        self.tokens_RL[slots_B[:, None], positions_BW] = kept_BW
        length_B = length_B + counts_B
        self.length_R[slots_B] = length_B
        self.block_end_R[slots_B] = torch.where(length_B == end_B, end_B + self.block_size_R[slots_B], end_B)
        return torch.cat([counts_B[:, None], predictions_BW], dim=1)

    def upload(self, values: npt.ArrayLike) -> torch.Tensor:
        """An integer array on the device; from pinned memory, so that nobody waits for the copy."""
        tensor = torch.from_numpy(np.asarray(values))
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)
