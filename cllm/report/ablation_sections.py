"""The paper's ablations (its section 4.3) from our students: data size × n, length n, losses; and all students."""

from collections.abc import Iterator, Sequence

from cllm.ablation.effects import Effect
from cllm.ablation.grid import Setting
from cllm.ablation.results import Outcome, Row
from cllm.ablation.summary import sentences
from cllm.evaluation.metrics import Estimate
from cllm.report.ablation import AblationDocument
from cllm.report.lines import Axis, Point, line_plot
from cllm.report.page import NOTHING, Absent, Plot, Plots, Section, Table, Value
from cllm.report.published import FIGURE_3, LOSS_ABLATION, TABLE_4
from cllm.report.values import number, percent_interval

_TABLE_4 = "The paper's Table 4: data size × n"
_FIGURE_3 = "The paper's Figure 3: length n"
_LOSSES = "The paper's loss ablation, and which settings matter"
_STUDENTS = "All students of the ablation"
_NO_FIT = "students of the grid are missing, so main effects could not be computed; run jobs/ablate.py again"


def ablation_sections(ablations: Sequence[AblationDocument]) -> list[Section | Absent]:
    if not ablations:
        why = "no ablation was given to the report: run jobs/ablate.py and add its folder"
        return [Absent(title, why) for title in (_TABLE_4, _FIGURE_3, _LOSSES)]
    return [_grid_section(ablations), _length_section(ablations), _effects_section(ablations), _all_section(ablations)]


def _grid_section(ablations: Sequence[AblationDocument]) -> Section | Absent:
    tables = tuple(_grid(ablation) for ablation in ablations if {"data", "n"} <= set(ablation.factors))
    if not tables:
        return Absent(_TABLE_4, "the ablation does not vary both data and n")
    note = (
        "Tokens a forward, × AR and accuracy, other settings at the centre; means over seeds. In brackets: not "
        "trained, but the sum of the main effects of all students, which knows no interaction of the two."
    )
    return Section(_TABLE_4, (TABLE_4,), tables, (note,))


def _grid(ablation: AblationDocument) -> Table:
    sizes, lengths = (_ascending(ablation.factors[name]) for name in ("data", "n"))
    heads = tuple(f"n = {n}" for n in lengths)
    lines = tuple(
        (Value(str(data), _order(data)), *(_grid_value(ablation, data, n) for n in lengths)) for data in sizes
    )
    return Table(("data", *heads), lines, frozenset({"data", *heads}), ablation.title)


def _grid_value(ablation: AblationDocument, data: Setting, n: Setting) -> Value:
    outcomes: tuple[Outcome, ...] = ("tpf", "speedup", "accuracy")
    trained = bool(ablation.at(data=data, n=n))
    find = ablation.measured if trained else ablation.fitted
    tpf, speedup, accuracy = (find(outcome, data=data, n=n) for outcome in outcomes)
    if tpf is None or speedup is None or accuracy is None:
        return NOTHING
    text = f"{tpf:.2f}, {speedup:.2f} × AR, {100 * accuracy:.1f}%"
    return Value(text if trained else f"({text})", tpf)


def _length_section(ablations: Sequence[AblationDocument]) -> Section | Absent:
    varied = [ablation for ablation in ablations if "n" in ablation.factors]
    fitted = [ablation for ablation in varied if ablation.effects]
    if not fitted:
        return Absent(_FIGURE_3, _NO_FIT if varied else "the ablation does not vary n")
    tables = tuple(_length_table(ablation) for ablation in fitted)
    plots = tuple(Plots(f"{ablation.grid}, fitted", ("fitted",), tuple(_length_plots(ablation))) for ablation in fitted)
    note = "Fitted over all students, other settings at the centre, with the 95% interval of the effect of n."
    return Section(_FIGURE_3, (FIGURE_3,), (*tables, *plots), (note,))


_BY_LENGTH: tuple[tuple[Outcome, str, float, Axis], ...] = (
    ("tpf", "tokens/forward", 1, Axis("tokens/forward", "from zero")),
    ("accuracy", "accuracy, %", 100, Axis("accuracy, %")),
)


def _length_table(ablation: AblationDocument) -> Table:
    heads = tuple(head for _, head, _, _ in _BY_LENGTH)
    lines = tuple(
        (Value(str(n), _order(n)), *(_length_value(ablation, outcome, n, unit) for outcome, _, unit, _ in _BY_LENGTH))
        for n in _ascending(ablation.factors["n"])
    )
    return Table(("n", *heads), lines, frozenset({"n", *heads}), ablation.title)


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


