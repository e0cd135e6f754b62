"""The n-gram pool against a search through the text, and its bounds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.decoding.records import DecodeRequest, SamplingParams
from cllm.engine.ngram import GuessRace, NgramPool
from cllm.errors import InputError
from tests.engine.making import make_engine
from tests.fakes import tiny_model

texts = st.lists(st.integers(0, 4), max_size=30)


def latest_follower(runs, context):
    """The token after the last occurrence of `context` in the runs, by brute force."""
    size = len(context)
    found = [run[i + size] for run in runs for i in range(len(run) - size) if list(run[i : i + size]) == list(context)]
    return found[-1] if found else None


def search(runs, last_tokens, count, order):
    """What `continue_from` promises, without an index."""
    text = list(last_tokens)
    for _ in range(count):
        contexts = [text[-size:] for size in range(min(order - 1, len(text)), 0, -1)]
        followers = [latest_follower(runs, context) for context in contexts]
        known = [token for token in followers if token is not None]
        if not known:
            break
        text.append(known[0])
    return text[len(last_tokens) :]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(runs=st.lists(texts, max_size=4), last_tokens=texts, count=st.integers(0, 12), order=st.integers(2, 5))
def test_continues_as_the_text_did_last_time(runs, last_tokens, count, order):
    pool = NgramPool(order)
    for run in runs:
        pool.add(run)
    assert pool.continue_from(last_tokens, count) == search(runs, last_tokens, count, order)


def test_a_repeated_phrase_is_chained_to_its_end():
    pool = NgramPool(3)
    pool.add([9, 1, 2, 3, 4, 5, 8, 1, 2])
    assert pool.continue_from([7, 1, 2], 4) == [3, 4, 5, 8]


def test_longer_context_beats_newer_shorter_one():
    pool = NgramPool(3)
    pool.add([1, 2, 3])
    pool.add([5, 2, 6])
    assert pool.continue_from([1, 2], 1) == [3]
    assert pool.continue_from([4, 2], 1) == [6]


def test_runs_do_not_join_unless_they_overlap():
    pool = NgramPool(2)
    pool.add([1, 2])
    pool.add([3, 4])
    assert pool.continue_from([2], 1) == []
    pool.add([2, 3])
    assert pool.continue_from([1], 9)[:3] == [2, 3, 4]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(text=texts, capacity=st.integers(1, 6))
def test_capacity_drops_the_contexts_seen_longest_ago(text, capacity):
    pool = NgramPool(2, capacity)
    pool.add(text)
    contexts = list(dict.fromkeys(reversed(text[:-1])))  # newest first
    assert len(pool) == min(capacity, len(contexts))
    for rank, token in enumerate(contexts):
        assert bool(pool.continue_from([token], 1)) == (rank < capacity)


@pytest.mark.parametrize(("order", "capacity", "name"), [(1, 8, "order"), (2, 0, "capacity")])
def test_arguments_are_checked(order, capacity, name):
    with pytest.raises(InputError, match=name):
        NgramPool(order, capacity)


def test_ngrams_lead_once_they_were_right_more_often_and_no_longer_when_they_are_not():
    race = GuessRace()
    for _ in range(40):
        race.note(carried=7, proposed=7, token=7)  # both right
        race.note(carried=7, proposed=7, token=8)  # both wrong
    assert not race.ngrams_lead
    for _ in range(10):
        race.note(carried=7, proposed=8, token=8)
    assert race.ngrams_lead
    for _ in range(10):
        race.note(carried=8, proposed=7, token=8)
    assert not race.ngrams_lead


def test_in_the_engine_ngrams_save_forwards_where_text_repeats():
    """Random models end in loops, which n-grams know."""
    requests = [DecodeRequest((3 + i, 4), 80, SamplingParams(ignore_eos=True)) for i in range(6)]
    forwards = {}
    for ngram in (0, 3):
        results = make_engine(tiny_model(1), window=6, ngram=ngram).generate(requests)
        forwards[ngram] = sum(result.num_forwards for result in results)
    assert forwards[3] < 0.95 * forwards[0]
