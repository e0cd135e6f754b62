"""The paper's Tables 1, 2, 3, 5 and 7 with our figures beside the published ones."""

from collections.abc import Iterator, Mapping, Sequence

from cllm.bench.compare import Row
from cllm.bench.methods import JacobiMethod, MethodConfig, VllmMethod, needs
from cllm.evaluation.metrics import Estimate
from cllm.report.groups import by_group, fewest_in_flight
from cllm.report.page import NOTHING, Absent, Section, Table, Value
from cllm.report.published import (
    CERTAINTIES,
    HARDWARE,
    TABLE_3,
    TABLE_5,
    TABLE_7,
    TASKS,
    PaperMethod,
    PublishedRow,
    PublishedTask,
)
from cllm.report.seeds import pooled
from cllm.report.sources import COLUMN, Sources
from cllm.report.values import (
    count,
    interval,
    number,
    parameters,
    percent,
    percent_interval,
    ratio_range,
    significant,
    spread,
)

_Judged = Mapping[str, Estimate]

_MODELS = {"target": "teacher", "CLLM": "cllm"}
# Of the same kind, not the same: see the note below.
_IN_VLLM: Mapping[str, PaperMethod] = {"draft_model": "speculative, distilled 160M draft", "medusa": "Medusa-2"}
_KINDS_NOTE = (
    "Beside the paper's distilled draft stands our run's own draft model, and beside Medusa-2 (which also trains the "
    "model) heads on a fixed model; both in vLLM, with × AR over vLLM's AR. Our size is that of model and draft."
)


def paper_sections(rows: Sequence[Row], judged: _Judged, sources: Sources) -> list[Section | Absent]:
    """Ours are the rows with one request in flight, as in the paper.

    Args:
        rows: at least one.
        judged: key of a cell -> its MT-bench score by a judge; with several seeds that of the first one counts.
    """
    alone = [row for row in pooled(rows) if row.cell.concurrency == 1]
    return [
        *(_speed_section(number, alone, judged, sources) for number in (1, 2)),
        _counts_section(alone, sources),
        _perplexity_section(alone, sources),
        _needs_section(rows, sources),
    ]


def _speed_section(table: int, rows: Sequence[Row], judged: _Judged, sources: Sources) -> Section | Absent:
    tasks = [task for task in TASKS if task.table == table]
    title = f"The paper's Table {table}: speed and quality"
    missing = [task.title for task in tasks if not _rows_of(task, rows)]
    if len(missing) == len(tasks):
        names = " or ".join(missing)
        return Absent(title, f"no run of {names} was measured with one request in flight, so nothing stands beside it")
    columns = ("task", "model", "method", "tok/s", "× AR", "metric", "size", "sure?")
    numbers = ("our tok/s", "our × AR", "× transformers", "our metric", "our size", COLUMN)
    lines = [line for task in tasks for row in task.rows for line in _speed_lines(task, row, rows, judged, sources)]
    certainties = "; ".join(f"{key}: {meaning}" for key, meaning in CERTAINTIES.items())
    notes = [f"sure? {certainties}"]
    notes += [f"{task.title}: metric is {task.metric}; target model {task.teacher}" for task in tasks]
    if missing:
        notes.append(f"No run of {', '.join(missing)} is among these results, so nothing stands beside those rows.")
    beside = [row for task in tasks for row in _rows_of(task, rows)]
    if any(isinstance(row.cell.method, VllmMethod) and row.cell.method.method in _IN_VLLM for row in beside):
        notes.append(_KINDS_NOTE)
    return Section(
        title,
        (
            f"Published: {HARDWARE}. Ours: {_setting(beside)}, AR by our engine. So tokens/s do not compare; of the "
            "ratios, “× transformers” is the one to hold against the published “× AR”. In brackets: of speeds the "
            "slowest and the fastest repeat and what they allow for a ratio, of metrics the 95% interval.",
        ),
        (
            Table(
                (*columns, "our method", *numbers, "our run and device"),
                tuple(lines),
                frozenset({"tok/s", "× AR", "metric", *numbers}),
            ),
        ),
        tuple(notes),
    )


def _setting(rows: Sequence[Row]) -> str:
    """Devices and sizes of models."""
    devices = dict.fromkeys(row.cell.platform.device for row in rows)
    sizes = dict.fromkeys(count(row.result.parameters).text for row in rows if row.result.parameters is not None)
    return f"{' and '.join(devices)}, models of {' and '.join(sizes) or 'unknown numbers of'} parameters"


def _speed_lines(
    task: PublishedTask, published: PublishedRow, rows: Sequence[Row], judged: _Judged, sources: Sources
) -> Iterator[tuple[Value, ...]]:
    fixed = (
        *(Value(text) for text in (task.title, published.model, published.method)),
        number(published.tokens_per_s, 1),
        number(published.speedup, 1),
        number(published.metric, 1),
        Value(published.size),
        Value(published.certainty),
    )
    found = [row for row in _rows_of(task, rows) if _is_same(published, row)]
    for row in found:
        yield (
            *fixed,
            Value(row.cell.method.label),
            spread(row.tokens_per_s),
            ratio_range(row.speedup),
            ratio_range(row.over_transformers),
            _quality(row, task, judged),
            _size(row),
            sources.of_rows([row]),
            Value(row.group),
        )
    if not found:
        yield (*fixed, *(NOTHING,) * 8)


def _quality(row: Row, task: PublishedTask, judged: _Judged) -> Value:
    """The figure that is the same quantity as the published one."""
    if row.cell.task not in task.tasks:
        return NOTHING
    return interval(judged.get(row.cell.key), 2) if row.accuracy is None else percent_interval(row.accuracy)


