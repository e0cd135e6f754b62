"""The paper's Tables 1, 2, 3, 5 and 7 with our figures beside the published ones."""

from collections.abc import Iterator, Sequence

from cllm.bench.compare import Row
from cllm.bench.methods import JacobiMethod, MethodConfig, needs
from cllm.report.page import NOTHING, Section, Table, Value
from cllm.report.published import CERTAINTIES, HARDWARE, TABLE_3, TABLE_5, TABLE_7, TASKS, PublishedRow, PublishedTask
from cllm.report.values import count, number, percent, ratio

_MODELS = {"target": "teacher", "CLLM": "cllm"}


def paper_sections(rows: Sequence[Row]) -> list[Section]:
    """Ours are the rows with one request in flight, as in the paper."""
    alone = [row for row in rows if row.cell.concurrency == 1]
    return [
        *(_speed_section(number, alone) for number in (1, 2)),
        _counts_section(alone),
        _perplexity_section(alone),
        _needs_section(rows),
    ]


def _speed_section(table: int, rows: Sequence[Row]) -> Section:
    tasks = [task for task in TASKS if task.table == table]
    columns = ("task", "model", "method", "tok/s", "× AR", "metric", "size", "sure?")
    ours = ("our tok/s", "our × AR", "× transformers", "our metric", "our size", "our device")
    lines = [line for task in tasks for row in task.rows for line in _speed_lines(task, row, rows)]
    certainties = "; ".join(f"{key}: {meaning}" for key, meaning in CERTAINTIES.items())
    missing = [task.title for task in tasks if not _rows_of(task, rows)]
    notes = [f"sure? {certainties}"]
    notes += [f"{task.title}: metric is {task.metric}; target model {task.teacher}" for task in tasks]
    if missing:
        notes.append(f"No run of {', '.join(missing)} is among these results, so nothing stands beside those rows.")
    return Section(
        f"The paper's Table {table}",
        (
            f"Published: {HARDWARE}. Ours: other hardware, other models and a faster AR (our engine), so tokens/s do "
            "not compare; of the ratios, “× transformers” is the one to hold against the published “× AR”.",
        ),
        (Table((*columns, *ours), tuple(lines), frozenset({"tok/s", "× AR", "metric", *ours[:4]})),),
        tuple(notes),
    )


def _speed_lines(task: PublishedTask, published: PublishedRow, rows: Sequence[Row]) -> Iterator[tuple[Value, ...]]:
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
        same_metric = row.cell.task in task.tasks
        yield (
            *fixed,
            number(row.tokens_per_s.mean, 0),
            ratio(row.speedup),
            ratio(row.over_transformers),
            percent(row.accuracy.mean) if same_metric else NOTHING,
            count(row.result.parameters),
            Value(f"{row.cell.platform.device}, {row.cell.run}"),
        )
    if not found:
        yield (*fixed, *(NOTHING,) * 6)


def _rows_of(task: PublishedTask, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.cell.task in (*task.tasks, *task.kin)]


def _is_same(published: PublishedRow, row: Row) -> bool:
    return _MODELS[published.model] == row.cell.model and _paper_name(row.cell.method) == published.method


def _paper_name(method: MethodConfig) -> str | None:
    """What the paper calls a method of ours; None for one that it does not have."""
    if isinstance(method, JacobiMethod):
        return "Jacobi" if method.is_paper else None
    return {"ar": "AR", "lookahead": "lookahead"}.get(method.kind)


def _counts_section(rows: Sequence[Row]) -> Section:
    counted = [row for row in rows if row.result.fast_forwarded is not None]
    lines = []
    for row in counted:
        target = next((other for other in counted if _is_target_of(other, row)), None)
        forward, stationary = row.result.fast_forwarded, row.result.stationary
        base_forward = target.result.fast_forwarded if target else None
        base_stationary = target.result.stationary if target else None
        lines.append(
            (
                *(Value(text) for text in (row.cell.run, row.cell.model, row.cell.method.label)),
                number(forward, 2),
                number(_over(forward, base_forward), 2),
                number(stationary, 2),
                number(_over(stationary, base_stationary), 1),
            )
        )
    figures = ("fast-forwarded an iteration", "× target", "stationary a block", "× target’s")
    table = Table(("run", "model", "method", *figures), tuple(lines), frozenset(figures))
    note = "Fast-forwarded includes the token that is right for free, so AR is 1. Tasks and models are not the paper's."
    return Section("The paper's Table 3: fast-forwarded and stationary tokens", (TABLE_3,), (table,), (note,))


def _is_target_of(other: Row, row: Row) -> bool:
    same = ("run", "data", "method", "platform", "seed")
    return other.cell.model == "teacher" and all(getattr(other.cell, n) == getattr(row.cell, n) for n in same)


def _over(value: float | None, target: float | None) -> float | None:
    return None if value is None or not target else value / target


def _perplexity_section(rows: Sequence[Row]) -> Section:
    lines = [
        (Value(row.cell.run), Value(row.cell.model), number(row.result.reference_perplexity, 4))
        for row in rows
        if row.result.reference_perplexity is not None
    ]
    column = "perplexity of reference answers"
    table = Table(("run", "model", column), tuple(lines), frozenset({column}))
    return Section("The paper's Table 5: perplexity", (TABLE_5,), (table,))


def _needs_section(rows: Sequence[Row]) -> Section:
    """One line for every model and method, with the figures of its first cell."""
    first: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        first.setdefault((row.cell.run, row.cell.model, row.cell.method.label), row)
    figures = ("same tokens as AR", "× AR", "memory, GiB")
    columns = ("run", "model", "method", "training", "draft or heads", "other mask", *figures)
    lines = tuple(
        (*_need_values(row), percent(row.identical), ratio(row.speedup), number(row.result.memory_gib, 1))
        for row in first.values()
    )
    notes = (
        "Training: a CLLM is distilled once and is one checkpoint afterwards; the target model is used as it comes.",
        "Memory is what the GPU had in use with the cell's cache; not known on a CPU.",
    )
    return Section(
        "The paper's Table 7: what each method needs", (TABLE_7,), (Table(columns, lines, frozenset(figures)),), notes
    )


def _need_values(row: Row) -> tuple[Value, ...]:
    cell, wanted = row.cell, needs(row.cell.method)
    trained = "distilled" if cell.model == "cllm" else ("of the draft" if wanted.draft else "none")
    texts = (cell.run, cell.model, cell.method.label, trained, wanted.draft or "none", "yes" if wanted.mask else "no")
    return tuple(map(Value, texts))
