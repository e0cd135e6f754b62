"""Rows of the matrix against calculations by hand, and its marks against simulated noise."""

import random
from statistics import fmean

import pytest

from cllm.bench.compare import Ratio, answered, chance_apart, compare, newest, speed_ratio
from cllm.bench.matrix import LoadConfig, Platform
from cllm.evaluation.metrics import paired_difference
from tests.bench.records import AR, BLOCK, PROVENANCE, VLLM, failed_record, make_cell, make_record, make_result


def at(time: str) -> dict[str, object]:
    return {**PROVENANCE, "time": time}


def test_the_range_of_a_ratio_holds_all_pairs_of_repeats():
    speeds, baseline = (180.0, 200.0, 220.0), (80.0, 100.0, 110.0)
    ratio = speed_ratio(speeds, baseline)
    pairs = [mine / other for mine in speeds for other in baseline]
    assert (ratio.low, ratio.high) == (min(pairs), max(pairs))
    assert ratio.value == 2


def test_a_ratio_is_noise_exactly_where_the_repeats_overlap():
    assert speed_ratio((95.0, 105.0, 110.0), (100.0, 101.0, 99.0)).within_noise
    assert speed_ratio((100.0, 105.0, 110.0), (90.0, 95.0, 100.0)).within_noise  # they touch
    assert not speed_ratio((101.0, 105.0, 110.0), (90.0, 95.0, 100.0)).within_noise
    assert not Ratio(1, 1, 1).within_noise  # a baseline beside itself


@pytest.mark.parametrize("repeats", [3, 5])
def test_equal_speeds_fall_apart_as_often_as_the_report_says(repeats: int):
    rng = random.Random(repeats)
    trials = 20_000
    apart = 0
    for _ in range(trials):
        one, other = ([rng.lognormvariate(0, 0.05) for _ in range(repeats)] for _ in range(2))
        apart += not speed_ratio(one, other).within_noise
    expected = chance_apart(repeats, repeats)
    assert apart / trials == pytest.approx(expected, abs=4 * (expected / trials) ** 0.5)
    assert chance_apart(3, 3) == 0.1


@pytest.mark.parametrize(("prompts", "won", "lost"), [(100, 0.05, 0.05), (200, 0.02, 0.06), (500, 0.001, 0.001)])
def test_paired_intervals_cover_the_true_difference(prompts: int, won: float, lost: float):
    """95% intervals miss in about 5% of test sets, hardly more, whether models differ often or almost never."""
    rng = random.Random(0)
    trials, missed = 2000, 0
    for _ in range(trials):
        draws = [rng.random() for _ in range(prompts)]
        scores = [float(draw < won) for draw in draws]
        baseline = [float(won <= draw < won + lost) for draw in draws]
        found = paired_difference(scores, baseline)
        missed += not found.low <= won - lost <= found.high
    assert missed / trials < 0.065


def test_only_cells_of_the_latest_state_of_a_model_are_compared():
    old, new = {"provenance": at("2026-01-01")}, {"provenance": at("2026-02-01")}
    records = [
        make_record(make_cell(AR, model="cllm", weights="old"), make_result((50.0, 50.0, 50.0)), **old),
        make_record(make_cell(BLOCK, model="cllm", weights="old"), make_result((150.0, 150.0, 150.0)), **old),
        make_record(make_cell(AR, model="cllm", weights="new"), make_result((100.0, 100.0, 100.0)), **new),
        make_record(make_cell(AR), **old),
    ]
    kept = {(record.cell.model, record.cell.method.label, record.cell.weights) for record in newest(records)}
    assert kept == {("cllm", "ar", "new"), ("teacher", "ar", "w" * 16)}
    assert newest(records[::-1]) == newest(records)  # the time decides, not the order
    assert len(compare(records)) == 2


def test_a_cell_measured_again_with_other_versions_replaces_the_first():
    platforms = [Platform(device="gpu", threads=0, versions={"torch": version}) for version in ("2.13", "2.14")]
    old, new = (
        make_record(make_cell(platform=platform), provenance=at(time))
        for platform, time in zip(platforms, ("2026-01-01", "2026-02-01"), strict=True)
    )
    assert newest([new, old]) == [new]


def test_a_scorer_that_was_mended_replaces_the_first():
    """Also where only one model was measured again: the other one's old scores are no baseline any more."""
    old, new = at("2026-01-01"), at("2026-02-01")
    records = [
        make_record(make_cell(AR, scorer="old"), provenance=old),
        make_record(make_cell(AR, model="cllm", scorer="old"), provenance=old),
        make_record(make_cell(AR, model="cllm", scorer="new"), provenance=new),
    ]
    teacher, cllm = compare(records)
    assert (teacher.cell.scorer, cllm.cell.scorer) == ("old", "new")
    assert cllm.minus_teacher is None


def test_test_sets_of_one_task_stand_side_by_side():
    """A run on Spider asked its own test questions, and another set of Spider's."""
    records = [
        make_record(make_cell(AR, data="own"), provenance=at("2026-01-01")),
        make_record(make_cell(AR, test="synthetic_sql", data="other"), provenance=at("2026-02-01")),
    ]
    rows = compare(records)
    assert [row.cell.test for row in rows] == ["", "synthetic_sql"]
    assert [row.speedup for row in rows] == [Ratio(1, 1, 1)] * 2
    assert rows[1].group == rows[0].group + ", another test set"


