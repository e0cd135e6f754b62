"""What training reads: documents of reference answers, of responses, and of trajectories with spans drawn anew."""

import random
from itertools import pairwise

import pytest

from cllm.decoding.records import BlockTrajectory
from cllm.decoding.trajectories import Trajectory
from cllm.recipe import LossConfig
from cllm.tasks.prompts import Prompt
from cllm.training.documents import Document, Span
from cllm.training.sources import (
    ReferenceDocuments,
    ResponseDocuments,
    TrajectoryDocuments,
    WindowGuess,
    draw_spans,
)
from tests.fakes import PAD
from tests.training.made import BLOCK, random_trajectory

GUESS = WindowGuess("pad", BLOCK, PAD)
ROWS = [random_trajectory(number) for number in range(20)]

# One block of four: the guess, a state with a mistake behind a right token, and the fixed point.
RESPONSE = (5, 6, 7, 8)
BY_HAND = Trajectory("0" * 16, (2, 3), RESPONSE, "stop", (BlockTrajectory(((9, 9, 9, 9), (5, 9, 7, 9), RESPONSE)),))


def documents(config: LossConfig, rows=ROWS, epoch=0, seed=3, references=None) -> list[Document]:
    return list(TrajectoryDocuments(rows, config, seed, GUESS, references).documents(epoch))


def test_reference_answers_are_the_same_in_every_epoch():
    prompts = [Prompt("0" * 16, "train", None, (2, 3), (4, 1), "", "", {}, "train:1")]
    source = ReferenceDocuments(prompts)
    assert list(source.documents(0)) == list(source.documents(7)) == [Document((2, 3), (4, 1))]


def test_responses_come_without_spans():
    expected = [Document(row.prompt_ids, row.response_ids) for row in ROWS]
    assert list(ResponseDocuments(ROWS).documents(0)) == list(ResponseDocuments(ROWS).documents(1)) == expected


@pytest.mark.parametrize(
    "config", [LossConfig(), LossConfig(states="guess", states_per_block=2)], ids=["states", "guess"]
)
def test_documents_are_a_function_of_seed_epoch_and_row(config):
    first = documents(config)
    assert first == documents(config)
    assert documents(config, rows=ROWS[7:8]) == first[7:8]  # the other rows decide nothing
    assert first != documents(config, epoch=1)
    assert first != documents(config, seed=4)
    for document, row in zip(first, ROWS, strict=True):
        assert (document.prompt_ids, document.response_ids) == (row.prompt_ids, row.response_ids)
        assert document.learn_response


def test_epochs_draw_all_states_but_the_fixed_point():
    """The last state teaches nothing. The first divergence of the two others is at 0 and at 1."""
    drawn = {documents(LossConfig(), [BY_HAND], epoch)[0].spans for epoch in range(40)}
    assert drawn == {(Span(0, (9, 9, 9)),), (Span(1, (9, 7)),)}


def test_a_local_target_is_the_next_state():
    drawn = {documents(LossConfig(target="local"), [BY_HAND], epoch)[0].spans for epoch in range(40)}
    assert drawn == {
        (Span(0, (9, 9, 9), Span(0, (5, 9, 7))),),
        (Span(1, (9, 7)),),
    }  # behind the last comes the fixed point


def test_a_corrected_copy_is_drawn_in_half_of_the_cases():
    copy = (9, 9, 7, 8)
    row = Trajectory("0" * 16, (2, 3), RESPONSE, "stop", BY_HAND.blocks, ((copy,),))
    hits = sum(draw_spans(row, LossConfig(), random.Random(i)) == (Span(0, copy[:3]),) for i in range(400))
    assert 150 < hits < 250
    local = {draw_spans(row, LossConfig(target="local"), random.Random(i)) for i in range(40)}
    assert (Span(0, copy[:3]),) in local  # held against the fixed point, for no state follows it


def test_reference_labels_are_documents_of_their_own():
    references = {row.prompt_id: (7, 7, int(row.prompt_id, 16) + 2) for row in ROWS}
    found = documents(LossConfig(ar_labels="reference"), references=references)
    assert len(found) == 2 * len(ROWS)
    plain = documents(LossConfig())
    for row, distilled, answered, expected in zip(ROWS, found[::2], found[1::2], plain, strict=True):
        assert distilled == Document(row.prompt_ids, row.response_ids, expected.spans, learn_response=False)
        assert answered == Document(row.prompt_ids, references[row.prompt_id])
    assert sum(document.num_ar_labels for document in found) == 3 * len(ROWS)


def test_reference_labels_need_reference_answers():
    with pytest.raises(ValueError, match="reference"):
        TrajectoryDocuments(ROWS, LossConfig(ar_labels="reference"), 0, GUESS)


def test_guessed_windows_tile_the_response_from_its_start_or_a_random_place():
    config = LossConfig(states="guess")
    starts = set()
    for epoch in range(60):
        for document, row in zip(documents(config, epoch=epoch), ROWS, strict=True):
            if len(row.response_ids) < 2 * BLOCK:
                continue
            places = [span.start for span in document.spans]
            assert all(b - a == BLOCK for a, b in pairwise(places))
            assert all(set(span.tokens) == {PAD} for span in document.spans)
            starts.add(places[0])
    assert starts == set(range(BLOCK))
