"""All cells in one table, and those that were not timed in another one."""

from collections.abc import Callable, Iterable, Sequence

from cllm.bench.compare import Answered, Row, chance_apart, sampling_text
from cllm.bench.matrix import LoadConfig
from cllm.bench.matrix_results import MatrixResults
from cllm.bench.result import CellResult
from cllm.report.page import NOTHING, Section, Table, Value
from cllm.report.sources import COLUMN, Sources
from cllm.report.values import number, parameters, percent, percent_interval, points, ratio_range, spread
from cllm.tasks.base import UNSCORED

_Column = tuple[str, Callable[[Row], Value]]
_TEXTS: tuple[_Column, ...] = (
    ("method", lambda row: Value(row.cell.method.label)),
    ("model", lambda row: Value(row.cell.model)),
)
_FIGURES: tuple[_Column, ...] = (
    ("in flight", lambda row: number(row.cell.concurrency, 0)),
    ("tokens/s", lambda row: spread(row.tokens_per_s)),
    ("× AR", lambda row: ratio_range(row.speedup)),
    ("× vLLM AR", lambda row: ratio_range(row.over_vllm)),
    ("tokens/forward", lambda row: number(row.result.tpf, 2)),
    ("accuracy (95% CI)", lambda row: percent_interval(row.accuracy)),
    ("− teacher AR, points", lambda row: points(row.minus_teacher)),
    ("same tokens as AR", lambda row: percent(row.identical)),
    ("tokens/response", lambda row: number(row.result.mean_response_tokens, 1)),
    ("p50 ms", lambda row: number(row.result.latency_ms["p50"], 0)),
    ("p90 ms", lambda row: number(row.result.latency_ms["p90"], 0)),
    ("p99 ms", lambda row: number(row.result.latency_ms["p99"], 0)),
    ("× copy floor", lambda row: number(row.floor_share, 2)),
    ("mJ/token", lambda row: spread(row.joules, unit=1000)),
    ("needs, GiB", lambda row: number(row.result.memory_gib, 2)),
    ("device in use, GiB", lambda row: number(row.result.device_memory_gib, 1)),
    ("trained parameters", lambda row: parameters(row.result.trained_parameters)),
    ("guesses held", lambda row: _held(row.result)),
)
# Shown where the cells differ in them.
_MORE: tuple[_Column, ...] = (
    ("run", lambda row: Value(row.cell.run)),
    ("test set", lambda row: Value(row.cell.task)),
    ("device", lambda row: Value(row.cell.platform.device)),
    ("threads", lambda row: Value(str(row.cell.platform.threads or "–"))),
    ("sampling", lambda row: Value(sampling_text(row.cell.load))),
    ("seed", lambda row: Value(str(row.cell.seed))),
    ("served by", lambda row: _package(row.result)),
    ("scheduling", lambda row: Value(row.result.engine.scheduling) if row.result.engine else NOTHING),
)


def cells_section(rows: Sequence[Row], results: MatrixResults, sources: Sources) -> Section:
    columns = [*_TEXTS, *(column for column in _MORE if _varies(column, rows))]
    figures = [(name, value) for name, value in _FIGURES if any(value(row) != NOTHING for row in rows)]
    shown = [*columns, *figures, (COLUMN, sources.of_row)]
    table = Table(
        tuple(name for name, _ in shown),
        tuple(tuple(value(row) for _, value in shown) for row in rows),
        frozenset({*(name for name, _ in figures), COLUMN}),
    )
    return Section(
        "All cells",
        (_counts(rows, results), *_loads(rows)),
        (table,) if rows else (),
        (*_NOTES, _chance(rows)) if rows else (),
    )


def untimed_section(rows: Sequence[Answered], sources: Sources) -> Section:
    """What was answered without a clock."""
    figures = ("in flight", "accuracy (95% CI)", "− teacher AR, points", "same tokens as AR", "tokens/forward", COLUMN)
    lines = tuple(
        (
            *map(Value, (row.group, row.cell.model, row.cell.method.label, str(row.cell.seed))),
            number(row.cell.concurrency, 0),
            percent_interval(row.accuracy),
            points(row.minus_teacher),
            percent(row.identical),
            number(row.result.tpf, 2),
            sources.of_row(row),
        )
        for row in rows
    )
    text = "These answered their prompts once, to be scored, and are compared among themselves."
    table = Table(("group", "model", "method", "seed", *figures), lines, frozenset(figures))
    return Section("Cells that were not timed", (text,), (table,))


