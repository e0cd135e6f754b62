"""The area under accuracy against parallelism, by hand."""

import math
from collections.abc import Sequence

import pytest

from cllm.bench.compare import compare
from cllm.bench.result import CellRecord
from cllm.report.page import Absent, Section, Table
from cllm.report.sources import Sources
from cllm.report.tradeoff import accuracy_under_parallelism, tradeoff_section
from tests.bench.records import AR, BLOCK, VLLM, make_cell, make_record, make_result


def test_one_point_is_its_rectangle():
    area = accuracy_under_parallelism([(1.0, 60.0)], best=80.0)
    assert (area.value, area.reach, area.used, area.left_out) == (60.0, 1.0, 1, 0)


def test_without_a_loss_it_is_the_parallelism_times_the_accuracy():
    curve = [(1.0, 60.0), (3.5, 60.0), (2.0, 60.0)]
    assert accuracy_under_parallelism(curve, best=60.0).value == pytest.approx(3.5 * 60)


def test_a_loss_weighs_as_in_the_paper():
    """AUP = rho_1 y_1 + sum of (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2."""
    curve, best = [(1.0, 60.0), (2.0, 58.0), (4.0, 56.0)], 60.0
    weighted = [y * math.exp(-3 * (1 - y / best)) for _, y in curve]
    expected = 60 + (weighted[0] + weighted[1]) / 2 + 2 * (weighted[1] + weighted[2]) / 2
    area = accuracy_under_parallelism(curve, best)
    assert area.value == pytest.approx(expected)
    assert area.value < 4 * 57
    better_elsewhere = accuracy_under_parallelism(curve, best=70.0).value
    assert better_elsewhere < area.value


def test_points_more_than_five_below_the_reference_do_not_count():
    curve = [(1.0, 60.0), (2.0, 55.0), (8.0, 54.9)]
    area = accuracy_under_parallelism(curve, best=60.0)
    assert area == accuracy_under_parallelism(curve[:2], best=60.0).__class__(area.value, 2.0, 2, 1)
    assert area.value == accuracy_under_parallelism(curve[:2], best=60.0).value


def section(**cllm: tuple[float, ...]) -> Section | Absent:
    records = [
        make_record(make_cell(AR), make_result(scores=(1.0,) * 4)),
        make_record(make_cell(BLOCK, model="cllm"), make_result(tpf=3.0, **{"scores": (1.0,) * 4, **cllm})),
        make_record(make_cell(VLLM, model="cllm"), make_result(tpf=9.0)),  # not our engine: no point
    ]
    return section_of(records)


def section_of(records: Sequence[CellRecord]) -> Section | Absent:
    rows = compare(records)
    return tradeoff_section(rows, Sources.of(rows))


def table_of(found: Section | Absent) -> list[str]:
    assert isinstance(found, Section)
    (table,) = [part for part in found.parts if isinstance(part, Table)]
    (row,) = table.rows
    return [value.text for value in row]


def test_the_curve_of_a_cllm_begins_with_the_teacher():
    assert table_of(section()) == [
        "cllm, demo, synthetic_sql, test cpu, 2 threads",
        "300.0",
        "3.00",
        "3.00",
        "2",
        "0",
        "1",
    ]
    assert table_of(section(scores=(1.0, 1.0, 1.0, 0.0)))[1:] == ["100.0", "1.00", "1.00", "1", "1", "1"]


def test_without_scores_there_is_no_curve():
    records = [
        make_record(make_cell(AR), make_result(scores=())),
        make_record(make_cell(BLOCK, model="cllm"), make_result(scores=())),
    ]
    assert isinstance(section_of(records), Absent)
    nothing_right = [record.model_copy(update={"result": make_result(scores=(0.0,) * 4)}) for record in records]
    assert isinstance(section_of(nothing_right), Absent)
