"""The stream of rows: nothing is lost or repeated within an epoch, any place of it can be returned to, and only what is
needed is made."""

import random
from collections import Counter

import pytest

from cllm.errors import InputError
from cllm.training.batches import RowStream
from cllm.training.documents import Document, Span
from cllm.training.lazy import LazySequence

ROW_TOKENS = 64


class Counted:
    """Documents of random lengths, other ones in every epoch, of which some are too long for a row."""

    def __init__(self, count: int = 400) -> None:
        self.count = count
        self.made: Counter[int] = Counter()  # by epoch

    def documents(self, epoch: int) -> LazySequence[Document]:
        def make(index: int) -> Document:
            self.made[epoch] += 1
            rng = random.Random(f"{epoch}/{index}")
            spans = tuple(Span(0, (9,) * rng.randint(1, 20)) for _ in range(rng.randint(0, 3)))
            response = 80 if index % 50 == 0 else 2 + index % 17
            return Document((index,), (5,) * response, spans)

        return LazySequence(range(self.count), make)


def numbers(rows) -> list[int]:
    return [document.prompt_ids[0] for row in rows for document in row]


def test_an_epoch_holds_every_document_that_fits_once():
    stream = RowStream(Counted(), ROW_TOKENS, seed=1)
    rows = list(stream.epoch_rows(0))
    assert sorted(numbers(rows)) == [index for index in range(400) if index % 50]
    assert stream.num_too_long == 8
    assert all(sum(document.num_tokens for document in row) <= ROW_TOKENS for row in rows)


def test_epochs_follow_each_other_in_other_orders():
    stream = RowStream(Counted(), ROW_TOKENS, seed=1)
    first, second = list(stream.epoch_rows(0)), list(stream.epoch_rows(1))
    taken = stream.take(len(first) + len(second))
    assert taken == first + second
    assert numbers(first) != numbers(second)
    assert stream.take(1) == list(stream.epoch_rows(2))[:1]


def test_any_place_can_be_returned_to():
    whole = RowStream(Counted(40), ROW_TOKENS, seed=1)
    places, rows = [], []
    while whole.state["epoch"] < 2:
        places.append(whole.state)
        rows += whole.take(1)
    rows += whole.take(3)
    for number, place in enumerate(places):
        resumed = RowStream(Counted(40), ROW_TOKENS, seed=1)
        resumed.restore(place)
        assert resumed.state == place
        assert resumed.take(3) == rows[number : number + 3]


def test_documents_are_made_when_their_turn_comes():
    source = Counted(4000)
    stream = RowStream(source, ROW_TOKENS, seed=1)
    assert not source.made
    stream.take(8)
    assert source.made[0] < 600  # 64 open rows, and those taken
    while source.made[1] == 0:
        stream.take(8)
    assert source.made[0] == 4000


def test_seeds_decide_the_order():
    orders = [numbers(RowStream(Counted(), ROW_TOKENS, seed=seed).epoch_rows(0)) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_rows_that_nothing_fits_into_are_refused():
    with pytest.raises(InputError, match="20 documents, and none fits into 2 tokens"):
        RowStream(Counted(20), 2, seed=0).take(1)
