"""Speed against the number of requests in flight, with the accuracy that it comes with."""

from collections.abc import Callable, Iterator, Sequence

from cllm.bench.compare import Ratio, Row
from cllm.report.groups import by_group, by_load, fewest_in_flight, loads
from cllm.report.lines import Axis, Point, line_plot
from cllm.report.page import NOTHING, Absent, Plot, Plots, Section, Table, Value
from cllm.report.sources import COLUMN, Sources
from cllm.report.values import percent_interval, points, ratio_range

_TITLE = "Speed against requests in flight, with accuracy"
_PLOTS_TITLE = "Plots against requests in flight"


def scaling_section(rows: Sequence[Row], sources: Sources) -> Section:
    """For every group a table: speed over vLLM's AR decoding, or over ours where vLLM was not measured."""
    groups = by_group(rows)
    tables = tuple(_table(name, found, sources) for name, found in groups.items())
    notes = (
        "A number of requests in flight heads its column: tokens/s over those of AR decoding of the same model under "
        "the same load, with the range that the repeats allow. ≈: the repeats of the two overlap.",
        f"Accuracy is that with the fewest requests in flight, in points against the teacher by AR; – for the teacher "
        f"itself, or where nothing was scored. {_batching(rows)}",
        *([_ONE_BY_ONE] if any(row.cell.method.kind == "transformers" for row in rows) else []),
    )
    return Section(_TITLE, (), tables, notes)


_ONE_BY_ONE = "Transformers' generate decodes one request at a time, so it stands at 1 alone."


def scaling_plots(rows: Sequence[Row]) -> Section | Absent:
    groups = {name: found for name, found in by_group(rows).items() if len(loads(found)) > 1}
    if not groups:
        return Absent(_PLOTS_TITLE, "every model was measured with one number of requests in flight only")
    parts = tuple(part for name, found in groups.items() for part in _group_plots(name, found))
    note = "Vertical lines: slowest and fastest repeat, and what they allow for a ratio. Point at a mark to read it."
    return Section(_PLOTS_TITLE, (), parts, (note,))


def _batching(rows: Sequence[Row]) -> str:
    """Whether accuracy moves with the load, which it may where rounding depends on the batch's shape."""
    accuracies: dict[tuple[str, str, str], set[float]] = {}
    for row in rows:
        if row.accuracy is not None:
            key = row.group, row.cell.model, row.cell.method.label
            accuracies.setdefault(key, set()).add(row.accuracy.mean)
    most = max((max(found) - min(found) for found in accuracies.values()), default=0.0)
    return f"Over the numbers of requests in flight it moves by at most {100 * most:.1f} points."


def _table(name: str, rows: Sequence[Row], sources: Sources) -> Table:
    over_vllm = any(row.over_vllm is not None for row in rows)
    baseline = "vLLM's AR decoding" if over_vllm else "our AR decoding (vLLM was not measured)"
    shown = loads(rows)
    numbers = ("accuracy (95% CI)", "− teacher AR, points", *(f"× at {load}" for load in shown), COLUMN)
    return Table(
        ("method", "model", *numbers),
        tuple(
            (*map(Value, names), *_figures(found, shown, over_vllm), sources.of_rows(found.values()))
            for names, found in by_load(rows).items()
        ),
        frozenset(numbers),
        f"{name}: tokens/s over {baseline}",
    )


def _figures(found: dict[int, Row], shown: Sequence[int], over_vllm: bool) -> Iterator[Value]:
    first = fewest_in_flight(list(found.values()))[0]
    yield percent_interval(first.accuracy)
    yield points(first.minus_teacher)
    for load in shown:
        row = found.get(load)
        yield NOTHING if row is None else ratio_range(row.over_vllm if over_vllm else row.speedup)


def _group_plots(name: str, rows: Sequence[Row]) -> Iterator[Plots]:
    for model in dict.fromkeys(row.cell.model for row in rows):
        ours = [row for row in rows if row.cell.model == model]
        names = tuple(dict.fromkeys(row.cell.method.label for row in ours))
        yield Plots(f"{model}: {name}", names, tuple(_model_plots(ours)))


def _model_plots(rows: Sequence[Row]) -> Iterator[Plot]:
    for title, y, level, point in _PLOTS:
        lines = _lines(rows, point)
        if any(lines.values()):
            yield Plot(title, line_plot(lines, Axis("requests in flight", "log at values"), y, level=level))


def _lines(rows: Sequence[Row], point: Callable[[Row], Point | None]) -> dict[str, list[Point]]:
    """A line for each method, through its concurrencies; an empty one where the figure is not known."""
    lines: dict[str, list[Point]] = {row.cell.method.label: [] for row in rows}
    for row in rows:
        found = point(row)
        if found is not None:
            lines[row.cell.method.label].append(found)
    return lines


def _speed_point(row: Row) -> Point:
    speed = row.tokens_per_s
    return Point(row.cell.concurrency, speed.mean, speed.low, speed.high)


def _ratio_point(row: Row, value: Ratio | None) -> Point | None:
    return None if value is None else Point(row.cell.concurrency, value.value, value.low, value.high)


_PLOTS: tuple[tuple[str, Axis, float | None, Callable[[Row], Point | None]], ...] = (
    ("Tokens a second", Axis("tokens/s", "log"), None, _speed_point),
    ("Over vLLM's AR decoding", Axis("× vLLM AR", "from zero"), 1.0, lambda row: _ratio_point(row, row.over_vllm)),
    (
        "Tokens a forward",
        Axis("tokens/forward", "from zero"),
        None,
        lambda row: Point(row.cell.concurrency, row.result.tpf),
    ),
    (
        "Over AR at the copy floor",
        Axis("× copy floor", "from zero"),
        1.0,
        lambda row: Point(row.cell.concurrency, row.floor_share),
    ),
    (
        "Latency, 9 of 10 requests within",
        Axis("ms", "log"),
        None,
        lambda row: Point(row.cell.concurrency, row.result.latency_ms["p90"]),
    ),
)
