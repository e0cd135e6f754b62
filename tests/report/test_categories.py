"""Tokens a forward by category, by hand and against simulated responses."""

import random

import pytest

from cllm.bench.compare import compare
from cllm.evaluation.metrics import ratio_of_sums
from cllm.report.categories import categories_section
from cllm.report.page import Absent, Section, Table
from cllm.report.sources import Sources
from tests.bench.records import AR, BLOCK, make_cell, make_record, make_result


def test_tokens_over_forwards_not_the_mean_of_ratios():
    found = ratio_of_sums([10, 40], [10, 10])
    assert found.mean == 2.5
    assert found.low < 2.5 < found.high
    alone = ratio_of_sums([12], [4])
    assert (alone.mean, alone.low, alone.high) == (3.0, 3.0, 3.0)
    same = ratio_of_sums([30, 60], [10, 20])  # no spread between responses
    assert same.low == pytest.approx(same.high)


def test_the_interval_covers_the_true_rate():
    """Responses of random lengths, each with a rate of its own."""
    rng = random.Random(0)
    trials, missed = 2000, 0
    for _ in range(trials):
        forwards = [rng.randint(5, 60) for _ in range(60)]
        found = ratio_of_sums([round(count * rng.uniform(2, 4)) for count in forwards], forwards)
        missed += not found.low <= 3 <= found.high
    assert missed / trials == pytest.approx(0.05, abs=0.025)


def test_a_column_for_each_category_and_one_for_all():
    work = {"response_tokens": (12, 12, 30, 6), "response_forwards": (4, 4, 10, 6)}
    records = [
        make_record(make_cell(AR), make_result(categories=("math", "math", "qa", "qa"))),
        make_record(make_cell(BLOCK, model="cllm"), make_result(categories=("math", "math", "qa", "qa"), **work)),
    ]
    rows = compare(records)
    section = categories_section(rows, Sources.of(rows))
    assert isinstance(section, Section)
    (table,) = section.parts
    assert isinstance(table, Table)
    assert table.columns == ("method", "model", "math (2)", "qa (2)", "all (4)", "source")
    assert [value.text.partition(" ")[0] for value in table.rows[1][2:5]] == ["3.00", "2.25", "2.50"]
    plain = compare([make_record()])
    assert isinstance(categories_section(plain, Sources.of(plain)), Absent)
