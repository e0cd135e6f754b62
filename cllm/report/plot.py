"""The plot of an evaluation: how many tokens a forward pass commits, teacher beside CLLM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from cllm.evaluation.results import find_row
from cllm.evaluation.subject import SUBJECTS

_COLOURS = {"teacher": "#9aa5b1", "cllm": "#1f6feb"}
_WIDTH = 0.4  # of a bar, in tokens


def plot_acceptance(results: Mapping[str, Any], path: Path) -> None:
    """Write an SVG: share of forward passes by tokens committed, sliding Jacobi, both models.

    The same results give the same bytes.
    """
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, shift in zip(SUBJECTS, (-_WIDTH / 2, _WIDTH / 2), strict=True):
        row = find_row(results, (name, "jacobi-sliding"))
        forwards = sum(row["step_histogram"].values())
        positions = [int(count) + shift for count in row["step_histogram"]]
        shares = [100 * number / forwards for number in row["step_histogram"].values()]
        label = f"{name}: {row['tpf']:.2f} tokens per forward"
        axes.bar(positions, shares, width=_WIDTH, color=_COLOURS[name], label=label)
    size = find_row(results, ("cllm", "jacobi-sliding"))["block_size"]
    axes.set_xticks(range(1, size + 1, 1 + size // 32))
    axes.set_xlim(0.5, size + 0.5)
    axes.set_xlabel(f"tokens committed by one forward pass (sliding Jacobi, block size {size})")
    axes.set_ylabel("% of forward passes")
    axes.set_title(f"{results['task']}, {results['num_prompts']} held-out prompts")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "cllm"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
