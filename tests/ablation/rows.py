"""Made-up students of a grid, whose outcomes are known functions of their settings."""

from collections.abc import Callable, Mapping

from cllm.ablation.cell import Figures
from cllm.ablation.grid import Grid, Setting, students
from cllm.ablation.results import Ablation, effects_of, make_row

Of = Callable[[Mapping[str, Setting]], float]


def made_up(grid: Grid, tpf: Of, *, noise: Callable[[int], float] = lambda seed: 0.0) -> Ablation:
    """An ablation with all students: `noise` of the seed is added to the tokens per forward."""
    rows = []
    for number, student in enumerate(students(grid)):
        value = tpf(student.settings) + noise(student.seed)
        figures = Figures(
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
        rows.append(make_row(student, f"{number:016x}", figures))
    return Ablation(grid, tuple(rows), effects_of(rows, grid), (), "execution accuracy", 4)
