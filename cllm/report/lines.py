"""Line plots as inline SVG: a figure against the number of requests in flight. Colours are the page's CSS variables."""

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _PLOT_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 240, 52, 14, 26, 40
_LEGEND_ROW = 17
_NUM_COLOURS = 8
_DASHES = ("", "6 3", "2 3")
Points = Sequence[tuple[float, float]]


def line_plot(lines: Mapping[str, Points], *, x_label: str, y_label: str) -> str:
    """An SVG element. The x axis is logarithmic in base 2, the y axis begins at 0; the legend stands below.

    Args:
        lines: name -> (x, y) with x > 0 and y >= 0, at least one point in all.
    """
    xs = sorted({x for points in lines.values() for x, _ in points})
    top = _round_up(max(y for points in lines.values() for _, y in points))
    bottom = _TOP + _PLOT_HEIGHT
    span = math.log2(xs[-1] / xs[0]) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x / xs[0]) / span) if len(xs) > 1 else 0.5
        return _LEFT + across * (_WIDTH - _LEFT - _RIGHT), bottom - y / top * _PLOT_HEIGHT

    height = bottom + _BOTTOM + _LEGEND_ROW * len(lines)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">']
    for tick in (top * part / 4 for part in range(5)):
        y = place(xs[0], tick)[1]
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="soft" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for x in xs:
        parts.append(f'<text class="soft" x="{place(x, 0)[0]:.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="soft" x="{middle}" y="{bottom + 31}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="soft" x="0" y="11">{escape(y_label)}</text>')
    for index, (name, points) in enumerate(lines.items()):
        parts += _line([place(x, y) for x, y in sorted(points)], index)
        parts += _legend(name, index, bottom + _BOTTOM + _LEGEND_ROW * index)
    return "".join([*parts, "</svg>"])


def _line(points: Sequence[tuple[float, float]], index: int) -> list[str]:
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    line = f'<polyline points="{text}" fill="none" {_stroke(index)}/>'
    return [line, *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" fill="{_colour(index)}"/>' for x, y in points)]


def _legend(name: str, index: int, y: float) -> list[str]:
    line = f'<line x1="{_LEFT}" x2="{_LEFT + 28}" y1="{y + 8}" y2="{y + 8}" {_stroke(index)}/>'
    return [line, f'<text x="{_LEFT + 36}" y="{y + 12}">{escape(name)}</text>']


def _stroke(index: int) -> str:
    dash = _DASHES[index // _NUM_COLOURS % len(_DASHES)]
    return f'stroke="{_colour(index)}" stroke-width="2" stroke-dasharray="{dash or "none"}"'


def _colour(index: int) -> str:
    return f"var(--c{index % _NUM_COLOURS})"


def _round_up(value: float) -> float:
    """The next of 1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8 times a power of ten, so that quarters are short numbers."""
    if value <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(value))
    return scale * next(step for step in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if step * scale >= value)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.3g}"
