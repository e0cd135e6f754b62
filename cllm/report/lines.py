"""Line plots as inline SVG. Colours are the page's CSS variables; every point shows its figures when pointed at."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

_WIDTH, _PLOT_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 220, 48, 12, 26, 40
_NUM_COLOURS = 8
_DASHES = ("", "6 3", "2 3")
_NUM_STEPS = 5  # at most, between the ticks of an axis


@dataclass(frozen=True, slots=True)
class Point:
    """A point, with the interval [low, high] of its y where it is an estimate."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows, and how.

    Attributes:
        scale: linear; linear from zero; or logarithmic, for positive values, with ticks at the values or at round ones.
    """

    label: str
    scale: Literal["linear", "from zero", "log", "log at values"] = "linear"

    @property
    def is_log(self) -> bool:
        return self.scale.startswith("log")


Lines = Mapping[str, Sequence[Point]]


def line_plot(lines: Lines, x: Axis, y: Axis, *, level: float | None = None) -> str:
    """An SVG element without a legend.

    Args:
        lines: name -> points, at least one in all. A line without points keeps its colour free, so that plots of the
            same names agree in their colours.
        level: a y to mark with a line across.
    """
    points = [point for line in lines.values() for point in line]
    ys = [value for point in points for value in (point.y, point.low, point.high) if value is not None]
    bottom = _TOP + _PLOT_HEIGHT
    x_ticks = _ticks([point.x for point in points], x)
    y_ticks = _ticks([*ys, *([] if level is None else [level])], y)
    across = _scale(x_ticks, x, _LEFT, _WIDTH - _RIGHT)
    up = _scale(y_ticks, y, bottom, _TOP)
    height = bottom + _BOTTOM
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(y.label)} by {escape(x.label)}">']
    parts += _y_axis(y_ticks, up, y.label)
    parts += _x_axis(x_ticks, across, x.label, bottom)
    if level is not None:
        parts.append(_rule(up(level), "level"))
    for index, (name, line) in enumerate(lines.items()):
        parts += _line(name, sorted(line, key=lambda point: point.x), index, across, up)
    return "".join([*parts, "</svg>"])


_Scale = Callable[[float], float]


def _scale(ticks: Sequence[float], axis: Axis, start: float, end: float) -> _Scale:
    """Values -> coordinates: the first tick at `start`, the last at `end`, a single one in the middle."""

    def position(value: float) -> float:
        return math.log2(value) if axis.is_log else value

    low, high = position(ticks[0]), position(ticks[-1])
    if low == high:
        return lambda value: (start + end) / 2
    return lambda value: start + (position(value) - low) / (high - low) * (end - start)


def _ticks(values: Sequence[float], axis: Axis) -> list[float]:
    """Short numbers around all values, or the values themselves."""
    low, high = min(values), max(values)
    if axis.scale == "log at values":
        return sorted(set(values))
    if axis.scale == "log":
        return _log_ticks(low, high)
    if axis.scale == "from zero":
        low = min(low, 0.0)
    step = _round_up((high - low or abs(high) or 1.0) / _NUM_STEPS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * k for k in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten; powers of ten alone where those would be many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(powers) <= _NUM_STEPS - 1 else (1,)
    ticks = [step * 10.0**power for power in powers for step in steps]
    first = max(index for index, tick in enumerate(ticks) if tick <= low * (1 + 1e-9))
    last = min(index for index, tick in enumerate(ticks) if tick >= high * (1 - 1e-9))
    return ticks[first : last + 1]


def _tick_text(value: float) -> str:
    scale, unit = (1e6, "M") if abs(value) >= 1e6 else (1e3, "k") if abs(value) >= 1e4 else (1, "")
    return f"{value / scale:.4g}{unit}"


def _text(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _y_axis(ticks: Sequence[float], up: _Scale, label: str) -> list[str]:
    parts = [f'<text class="soft" x="0" y="11">{escape(label)}</text>']
    for tick in ticks:
        parts.append(_rule(up(tick), "rule"))
        parts.append(
            f'<text class="soft" x="{_LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{_tick_text(tick)}</text>'
        )
    return parts


def _x_axis(ticks: Sequence[float], across: _Scale, label: str, bottom: float) -> list[str]:
    parts = [
        f'<text class="soft" x="{across(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{_tick_text(tick)}</text>'
        for tick in ticks
    ]
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="soft" x="{middle}" y="{bottom + 31}" text-anchor="middle">{escape(label)}</text>')
    return parts


def _rule(y: float, name: str) -> str:
    return f'<line class="{name}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _line(name: str, points: Sequence[Point], index: int, across: _Scale, up: _Scale) -> list[str]:
    text = " ".join(f"{across(point.x):.1f},{up(point.y):.1f}" for point in points)
    parts = [f'<polyline points="{text}" fill="none" {_stroke(index)}/>'] if points else []
    for point in points:
        x, y = across(point.x), up(point.y)
        shown = f"{_text(point.x)}: {_text(point.y)}"
        if point.low is not None and point.high is not None:
            shown += f" ({_text(point.low)} to {_text(point.high)})"
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up(point.low):.1f}" y2="{up(point.high):.1f}" '
                f'stroke="{_colour(index)}"/>'
            )
        dot = f'cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{_colour(index)}"'
        parts.append(f"<circle {dot}><title>{escape(name)}, {shown}</title></circle>")
    return parts


def line_key(index: int) -> str:
    """A short piece of the line with this number, for a legend."""
    return f'<svg viewBox="0 0 28 8" aria-hidden="true"><line x2="28" y1="4" y2="4" {_stroke(index)}/></svg>'


def _stroke(index: int) -> str:
    dash = _DASHES[index // _NUM_COLOURS % len(_DASHES)]
    return f'stroke="{_colour(index)}" stroke-width="2" stroke-dasharray="{dash or "none"}"'


def _colour(index: int) -> str:
    return f"var(--c{index % _NUM_COLOURS})"


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 and 10 times a power of ten."""
    scale = 10.0 ** math.floor(math.log10(value))
    return scale * next(step for step in (1, 2, 2.5, 5, 10) if step * scale >= value * (1 - 1e-9))
