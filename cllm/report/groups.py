"""Rows by what they have in common."""

from collections.abc import Iterable, Sequence

from cllm.bench.compare import Row
from cllm.report.seeds import pooled


def by_group(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Group (run, task, device, sampling) -> its rows in their order, those of several seeds pooled."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return {name: pooled(found) for name, found in groups.items()}


def fewest_in_flight(rows: Sequence[Row]) -> list[Row]:
    """The rows with the smallest number of requests in flight: one, in most matrices."""
    fewest = min(row.cell.concurrency for row in rows)
    return [row for row in rows if row.cell.concurrency == fewest]


def loads(rows: Iterable[Row]) -> list[int]:
    """Numbers of requests in flight, ascending."""
    return sorted({row.cell.concurrency for row in rows})


def by_load(rows: Iterable[Row]) -> dict[tuple[str, str], dict[int, Row]]:
    """(Label of the method, model) -> requests in flight -> row."""
    found: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        found.setdefault((row.cell.method.label, row.cell.model), {})[row.cell.concurrency] = row
    return found


def find(rows: Iterable[Row], *, model: str, kind: str) -> Row | None:
    """The first row of a model by a kind of method."""
    return next((row for row in rows if (row.cell.model, row.cell.method.kind) == (model, kind)), None)
