"""The folders of finished cells -> the document of an ablation."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from cllm.ablation.cell import Figures
from cllm.ablation.document import AblationDocument, Base, Outcome, StudentRow
from cllm.ablation.effects import Effects, main_effects
from cllm.ablation.grid import Grid, Student, centre_settings, students
from cllm.artifacts import read_manifest
from cllm.evaluation.metrics import accuracy

KIND = "ablation-cell"
FIGURES_NAME = "figures.json"
RATIOS: Mapping[Outcome, bool] = {"tpf": False, "speedup": False, "accuracy": False, "reference_perplexity": True}


def make_row(student: Student, key: str, figures: Figures, *, source: int = 0) -> StudentRow:
    score = accuracy(figures.scores)
    return StudentRow(
        settings=student.settings,
        seed=student.seed,
        window=student.window,
        key=key,
        source=source,
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


def gather(
    grid: Grid, finished: Sequence[tuple[Student, Path]], missing: Sequence[str], provenance: Mapping[str, Any]
) -> AblationDocument:
    """What the folders of finished cells hold; at least one of a student that was decoded with its own n.

    Args:
        missing: what could not be made, and why.
        provenance: of this job; the students bring their own.
    """
    found = [(student, folder, read_figures(folder)) for student, folder in finished]
    origins = [_origin(folder) for _, folder in finished]
    sources = [source for index, source in enumerate(origins) if source not in origins[:index]]
    rows = [
        (student, make_row(student, folder.name, figures, source=sources.index(origin)))
        for (student, folder, figures), origin in zip(found, origins, strict=True)
    ]
    own = tuple(row for student, row in rows if not student.further)
    figures = found[0][2]
    base = Base(
        recipe=grid.base.recipe,
        overrides=grid.base.overrides,
        centre=grid.centre,
        settings=centre_settings(grid),
        metric=figures.metric,
        num_prompts=len(figures.scores),
    )
    return AblationDocument(
        provenance=provenance,
        sources=tuple(sources),
        grid=grid.name,
        base=base,
        factors={factor.name: factor.values for factor in grid.factors},
        rows=own,
        decoded=tuple(row for student, row in rows if student.further),
        effects=effects_of(own, grid) if len(own) == len(students(grid)) else {},
        missing=tuple(missing),
    )


def effects_of(rows: Sequence[StudentRow], grid: Grid) -> dict[Outcome, Effects]:
    """Main effects on every outcome that all rows have. The rows must be those of a whole grid."""
    levels = {factor.name: factor.values for factor in grid.factors}
    found: dict[Outcome, Effects] = {}
    for outcome, ratio in RATIOS.items():
        values = [getattr(row, outcome) for row in rows]
        if None not in values:
            found[outcome] = main_effects([row.settings for row in rows], values, levels, ratio=ratio)
    return found


def _origin(folder: Path) -> dict[str, Any]:
    """What made a cell; its time would tell every one from the others."""
    provenance = read_manifest(folder, KIND).provenance
    return {name: value for name, value in provenance.items() if name != "time"}
