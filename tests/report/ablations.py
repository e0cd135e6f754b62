"""An ablation by hand: the students of a real grid, with figures that follow a formula."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from cllm.ablation.cell import Figures
from cllm.ablation.document import AblationDocument, write_document
from cllm.ablation.grid import Setting, Student, decoded_further, students
from cllm.ablation.grids import get_grid
from tests.ablation.rows import document_of
from tests.bench.records import PROVENANCE

PROMPTS = 200
GRID = get_grid("demo")
LATER = PROVENANCE | {"commit": "fedcba9876543210", "time": "2026-01-02T00:00:00+00:00"}


def made_up_ablation(made: Sequence[Student] | None = None, missing: Sequence[str] = ()) -> AblationDocument:
    """All students of the grid `demo`, or those given. More data and a larger n help speed, the AR weight helps
    accuracy, and decoding with another n costs 0.2 tokens a forward. Those of seed 1 were made by a later job."""
    if made is None:
        own = students(GRID)
        made = [*own, *decoded_further(GRID, own)]
    return document_of(
        GRID, made, figures_of, missing=missing, origin=lambda student: LATER if student.seed else PROVENANCE
    )


def figures_of(student: Student) -> Figures:
    settings, seed = student.settings, student.seed
    tpf = true_tpf(settings) + 0.02 * (-1) ** seed - 0.2 * student.further
    right = 170 + (4 if settings["ar_weight"] == 10.0 else 0) - (6 if settings["loss"] == "local" else 0) + seed
    return Figures(
        metric="execution accuracy",
        tpf=tpf,
        speedups=(0.68 * tpf, 0.7 * tpf, 0.72 * tpf),
        tokens_per_s=(600 * tpf, 610 * tpf, 620 * tpf),
        scores=(1.0,) * right + (0.0,) * (PROMPTS - right),
        reference_perplexity=1.9 + 0.1 * seed,
        mean_response_tokens=31.5,
        train_seconds=44.0,
        train_tokens=1_200_000,
    )


def true_tpf(settings: Mapping[str, Setting]) -> float:
    """Without the noise of a seed."""
    by_data = {1.0: 0.0, 0.25: -0.6, 0.0625: -1.1}
    by_length = {16: 0.0, 8: -0.7, 32: 0.4}
    return 3.4 + by_data[float(settings["data"])] + by_length[int(settings["n"])]


def write_ablation(folder: Path, ablation: AblationDocument | None = None) -> Path:
    """Into a folder as the job does; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_document(folder, ablation or made_up_ablation())
    return folder
