"""No question and no group is in two splits, whatever the order of rows."""

from collections import defaultdict
from collections.abc import Iterable
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from cllm.tasks.base import SPLITS, Example, Split, Turn
from cllm.tasks.splits import assign_splits, example_id


def example(question: str, split: Split = "train", group: str | None = None, response: str = "a") -> Example:
    return Example(turns=(Turn("user", question),), response=response, split=split, group=group)


def assign(
    examples: Iterable[Example], *, fraction: float = 0.2, seed: int = 0
) -> tuple[list[Example], dict[str, int]]:
    return assign_splits(examples, validation_fraction=fraction, seed=seed)


def split_of(examples: Iterable[Example]) -> dict[str, Split]:
    return {e.turns[0].content: e.split for e in examples}


def test_the_id_is_of_question_group_and_task_alone() -> None:
    one = example_id("t", example("What  is\né ?", group="g"))
    assert len(one) == 16
    assert int(one, 16) >= 0
    assert one == example_id("t", example(" What is e\u0301 ?", "test", group="g", response="b"))
    others = [
        example_id("u", example("What is é ?", group="g")),
        example_id("t", example("What is é ?", group="h")),
        example_id("t", example("What is e ?", group="g")),
        example_id("t", Example((Turn("system", "What is é ?"),), "a", "train", "g")),
    ]
    assert len({one, *others}) == 5


rows = st.lists(
    st.builds(
        example,
        st.sampled_from([f"q{i}" for i in range(8)]),
        st.sampled_from(SPLITS),
        st.sampled_from([None, *"ABCD"]),
    ),
    max_size=40,
)


@given(rows, st.integers(0, 3))
def test_nothing_crosses_the_splits(examples: list[Example], seed: int) -> None:
    kept, counts = assign(examples, seed=seed)
    splits: dict[tuple[str, str], set[Split]] = defaultdict(set)
    for e in kept:
        splits["question", e.turns[0].content].add(e.split)
        if e.group is not None:
            splits["group", e.group].add(e.split)
    assert all(len(found) == 1 for found in splits.values())
    assert len({example_id("t", e) for e in kept}) == len(kept)
    assert counts["rows"] == len(examples) == len(kept) + counts["duplicates"] + counts["leaks"]
    assert [counts[s] for s in SPLITS] == [sum(e.split == s for e in kept) for s in SPLITS]


@given(rows, st.randoms())
def test_the_order_of_rows_does_not_count(examples: list[Example], shuffler: Random) -> None:
    shuffled = shuffler.sample(examples, len(examples))
    kept = {(example_id("t", e), e.split) for e in assign(examples)[0]}
    assert kept == {(example_id("t", e), e.split) for e in assign(shuffled)[0]}


def test_test_wins_then_validation() -> None:
    given_rows = [
        example("a"),
        example("a", "test"),
        example("b"),
        example("b", "validation"),
        example("c", "validation", "G"),
        example("d", "test", "G"),
        example("e", "train", "G"),
        example("f"),
    ]
    kept, counts = assign(given_rows)
    assert split_of(kept) == {"a": "test", "b": "validation", "d": "test", "f": "train"}
    assert (counts["duplicates"], counts["leaks"]) == (2, 2)


def test_validation_is_carved_only_where_there_is_none() -> None:
    train = [example(f"q{i}") for i in range(100)]
    kept, counts = assign(train)
    assert (counts["train"], counts["validation"]) == (80, 20)
    assert assign([*train, example("v", "validation")])[1]["validation"] == 1
    other = {q for q, s in split_of(assign(train, seed=1)[0]).items() if s == "validation"}
    assert other != {q for q, s in split_of(kept).items() if s == "validation"}


def test_validation_takes_whole_groups_and_leaves_one() -> None:
    train = [example(f"{group}{i}", group=group) for group in "ABC" for i in range(10)]
    kept, counts = assign(train, fraction=0.05)
    assert (counts["train"], counts["validation"]) == (20, 10)
    assert len({e.group for e in kept if e.split == "validation"}) == 1
    assert assign(train[:10])[1]["validation"] == 0


def test_the_first_of_several_answers_stays() -> None:
    kept, _ = assign([example("q", response="one"), example("q", response="two"), example("r")], fraction=0.01)
    assert next(e.response for e in kept if e.turns[0].content == "q") == "one"