def _effects_section(ablations: Sequence[AblationDocument]) -> Section | Absent:
    tables = tuple(_effects_table(ablation) for ablation in ablations if ablation.effects)
    if not tables:
        return Absent(_LOSSES, _NO_FIT)
    notes = (
        "Main effects against the centre, fitted over all students at once by least squares, with 95% intervals "
        "(Student's t) of what the fit leaves over: noise of seeds, of measuring, and interactions. ≈: the interval "
        "includes no effect.",
        "Below the centre's line: differences in tokens a forward, in × AR and in points of accuracy, and the factor "
        "of the perplexity of the reference answers.",
    )
    found = [
        f"{a.grid}, levels that change an outcome beyond noise; {text}."
        for a in ablations
        for text in sentences(a.effects)
    ]
    return Section(_LOSSES, (LOSS_ABLATION, *found), tables, notes)


_OUTCOMES: tuple[tuple[Outcome, str, float, str], ...] = (
    ("tpf", "tokens/forward", 1, "+z.2f"),
    ("speedup", "× AR", 1, "+z.2f"),
    ("accuracy", "accuracy, points", 100, "+z.1f"),
    ("reference_perplexity", "perplexity of references", 1, ".2f"),
)


def _effects_table(ablation: AblationDocument) -> Table:
    shown = [outcome for outcome in _OUTCOMES if outcome[0] in ablation.effects]
    heads = tuple(head for _, head, _, _ in shown)
    centre = tuple(
        Value(f"{unit * ablation.effects[outcome].centre:{form.lstrip('+')}}") for outcome, _, unit, form in shown
    )
    lines = [
        (
            Value(factor),
            Value(f"{level}, not {levels[0]}"),
            *(_effect_value(ablation.effect(outcome, factor, level), unit, form) for outcome, _, unit, form in shown),
        )
        for factor, levels in ablation.factors.items()
        for level in levels[1:]
    ]
    rows = ((Value("all"), Value("centre"), *centre), *lines)
    return Table(("setting", "level", *heads), rows, frozenset(heads), ablation.title)


def _effect_value(effect: Effect | None, unit: float, form: str) -> Value:
    if effect is None:
        return NOTHING
    value = unit * effect.value
    if effect.low is None or effect.high is None:
        return Value(f"{value:{form}}", value)
    text = f"{value:{form}} ({unit * effect.low:{form}} to {unit * effect.high:{form}})"
    return Value(text, value, not effect.matters)


def _all_section(ablations: Sequence[AblationDocument]) -> Section:
    missing = tuple(f"Missing: {text}" for ablation in ablations for text in ablation.missing)
    bases = dict.fromkeys(f"{a.grid}: {a.base.metric} over {a.base.num_prompts} prompts." for a in ablations)
    return Section(_STUDENTS, tuple(bases), tuple(map(_all_table, ablations)), missing)


def _all_table(ablation: AblationDocument) -> Table:
    figures = (
        "tokens/forward",
        "× AR",
        "accuracy (95% CI)",
        "tokens/response",
        "perplexity of references",
        "training, s",
        "training, million tokens",
    )
    columns = (*ablation.factors, "seed", *figures)
    numeric = {name for name, levels in ablation.factors.items() if all(_order(level) is not None for level in levels)}
    lines = tuple(_student_line(row, list(ablation.factors)) for row in ablation.rows)
    return Table(columns, lines, frozenset({*numeric, "seed", *figures}), ablation.title)


def _student_line(row: Row, factors: Sequence[str]) -> tuple[Value, ...]:
    speedup = f"{row.speedup:.2f} ({row.speedup_low:.2f}–{row.speedup_high:.2f})"
    return (
        *(Value(str(row.settings[name]), _order(row.settings[name])) for name in factors),
        number(row.seed, 0),
        number(row.tpf, 2),
        Value(speedup, row.speedup),
        percent_interval(Estimate(row.accuracy, row.accuracy_low, row.accuracy_high)),
        number(row.mean_response_tokens, 1),
        number(row.reference_perplexity, 2),
        number(row.train_seconds, 0),
        number(row.train_tokens / 1e6, 2),
    )


def _ascending(levels: Sequence[Setting]) -> list[Setting]:
    """Numbers in their order, texts as they stand, after them."""
    return sorted(levels, key=lambda level: float("inf") if isinstance(level, str) else level)


def _order(level: Setting) -> float | None:
    return None if isinstance(level, str) else level
