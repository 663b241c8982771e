"""Curves as SVG."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.report.curve import BOTTOM, HEIGHT, LEFT, MOST_POINTS, RIGHT, TOP, WIDTH, Point, Series, curve_svg, ticks
from dtrain.report.dataset import dataset_of
from dtrain.report.history import row_of
from dtrain.report.page import run_html
from tests.report.helpers import result_of

FINITE = st.floats(-1e12, 1e12, allow_subnormal=False)


def series_of(*points: Point) -> Series:
    series = Series()
    for x, y in points:
        series = series.with_point(x, y)
    return series


@given(st.integers(1, 5000))
def test_a_curve_keeps_its_ends_and_few_points_evenly(count: int) -> None:
    xs = [x for x, _ in series_of(*((n, float(n)) for n in range(count))).points]
    assert len(xs) <= MOST_POINTS + 1
    assert (xs[0], xs[-1]) == (0, count - 1)
    steps = [after - before for before, after in pairwise(xs)]
    assert len(set(steps[:-1])) <= 1
    assert all(0 < step <= max(1, 2 * count / MOST_POINTS) for step in steps)


def test_values_that_are_not_finite_are_no_points() -> None:
    for value in (None, math.nan, math.inf):
        assert Series().with_point(1, value) == Series()


@given(st.lists(FINITE, min_size=1, max_size=30), st.lists(FINITE, max_size=30))
def test_all_points_lie_in_the_plot(train: list[float], val: list[float]) -> None:
    text = curve_svg({"train": series_of(*enumerate(train)), "val": series_of(*enumerate(val))})
    ElementTree.fromstring(text)  # it is XML
    assert "nan" not in text
    for points in re.findall("points='([^']*)'", text):
        for point in points.split():
            x, y = map(float, point.split(","))
            assert LEFT - 0.1 <= x <= WIDTH - RIGHT + 0.1
            assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1
    assert text.count("<polyline") == (2 if val else 1)


def test_a_falling_loss_falls() -> None:
    (points,) = re.findall("points='([^']*)'", curve_svg({"train": series_of((1, 4.0), (2, 2.0), (3, 1.0))}))
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert heights == sorted(heights)  # SVG counts from the top
    assert heights[1] - heights[0] == pytest.approx(2 * (heights[2] - heights[1]), abs=0.2)  # linear


def test_losses_that_differ_much_have_a_logarithmic_scale() -> None:
    (points,) = re.findall("points='([^']*)'", curve_svg({"train": series_of((1, 100.0), (2, 1.0), (3, 0.01))}))
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)
    assert ">100 <" in curve_svg({"train": series_of((1, 100.0), (2, 1.0), (3, 0.01))})


def test_what_is_left_where_svg_is_removed_can_be_read() -> None:
    text = curve_svg({"train": series_of((1, 2.0), (9, 1.0)), "val": series_of((9, 1.5))})
    left = re.sub("<[^>]*>", "", text)
    assert left == "train and val over round, drawn in a trusted notebook: 1 1.5 2 round 1 9 train val "


def test_no_point_is_no_curve() -> None:
    assert curve_svg({"train": Series(), "val": Series()}) == ""


@given(FINITE, FINITE)
def test_ticks_are_few_and_between(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    found = ticks(low, high)
    assert 1 <= len(found) <= 4
    margin = 1e-6 * max(high - low, abs(high), abs(low))
    assert all(low - margin <= tick <= high + margin for tick in found)


# Runs and histories ---------------------------------------------------------------------------------------------


def test_a_history_is_shown_with_its_curve_and_its_values() -> None:
    history = dataset_of([row_of(result_of(n)) for n in (1, 2, 3)])
    assert "<polyline" in history._repr_html_()
    assert "update_cosine" in history._repr_html_()
    assert "<polyline" in history.isel(round=[0, 1])._repr_html_()
    assert "<polyline" not in history[["samples"]]._repr_html_()
    assert "<polyline" not in history.isel(round=0)._repr_html_()
    assert "<polyline" not in dataset_of([])._repr_html_()


def test_a_run_shows_the_last_evaluated_rounds_and_the_last_one() -> None:
    rows = [row_of(result_of(n, metrics={"val_loss": 1 / n} if n % 3 == 0 else {})) for n in range(1, 41)]
    html = run_html("a run", rows, 50, 39)
    assert [int(n) for n in re.findall(r">(\d+) of 50<", html)] == [*range(15, 40, 3), 40]
    assert html.count(">best<") == 1
    assert "no round is finished" in run_html("a run", [], 50, None)
    assert "<script" not in run_html("<script>", rows, 50, None)
