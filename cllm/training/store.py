"""Trajectories in memory as Arrow has them, 4 bytes a token, and as Python objects one at a time.

A state of every iteration of every block is recorded: 48,000 responses of 350 tokens have half a billion tokens in
their states, which as Python objects would take 20 GB in each training worker.

Shapes: D lists of one level and their D + 1 offsets, T tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cllm.decoding.records import BlockTrajectory
from cllm.decoding.trajectories import Trajectory
from cllm.training.lazy import LazySequence


@dataclass(frozen=True, slots=True)
class NestedTokens:
    """A column of (lists of lists of) tokens, as views of Arrow's buffers."""

    offsets_D: tuple[np.ndarray, ...]  # of each level, the outermost first
    tokens_T: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "NestedTokens":
        array = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()  # the latter always copies
        offsets = []
        while pa.types.is_list(array.type):
            offsets.append(array.offsets.to_numpy())
            array = array.values
        return cls(tuple(offsets), array.to_numpy())

    def row(self, index: int) -> tuple[Any, ...]:
        """Row `index` as (tuples of tuples of) integers."""
        return self._nested(0, index)

    def _nested(self, level: int, index: int) -> tuple[Any, ...]:
        start, end = self.offsets_D[level][index : index + 2].tolist()
        if level + 1 == len(self.offsets_D):
            return tuple(self.tokens_T[start:end].tolist())
        return tuple([self._nested(level + 1, i) for i in range(start, end)])


class _File:
    """The rows of one file. Without `states` they have no blocks, as in `cllm.decoding.trajectories.from_table`."""

    def __init__(self, table: pa.Table, states: bool) -> None:
        self.prompt_ids: list[str] = table["prompt_id"].to_pylist()
        self._reasons = table["finish_reason"].to_pylist()
        names = ("prompt_ids", "response_ids", *(("states", "augmented") if states else ()))
        self._columns = [NestedTokens.of(table[name]) for name in names]

    def row(self, index: int) -> Trajectory:
        prompt_ids, response_ids, *nested = [column.row(index) for column in self._columns]
        states, augmented = nested or ((), ())
        blocks = tuple([BlockTrajectory(block) for block in states])
        return Trajectory(self.prompt_ids[index], prompt_ids, response_ids, self._reasons[index], blocks, augmented)


def stored_trajectories(tables: Iterable[pa.Table], *, states: bool) -> Sequence[Trajectory]:
    """The rows of all tables ordered by prompt id, each made when it is asked for.

    Args:
        tables: of `cllm.decoding.trajectories.to_table`; from an iterator, one at a time is held whole.
        states: whether the rows have their blocks.
    """
    files = [_File(table, states) for table in tables]
    places = [(prompt_id, i, row) for i, file in enumerate(files) for row, prompt_id in enumerate(file.prompt_ids)]
    order = np.array([place[1:] for place in sorted(places, key=lambda place: place[0])], np.int32).reshape(-1, 2)

    def make(index: int) -> Trajectory:
        file, row = order[index].tolist()
        return files[file].row(row)

    return LazySequence(range(len(order)), make)