def test_loads_of_two_matrices_stand_side_by_side():
    """500 prompts with 256 timed in one matrix, 256 with 128 in a later one; the names tell them apart."""
    loads = [LoadConfig(num_prompts=n, speed_prompts=n // 2, max_new_tokens=8) for n in (500, 256)]
    times = ("2026-01-01", "2026-02-01")
    records = [
        make_record(make_cell(method, load=load), make_result((speed,) * 3), provenance=at(time))
        for load, time in zip(loads, times, strict=True)
        for method, speed in ((AR, 1.0), (BLOCK, 2.0))
    ]
    rows = compare(records)
    assert len(rows) == 4
    assert [row.speedup.value for row in rows if row.cell.method == BLOCK and row.speedup] == [2, 2]
    groups = {row.cell.load.num_prompts: row.group for row in rows}
    assert "500 prompts, 250 of them 3 times" in groups[500]
    assert "256 prompts, 128 of them 3 times" in groups[256]
    (alone,) = {row.group for row in compare(records[:2])}
    assert "prompts" not in alone


def test_what_was_not_timed_is_no_row_and_compared_with_its_like():
    load = LoadConfig(num_prompts=4, repeats=0, max_new_tokens=8)
    still = {"tokens_per_s": (), "latency_ms": {}, "floor_ms": 0.0}
    records = [
        make_record(make_cell(AR)),
        make_record(make_cell(AR, load=load), make_result(**still)),
        make_record(make_cell(BLOCK, model="cllm", load=load), make_result(**still, scores=(1.0,) * 4)),
    ]
    assert [row.cell.load.timed for row in compare(records)] == [True]
    teacher, cllm = answered(records)
    assert (teacher.identical, teacher.minus_teacher) == (1, None)
    assert cllm.minus_teacher is not None
    assert cllm.minus_teacher.mean == 0.5


def test_a_row_says_where_it_is_from():
    records = [
        make_record(make_cell(AR), provenance={**PROVENANCE, "commit": "a"}),
        make_record(make_cell(BLOCK), provenance={**PROVENANCE, "commit": "b"}),
    ]
    assert [row.provenance["commit"] for row in compare(records)] == ["a", "b"]


def test_a_failure_replaces_nothing():
    done = make_record(provenance=at("2026-01-01"))
    failed = failed_record(make_cell(weights="new"), "lost").model_copy(update={"provenance": at("2026-02-01")})
    assert newest([done, failed]) == [done]


def test_tasks_devices_threads_and_sampling_do_not_mix():
    """Each of them has a baseline of its own, which is half as fast as its block decoding."""
    warm = LoadConfig(num_prompts=4, max_new_tokens=8, temperature=0.7)
    cells = [
        {"task": "spider"},
        {"task": "gsm8k"},
        {"platform": Platform(device="gpu", threads=0, versions={})},
        {"platform": Platform(device="test cpu", threads=1, versions={})},
        {"load": warm},
    ]
    records = []
    for speed, cell in enumerate(cells, start=1):
        records.append(make_record(make_cell(AR, **cell), make_result((1.0 * speed,) * 3)))
        records.append(make_record(make_cell(BLOCK, **cell), make_result((2.0 * speed,) * 3)))
    rows = compare(records)
    assert len({row.group for row in rows}) == len(cells)
    assert [row.speedup.value for row in rows if row.cell.method == BLOCK and row.speedup] == [2] * len(cells)


def test_energy_is_compared_like_speed():
    ar = make_record(make_cell(AR), make_result(energy_j=(0.4, 0.5, 0.6)))
    block = make_record(make_cell(BLOCK), make_result(energy_j=(0.1, 0.2, 0.2)))
    vllm = make_record(make_cell(VLLM), make_result())
    rows = {row.cell.method.label: row for row in compare([ar, block, vllm])}
    found = rows[BLOCK.label]
    assert found.joules is not None
    assert (found.joules.mean, found.joules.low, found.joules.high) == (0.2, 0.1, 0.2)
    assert found.joules_over_ar == Ratio(0.2 / 0.5, 0.1 / 0.6, 0.2 / 0.4)
    assert rows["ar"].joules_over_ar == Ratio(1, 1, 1)
    assert (rows["vllm ar"].joules, rows["vllm ar"].joules_over_ar) == (None, None)


def test_without_scores_there_is_no_accuracy_and_no_difference():
    teacher = make_record(make_cell(AR), make_result(scores=(), metric="none"))
    cllm = make_record(make_cell(AR, model="cllm"), make_result(scores=(), metric="none"))
    rows = compare([teacher, cllm])
    assert [(row.accuracy, row.minus_teacher) for row in rows] == [(None, None)] * 2
    assert not any(row.differs_from_teacher for row in rows)
    assert rows[1].identical == 1


def test_scores_are_paired_by_prompt():
    teacher, cllm = (1.0, 1.0, 0.0, 0.0), (1.0, 0.0, 1.0, 0.0)
    rows = compare(
        [
            make_record(make_cell(AR), make_result(scores=teacher)),
            make_record(make_cell(BLOCK, model="cllm"), make_result(scores=cllm)),
        ]
    )
    minus = rows[1].minus_teacher
    assert minus is not None
    assert minus.mean == fmean(cllm) - fmean(teacher) == 0
    assert minus.low < 0 < minus.high


def test_precisions_do_not_mix():
    """A model measured again in another precision is a new state; a baseline of another one is none."""
    old, new = {"provenance": at("2026-01-01")}, {"provenance": at("2026-02-01")}
    records = [
        make_record(make_cell(AR, precision="fp32"), **old),
        make_record(make_cell(BLOCK, precision="fp32"), **old),
        make_record(make_cell(BLOCK, precision="bf16"), **new),
    ]
    (row,) = compare(records)
    assert (row.cell.method, row.cell.precision, row.speedup) == (BLOCK, "bf16", None)
    assert row.minus_teacher is None
