"""The benchmark's report, made from the results alone: one HTML file and the same as Markdown."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cllm.artifacts import write_atomic
from cllm.bench.compare import Row, compare
from cllm.bench.matrix_results import CellRecord, MatrixResults
from cllm.errors import InputError
from cllm.report.lines import line_plot
from cllm.report.page import NOTHING, Plot, Section, Table, Value, as_html, as_markdown
from cllm.report.paper_tables import paper_sections
from cllm.report.values import number, percent, percent_interval, points, ratio, spread

HTML_NAME = "report.html"
MARKDOWN_NAME = "report.md"


def write_report(results: MatrixResults, folder: Path) -> list[Path]:
    """Write both files; their paths.

    Raises:
        InputError: there is nothing to report, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot create the folder ({error.strerror})") from error
    title, sections = f"Benchmark {', '.join(results.matrices)}", report_sections(results)
    paths = [folder / HTML_NAME, folder / MARKDOWN_NAME]
    for path, text in zip(paths, (as_html(title, sections), as_markdown(title, sections)), strict=True):
        write_atomic(path, text)
    return paths


def report_sections(results: MatrixResults) -> list[Section]:
    """Raises InputError if there is neither a record nor a reason for having none."""
    if not results.records and not results.cannot_run:
        raise InputError("the results hold no cells: nothing to report")
    rows = compare(results.records)
    sections = [_matrix_section(rows, results)]
    if rows:
        sections.append(_plots_section(rows))
    if results.failed or results.cannot_run:
        sections.append(_missing_section(results))
    if rows:
        sections += [*paper_sections(rows), _provenance_section(results.done)]
    return [*sections, _LEFT_OUT]


_Column = tuple[str, Callable[[Row], Value]]
_TEXTS: tuple[_Column, ...] = (
    ("method", lambda row: Value(row.cell.method.label)),
    ("model", lambda row: Value(row.cell.model)),
)
_FIGURES: tuple[_Column, ...] = (
    ("in flight", lambda row: number(row.cell.concurrency, 0)),
    ("tokens/s", lambda row: spread(row.tokens_per_s)),
    ("× AR", lambda row: ratio(row.speedup)),
    ("× vLLM AR", lambda row: ratio(row.over_vllm)),
    ("tokens/forward", lambda row: number(row.result.tpf, 2)),
    ("accuracy (95% CI)", lambda row: percent_interval(row.accuracy)),
    ("− teacher AR, points", lambda row: points(row.minus_teacher, noise=not row.differs_from_teacher)),
    ("same tokens as AR", lambda row: percent(row.identical)),
    ("p50 ms", lambda row: number(row.result.latency_ms["p50"], 0)),
    ("p90 ms", lambda row: number(row.result.latency_ms["p90"], 0)),
    ("p99 ms", lambda row: number(row.result.latency_ms["p99"], 0)),
    ("× copy floor", lambda row: number(row.floor_share, 2)),
)
_SEED: _Column = ("seed", lambda row: number(row.cell.seed, 0))
_RUN: _Column = ("run", lambda row: Value(row.cell.run))
_DEVICE: _Column = ("device", lambda row: Value(row.cell.platform.device))


def _matrix_section(rows: Sequence[Row], results: MatrixResults) -> Section:
    texts = [*_TEXTS, *(column for column in (_RUN, _DEVICE) if _varies(column, rows))]
    numbers = [*_FIGURES, *([_SEED] if _varies(_SEED, rows) else [])]
    numbers = [(name, value) for name, value in numbers if any(value(row) != NOTHING for row in rows)]
    columns = [*texts, *numbers]
    table = Table(
        tuple(name for name, _ in columns),
        tuple(tuple(value(row) for _, value in columns) for row in rows),
        frozenset(name for name, _ in numbers),
    )
    counts = f"{len(rows)} cells measured, {len(results.failed)} failed, {len(results.cannot_run)} entries cannot run."
    return Section("The matrix", (counts, *_loads(rows)), (table,) if rows else (), _NOTES)


def _varies(column: _Column, rows: Sequence[Row]) -> bool:
    return len({column[1](row) for row in rows}) > 1


def _loads(rows: Sequence[Row]) -> Iterable[str]:
    """What was asked of every run's cells, one sentence for each kind of load."""
    for run in dict.fromkeys(row.cell.run for row in rows):
        ours = [row for row in rows if row.cell.run == run]
        for load in dict.fromkeys(row.cell.load for row in ours):
            row = next(row for row in ours if row.cell.load == load)
            how = "greedy" if load.temperature == 0 else f"temperature {load.temperature:g}, top-p {load.top_p:g}"
            yield (
                f"{run}: {row.cell.task}, {row.result.metric} over {len(row.result.prompt_ids)} held-out prompts, "
                f"{how}, at most {load.max_new_tokens} new tokens; speed over "
                f"{min(load.speed_prompts, len(row.result.prompt_ids))} of them, {load.repeats} times."
            )


