"""Figures as table cells."""

from cllm.bench.compare import Ratio
from cllm.evaluation.metrics import Estimate
from cllm.report.page import NOTHING, Value


def number(value: float | None, digits: int) -> Value:
    return NOTHING if value is None else Value(f"{value:,.{digits}f}", value)


def percent(share: float | None) -> Value:
    return NOTHING if share is None else Value(f"{100 * share:.1f}%", share)


def percent_interval(estimate: Estimate) -> Value:
    """A share with its 95% interval."""
    return Value(f"{100 * estimate.mean:.1f}% ({100 * estimate.low:.1f}–{100 * estimate.high:.1f})", estimate.mean)


def points(difference: Estimate | None, *, noise: bool) -> Value:
    """A difference of shares with its 95% interval."""
    if difference is None:
        return NOTHING
    low, high = 100 * difference.low, 100 * difference.high
    return Value(f"{100 * difference.mean:+.1f} ({low:+.1f} to {high:+.1f})", difference.mean, noise)


def spread(estimate: Estimate) -> Value:
    """A median with the slowest and the fastest repeat."""
    return Value(f"{estimate.mean:,.0f} ({estimate.low:,.0f}–{estimate.high:,.0f})", estimate.mean)


def ratio(value: Ratio | None) -> Value:
    return NOTHING if value is None else Value(f"{value.value:.2f}", value.value, value.within_noise)


def count(value: int | None) -> Value:
    """A number of parameters."""
    if value is None:
        return NOTHING
    scale, unit = (1e9, "B") if value >= 1e9 else (1e6, "M") if value >= 1e6 else (1e3, "K")
    return Value(f"{value / scale:.1f}{unit}", value)
