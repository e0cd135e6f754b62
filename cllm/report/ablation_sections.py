"""The paper's ablations of data size and length n (its section 4.3: Table 4, Figure 3) from our students."""

from collections.abc import Iterator, Sequence
from statistics import fmean

from cllm.ablation.document import AblationDocument, Outcome, StudentRow
from cllm.ablation.grid import Setting
from cllm.evaluation.metrics import Estimate
from cllm.report.ablation_effects import effects_section, students_section
from cllm.report.ablation_values import ascending, order, title_of
from cllm.report.lines import Axis, Point, line_plot
from cllm.report.page import NOTHING, Absent, Plot, Plots, Section, Table, Value
from cllm.report.published import FIGURE_3, TABLE_4
from cllm.report.sources import Sources

_TABLE_4 = "The paper's Table 4: data size × n"
_FIGURE_3 = "The paper's Figure 3: length n"
_LOSSES = "The paper's loss ablation, and which settings matter"
_NO_FIT = "students of the grid are missing, so main effects could not be computed; run jobs/ablate.py again"


def ablation_sections(ablations: Sequence[AblationDocument], sources: Sources) -> list[Section | Absent]:
    if not ablations:
        why = "no ablation was given to the report: run jobs/ablate.py and add its folder"
        return [Absent(title, why) for title in (_TABLE_4, _FIGURE_3, _LOSSES)]
    return [
        _grid_section(ablations, sources),
        _length_section(ablations, sources),
        effects_section(ablations, sources) or Absent(_LOSSES, _NO_FIT),
        students_section(ablations, sources),
    ]


def _grid_section(ablations: Sequence[AblationDocument], sources: Sources) -> Section | Absent:
    found = [ablation for ablation in ablations if {"data", "n"} <= set(ablation.factors)]
    if not found:
        return Absent(_TABLE_4, "the ablation does not vary both data and n")
    grids = [_grid(ablation, sources) for ablation in found]
    notes = [
        "Tokens a forward, × AR and accuracy, other settings at the centre, each student decoding with the n of its "
        "training; means over seeds. Slowest and fastest repeat and 95% intervals of accuracy in brackets."
    ]
    if any(value.text.startswith("(") for table in grids for row in table.rows for value in row):
        notes.append(
            "All in brackets: not trained, but the sum of the main effects of all students, which knows no interaction."
        )
    further = [_decoded(ablation, sources) for ablation in found if ablation.decoded]
    if further:
        notes.append("Decoded with other n: the same students, of one seed, with the n of their training among them.")
    else:
        notes.append("No student was decoded with another n than that of its training.")
    return Section(_TABLE_4, (TABLE_4,), (*grids, *further), tuple(notes))


def _grid(ablation: AblationDocument, sources: Sources) -> Table:
    sizes, lengths = (ascending(ablation.factors[name]) for name in ("data", "n"))
    heads = tuple(f"n = {n}" for n in lengths)
    lines = tuple((Value(str(data), order(data)), *(_grid_value(ablation, data, n) for n in lengths)) for data in sizes)
    return Table(("data", *heads), lines, frozenset({"data", *heads}), title_of(ablation, sources))


def _grid_value(ablation: AblationDocument, data: Setting, n: Setting) -> Value:
    rows = ablation.at(data=data, n=n)
    if rows:
        return _measured(rows)
    outcomes: tuple[Outcome, ...] = ("tpf", "speedup", "accuracy")
    tpf, speedup, accuracy = (ablation.fitted(outcome, data=data, n=n) for outcome in outcomes)
    if tpf is None or speedup is None or accuracy is None:
        return NOTHING
    return Value(f"({tpf:.2f}, {speedup:.2f} × AR, {100 * accuracy:.1f}%)", tpf)


def _measured(rows: Sequence[StudentRow]) -> Value:
    """Means over students that differ in their seed. They answer the same prompts, so their intervals of accuracy, not
    narrower ones, are those of the mean."""
    tpf, speedup = fmean(row.tpf for row in rows), fmean(row.speedup for row in rows)
    slow, fast = min(row.speedup_low for row in rows), max(row.speedup_high for row in rows)
    accuracy, low, high = (
        100 * fmean(getattr(row, name) for row in rows) for name in ("accuracy", "accuracy_low", "accuracy_high")
    )
    return Value(f"{tpf:.2f}, {speedup:.2f} ({slow:.2f}–{fast:.2f}) × AR, {accuracy:.1f}% ({low:.1f}–{high:.1f})", tpf)


