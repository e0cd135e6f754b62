"""Main effects: what each level changes against the centre's, over all students at once.

The model is additive: outcome = centre + the effect of each factor's level, fitted by least squares over all students.
What it leaves over holds the noise of training and measuring (students that differ in their seed alone) and all
interactions, so the intervals (Student's t) are wide where settings interact, and never ignore it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student_t  # type: ignore[import-untyped]

from cllm.ablation.grid import Setting

Levels = Mapping[str, Sequence[Setting]]  # factor -> values, the centre's first


@dataclass(frozen=True, slots=True)
class Effect:
    """What a level does to an outcome, against the centre's level; for a ratio, the factor by which it changes it.

    Attributes:
        fitted: the outcome at the centre with this level.
        low, high: of the 95% interval of `value`; None where there are no more students than levels.
    """

    factor: str
    level: Setting
    value: float
    low: float | None
    high: float | None
    fitted: float
    neutral: float  # the value of no effect: 0, or 1 for a ratio

    @property
    def matters(self) -> bool:
        """Whether the interval leaves out "no effect"."""
        return self.low is not None and self.high is not None and not self.low <= self.neutral <= self.high


@dataclass(frozen=True, slots=True)
class Effects:
    """All effects on one outcome, in the order of the factors and levels, and the outcome fitted at the centre."""

    centre: float
    effects: tuple[Effect, ...]


def main_effects(
    settings: Sequence[Mapping[str, Setting]], outcomes: Sequence[float], levels: Levels, *, ratio: bool = False
) -> Effects:
    """Effects of all levels but the centre's.

    Args:
        settings: of the students, a value for every factor.
        outcomes: theirs; positive if `ratio`.
        ratio: effects multiply (the model is additive in logarithms).

    Raises:
        ValueError: a level that no student has, or levels that only occur together.
    """
    columns = [(factor, value) for factor, values in levels.items() for value in values[1:]]
    design = np.array([[1.0, *(chosen[f] == value for f, value in columns)] for chosen in settings])
    observed = np.log(outcomes) if ratio else np.array(outcomes, dtype=float)
    if np.linalg.matrix_rank(design) < design.shape[1]:
        raise ValueError("the students do not tell all levels apart")
    fit = np.linalg.lstsq(design, observed, rcond=None)[0].round(12)  # where nothing differs, the last bits do
    half = _half_widths(design, observed - design @ fit)
    scale: Callable[[float], float] = math.exp if ratio else float
    effects = [
        Effect(
            factor,
            value,
            value=scale(fit[i]),
            low=None if half is None else scale(fit[i] - half[i]),
            high=None if half is None else scale(fit[i] + half[i]),
            fitted=scale(fit[0] + fit[i]),
            neutral=scale(0.0),
        )
        for i, (factor, value) in enumerate(columns, start=1)
    ]
    return Effects(scale(fit[0]), tuple(effects))


def _half_widths(design: np.ndarray, residuals: np.ndarray) -> np.ndarray | None:
    """Half of the 95% intervals of the coefficients; None without a degree of freedom."""
    freedom = design.shape[0] - design.shape[1]
    if freedom < 1:
        return None
    variance = float(residuals @ residuals) / freedom
    covariance = variance * np.linalg.inv(design.T @ design)
    half: np.ndarray = student_t.ppf(0.975, freedom) * np.sqrt(np.diag(covariance))
    return half
