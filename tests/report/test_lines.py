"""Plots are well-formed, to scale, and say what they show."""

import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.report.lines import Axis, Lines, Point, line_plot

LOADS = Axis("requests in flight", "log at values")
TOKENS = Axis("tokens/s", "from zero")


def plot(lines: Lines, x: Axis = LOADS, y: Axis = TOKENS, **options: float) -> ET.Element:
    return ET.fromstring(line_plot(lines, x, y, **options))


def centres(root: ET.Element) -> list[tuple[float, float]]:
    return [(float(dot.get("cx", 0)), float(dot.get("cy", 0))) for dot in root.iter("circle")]


def test_points_are_to_scale():
    (left, low), (right, high), (across, up) = centres(
        plot({"a & b": [Point(4, 8.0), Point(1, 0.0)], "c": [Point(2, 4.0)]})
    )
    # 2 lies halfway between 1 and 4 in powers of two, and 4 halfway between 0 and 8.
    assert across == pytest.approx((left + right) / 2, abs=0.1)
    assert up == pytest.approx((low + high) / 2, abs=0.1)
    assert left < right
    assert high < low  # downwards in SVG


def test_a_logarithmic_axis_gives_factors_equal_lengths():
    heights = [y for _, y in centres(plot({"a": [Point(1, 10), Point(2, 100), Point(4, 1000)]}, y=Axis("t", "log")))]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_intervals_and_the_level_are_drawn_to_scale():
    root = plot({"a": [Point(1, 2.0, 1.0, 4.0)], "b": [Point(1, 1.0)], "c": [Point(1, 4.0)]}, level=1.0)
    (whisker,) = [line for line in root.iter("line") if line.get("stroke")]
    _, (_, at_one), (_, at_four) = centres(root)
    ends = float(whisker.get("y1", 0)), float(whisker.get("y2", 0))
    assert ends == pytest.approx((at_one, at_four), abs=0.1)
    (level,) = [line for line in root.iter("line") if line.get("class") == "level"]
    assert float(level.get("y1", 0)) == pytest.approx(at_one, abs=0.1)


def test_a_point_can_be_read_and_names_are_escaped():
    root = plot({"a & b": [Point(4, 12_345.0, 11_000.0, 13_000.0)]})
    assert [title.text for title in root.iter("title")] == ["a & b, 4: 12,345 (11,000 to 13,000)"]


def test_a_line_without_points_keeps_its_colour_free():
    dots = list(plot({"a": [], "b": [Point(1, 1.0)]}).iter("circle"))
    assert [dot.get("fill") for dot in dots] == ["var(--c1)"]


numbers = st.floats(1e-3, 1e7)


@given(
    points=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6),
    scale=st.sampled_from(["linear", "from zero", "log"]),
)
def test_every_point_lies_between_the_ticks(points: list[tuple[float, float]], scale):
    root = plot({"a": [Point(x, y) for x, y in points]}, Axis("x"), Axis("y", scale))
    rules = sorted(float(line.get("y1", 0)) for line in root.iter("line") if line.get("class") == "rule")
    assert 1 <= len(rules) <= 12
    assert all(later - earlier > 0.5 for earlier, later in pairwise(rules))
    tolerance = 0.11  # coordinates have one decimal place
    for x, y in centres(root):
        assert rules[0] - tolerance <= y <= rules[-1] + tolerance
        assert 48 - tolerance <= x <= 408 + tolerance
