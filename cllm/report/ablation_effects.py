"""What each setting of an ablation does (the paper's loss ablation among them), and all students."""

from collections.abc import Sequence

from cllm.ablation.document import AblationDocument, StudentRow
from cllm.ablation.effects import Effect
from cllm.ablation.summary import OUTCOMES, Shown, sentences
from cllm.evaluation.metrics import Estimate
from cllm.report.ablation_values import order, title_of
from cllm.report.page import NOTHING, Section, Table, Value
from cllm.report.published import LOSS_ABLATION
from cllm.report.sources import COLUMN, Sources
from cllm.report.values import number, percent_interval

_EFFECTS = "The paper's loss ablation, and which settings matter"
_STUDENTS = "All students of the ablation"


def effects_section(ablations: Sequence[AblationDocument], sources: Sources) -> Section | None:
    """None where no ablation has all its students."""
    tables = tuple(_effects_table(ablation, sources) for ablation in ablations if ablation.effects)
    if not tables:
        return None
    notes = (
        "Main effects against the centre, fitted over all students at once by least squares, with 95% intervals "
        "(Student's t) of what the fit leaves over: noise of seeds, of measuring, and interactions. ≈: the interval "
        "includes no effect; of twenty effects that are none, one has no such mark by chance.",
        "Below the centre's line: differences in tokens a forward, in × AR and in points of accuracy, and the factor "
        "of the perplexity of the reference answers.",
    )
    found = [
        f"{a.grid}, levels that change an outcome beyond noise; {text}."
        for a in ablations
        for text in sentences(a.effects)
    ]
    return Section(_EFFECTS, (LOSS_ABLATION, *found), tables, notes)


def students_section(ablations: Sequence[AblationDocument], sources: Sources) -> Section:
    missing = tuple(f"Missing: {text}" for ablation in ablations for text in ablation.missing)
    bases = dict.fromkeys(
        f"{a.grid}: {a.base.metric} over {a.base.num_prompts} prompts, greedy, sliding Jacobi decoding; × AR: median, "
        "slowest and fastest repeat, one prompt at a time, over the student's own AR decoding."
        for a in ablations
    )
    tables = tuple(_students_table(ablation, sources) for ablation in ablations)
    return Section(_STUDENTS, tuple(bases), tables, missing)


def _effects_table(ablation: AblationDocument, sources: Sources) -> Table:
    shown = {outcome: OUTCOMES[outcome] for outcome in OUTCOMES if outcome in ablation.effects}
    heads = tuple(one.name for one in shown.values())
    centre = tuple(Value(one.level(ablation.effects[outcome].centre)) for outcome, one in shown.items())
    lines = [
        (
            Value(factor),
            Value(f"{level}, not {levels[0]}"),
            *(_effect_value(ablation.effect(outcome, factor, level), one) for outcome, one in shown.items()),
        )
        for factor, levels in ablation.factors.items()
        for level in levels[1:]
    ]
    rows = ((Value("all"), Value("centre"), *centre), *lines)
    return Table(("setting", "level", *heads), rows, frozenset(heads), title_of(ablation, sources))


def _effect_value(effect: Effect | None, shown: Shown) -> Value:
    if effect is None:
        return NOTHING
    text, value = shown.effect(effect.value), shown.unit * effect.value
    if effect.low is None or effect.high is None:
        return Value(text, value)
    return Value(f"{text} ({shown.effect(effect.low)} to {shown.effect(effect.high)})", value, not effect.matters)


def _students_table(ablation: AblationDocument, sources: Sources) -> Table:
    figures = (
        "tokens/forward",
        "× AR",
        "accuracy (95% CI)",
        "tokens/response",
        "perplexity of references",
        "training, s",
        "training, million tokens",
        COLUMN,
    )
    columns = (*ablation.factors, "seed", "decoded with n", *figures)
    numeric = {name for name, levels in ablation.factors.items() if all(order(level) is not None for level in levels)}
    lines = tuple(_student_line(row, ablation, sources) for row in (*ablation.rows, *ablation.decoded))
    return Table(columns, lines, frozenset({*numeric, "seed", "decoded with n", *figures}), ablation.title)


def _student_line(row: StudentRow, ablation: AblationDocument, sources: Sources) -> tuple[Value, ...]:
    speedup = f"{row.speedup:.2f} ({row.speedup_low:.2f}–{row.speedup_high:.2f})"
    settings = [row.settings[name] for name in ablation.factors]
    return (
        *(Value(str(setting), order(setting)) for setting in settings),
        number(row.seed, 0),
        number(row.window, 0),
        number(row.tpf, 2),
        Value(speedup, row.speedup),
        percent_interval(Estimate(row.accuracy, row.accuracy_low, row.accuracy_high)),
        number(row.mean_response_tokens, 1),
        number(row.reference_perplexity, 2),
        number(row.train_seconds, 0),
        number(row.train_tokens / 1e6, 2),
        sources.of_provenances([ablation.sources[row.source]]),
    )
