"""Tokens a forward by category of the prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from cllm.bench.compare import Row
from cllm.evaluation.metrics import Estimate
from cllm.report.groups import by_group, fewest_in_flight
from cllm.report.page import NOTHING, Absent, Section, Table, Value
from cllm.report.values import interval

_TITLE = "Tokens per forward by category"
_ALL = "all"
_Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Work:
    """One response: its new tokens, and the forward passes that made them."""

    tokens: int
    forwards: int


def tokens_per_forward(work: Sequence[Work]) -> Estimate:
    """All tokens over all forwards, with a 95% interval over prompts.

    A ratio of two sums: the interval is that of its linearisation (delta method), so it needs a few prompts to hold;
    for one prompt it is the value alone.
    """
    forwards = sum(one.forwards for one in work)
    rate = sum(one.tokens for one in work) / forwards
    if len(work) < 2:
        return Estimate(rate, rate, rate)
    squares = sum((one.tokens - rate * one.forwards) ** 2 for one in work)
    half = _Z95 * math.sqrt(squares * len(work) / (len(work) - 1)) / forwards
    return Estimate(rate, rate - half, rate + half)


def categories_section(rows: Sequence[Row]) -> Section | Absent:
    """A table for every test set whose prompts have categories."""
    groups = {name: _with_categories(found) for name, found in by_group(rows).items()}
    tables = tuple(_table(name, found) for name, found in groups.items() if found)
    if not tables:
        return Absent(_TITLE, "no test set among these has categories (MT-bench and Spec-Bench have)")
    note = "95% intervals over the prompts of a category. Tokens over forwards of each response by itself."
    return Section(_TITLE, (), tables, (note,))


def work_by_category(row: Row) -> dict[str, list[Work]]:
    """Category -> its responses, with all of them last."""
    result = row.result
    found: dict[str, list[Work]] = {}
    work = [Work(*pair) for pair in zip(result.response_tokens, result.response_forwards, strict=True)]
    for category, one in zip(result.categories, work, strict=True):
        found.setdefault(category, []).append(one)
    return {**dict(sorted(found.items())), _ALL: work}


def _with_categories(rows: Sequence[Row]) -> list[Row]:
    return [row for row in fewest_in_flight(rows) if row.result.categories and row.result.response_forwards]


def _table(name: str, rows: Sequence[Row]) -> Table:
    found = [work_by_category(row) for row in rows]
    names = list(dict.fromkeys(category for work in found for category in work if category != _ALL))
    heads = {category: f"{category} ({len(found[0].get(category, ()))})" for category in (*names, _ALL)}
    lines = tuple(
        (Value(row.cell.method.label), Value(row.cell.model), *(_figure(work.get(name)) for name in heads))
        for row, work in zip(rows, found, strict=True)
    )
    return Table(("method", "model", *heads.values()), lines, frozenset(heads.values()), f"{name} (number of prompts)")


def _figure(work: Sequence[Work] | None) -> Value:
    return NOTHING if not work else interval(tokens_per_forward(work), 2)
