"""Curves of a run as SVG: small, without scripts, in the colours of the page that shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeAlias

from dtrain.display import COLOURS

Point: TypeAlias = tuple[float, float]

MOST_POINTS = 240
"""Of a curve: more than it has pixels are of no use."""
MARKED_POINTS = 30
"""Curves of so few points, or fewer, show each of them."""
WIDTH, HEIGHT = 420, 170
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 22, 20
LOG_RATIO = 20.0
"""A logarithmic scale shows values that differ by this factor or more."""


@dataclass(frozen=True, slots=True)
class Series:
    """The points of one curve, from left to right; of very many, every n-th one."""

    kept: tuple[Point, ...] = ()
    last: Point | None = None
    stride: int = 1
    offered: int = 0

    def with_point(self, x: float, y: float | None) -> Series:
        """Return the curve with another point; values that are not finite are no points."""
        if y is None or not math.isfinite(y):
            return self
        kept, stride = self.kept, self.stride
        if self.offered % stride == 0:
            kept = (*kept, (x, y))
        if len(kept) > MOST_POINTS:
            kept, stride = kept[::2], 2 * stride
        return Series(kept, (x, y), stride, self.offered + 1)

    @property
    def points(self) -> tuple[Point, ...]:
        """The points that are drawn: the last one is always there."""
        return self.kept if self.last in (None, *self.kept[-1:]) else (*self.kept, *filter(None, [self.last]))


def curves_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Return the curves of the losses of rounds, by name."""
    curves = {"train": Series(), "val": Series()}
    for row in rows:
        curves = with_row(curves, row)
    return curves


def with_row(curves: Mapping[str, Series], row: Mapping[str, Any]) -> dict[str, Series]:
    """Return the curves of the losses after another round."""
    return {name: curve.with_point(row["round"], row.get(f"{name}_loss")) for name, curve in curves.items()}


def curve_svg(curves: Mapping[str, Series], x_name: str = "round") -> str:
    """Return curves as SVG; empty if none has a point.

    The scale is logarithmic where the values are positive and differ much.
    """
    named = {name: series.points for name, series in curves.items() if series.points}
    if not named:
        return ""
    points = [point for series in named.values() for point in series]
    is_log = min(y for _, y in points) > 0 and max(y for _, y in points) > LOG_RATIO * min(y for _, y in points)
    scaled = {name: [(x, math.log10(y) if is_log else y) for x, y in series] for name, series in named.items()}
    heights = [y for series in scaled.values() for _, y in series]
    to_x = Scale(min(x for x, _ in points), max(x for x, _ in points), LEFT, WIDTH - RIGHT)
    to_y = Scale(min(heights), max(heights), HEIGHT - BOTTOM, TOP)
    drawn = [
        *axes(heights, is_log, to_y),
        *_ends(points, x_name, to_x),
        *(
            part
            for number_, (name, series) in enumerate(scaled.items())
            for part in _line([(to_x(x), to_y(y)) for x, y in series], COLOURS[number_ % len(COLOURS)], name, number_)
        ),
    ]
    return svg(drawn, f"{' and '.join(named)} over {x_name}")


def svg(parts: Sequence[str], label: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    """Return an SVG element; its text has the colour of the text around it.

    JupyterLab removes it from a notebook that is not trusted, and keeps its text: then a description is read, which is
    not drawn, and the numbers after it.
    """
    return (
        f"<svg role='img' aria-label='{escape(label)}' viewBox='0 0 {width} {height}' width='{width}' "
        f"height='{height}' style='max-width:100%;font:11px sans-serif;fill:currentColor'>"
        f"<desc>{escape(label)}, drawn in a trusted notebook: </desc>{''.join(parts)}</svg>"
    )


class Scale:
    """Maps numbers from `low` to `high` to pixels."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        margin = 0.0 if high > low else (abs(low) or 1.0) / 2
        self._low, self._span = low - margin, (high - low) + 2 * margin
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        """Return the place of a number."""
        return self._start + (value - self._low) / self._span * (self._stop - self._start)


def axes(heights: Sequence[float], is_log: bool, to_y: Scale) -> list[str]:
    """Return the grid: lines at round numbers between the smallest and the largest value."""
    parts = []
    for tick in ticks(min(heights), max(heights)):
        y = to_y(tick)
        text = f"{10**tick if is_log else tick:.3g}"
        parts.append(
            f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}' stroke='currentColor' "
            "stroke-opacity='.15'/>"
            f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end' opacity='.7'>{text} </text>"
        )
    return parts


def _ends(points: Sequence[Point], x_name: str, to_x: Scale) -> list[str]:
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    y = HEIGHT - 5
    parts = [f"<text x='{to_x(first):.1f}' y='{y}' opacity='.7'>{escape(x_name)} {first:g} </text>"]
    if last > first:
        parts.append(f"<text x='{to_x(last):.1f}' y='{y}' text-anchor='end' opacity='.7'>{last:g} </text>")
    return parts


def _line(places: Sequence[Point], colour: str, name: str, place: int) -> list[str]:
    """Return a curve, its points where they are few, and its name with the last value above the plot."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f"<polyline points='{path}' style='fill:none;stroke:{colour};stroke-width:1.6'/>"]
    if len(places) <= MARKED_POINTS:
        parts += [f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.2' style='fill:{colour}'/>" for x, y in places]
    at = LEFT + 90 * place
    return [
        *parts,
        f"<rect x='{at}' y='6' width='12' height='4' style='fill:{colour}'/>",
        f"<text x='{at + 17}' y='12'>{escape(name)} </text>",
    ]


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Return round numbers from `low` to `high`, `most` at most; one number if they are equal.

    >>> ticks(0.13, 0.92), ticks(2.0, 2.0), ticks(0.0, 10.0)
    ([0.2, 0.4, 0.6, 0.8], [2.0], [0.0, 5.0, 10.0])
    """
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * power
        first = math.ceil(low / step - 1e-9)
        count = math.floor(high / step + 1e-9) - first + 1
        if count <= most:
            return [round((first + n) * step, 12) for n in range(count)] or [low]
    return [low]
