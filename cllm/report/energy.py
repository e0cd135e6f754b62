"""Energy of a new token."""

from collections.abc import Iterator, Sequence

from cllm.bench.compare import Row
from cllm.report.groups import by_group, by_load, loads
from cllm.report.page import NOTHING, Absent, Section, Table, Value
from cllm.report.sources import COLUMN, Sources
from cllm.report.values import ratio_range, spread

_TITLE = "Energy per token"


def energy_section(rows: Sequence[Row], sources: Sources) -> Section | Absent:
    groups = {name: [row for row in found if row.joules is not None] for name, found in by_group(rows).items()}
    tables = tuple(_table(name, found, sources) for name, found in groups.items() if found)
    if not tables:
        return Absent(_TITLE, "no device here has an energy counter that could be read (NVML's, on GPUs)")
    notes = (
        "By requests in flight. Millijoules for a new token by the device's own energy counter: the whole GPU, without "
        "the host; median of the timed repeats, with the lowest and the highest.",
        "× AR: energy of a token over that of AR of the same engine, model and load; below 1 is less. ≈: the repeats "
        "of the two overlap.",
    )
    return Section(_TITLE, (), tables, notes)


def _table(name: str, rows: Sequence[Row], sources: Sources) -> Table:
    shown = loads(rows)
    figures = (*(f"mJ at {load}" for load in shown), *(f"× AR at {load}" for load in shown), COLUMN)
    lines = tuple(
        (*map(Value, names), *_figures(found, shown), sources.of_rows(found.values()))
        for names, found in by_load(rows).items()
    )
    return Table(("method", "model", *figures), lines, frozenset(figures), name)


def _figures(found: dict[int, Row], shown: Sequence[int]) -> Iterator[Value]:
    cells = [found.get(load) for load in shown]
    for row in cells:
        yield NOTHING if row is None else spread(row.joules, unit=1000)
    for row in cells:
        yield NOTHING if row is None else ratio_range(row.joules_over_ar)