_NOTES = (
    "≈ marks a difference within noise: a ratio of speeds whose range over the repeats includes 1, or a difference of "
    "accuracy whose 95% interval includes 0.",
    "Accuracy: Wilson's 95% interval. Minus teacher AR: paired by prompt, in points, with its 95% interval.",
    "tokens/s: median of the repeats, slowest and fastest in brackets; new tokens of all requests over the time from "
    "the first request to the last token, so prompts are read within it. Latency: a request's start to its last token.",
    "× AR: over AR of the same engine, model and number of requests in flight; for lookahead decoding and transformers "
    "that of our engine. Cells are timed one after the other, each with the device to itself.",
    "Same tokens as AR: share of responses equal to our AR decoding of the same model, token by token.",
    "× copy floor: tokens/s over what AR would reach if a step took as long as copying the weights within the device's "
    "memory. Weights that fit into a CPU's cache are read faster than that.",
)


def _plots_section(rows: Sequence[Row]) -> Section:
    plots = [plot for group in _plot_groups(rows) for plot in _plots_of(*group)]
    return Section("Against the number of requests in flight", (), tuple(plots))


def _plot_groups(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows that belong into one plot, and what they have in common."""
    groups: dict[str, list[Row]] = {}
    first_seed = min(row.cell.seed for row in rows)
    for row in rows:
        if row.cell.seed == first_seed:
            cell = row.cell
            groups.setdefault(f"{cell.run}, {cell.model}, {cell.platform.device}", []).append(row)
    return list(groups.items())


def _plots_of(title: str, rows: Sequence[Row]) -> list[Plot]:
    figures: tuple[tuple[str, str, Callable[[Row], float]], ...] = (
        ("Tokens a forward", "tokens/forward", lambda row: row.result.tpf),
        ("Tokens a second", "tokens/s", lambda row: row.tokens_per_s.mean),
        ("Over AR at the copy floor", "× copy floor", lambda row: row.floor_share),
    )
    return [
        Plot(f"{name}: {title}", line_plot(_lines(rows, value), x_label="requests in flight", y_label=unit))
        for name, unit, value in figures
    ]


def _lines(rows: Sequence[Row], value: Callable[[Row], float]) -> dict[str, list[tuple[float, float]]]:
    """A line for each method, through its concurrencies."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        lines.setdefault(row.cell.method.label, []).append((row.cell.concurrency, value(row)))
    return lines


def _missing_section(results: MatrixResults) -> Section:
    lines = [(Value(record.cell.title), Value("failed"), Value(record.error or "")) for record in results.failed]
    for obstacle in results.cannot_run:
        what, _, _ = str(obstacle).partition(": ")
        lines.append((Value(what), Value("cannot run"), Value(obstacle.why)))
    text = "Failed cells were tried twice; the next run of the benchmark tries them again."
    return Section("What is missing, and why", (text,), (Table(("cells", "what", "why"), tuple(lines)),))


def _provenance_section(records: Sequence[CellRecord]) -> Section:
    """One line for each command, commit and machine."""
    lines: dict[tuple[str, ...], int] = {}
    for record in records:
        source = record.provenance
        hardware = source["hardware"]
        cpus = f"{hardware['cores']:g} cores of {hardware['cpu']}, {hardware['memory_gib']:g} GiB"
        machine = " + ".join([*hardware["gpus"], cpus])
        threads = record.cell.platform.threads
        commit = source["commit"][:12] + (" with changes" if source["dirty"] else "")
        versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
        key = (machine, str(threads or "–"), commit, " ".join(source["command"]), versions)
        lines[key] = lines.get(key, 0) + 1
    columns = ("hardware", "threads", "commit", "command", "versions", "cells")
    rows = tuple((*map(Value, key), number(cells, 0)) for key, cells in lines.items())
    text = "Raw data: results.json (every cell with all repeats, scores and response hashes) and results.parquet."
    return Section("Where the figures are from", (text,), (Table(columns, rows, frozenset({"cells"})),))


_LEFT_OUT = Section(
    "Not in this report",
    (
        "MT-bench with a judge, Spec-Bench, perplexity on WikiText-2 and PTB, the paper's Table 4, the ablations, and "
        "energy per token.",
    ),
)