def _size(row: Row) -> Value:
    """Of the model with its draft or heads."""
    model, trained = row.result.parameters, row.result.trained_parameters
    if model is None or not needs(row.cell.method).draft:
        return count(model)
    return NOTHING if trained is None else count(model + trained)


def _rows_of(task: PublishedTask, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.cell.task in (*task.tasks, *task.kin)]


def _is_same(published: PublishedRow, row: Row) -> bool:
    return _MODELS[published.model] == row.cell.model and _paper_name(row.cell.method) == published.method


def _paper_name(method: MethodConfig) -> str | None:
    """What the paper calls a method of ours, or the like of it; None for one that it does not have."""
    if isinstance(method, JacobiMethod):
        return "Jacobi" if method.is_paper else None
    if isinstance(method, VllmMethod):
        return _IN_VLLM.get(method.method)
    return {"ar": "AR", "lookahead": "lookahead"}.get(method.kind)


def _counts_section(rows: Sequence[Row], sources: Sources) -> Section | Absent:
    title = "The paper's Table 3: fast-forwarded and stationary tokens"
    counted = [row for row in rows if row.result.fast_forwarded is not None]
    if not counted:
        return Absent(title, "no cell decodes block by block (refill block, no n-grams) with one request in flight")
    figures = ("fast-forwarded an iteration", "× target", "stationary a block", "× target’s", COLUMN)
    lines = tuple((*_counts_line(row, counted), sources.of_rows([row])) for row in counted)
    table = Table(("group", "model", "method", *figures), lines, frozenset(figures))
    note = "Fast-forwarded includes the token that is right for free, so AR is 1. Tasks and models are not the paper's."
    return Section(title, (TABLE_3,), (table,), (note,))


def _counts_line(row: Row, counted: Sequence[Row]) -> tuple[Value, ...]:
    target = next((other.result for other in counted if _is_target_of(other, row)), None)
    forward, stationary = row.result.fast_forwarded, row.result.stationary
    return (
        *(Value(text) for text in (row.group, row.cell.model, row.cell.method.label)),
        number(forward, 2),
        number(_over(forward, target.fast_forwarded if target else None), 2),
        number(stationary, 2),
        number(_over(stationary, target.stationary if target else None), 1),
    )


def _is_target_of(other: Row, row: Row) -> bool:
    same = other.group == row.group and other.cell.method == row.cell.method
    return same and other.cell.model == "teacher"


def _over(value: float | None, target: float | None) -> float | None:
    return None if value is None or not target else value / target


def _perplexity_section(rows: Sequence[Row], sources: Sources) -> Section | Absent:
    title = "The paper's Table 5: perplexity"
    known = [row for row in rows if row.result.perplexity or row.result.reference_perplexity is not None]
    if not known:
        return Absent(title, "no cell of AR decoding with one request in flight, which is where it is computed")
    corpora = list(dict.fromkeys(corpus for row in known for corpus in row.result.perplexity))
    figures = (
        *(f"{corpus}, per {unit}" for corpus in corpora for unit in ("token", "word")),
        "reference answers, per token",
        COLUMN,
    )
    lines = tuple(
        (
            *(Value(text) for text in (row.group, row.cell.model)),
            *(significant(found.get(corpus), 5) for corpus in corpora for found in _perplexities(row)),
            significant(row.result.reference_perplexity, 5),
            sources.of_rows([row]),
        )
        for row in known
    )
    missing = "" if corpora else " No corpus was given to the benchmark (key corpora), so only the latter is here."
    table = Table(("group", "model", *figures), lines, frozenset(figures))
    return Section(title, (TABLE_5 + missing,), (table,))


def _perplexities(row: Row) -> tuple[dict[str, float], dict[str, float]]:
    return dict(row.result.perplexity), dict(row.result.word_perplexity)


def _needs_section(rows: Sequence[Row], sources: Sources) -> Section:
    """A line for every model and method, with the fewest requests in flight."""
    tables = tuple(_needs_table(name, fewest_in_flight(found), sources) for name, found in by_group(rows).items())
    notes = (
        "Training: a CLLM is distilled once and is one checkpoint afterwards; the target model is used as it comes.",
        "Trained parameters: what was trained on top of the teacher; – where others trained it and it is not known.",
        "Memory needed: weights, those of draft or heads, and keys and values of so many of the longest requests.",
    )
    return Section("The paper's Table 7: what each method needs", (TABLE_7,), tables, notes)


def _needs_table(name: str, rows: Sequence[Row], sources: Sources) -> Table:
    figures = ("trained parameters", "same tokens as AR", "× AR", "needs, GiB", COLUMN)
    columns = ("method", "model", "training", "draft or heads", "other mask", *figures)
    lines = tuple((*_need_values(row), *_need_figures(row), sources.of_rows([row])) for row in rows)
    return Table(columns, lines, frozenset(figures), name)


def _need_values(row: Row) -> tuple[Value, ...]:
    cell, wanted = row.cell, needs(row.cell.method)
    parts = ["distilled"] if cell.model == "cllm" else []
    parts += ["of the draft"] if wanted.draft else []
    texts = (cell.method.label, cell.model, " and ".join(parts) or "none", wanted.draft or "none")
    return tuple(map(Value, (*texts, "yes" if wanted.mask else "no")))


def _need_figures(row: Row) -> tuple[Value, ...]:
    return (
        parameters(row.result.trained_parameters),
        percent(row.identical),
        ratio_range(row.speedup),
        number(row.result.memory_gib, 2),
    )
