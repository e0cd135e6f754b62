"""Each figure against a calculation by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from cllm.evaluation.metrics import accuracy, identical_rate, paired_difference, step_histogram, tokens_per_forward


@pytest.mark.parametrize(("right", "total"), [(0, 10), (3, 10), (10, 10), (1, 1), (412, 500)])
def test_accuracy_has_the_wilson_interval(right: int, total: int) -> None:
    estimate = accuracy([1.0] * right + [0.0] * (total - right))
    expected = binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert estimate.mean == pytest.approx(right / total)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_interval_holds_the_mean_and_stays_a_share(scores: list[float]) -> None:
    estimate = accuracy(scores)
    assert 0 <= estimate.low <= estimate.mean <= estimate.high <= 1


def test_paired_difference_by_hand() -> None:
    """Ten prompts: three wins, one loss, six ties. With half a win, half a loss and a tie added: twelve prompts."""
    mine = [1, 1, 1, 0, 1, 1, 1, 0, 0, 0]
    other = [0, 0, 0, 1, 1, 1, 1, 0, 0, 0]
    estimate = paired_difference(mine, other)
    centre = (3 - 1) / 12
    half = 1.959964 * math.sqrt(((3 + 1 + 1) / 12 - centre**2) / 12)
    assert estimate.mean == pytest.approx(0.2)
    assert (estimate.low, estimate.high) == pytest.approx((centre - half, centre + half), abs=1e-6)


def test_no_difference_among_few_prompts_is_no_proof() -> None:
    estimate = paired_difference([1.0] * 20, [1.0] * 20)
    assert estimate.mean == 0
    assert estimate.low == -estimate.high < -0.05


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=60))
def test_paired_interval_holds_the_difference_and_mirrors(pairs: list[tuple[float, float]]) -> None:
    mine, other = zip(*pairs, strict=True)
    estimate, mirrored = paired_difference(mine, other), paired_difference(other, mine)
    assert -1 <= estimate.low <= estimate.mean <= estimate.high <= 1
    assert (mirrored.low, mirrored.high) == pytest.approx((-estimate.high, -estimate.low))


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        paired_difference([1.0, 0.0], [1.0])


def test_tokens_per_forward_is_total_over_total() -> None:
    """Not the mean of the rows' ratios, which would be (8 + 1) / 2."""
    assert tokens_per_forward([(8,), (1, 1, 1, 1)]) == pytest.approx(12 / 5)


def test_step_histogram() -> None:
    assert step_histogram([(3, 1), (1, 1, 10)]) == {1: 3, 3: 1, 10: 1}


def test_identical_rate_counts_whole_responses() -> None:
    assert identical_rate([(1, 2), (1, 2), (3,), ()], [(1, 2), (1, 3), (3, 4), ()]) == 0.5
