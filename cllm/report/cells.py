"""All cells in one table; what is missing; and where the figures are from."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cllm.bench.compare import Row, chance_apart, sampling_text
from cllm.bench.matrix_results import CellRecord, MatrixResults
from cllm.report.ablation import AblationDocument
from cllm.report.page import NOTHING, Section, Table, Value
from cllm.report.values import number, percent, percent_interval, points, ratio_range, spread
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
    ("− teacher AR, points", lambda row: points(row.minus_teacher, noise=not row.differs_from_teacher)),
    ("same tokens as AR", lambda row: percent(row.identical)),
    ("tokens/response", lambda row: number(row.result.mean_response_tokens, 1)),
    ("p50 ms", lambda row: number(row.result.latency_ms["p50"], 0)),
    ("p90 ms", lambda row: number(row.result.latency_ms["p90"], 0)),
    ("p99 ms", lambda row: number(row.result.latency_ms["p99"], 0)),
    ("× copy floor", lambda row: number(row.floor_share, 2)),
    ("mJ/token", lambda row: spread(row.joules, unit=1000)),
)
# Shown where the cells differ in them.
_MORE: tuple[_Column, ...] = (
    ("run", lambda row: Value(row.cell.run)),
    ("test set", lambda row: Value(row.cell.task)),
    ("device", lambda row: Value(row.cell.platform.device)),
    ("threads", lambda row: Value(str(row.cell.platform.threads or "–"))),
    ("sampling", lambda row: Value(sampling_text(row.cell.load))),
    ("seed", lambda row: Value(str(row.cell.seed))),
)


def cells_section(rows: Sequence[Row], results: MatrixResults) -> Section:
    columns = [*_TEXTS, *(column for column in _MORE if _varies(column, rows))]
    figures = [(name, value) for name, value in _FIGURES if any(value(row) != NOTHING for row in rows)]
    table = Table(
        tuple(name for name, _ in (*columns, *figures)),
        tuple(tuple(value(row) for _, value in (*columns, *figures)) for row in rows),
        frozenset(name for name, _ in figures),
    )
    return Section(
        "All cells",
        (_counts(rows, results), *_loads(rows)),
        (table,) if rows else (),
        (*_NOTES, _chance(rows)) if rows else (),
    )


def missing_section(results: MatrixResults) -> Section:
    lines = [(Value(record.cell.title), Value("failed"), Value(record.error or "")) for record in results.failed]
    for obstacle in results.cannot_run:
        what, _, _ = str(obstacle).partition(": ")
        lines.append((Value(what), Value("cannot run"), Value(obstacle.why)))
    text = "Failed cells were tried twice; the next run of the benchmark tries them again."
    return Section("What is missing, and why", (text,), (Table(("cells", "what", "why"), tuple(lines)),))


def sources_section(records: Sequence[CellRecord], ablations: Sequence[AblationDocument]) -> Section:
    """One line for each command, commit and machine."""
    cells = Counter(_source(record.provenance, record.cell.platform.threads) for record in records)
    lines = [(*map(Value, source), Value(f"{count} cells")) for source, count in cells.items()]
    lines += [
        (
            *map(Value, _source(ablation.provenance, 0)),
            Value(f"{len(ablation.rows)} students, ablation {ablation.grid}"),
        )
        for ablation in ablations
    ]
    columns = ("hardware", "threads", "commit", "command", "versions", "figures")
    text = (
        "Raw data: results.json (every cell with all repeats, scores and response hashes), the same as a table in "
        "results.parquet, and ablation.json."
    )
    return Section("Where the figures are from", (text,), (Table(columns, tuple(lines)),))


def _source(provenance: Mapping[str, Any], threads: int) -> tuple[str, ...]:
    """Machine, threads (0: not known, or of no matter), commit, command and versions."""
    hardware = provenance["hardware"]
    cpus = f"{hardware['cores']:g} cores of {hardware['cpu']}, {hardware['memory_gib']:g} GiB"
    commit = provenance["commit"][:12] + (" with changes" if provenance["dirty"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    machine = " + ".join([*hardware["gpus"], cpus])
    return machine, str(threads or "–"), commit, " ".join(provenance["command"]), versions


def _varies(column: _Column, rows: Sequence[Row]) -> bool:
    return len({column[1](row) for row in rows}) > 1


def _counts(rows: Sequence[Row], results: MatrixResults) -> str:
    counts = (
        f"{len(rows)} cells measured, {len(results.failed)} failed. Entries of the matrix that cannot run: "
        f"{len(results.cannot_run)}."
    )
    seeds = sorted({row.cell.seed for row in rows})
    if len(seeds) > 1:
        counts += f" Here are seeds {', '.join(map(str, seeds))}; all other sections show seed {seeds[0]}."
    replaced = len(results.done) - len(rows)
    later = "are not shown: later ones have other weights, prompts, load or versions."
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
                f"{load.max_new_tokens} new tokens; speed over {min(load.speed_prompts, prompts)} of them, "
                f"{load.repeats} times."
            )


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
)