def _held(result: CellResult) -> Value:
    return percent(result.engine.acceptance if result.engine else None)


def _package(result: CellResult) -> Value:
    engine = result.engine
    if engine is None:
        return NOTHING
    return Value(" ".join(filter(None, (engine.package, engine.version, engine.runner and f"runner {engine.runner}"))))


def _varies(column: _Column, rows: Sequence[Row]) -> bool:
    return len({column[1](row) for row in rows}) > 1


def _counts(rows: Sequence[Row], results: MatrixResults) -> str:
    untimed = sum(not record.result.tokens_per_s for record in results.done if record.result)
    counts = (
        f"{len(rows)} cells measured, {len(results.failed)} failed. Entries of the matrix that cannot run: "
        f"{len(results.cannot_run)}."
    )
    counts += f" {untimed} cells were not timed." if untimed else ""
    seeds = sorted({row.cell.seed for row in rows})
    if len(seeds) > 1:
        counts += (
            f" Seeds {', '.join(map(str, seeds))} stand here one by one. The other sections take them together: the "
            "repeats of all for speed, each prompt's mean score for accuracy."
        )
    replaced = len(results.done) - untimed - len(rows)
    later = "are not shown: later ones have other weights, prompts or versions."
    return f"{counts} {replaced} more {later}" if replaced else counts


def _loads(rows: Sequence[Row]) -> Iterable[str]:
    """What was asked of every group's cells, one sentence for each kind of load."""
    for group in dict.fromkeys(row.group for row in rows):
        ours = [row for row in rows if row.group == group]
        for load in dict.fromkeys(row.cell.load for row in ours):
            row = next(row for row in ours if row.cell.load == load)
            prompts = len(row.result.prompt_ids)
            yield (
                f"{group}: {_metric(row)} over {prompts} held-out prompts, {sampling_text(load)}, at most "
                f"{load.max_new_tokens} new tokens; speed over {_timed(ours, load)} of them, {load.repeats} times."
            )


def _timed(rows: Sequence[Row], load: LoadConfig) -> str:
    """How many prompts were timed, more where more were in flight."""
    counts = {
        min(load.timed_prompts(row.cell.concurrency), len(row.result.prompt_ids))
        for row in rows
        if row.cell.load == load
    }
    return f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{max(counts)}"


def _metric(row: Row) -> str:
    return "nothing scored" if row.result.metric == UNSCORED else row.result.metric


def _chance(rows: Sequence[Row]) -> str:
    repeats = min(len(row.result.tokens_per_s) for row in rows)
    wrong = 100 * chance_apart(repeats, repeats)
    return (
        f"With {repeats} repeats of each, two equal speeds fall apart by chance in {wrong:.1f}% of comparisons, and "
        "95% intervals of accuracy miss in 5%: of many differences in a table, some are not real."
    )


_NOTES = (
    "≈ marks a difference within noise: a ratio of speeds whose range over the repeats includes 1, or a difference of "
    "accuracy whose 95% interval includes 0.",
    "Accuracy: Wilson's 95% interval. Minus teacher AR: paired by prompt, in points, with its 95% interval (Agresti "
    "and Min). – where nothing was scored.",
    "tokens/s: median of the repeats, slowest and fastest in brackets; new tokens of all requests over the time from "
    "the first request to the last token, so prompts are read within it. Latency: a request's start to its last token.",
    "× AR: over AR of the same engine, model and number of requests in flight; for lookahead decoding and transformers "
    "that of our engine. In brackets the slowest repeat of one over the fastest of the other, and the reverse. Cells "
    "are timed one after the other, each with the device to itself.",
    "Same tokens as AR: share of responses equal to our AR decoding of the same model, token by token.",
    "× copy floor: tokens/s over what AR would reach if a step took as long as copying the weights within the device's "
    "memory. Weights that fit into a CPU's cache are read faster than that.",
    "Needs: weights, those of draft or heads, and keys and values of so many of the longest requests, computed alike "
    "for all methods. Device in use: all of the GPU's memory, of which vLLM takes what it is allowed. Trained "
    "parameters: on top of the teacher. Guesses held: share of the guesses that a step verified.",
)
