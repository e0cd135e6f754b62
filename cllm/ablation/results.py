"""The document of an ablation: a row for each student, and the main effects of all factors.

`ablation.json` is plain data: {schema_version, provenance, grid, base, factors, rows, effects, missing}.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from cllm.ablation.cell import Figures
from cllm.ablation.effects import Effects, main_effects
from cllm.ablation.grid import Grid, Setting, Student, centre_settings
from cllm.artifacts import write_atomic
from cllm.config import Config
from cllm.evaluation.metrics import accuracy
from cllm.evaluation.results import without_folders

SCHEMA_VERSION = 1
RESULTS_NAME = "ablation.json"
FIGURES_NAME = "figures.json"
Outcome = Literal["tpf", "speedup", "accuracy", "reference_perplexity"]
RATIOS: Mapping[Outcome, bool] = {"tpf": False, "speedup": False, "accuracy": False, "reference_perplexity": True}


class Row(Config):
    """A student that was trained and measured; figures as in `cllm.ablation.cell.Figures`."""

    settings: Mapping[str, Setting]
    seed: int
    key: str
    tpf: float
    speedup: float  # median over the repeats
    speedup_low: float
    speedup_high: float
    accuracy: float  # with its 95% interval
    accuracy_low: float
    accuracy_high: float
    reference_perplexity: float | None
    mean_response_tokens: float
    train_seconds: float
    train_tokens: int
    overrides: tuple[str, ...]  # of the base run's recipe


def make_row(student: Student, key: str, figures: Figures) -> Row:
    score = accuracy(figures.scores)
    return Row(
        settings=student.settings,
        seed=student.seed,
        key=key,
        tpf=figures.tpf,
        speedup=median(figures.speedups),
        speedup_low=min(figures.speedups),
        speedup_high=max(figures.speedups),
        accuracy=score.mean,
        accuracy_low=score.low,
        accuracy_high=score.high,
        reference_perplexity=figures.reference_perplexity,
        mean_response_tokens=figures.mean_response_tokens,
        train_seconds=figures.train_seconds,
        train_tokens=figures.train_tokens,
        overrides=student.overrides,
    )


def read_figures(folder: Path) -> Figures:
    """Those of a finished cell."""
    path = folder / FIGURES_NAME
    return Figures.from_data(json.loads(path.read_text()), where=str(path))


@dataclass(frozen=True, slots=True)
class Ablation:
    """All that is known about a grid's students.

    Attributes:
        effects: by outcome; empty while students are missing.
        missing: students that could not be made, and why.
        metric: what accuracy is, over `num_prompts` prompts.
    """

    grid: Grid
    rows: tuple[Row, ...]
    effects: Mapping[Outcome, Effects]
    missing: tuple[str, ...]
    metric: str
    num_prompts: int


def gather(grid: Grid, finished: Sequence[tuple[Student, Path]], missing: Sequence[str]) -> Ablation:
    """What the folders of finished cells hold; at least one."""
    figures = [read_figures(folder) for _, folder in finished]
    rows = tuple(make_row(student, folder.name, f) for (student, folder), f in zip(finished, figures, strict=True))
    effects = {} if missing else effects_of(rows, grid)
    return Ablation(grid, rows, effects, tuple(missing), figures[0].metric, len(figures[0].scores))


def effects_of(rows: Sequence[Row], grid: Grid) -> dict[Outcome, Effects]:
    """Main effects on every outcome that all rows have. The rows must be those of a whole grid."""
    levels = {factor.name: factor.values for factor in grid.factors}
    found: dict[Outcome, Effects] = {}
    for outcome, ratio in RATIOS.items():
        values = [getattr(row, outcome) for row in rows]
        if None not in values:
            found[outcome] = main_effects([row.settings for row in rows], values, levels, ratio=ratio)
    return found


def write_document(folder: Path, ablation: Ablation, provenance: Mapping[str, Any]) -> None:
    """Write `ablation.json`. It is published, so it names no folders."""
    grid = ablation.grid
    base = {
        "recipe": grid.base.recipe,
        "overrides": list(grid.base.overrides),
        "centre": list(grid.centre),
        "settings": centre_settings(grid),
        "metric": ablation.metric,
        "num_prompts": ablation.num_prompts,
    }
    document = {
        "schema_version": SCHEMA_VERSION,
        "provenance": dict(provenance),
        "grid": grid.name,
        "base": base,
        "factors": {factor.name: list(factor.values) for factor in grid.factors},
        "rows": [row.model_dump(mode="json") for row in ablation.rows],
        "effects": {outcome: asdict(found) for outcome, found in ablation.effects.items()},
        "missing": list(ablation.missing),
    }
    write_atomic(folder / RESULTS_NAME, json.dumps(without_folders(document), indent=1, allow_nan=False))
