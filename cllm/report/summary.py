"""What the results say, in at most five sentences made of their figures."""

from collections.abc import Callable, Mapping, Sequence

from cllm.bench.compare import Ratio, Row, threads_text
from cllm.bench.matrix_results import MatrixResults
from cllm.report.groups import by_group, fewest_in_flight

_OURS = ("jacobi", "lookahead")
_ALL = ""  # no group has this name
Best = Mapping[str, tuple[Row, int]]  # group -> fastest row of the CLLM, and of how many methods


def summary_of(rows: Sequence[Row], results: MatrixResults) -> list[str]:
    """Hardware and scope; the CLLM over AR; over vLLM; at what accuracy; and with the most requests in flight."""
    if not rows:
        return []
    groups = _with_short_names(by_group(rows))
    best = _best({name: fewest_in_flight(found) for name, found in groups.items()})
    if not best:
        return [_scope(rows), "No CLLM was measured by Jacobi or lookahead decoding, so there is no gain to state."]
    crowded = _best({name: _most_in_flight(found) for name, found in groups.items()})
    sentences = [_scope(rows), _over_ar(best), _over_vllm(best, results), _accuracy(best), _crowded(crowded)]
    return [sentence for sentence in sentences if sentence]


def _with_short_names(groups: Mapping[str, list[Row]]) -> dict[str, list[Row]]:
    """Groups under as much of their names as tells them apart."""
    rows = list(groups.values())
    ways: tuple[Callable[[Row], str], ...] = (
        lambda row: row.cell.run,
        lambda row: f"{row.cell.run}/{row.cell.task}",
        lambda row: row.group,
    )
    short = next(way for way in ways if len({way(found[0]) for found in rows}) == len(rows))
    return {short(found[0]): found for found in rows}


def _most_in_flight(rows: Sequence[Row]) -> list[Row]:
    """Rows at the highest load; none if there is one load only."""
    loads = sorted({row.cell.concurrency for row in rows})
    return [row for row in rows if len(loads) > 1 and row.cell.concurrency == loads[-1]]


def _best(groups: Mapping[str, Sequence[Row]]) -> dict[str, tuple[Row, int]]:
    found = {}
    for name, rows in groups.items():
        ours = [row for row in rows if row.cell.model == "cllm" and row.cell.method.kind in _OURS]
        if ours:
            found[name] = max(ours, key=lambda row: row.tokens_per_s.mean), len(ours)
    return found


def _scope(rows: Sequence[Row]) -> str:
    platforms = dict.fromkeys((row.cell.platform.device, row.cell.platform.threads) for row in rows)
    devices = " and ".join(device + (f" ({threads_text(threads)})" if threads else "") for device, threads in platforms)
    prompts = _span([len(row.result.prompt_ids) for row in rows])
    repeats = _span([len(row.result.tokens_per_s) for row in rows])
    return (
        f"Measured on {devices}: {len(rows)} cells, each answers {prompts} held-out prompts once, and some of them "
        f"{repeats} times for its speed, which is the median."
    )


def _span(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _over_ar(best: Best) -> str:
    by = _by(best)
    parts = [
        f"{_ratio(row.speedup)} on {name}{by[name]}, with {row.result.tpf:.2f} tokens a forward"
        for name, (row, _) in best.items()
    ]
    what = f"Tokens a second of the CLLM over AR decoding of the same weights{_load(best)}{by[_ALL]}"
    return f"{what}: {'; '.join(parts)}."


def _over_vllm(best: Best, results: MatrixResults) -> str:
    parts = [f"{_ratio(row.over_vllm)} on {name}" for name, (row, _) in best.items() if row.over_vllm is not None]
    if parts:
        return f"Over vLLM's AR decoding of the same weights{_load(best)}: {'; '.join(parts)}."
    return f"How it compares with vLLM is not known here: {why_no_vllm(results)}."


def _accuracy(best: Best) -> str:
    parts = []
    for name, (row, _) in best.items():
        if row.accuracy is None:
            parts.append(f"not scored on {name}")
            continue
        reached = f"on {name}, where it reaches {100 * row.accuracy.mean:.1f}% {row.result.metric}"
        parts.append(f"{_difference(row)} {reached}")
    return f"Accuracy of that decoding against the teacher by AR: {'; '.join(parts)}."


def _difference(row: Row) -> str:
    minus = row.minus_teacher
    if minus is None:
        return "not known"
    noise = "" if row.differs_from_teacher else ", within noise"
    return f"{100 * minus.mean:+z.1f} points ({100 * minus.low:+z.1f} to {100 * minus.high:+z.1f}{noise})"


def _crowded(best: Best) -> str:
    parts, by = [], _by(best)
    for name, (row, _) in best.items():
        over = [f"{_ratio(row.speedup)} over AR"]
        over += [f"{_ratio(row.over_vllm)} over vLLM's"] if row.over_vllm is not None else []
        parts.append(f"{' and '.join(over)} with {row.cell.concurrency} on {name}{by[name]}")
    return f"At the highest number of requests in flight{by[_ALL]}: {'; '.join(parts)}." if parts else ""


def why_no_vllm(results: MatrixResults) -> str:
    """The first reason why a cell of vLLM's AR decoding is missing."""
    reasons = [obstacle.why for obstacle in results.cannot_run if (obstacle.method or "").startswith("vllm")]
    reasons += [record.error or "failed" for record in results.failed if record.cell.engine == "vllm"]
    return reasons[0] if reasons else "no cell of its AR decoding is among these results"


def _load(best: Best) -> str:
    loads = {row.cell.concurrency for row, _ in best.values()}
    return {frozenset({1}): ", one request in flight"}.get(frozenset(loads), f", {_span(sorted(loads))} in flight")


def _by(best: Best) -> dict[str, str]:
    """By what method, for each group; for `_ALL` instead where it is the same for all."""
    found = {name: f" by {row.cell.method.label}{_of(number)}" for name, (row, number) in best.items()}
    if len(set(found.values())) == 1:
        return {**dict.fromkeys(found, ""), _ALL: f",{next(iter(found.values()))}"}
    return {**found, _ALL: ""}


def _of(number: int) -> str:
    return "" if number == 1 else f", the fastest of {number} methods"


def _ratio(value: Ratio | None) -> str:
    if value is None:
        return "not known"
    return f"{value.value:.2f} ({value.low:.2f} to {value.high:.2f}{', within noise' if value.within_noise else ''})"
