"""An ablation as Markdown: which settings matter, the main effects, and all students."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from cllm.ablation.effects import Effect, Effects
from cllm.ablation.grid import Grid, centre_settings
from cllm.ablation.results import Ablation, Outcome, Row

OUTCOMES: Mapping[Outcome, str] = {
    "tpf": "tokens/forward",
    "speedup": "× AR",
    "accuracy": "accuracy, points",
    "reference_perplexity": "perplexity, ×",
}
_METHOD = (
    "An effect is what a level changes against the centre's, by least squares over all students at once (additive; for "
    "perplexity in logarithms), with its 95% interval (Student's t). What the model leaves over, interactions "
    "included, counts as noise. Bold: the interval leaves out no effect; of twenty effects that are none, one is bold "
    "by chance. Speed: median of the repeats, one prompt at a time, each student against its own AR decoding."
)


def summary(ablation: Ablation, figure: str) -> str:
    """The page. `figure` is the name of the image file beside it; there is one where there are effects."""
    grid, effects, missing = ablation.grid, ablation.effects, ablation.missing
    centre = ", ".join(f"{name}={value}" for name, value in centre_settings(grid).items())
    parts = [
        f"# Ablation {grid.name}",
        f"{len(ablation.rows)} students of the run `{grid.base.recipe}`, each from its teacher; {ablation.metric} over "
        f"{ablation.num_prompts} held-out prompts, greedy, sliding Jacobi decoding. Centre: {centre}.",
    ]
    if missing:
        parts += [f"{len(missing)} students are missing, so there are no effects yet:", _list(missing)]
    if effects:
        parts += [_list(sentences(effects)), f"![Main effects]({figure})"]
        parts += ["## Main effects", _effects_table(effects), _METHOD]
    parts += ["## Students", _students_table(grid, ablation.rows)]
    return "\n\n".join(parts) + "\n"


def sentences(effects: Mapping[Outcome, Effects]) -> list[str]:
    """For each outcome the levels that change it beyond noise, the strongest first."""
    return [f"{OUTCOMES[outcome]}: {_beyond_noise(outcome, fitted)}" for outcome, fitted in effects.items()]


def _beyond_noise(outcome: Outcome, fitted: Effects) -> str:
    if any(effect.low is None for effect in fitted.effects):
        return "no intervals, for there are no more students than levels"
    strong = sorted((e for e in fitted.effects if e.matters), key=lambda e: -abs(e.value - e.neutral))
    named = [f"{effect.factor}={effect.level} ({_shown(outcome)(effect.value)})" for effect in strong]
    return ", ".join(named) or "no level differs from the centre beyond noise"


def _effects_table(effects: Mapping[Outcome, Effects]) -> str:
    by_level = zip(*(fitted.effects for fitted in effects.values()), strict=True)
    rows = [
        [
            one[0].factor,
            str(one[0].level),
            *(_effect(outcome, effect) for outcome, effect in zip(effects, one, strict=True)),
        ]
        for one in by_level
    ]
    return _table(["factor", "level", *(OUTCOMES[outcome] for outcome in effects)], rows, words=2)


def _effect(outcome: Outcome, effect: Effect) -> str:
    shown = _shown(outcome)
    value = f"**{shown(effect.value)}**" if effect.matters else shown(effect.value)
    if effect.low is None or effect.high is None:
        return value
    return f"{value} ({shown(effect.low)} to {shown(effect.high)})"


def _shown(outcome: Outcome) -> Callable[[float], str]:
    if outcome == "accuracy":
        return lambda value: f"{100 * value:+.1f}"
    return "{:.3g}".format if outcome == "reference_perplexity" else "{:+.2f}".format


def _students_table(grid: Grid, rows: Sequence[Row]) -> str:
    names = [factor.name for factor in grid.factors]
    columns = [*names, "seed", "tokens/forward", "× AR", "accuracy (95% CI)", "perplexity", "training, s", "tokens"]
    return _table(columns, [_student(names, row) for row in rows], words=0)


def _student(names: Sequence[str], row: Row) -> list[str]:
    return [
        *(str(row.settings[name]) for name in names),
        str(row.seed),
        f"{row.tpf:.2f}",
        f"{row.speedup:.2f} ({row.speedup_low:.2f} to {row.speedup_high:.2f})",
        f"{row.accuracy:.1%} ({100 * row.accuracy_low:.1f} to {100 * row.accuracy_high:.1f})",
        "–" if row.reference_perplexity is None else f"{row.reference_perplexity:.3g}",
        f"{row.train_seconds:.1f}",
        f"{row.train_tokens:,}",
    ]


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: int) -> str:
    """The first `words` columns are aligned to the left."""
    rule = ["---"] * words + ["---:"] * (len(columns) - words)
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, rule, *rows])


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
