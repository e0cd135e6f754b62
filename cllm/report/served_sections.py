"""Load on an endpoint, and the cost of HTTP and Serve, as sections."""

from collections.abc import Sequence

from cllm.evaluation.metrics import Estimate
from cllm.report.page import NOTHING, Section, Table, Value
from cllm.report.served import LoadDocument, OverheadDocument, ServedDocument, Spread
from cllm.report.sources import COLUMN, Sources
from cllm.report.values import interval, number, spread


def served_sections(documents: Sequence[ServedDocument], sources: Sources) -> list[Section]:
    """Those that there are documents for."""
    loads = [document for document in documents if isinstance(document, LoadDocument)]
    overheads = [document for document in documents if isinstance(document, OverheadDocument)]
    found = [_load_section(loads, sources)] if loads else []
    return [*found, *([_overhead_section(overheads, sources)] if overheads else [])]


def _load_section(documents: Sequence[LoadDocument], sources: Sources) -> Section:
    names = ("model", "endpoint", "load")
    numbers = ("answered", "tokens/s", "ms to the first token, p50 (p95)", "ms a token, p50 (p95)", COLUMN)
    rows = tuple((*_load_row(document), sources.of_provenances([document.provenance])) for document in documents)
    text = "What clients of the HTTP endpoint saw. A closed loop has so many clients, an open loop so many requests/s."
    return Section("Load on the endpoint", (text,), (Table(names + numbers, rows, frozenset(numbers)),))


def _load_row(document: LoadDocument) -> tuple[Value, ...]:
    share = f"{document.num_answered} of {document.num_requests}"
    return (
        Value(document.model),
        Value(document.endpoint),
        Value(document.loop),
        Value(share, document.num_answered / document.num_requests),
        number(document.tokens_per_s, 0),
        _milliseconds(document.first_token_s),
        _milliseconds(document.per_token_s),
    )


def _milliseconds(seconds: Spread | None) -> Value:
    if seconds is None:
        return NOTHING
    return Value(f"{1000 * seconds.p50:.2f} ({1000 * seconds.p95:.2f})", seconds.p50)


def _overhead_section(documents: Sequence[OverheadDocument], sources: Sources) -> Section:
    names = ("model", "requests at a time")
    numbers = (
        "engine, tokens/s", "HTTP, tokens/s", "HTTP / engine",
        "engine, ms to the first token", "HTTP, ms to the first token", "HTTP − engine, ms", COLUMN,
    )  # fmt: skip
    rows = tuple((*_overhead_row(document), sources.of_provenances([document.provenance])) for document in documents)
    text = (
        "The same requests through HTTP and Serve, and given to the same engine in the same process, in turns; medians "
        "with the least and the most of the repeats. The first token is that of lone requests."
    )
    return Section("Cost of HTTP and Serve", (text,), (Table(names + numbers, rows, frozenset(numbers)),))


def _overhead_row(document: OverheadDocument) -> tuple[Value, ...]:
    speed, first = document.tokens_per_s, document.first_token_s
    added = Estimate(1000 * first.http_against_engine, 1000 * first.least, 1000 * first.most)
    return (
        Value(document.model),
        Value(str(document.settings["concurrency"]), document.settings["concurrency"]),
        number(speed.engine, 0),
        number(speed.http, 0),
        spread(Estimate(speed.http_against_engine, speed.least, speed.most)),
        number(1000 * first.engine, 2),
        number(1000 * first.http, 2),
        interval(added, 2),
    )
