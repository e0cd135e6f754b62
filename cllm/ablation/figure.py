"""The figure of an ablation: for each factor, what its levels make of tokens per forward and of accuracy."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from cllm.ablation.document import AblationDocument, Outcome
from cllm.ablation.effects import Effect, Effects
from cllm.ablation.grid import Setting

_POINT, _STUDENT, _CENTRE = "#1f6feb", "#c3cad3", "#6b7684"
_PANELS: Mapping[Outcome, tuple[str, float]] = {"tpf": ("tokens per forward", 1), "accuracy": ("accuracy, %", 100)}
_WIDTH, _HEIGHT = 1.7, 2.5  # of a panel, in inches


def plot_effects(ablation: AblationDocument, path: Path) -> None:
    """Write an SVG: a column for each factor, a row for each outcome (tokens per forward on a log scale).

    Fitted values with the intervals of their effects against the centre's level (dashed; hollow: within noise), and all
    students in grey. The same results give the same bytes.
    """
    factors, rows = ablation.factors, ablation.rows
    size = (1 + _WIDTH * len(factors), _HEIGHT * len(_PANELS))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(_PANELS), len(factors), sharex="col", sharey="row", squeeze=False)
    for line, (outcome, (label, scale)) in zip(grid, _PANELS.items(), strict=True):
        for axes, (name, levels) in zip(line, factors.items(), strict=True):
            _students(axes, levels, [(row.settings[name], scale * getattr(row, outcome)) for row in rows])
            _levels(axes, name, levels, ablation.effects[outcome], scale)
        line[0].set_ylabel(label)
    # A student without an AR loss writes nonsense several times as fast as the others write answers.
    grid[0][0].set_yscale("log", base=2)
    grid[0][0].yaxis.set_major_formatter(ScalarFormatter())
    for axes, factor in zip(grid[0], factors, strict=True):
        axes.set_title(factor, fontsize="medium")
    with matplotlib.rc_context({"svg.hashsalt": "cllm"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _students(axes: Axes, levels: Sequence[Setting], points: Sequence[tuple[Setting, float]]) -> None:
    places = [levels.index(value) for value, _ in points]
    axes.scatter(places, [y for _, y in points], s=9, color=_STUDENT, linewidths=0, zorder=1)


def _levels(axes: Axes, factor: str, levels: Sequence[Setting], fitted: Effects, scale: float) -> None:
    mine = [effect for effect in fitted.effects if effect.factor == factor]
    centre = scale * fitted.centre
    axes.axhline(centre, color=_CENTRE, linewidth=0.8, linestyle="--", zorder=2)
    axes.plot([0], [centre], "o", color=_CENTRE, markersize=4, zorder=3)
    for place, effect in enumerate(mine, start=1):
        axes.errorbar(
            [place],
            [scale * effect.fitted],
            yerr=_bar(effect, scale),
            fmt="o",
            color=_POINT,
            zorder=3,
            markersize=4,
            capsize=3,
            mfc=_POINT if effect.matters else "white",
        )
    axes.set_xticks(range(len(levels)), [str(value) for value in levels], fontsize="small", rotation=30)
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.spines[["top", "right"]].set_visible(False)


def _bar(effect: Effect, scale: float) -> list[list[float]] | None:
    """How far the interval reaches below and above."""
    if effect.low is None or effect.high is None:
        return None
    return [[scale * (effect.value - effect.low)], [scale * (effect.high - effect.value)]]
