"""Made-up students of a grid, whose outcomes are known functions of their settings, through the folders of a job."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cllm.ablation.cell import Figures
from cllm.ablation.document import AblationDocument
from cllm.ablation.grid import Grid, Setting, Student, students
from cllm.ablation.results import FIGURES_NAME, KIND, gather
from cllm.artifacts import write_artifact
from tests.bench.records import PROVENANCE

Of = Callable[[Mapping[str, Setting]], float]
Provenance = Mapping[str, Any]


def made_up(
    grid: Grid, tpf: Of, *, noise: Callable[[int], float] = lambda seed: 0.0, provenance: Provenance = PROVENANCE
) -> AblationDocument:
    """An ablation with all students: `noise` of the seed is added to the tokens per forward."""

    def figures(student: Student) -> Figures:
        value = tpf(student.settings) + noise(student.seed)
        return Figures(
            metric="execution accuracy",
            tpf=value,
            speedups=(value / 2, value / 2 + 0.1, value / 2 - 0.1),
            tokens_per_s=(100.0, 101.0, 99.0),
            scores=(1.0, 1.0, 1.0, float(student.settings["n"] == grid.factors[1].values[0])),
            reference_perplexity=2.0 if student.settings["data"] == 1.0 else 3.0,
            mean_response_tokens=30.0,
            train_seconds=40.0,
            train_tokens=1000,
        )

    return document_of(grid, students(grid), figures, provenance=provenance)


def document_of(
    grid: Grid,
    made: Sequence[Student],
    figures: Callable[[Student], Figures],
    *,
    missing: Sequence[str] = (),
    provenance: Provenance = PROVENANCE,
    origin: Callable[[Student], Provenance] = lambda student: PROVENANCE,
) -> AblationDocument:
    """The document of cells that a job has left in a folder; `origin` is the provenance of each."""
    with TemporaryDirectory() as folder:
        finished = []
        for number, student in enumerate(made):
            path = Path(folder) / f"{number:016x}"
            with write_artifact(path, kind=KIND, inputs={}, provenance=origin(student)) as working:
                (working / FIGURES_NAME).write_text(figures(student).model_dump_json())
            finished.append((student, path))
        return gather(grid, finished, missing, provenance)
