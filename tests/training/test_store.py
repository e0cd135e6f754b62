"""Trajectories in Arrow's buffers are, row by row, those that were written; and they take no more room."""

import random

import pyarrow as pa
import pytest

from cllm.decoding.trajectories import from_table, to_table
from cllm.training.store import NestedTokens, stored_trajectories
from tests.training.made import random_trajectory


def tables(augmented: bool = False) -> list[pa.Table]:
    """Three files, with the ids in no order."""
    numbers = list(range(30))
    random.Random(0).shuffle(numbers)
    rows = [random_trajectory(number, augmented=augmented) for number in numbers]
    return [to_table(rows[start::3], {}) for start in range(3)]


@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("augmented", [True, False])
def test_rows_are_those_of_the_tables_ordered_by_prompt(states, augmented):
    rows = [row for table in tables(augmented) for row in from_table(table, states=states)]
    stored = stored_trajectories(iter(tables(augmented)), states=states)
    assert list(stored) == sorted(rows, key=lambda row: row.prompt_id)
    assert all(bool(row.blocks) == states for row in stored)


def test_responses_to_one_prompt_keep_the_order_of_the_files():
    rows = [random_trajectory(number) for number in (5, 6, 7)]
    same = [type(row)("0" * 16, row.prompt_ids, row.response_ids, "stop", row.blocks) for row in rows]
    stored = stored_trajectories([to_table(same[:2], {}), to_table(same[2:], {})], states=True)
    assert list(stored) == same


def test_slices_are_rows_as_well():
    stored = stored_trajectories(tables(), states=True)
    whole = list(stored)
    assert list(stored[3:20:4]) == whole[3:20:4]
    assert stored[3:20][-1] == stored[19] == whole[19]
    assert stored[-1] == whole[-1]
    assert len(stored[:0]) == 0
    with pytest.raises(IndexError):
        stored[30]


def test_a_table_in_several_chunks_and_a_part_of_one_are_read_alike():
    whole = pa.concat_tables(tables())
    assert whole["states"].num_chunks == 3
    assert list(stored_trajectories([whole], states=True)) == list(stored_trajectories(tables(), states=True))
    part = whole.slice(7, 5)
    assert sorted(map(repr, stored_trajectories([part], states=True))) == sorted(map(repr, from_table(part)))


def test_states_are_not_copied():
    """The tokens of all states are seen through Arrow's own buffer, four bytes each."""
    table = tables()[0]
    column = NestedTokens.of(table["states"])
    assert column.tokens_T.dtype == "int32"
    buffers = {buffer.address for chunk in table["states"].chunks for buffer in chunk.buffers() if buffer is not None}
    assert column.tokens_T.__array_interface__["data"][0] in buffers


def test_no_table_is_no_row():
    assert list(stored_trajectories([], states=True)) == []
