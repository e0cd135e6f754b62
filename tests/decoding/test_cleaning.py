"""Which responses are dropped before training, and what augmentation makes of the states of the others."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.decoding.records import BlockTrajectory
from cllm.decoding.trajectories import Trajectory, longest_run, most_repeated_sentence, partly_corrected
from cllm.engine.collection import augment, reason_to_drop
from cllm.recipe import CollectConfig
from cllm.tasks.tokenizer import train_tokenizer

FIXED = (2, 3, 4, 5, 6, 7)
BLOCK = BlockTrajectory(((9, 9, 9, 9, 9, 9), (2, 9, 9, 9, 9, 9), (2, 3, 4, 5, 6, 9), FIXED))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat here. it sat there! so it is? yes no"], 300)


def answered(text: str, tokenizer, finish_reason: str = "stop") -> Trajectory:
    ids = (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
    return Trajectory("0" * 16, (2,), ids, finish_reason, ())


# Cleaning rules


@pytest.mark.parametrize(
    ("tokens", "length"), [((), 0), ((5,), 1), ((5, 5, 6, 6, 6, 5), 3), ((5, 6, 5, 6), 1), ((7, 7, 7, 7), 4)]
)
def test_longest_run(tokens, length):
    assert longest_run(tokens) == length


@pytest.mark.parametrize(
    ("text", "times"),
    [
        ("", 0),
        ("The cat sat here. It sat there. The cat sat here.", 2),
        ("the cat sat\nthe cat sat\n  the cat sat", 3),  # lines are sentences, whatever their indentation
        ("So it is? So it is! So it is.", 1),  # other marks, other sentences
        ("Yes no. Yes no. Yes no.", 0),  # under three words
        ("return x.y.z and return x.y.z and return", 1),  # no space behind the mark
    ],
)
def test_most_repeated_sentence(text, times):
    assert most_repeated_sentence(text) == times


def test_a_sentence_may_come_back_so_often(tokenizer):
    response = answered("the cat sat here. " * 4, tokenizer)
    assert reason_to_drop(response, tokenizer, CollectConfig(max_sentence_repeat=3)) == "sentence_repetition"
    assert reason_to_drop(response, tokenizer, CollectConfig(max_sentence_repeat=4)) is None
    assert reason_to_drop(response, tokenizer, CollectConfig(max_sentence_repeat=None)) is None


def test_a_token_may_follow_itself_so_often(tokenizer):
    response = Trajectory("0" * 16, (2,), (5,) * 6, "stop", ())
    settings = {"max_sentence_repeat": None}
    assert reason_to_drop(response, tokenizer, CollectConfig(max_token_repeat=5, **settings)) == "token_repetition"
    assert reason_to_drop(response, tokenizer, CollectConfig(max_token_repeat=6, **settings)) is None
    assert reason_to_drop(response, tokenizer, CollectConfig(max_token_repeat=None, **settings)) is None


def test_a_response_that_was_cut_off_is_dropped_unless_it_may_stay(tokenizer):
    cut = answered("the cat sat", tokenizer, "length")
    assert reason_to_drop(cut, tokenizer, CollectConfig()) == "unfinished"
    assert reason_to_drop(cut, tokenizer, CollectConfig(drop_unfinished=False)) is None
    assert reason_to_drop(answered("the cat sat", tokenizer), tokenizer, CollectConfig()) is None


# Augmentation


def test_partly_corrected_by_hand():
    """All wrong tokens but the first are corrected with a share of 1; a state with one mistake has no copy."""
    assert partly_corrected(BLOCK, 1.0, random.Random(0)) == ((9, 3, 4, 5, 6, 7), (2, 9, 4, 5, 6, 7))
    half = partly_corrected(BLOCK, 0.5, random.Random(0))
    wrong = [sum(a != b for a, b in zip(copy, FIXED, strict=True)) for copy in half]
    assert wrong == [6 - 2, 5 - 2]  # a half of five, to the even; a half of four


@given(
    states=st.lists(st.lists(st.integers(2, 5), min_size=6, max_size=6).map(tuple), min_size=1, max_size=6),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 99),
)
def test_copies_are_states_with_only_later_mistakes_corrected(states, share, seed):
    block = BlockTrajectory((*states, FIXED))
    copies = partly_corrected(block, share, random.Random(seed))
    sources = [state for state in states if sum(a != b for a, b in zip(state, FIXED, strict=True)) >= 2]
    assert len(copies) == len(sources)
    for state, copy in zip(sources, copies, strict=True):
        first = next(i for i in range(6) if state[i] != FIXED[i])
        assert copy[: first + 1] == state[: first + 1]
        assert copy != state
        assert all(token in (old, right) for token, old, right in zip(copy, state, FIXED, strict=True))


def test_augmentation_is_a_function_of_seed_and_prompt_and_0_turns_it_off():
    row = Trajectory("00000000000000aa", (2,), FIXED, "stop", (BLOCK,))
    assert augment(row, 0.0, 7) is row
    once = augment(row, 0.5, 7)
    assert once == augment(row, 0.5, 7)
    assert len(once.augmented) == len(once.blocks) == 1
    assert {augment(row, 0.5, seed).augmented for seed in range(20)} != {once.augmented}
