"""Figures as table cells."""

import math

from cllm.bench.compare import Ratio
from cllm.evaluation.metrics import Estimate
from cllm.report.page import NOTHING, Value


def number(value: float | None, digits: int) -> Value:
    return NOTHING if value is None else Value(f"{value:,.{digits}f}", value)


def significant(value: float | None, digits: int) -> Value:
    """To so many digits, or to the unit."""
    return NOTHING if value is None else number(value, _places(value, digits))


def percent(share: float | None) -> Value:
    return NOTHING if share is None else Value(f"{100 * share:.1f}%", share)


def percent_interval(estimate: Estimate | None) -> Value:
    """A share with its 95% interval."""
    if estimate is None:
        return NOTHING
    return Value(f"{100 * estimate.mean:.1f}% ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})", estimate.mean)


def points(difference: Estimate | None) -> Value:
    """A difference of shares with its 95% interval; noise where that includes 0."""
    if difference is None:
        return NOTHING
    low, high = 100 * difference.low, 100 * difference.high
    return Value(f"{100 * difference.mean:+z.1f} ({low:+z.1f} to {high:+z.1f})", difference.mean, low <= 0 <= high)


def spread(estimate: Estimate | None, *, unit: float = 1) -> Value:
    """`unit` times a median with the lowest and the highest repeat, to three digits or to the unit."""
    if estimate is None:
        return NOTHING
    shown = Estimate(unit * estimate.mean, unit * estimate.low, unit * estimate.high)
    return interval(shown, _places(shown.mean, 3))


def interval(estimate: Estimate | None, places: int) -> Value:
    """A figure with its interval, to so many decimal places."""
    if estimate is None:
        return NOTHING
    low, high = f"{estimate.low:,.{places}f}", f"{estimate.high:,.{places}f}"
    return Value(f"{estimate.mean:,.{places}f} ({low}–{high})", estimate.mean)


def ratio_range(value: Ratio | None) -> Value:
    """With the range that the repeats allow; a baseline beside itself has none."""
    if value is None:
        return NOTHING
    if value.low == value.high:
        return Value(f"{value.value:.2f}", value.value)
    text = f"{value.value:.2f} ({value.low:.2f}–{value.high:.2f})"
    return Value(text, value.value, value.within_noise)


def _places(value: float, digits: int) -> int:
    """Decimal places that give a positive value so many digits."""
    return max(0, digits - 1 - math.floor(math.log10(value))) if value > 0 else 0


def parameters(trained: int | None) -> Value:
    """A number of trained parameters, which may be none."""
    return Value("0", 0) if trained == 0 else count(trained)


def count(value: int | None) -> Value:
    """A number of parameters."""
    if value is None:
        return NOTHING
    scale, unit = (1e9, "B") if value >= 1e9 else (1e6, "M") if value >= 1e6 else (1e3, "K")
    return Value(f"{value / scale:.1f}{unit}", value)
