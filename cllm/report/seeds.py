"""Cells that differ in their seed alone, as one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median

from cllm.bench.compare import Ratio, Row
from cllm.bench.result import CellResult
from cllm.evaluation.metrics import Estimate, accuracy, paired_difference

_MEANS = (
    "tpf", "mean_response_tokens", "fast_forwarded", "stationary", "floor_ms", "step_ms", "reference_perplexity",
)  # fmt: skip


def pooled(rows: Iterable[Row]) -> list[Row]:
    """A row for every cell, whatever its seeds, in the order of the first ones.

    Speed: median, slowest and fastest of the repeats of all seeds; a ratio is the median of the seeds' ratios, within
    the range that the repeats of any of them allow. Accuracy: each prompt has the mean of its scores, so that its
    interval is still one over prompts. What a row is of one seed alone (its cell, its hashes of responses) is of the
    first one.
    """
    by_cell: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        by_cell.setdefault(_name(row), []).append(row)
    found = [_pooled(mine) for mine in by_cell.values()]
    teachers = {_load(row): row for row in found if (row.cell.model, row.cell.method.kind) == ("teacher", "ar")}
    return [_against(row, teachers.get(_load(row))) if len(by_cell[_name(row)]) > 1 else row for row in found]


def _name(row: Row) -> tuple[object, ...]:
    return *_load(row), row.cell.model, row.cell.method.label


def _load(row: Row) -> tuple[object, ...]:
    return row.group, row.cell.concurrency


def _pooled(rows: Sequence[Row]) -> Row:
    first = rows[0]
    if len(rows) == 1:
        return first
    result = _result([row.result for row in rows])
    return replace(
        first,
        result=result,
        accuracy=accuracy(result.scores) if result.scores else None,
        tokens_per_s=_middle(result.tokens_per_s),
        joules=_middle(result.energy_j) if result.energy_j else None,
        speedup=_ratio(rows, lambda row: row.speedup),
        over_vllm=_ratio(rows, lambda row: row.over_vllm),
        over_transformers=_ratio(rows, lambda row: row.over_transformers),
        joules_over_ar=_ratio(rows, lambda row: row.joules_over_ar),
        identical=_mean([row.identical for row in rows]),
        floor_share=fmean(row.floor_share for row in rows),
    )


def _against(row: Row, teacher: Row | None) -> Row:
    """With the paired difference of the pooled scores; where the seeds have one."""
    if row.minus_teacher is None or teacher is None:
        return row
    return replace(row, minus_teacher=paired_difference(row.result.scores, teacher.result.scores))


def _result(results: Sequence[CellResult]) -> CellResult:
    first = results[0]
    changed: dict[str, object] = {name: _mean([getattr(result, name) for result in results]) for name in _MEANS}
    changed |= {
        "tokens_per_s": tuple(speed for result in results for speed in result.tokens_per_s),
        "energy_j": tuple(energy for result in results for energy in result.energy_j),
        "latency_ms": _medians([result.latency_ms for result in results]),
        "scores": tuple(map(fmean, _by_prompt([result.scores for result in results]))),
        "response_tokens": tuple(map(sum, _by_prompt([result.response_tokens for result in results]))),
        "response_forwards": tuple(map(sum, _by_prompt([result.response_forwards for result in results]))),
    }
    return first.model_copy(update=changed)


def _by_prompt(figures: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """The seeds' figures of each prompt; none where a seed has none."""
    return list(zip(*figures, strict=True)) if all(figures) else []


def _medians(latencies: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: median(found[name] for found in latencies) for name in latencies[0]}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _middle(repeats: Sequence[float]) -> Estimate:
    return Estimate(median(repeats), min(repeats), max(repeats))


def _ratio(rows: Sequence[Row], of: Callable[[Row], Ratio | None]) -> Ratio | None:
    found = [ratio for ratio in map(of, rows) if ratio is not None]
    if not found:
        return None
    values = [ratio.value for ratio in found]
    return Ratio(median(values), min(ratio.low for ratio in found), max(ratio.high for ratio in found))
