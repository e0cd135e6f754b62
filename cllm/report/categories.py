"""Tokens a forward by category of the prompts."""

from collections.abc import Sequence

from cllm.bench.compare import Row
from cllm.evaluation.metrics import ratio_of_sums
from cllm.report.groups import by_group, fewest_in_flight
from cllm.report.page import NOTHING, Absent, Section, Table, Value
from cllm.report.sources import COLUMN, Sources
from cllm.report.values import interval

_TITLE = "Tokens per forward by category"
_ALL = "all"
Work = tuple[int, int]  # of one response: its new tokens, and the forward passes that made them


def categories_section(rows: Sequence[Row], sources: Sources) -> Section | Absent:
    """A table for every test set whose prompts have categories."""
    groups = {name: _with_categories(found) for name, found in by_group(rows).items()}
    tables = tuple(_table(name, found, sources) for name, found in groups.items() if found)
    if not tables:
        return Absent(_TITLE, "no test set among these has categories (MT-bench and Spec-Bench have)")
    note = "95% intervals over the prompts of a category. Tokens over forwards of each response by itself."
    return Section(_TITLE, (), tables, (note,))


def work_by_category(row: Row) -> dict[str, list[Work]]:
    """Category -> its responses, with all of them last."""
    result = row.result
    found: dict[str, list[Work]] = {}
    work = list(zip(result.response_tokens, result.response_forwards, strict=True))
    for category, one in zip(result.categories, work, strict=True):
        found.setdefault(category, []).append(one)
    return {**dict(sorted(found.items())), _ALL: work}


def _with_categories(rows: Sequence[Row]) -> list[Row]:
    return [row for row in fewest_in_flight(rows) if row.result.categories and row.result.response_forwards]


def _table(name: str, rows: Sequence[Row], sources: Sources) -> Table:
    found = [work_by_category(row) for row in rows]
    names = list(dict.fromkeys(category for work in found for category in work if category != _ALL))
    heads = {category: f"{category} ({len(found[0].get(category, ()))})" for category in (*names, _ALL)}
    lines = tuple(
        (
            *map(Value, (row.cell.method.label, row.cell.model)),
            *(_figure(work.get(name)) for name in heads),
            sources.of_rows([row]),
        )
        for row, work in zip(rows, found, strict=True)
    )
    numbers = (*heads.values(), COLUMN)
    return Table(("method", "model", *numbers), lines, frozenset(numbers), f"{name} (number of prompts)")


def _figure(work: Sequence[Work] | None) -> Value:
    if not work:
        return NOTHING
    tokens, forwards = zip(*work, strict=True)
    return interval(ratio_of_sums(tokens, forwards), 2)