def _decoded(ablation: AblationDocument, sources: Sources) -> Table:
    """Students of data and n against the n that they decode with."""
    rows = {(row.settings["data"], row.settings["n"], row.seed, row.window): row for row in ablation.decoded}
    trainings = dict.fromkeys((data, n, seed) for data, n, seed, _ in rows)
    for data, n, seed in trainings:
        own = (row for row in ablation.at(data=data, n=n) if row.seed == seed)
        rows |= {(data, n, seed, row.window): row for row in own}
    windows = sorted({window for *_, window in rows})
    heads = tuple(f"decoded with n = {window}" for window in windows)
    lines = tuple(
        (
            *(Value(str(setting), order(setting)) for setting in (data, n)),
            *(_measured([rows[name]]) if name in rows else NOTHING for name in ((data, n, seed, w) for w in windows)),
        )
        for data, n, seed in sorted(trainings, key=lambda key: (order(key[0]) or 0.0, order(key[1]) or 0.0, key[2]))
    )
    columns = ("data", "trained with n", *heads)
    title = f"{title_of(ablation, sources)}; decoded with other n"
    return Table(columns, lines, frozenset(columns), title)


def _length_section(ablations: Sequence[AblationDocument], sources: Sources) -> Section | Absent:
    varied = [ablation for ablation in ablations if "n" in ablation.factors]
    fitted = [ablation for ablation in varied if ablation.effects]
    if not fitted:
        return Absent(_FIGURE_3, _NO_FIT if varied else "the ablation does not vary n")
    tables = tuple(_length_table(ablation, sources) for ablation in fitted)
    plots = tuple(Plots(f"{ablation.grid}, fitted", ("fitted",), tuple(_length_plots(ablation))) for ablation in fitted)
    note = "Fitted over all students, other settings at the centre, with the 95% interval of the effect of n."
    return Section(_FIGURE_3, (FIGURE_3,), (*tables, *plots), (note,))


_BY_LENGTH: tuple[tuple[Outcome, str, float, Axis], ...] = (
    ("tpf", "tokens/forward", 1, Axis("tokens/forward", "from zero")),
    ("accuracy", "accuracy, %", 100, Axis("accuracy, %")),
)


def _length_table(ablation: AblationDocument, sources: Sources) -> Table:
    heads = tuple(head for _, head, _, _ in _BY_LENGTH)
    lines = tuple(
        (Value(str(n), order(n)), *(_length_value(ablation, outcome, n, unit) for outcome, _, unit, _ in _BY_LENGTH))
        for n in ascending(ablation.factors["n"])
    )
    return Table(("n", *heads), lines, frozenset({"n", *heads}), title_of(ablation, sources))


def _length_value(ablation: AblationDocument, outcome: Outcome, n: Setting, unit: float) -> Value:
    found = _fitted_interval(ablation, outcome, n, unit)
    if found is None:
        return NOTHING
    interval = "" if found.low == found.high else f" ({found.low:.2f} to {found.high:.2f})"
    return Value(f"{found.mean:.2f}{interval}", found.mean)


def _length_plots(ablation: AblationDocument) -> Iterator[Plot]:
    for outcome, head, unit, axis in _BY_LENGTH:
        points = [
            Point(n, found.mean, found.low, found.high)
            for n in ablation.factors["n"]
            if isinstance(n, int | float) and (found := _fitted_interval(ablation, outcome, n, unit)) is not None
        ]
        if points:
            yield Plot(f"{head} by n", line_plot({head: points}, Axis("n", "log at values"), axis))


def _fitted_interval(ablation: AblationDocument, outcome: Outcome, n: Setting, unit: float) -> Estimate | None:
    """The fitted outcome in `unit`s, with the interval of the effect of n around it; of the centre's n without one."""
    fitted = ablation.fitted(outcome, n=n)
    if fitted is None:
        return None
    effect = ablation.effect(outcome, "n", n)
    if effect is None or effect.low is None or effect.high is None:
        return Estimate(unit * fitted, unit * fitted, unit * fitted)
    rest = fitted - effect.value
    return Estimate(unit * fitted, unit * (rest + effect.low), unit * (rest + effect.high))
