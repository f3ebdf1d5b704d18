"""Line charts: where a value lies, which ticks an axis has, what a screen reader and the pointer get."""

import math
import re
from xml.etree import ElementTree

import pytest

from components.reports.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    Series,
    line_chart,
    positive_bounds,
    thinned,
)


def test_a_line_goes_through_its_values():
    svg = line_chart("loss", [Series("run", 0, [0, 5, 10], [0, 1, 2])], Axis("step", 0, 10), Axis("loss", 0, 2))
    (line,) = re.findall(r'points="([^"]*)"', svg)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    middle = f"{(LEFT + right) / 2:.1f},{(TOP + bottom) / 2:.1f}"
    assert line.split() == [f"{LEFT:.1f},{bottom:.1f}", middle, f"{right:.1f},{TOP:.1f}"]


def test_a_logarithmic_axis_halves_at_the_geometric_mean():
    assert Axis("loss", 0.01, 1, log=True).place([0.01, 0.1, 1]).tolist() == pytest.approx([0, 0.5, 1])


def test_a_value_that_is_no_number_leaves_the_line():
    svg = line_chart("loss", [Series("run", 0, [1, 2, 3], [1, math.nan, 3])], Axis("step", 0, 3), Axis("loss", 0, 3))
    assert 'data-x="1 3" data-y="1 3"' in svg


def test_names_cannot_break_out_of_the_markup():
    name = '<script>"&'
    tree = ElementTree.fromstring(line_chart(name, [Series(name, 7, [1], [1])], Axis(name, 0, 1), Axis("y", 0, 1)))
    (line,) = tree.iter("polyline")
    assert line.attrib["data-name"] == name
    assert line.attrib["class"] == "line s1"  # the eighth colour is the second again
    assert tree.attrib["aria-label"] == f"{name}: {name} ends at 1"


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis("", 0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Axis("", 0, 850), [0, 200, 400, 600, 800]),
        (Axis("", 0, 90_000), [0, 20_000, 40_000, 60_000, 80_000]),
        (Axis("", 0.4, 5, log=True), [0.5, 1, 2, 5]),
        (Axis("", 0.001, 1000, log=True), [0.001, 0.01, 0.1, 1, 10, 100, 1000]),
    ],
)
def test_ticks_are_round(axis: Axis, ticks: list[float]):
    assert axis.ticks() == pytest.approx(ticks)


def test_a_long_series_becomes_means():
    x, y = thinned(range(1, 1001), [2.0, 4.0] * 500, limit=10)
    assert x == [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000]
    assert y == [3.0] * 10
    assert thinned([1, 2], [3, 4], limit=10) == ([1, 2], [3, 4])


def test_bounds_hold_what_is_positive():
    low, high = positive_bounds([Series("a", 0, [1, 2, 3], [0, math.nan, 0.5]), Series("b", 1, [1], [8.0])])
    assert low < 0.5
    assert high > 8
    assert positive_bounds([Series("a", 0, [1], [0.0])]) == (0.1, 1.0)
