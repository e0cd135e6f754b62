"""Figures as they stand in a table."""

import pytest

from cllm.evaluation.metrics import Estimate
from cllm.report.page import NOTHING
from cllm.report.values import count, points, significant, spread


@pytest.mark.parametrize(
    ("value", "text"), [(0.012345, "0.012345"), (1.25, "1.2500"), (260.1, "260.10"), (4.4e9, "4,400,000,000"), (0, "0")]
)
def test_so_many_digits_or_to_the_unit(value: float, text: str):
    assert significant(value, 5).text == text
    assert significant(None, 5) == NOTHING


def test_a_spread_has_three_digits_in_its_unit_and_sorts_by_its_median():
    assert spread(Estimate(2557.3, 2549.0, 2586.0)).text == "2,557 (2,549–2,586)"
    found = spread(Estimate(0.00512, 0.005, 0.0064), unit=1000)
    assert (found.text, found.order) == ("5.12 (5.00–6.40)", pytest.approx(5.12))
    assert spread(None) == NOTHING


def test_a_difference_that_rounds_to_zero_is_not_negative():
    assert points(Estimate(-0.0001, -0.02, 0.02)).text == "+0.0 (-2.0 to +2.0)"


@pytest.mark.parametrize(("value", "text"), [(30_200, "30.2K"), (1_900_000, "1.9M"), (6_738_000_000, "6.7B")])
def test_numbers_of_parameters(value: int, text: str):
    assert count(value).text == text
