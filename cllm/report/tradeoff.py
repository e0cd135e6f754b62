"""Accuracy against parallelism, and the area under that curve (AUP)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cllm.bench.compare import Row
from cllm.evaluation.subject import SUBJECTS
from cllm.report.groups import by_group, fewest_in_flight, find
from cllm.report.lines import Axis, Point, line_plot
from cllm.report.page import Absent, Plot, Plots, Section, Table, Value
from cllm.report.sources import COLUMN, Sources
from cllm.report.values import number

_TITLE = "Accuracy against parallelism"
_PENALTY = 3.0
_ALLOWED_LOSS = 5.0  # points of accuracy


@dataclass(frozen=True, slots=True)
class Area:
    """The area under a curve of accuracy against parallelism.

    Attributes:
        value: in tokens a forward × points of accuracy.
        reach: most tokens a forward among the points within the allowed loss.
        used, left_out: numbers of points within the allowed loss and beyond it.
    """

    value: float
    reach: float
    used: int
    left_out: int


def accuracy_under_parallelism(curve: Sequence[tuple[float, float]], best: float) -> Area:
    """AUP of Qian et al. 2026 (d3LLM, arXiv 2601.07568), with their alpha = 3 and 5 points of allowed loss.

    With points (rho_i, y_i) in the order of rho, those with y_i < y_1 - 5 left out, and W(y) = min(1, exp(-alpha *
    (1 - y / best))):  AUP = rho_1 y_1 + sum over i > 1 of (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2.
    Without any loss of accuracy it is rho_max * y_1.

    Args:
        curve: (tokens a forward, accuracy in points of 100), the reference first; at least one point.
        best: highest accuracy on this task of all that is compared, > 0.
    """
    (_, reference), *_ = curve
    used = sorted((point for point in curve if point[1] >= reference - _ALLOWED_LOSS), key=lambda point: point[0])
    weighted = [y * min(1.0, math.exp(-_PENALTY * (1 - y / best))) for _, y in used]
    area = used[0][0] * used[0][1]
    for i in range(1, len(used)):
        area += (used[i][0] - used[i - 1][0]) * (weighted[i] + weighted[i - 1]) / 2
    return Area(area, used[-1][0], len(used), len(curve) - len(used))


def tradeoff_section(rows: Sequence[Row], sources: Sources) -> Section | Absent:
    """One curve for each model: the teacher by AR, then all that our engine makes of that model's weights."""
    groups = {name: _scored(found) for name, found in by_group(rows).items()}
    groups = {name: found for name, found in groups.items() if _can_be_drawn(found)}
    if not groups:
        return Absent(_TITLE, "no test set has the teacher's AR decoding with a score above 0 and another method")
    columns = ("curve", "AUP", "over the teacher by AR", "tokens/forward within the loss", "points", "left out", COLUMN)
    lines = [line for name, found in groups.items() for line in _table_lines(name, found, sources)]
    plots = Plots("Curves", SUBJECTS, tuple(_plot(name, found) for name, found in groups.items()))
    return Section(_TITLE, (_DEFINITION,), (Table(columns, tuple(lines), frozenset(columns[1:])), plots), _NOTES)


_DEFINITION = (
    "AUP is the area under accuracy (in points) as a function of tokens a forward, in which accuracy below the best of "
    "the test set weighs exp(−3 (1 − y / best)) and points more than 5 points below the first one do not count (Qian "
    "et al., arXiv 2601.07568). Without a loss of accuracy it is the most tokens a forward times the accuracy, so the "
    "column beside it says how many tokens a forward of the teacher's quality a model is worth."
)
_NOTES = (
    "Each curve begins with the teacher by AR, for that is what a user has before; its other points are our engine's "
    "methods on the curve's model. Methods that need a second model are not points: their forwards are not comparable.",
    "Vertical lines: 95% interval of the accuracy. AUP has no interval here: where accuracies lie closer together than "
    "those intervals, so do the areas.",
)


def _scored(rows: Sequence[Row]) -> list[Row]:
    return [row for row in fewest_in_flight(rows) if row.accuracy is not None and row.cell.engine == "cllm"]


def _can_be_drawn(rows: Sequence[Row]) -> bool:
    reference = find(rows, model="teacher", kind="ar")
    return len(rows) > 1 and reference is not None and _points(reference) > 0


def _curve(rows: Sequence[Row], model: str) -> list[Row]:
    reference = find(rows, model="teacher", kind="ar")
    assert reference is not None
    return [reference, *(row for row in rows if row.cell.model == model and row is not reference)]


def _points(row: Row) -> float:
    assert row.accuracy is not None
    return 100 * row.accuracy.mean


def _models(rows: Sequence[Row]) -> list[str]:
    return [model for model in SUBJECTS if len(_curve(rows, model)) > 1]


def _table_lines(name: str, rows: Sequence[Row], sources: Sources) -> list[tuple[Value, ...]]:
    best = max(map(_points, rows))
    lines: list[tuple[Value, ...]] = []
    for model in _models(rows):
        mine = _curve(rows, model)
        curve = [(row.result.tpf, _points(row)) for row in mine]
        area = accuracy_under_parallelism(curve, best)
        alone = accuracy_under_parallelism(curve[:1], best)
        figures = number(area.value, 1), number(area.value / alone.value, 2), number(area.reach, 2)
        counts = number(area.used, 0), number(area.left_out, 0)
        lines.append((Value(f"{model}, {name}"), *figures, *counts, sources.of_rows(mine)))
    return lines


def _plot(name: str, rows: Sequence[Row]) -> Plot:
    lines: dict[str, list[Point]] = {model: [] for model in SUBJECTS}
    lines |= {model: [_plot_point(row) for row in _curve(rows, model)] for model in _models(rows)}
    return Plot(name, line_plot(lines, Axis("tokens a forward"), Axis("accuracy, %")))


def _plot_point(row: Row) -> Point:
    assert row.accuracy is not None
    return Point(row.result.tpf, _points(row), 100 * row.accuracy.low, 100 * row.accuracy.high)
