"""The loss of a run by unit, to find bad data: a data set that shows and plots itself."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from dtrain.display import COLOURS, html_beside, html_card, html_table, number
from dtrain.errors import InvalidConfig, one_line
from dtrain.report.curve import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Scale, axes, svg

if TYPE_CHECKING:
    import pandas as pd

MAD = 1.4826
"""The standard deviation of a normal distribution, by its median distance from the median."""
STANDS_OUT = 6.0
"""A unit stands out whose score is larger."""
SHOWN = 8
MOST_DOTS = 1500
SPLITS = ("train", "val", "test")


def scores(losses: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return how far each loss is above the median, in robust standard deviations: bad units do not change them.

    >>> scores(np.array([1.0, 2.0, 3.0, 100.0])).round(1).tolist()
    [-1.0, -0.3, 0.3, 65.8]
    """
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return np.where(np.isnan(losses), np.inf, losses)
    middle = np.median(finite)
    spread = MAD * np.median(np.abs(finite - middle)) or 1e-12 + abs(middle) * 1e-6
    return np.where(np.isfinite(losses), (losses - middle) / spread, np.inf)


class Partitions(xr.Dataset):  # type: ignore[no-untyped-call]
    """The loss by unit (`dtrain.Run.partitions`). A unit that several partitions or splits share has a row for each.

    Variables over ``unit``: ``loss``, ``score`` (how far above the median), ``samples``, ``split``, ``partition`` (the
    replica that trains on it; -1 elsewhere), ``store``, ``first_row``, ``last_row``, ``start`` and ``stop`` (the
    coordinate there), ``box`` (its patched dimensions) and ``object`` (its first stored object).
    """

    __slots__ = ()

    def worst(self, count: int = SHOWN) -> Partitions:
        """Return the units with the largest loss, the largest first; losses that are not finite come before."""
        order = np.argsort(-self.score.values, kind="stable")[:count]
        return self.isel(unit=order)

    def to_pandas(self) -> pd.DataFrame:
        """Return a row a unit."""
        return self.to_dataframe()

    @property
    def standing_out(self) -> Partitions:
        """The units whose score is more than `STANDS_OUT`."""
        return self.isel(unit=np.flatnonzero(self.score.values > STANDS_OUT))

    def plot(self) -> Any:  # type: ignore[override]
        """Plot the loss of each unit over its first row; units that stand out are named.

        Returns
        -------
        matplotlib.axes.Axes

        Raises
        ------
        InvalidConfig
            matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise InvalidConfig(
                f"Plots need a package that is not installed: {one_line(error)}", 'pip install "dtrain[plots]".'
            ) from None
        _, ax = plt.subplots(figsize=(9, 4), layout="constrained")
        for split in SPLITS:
            own = self.isel(unit=np.flatnonzero(self.split.values == split))
            if own.sizes["unit"]:
                ax.plot(own.first_row, own.loss, "o", markersize=4, label=split)
        for unit in self.standing_out.worst().unit.values.tolist():
            one = self.sel(unit=unit)
            ax.annotate(_name(one), (one.first_row.item(), one.loss.item()), fontsize=8)
        ax.set_xlabel("first row of the unit")
        ax.set_ylabel("loss")
        ax.legend()
        return ax

    def __repr__(self) -> str:
        if not self._is_whole:
            return super().__repr__()
        lines = [f"<dtrain.Partitions> {self._headline()}", *(" ".join(row) for row in self._rows(self.worst()))]
        return "\n  ".join(lines)

    @property
    def _is_whole(self) -> bool:
        """Whether it has all variables, and several units."""
        return "unit" in self.dims and {*NAMES} <= {*self.data_vars}

    def _headline(self) -> str:
        out = self.standing_out.sizes["unit"]
        return f"{self.sizes['unit']:,} units, {out:,} of which stand out"

    def _repr_html_(self) -> str:
        if not self._is_whole or not self.sizes["unit"]:
            return super()._repr_html_()
        table = html_table("", self._rows(self.worst()), HEADER, numbers=True)
        note = "the largest losses; .to_pandas() has all units, .plot() plots them"
        return html_card(f"dtrain.Partitions: {self._headline()}", [html_beside([_dots(self), table]), escape(note)])

    def _rows(self, units: Partitions) -> list[list[str]]:
        return [
            [
                f"{one['split']} {_place(one)}",
                number(one["loss"]),
                f"{one['score']:+.1f}",
                f"{one['samples']:,}",
                "" if one["partition"] < 0 else str(one["partition"]),
                str(one["object"]),
            ]
            for one in units.to_dataframe().to_dict("index").values()
        ]


NAMES = (
    *("loss", "score", "samples", "split", "partition", "first_row", "last_row"),
    *("start", "stop", "box", "object"),
)
HEADER = ("rows", "loss", "score", "samples", "partition", "object")


def _place(one: Any) -> str:
    ends = f" ({one['start']} to {one['stop']})" if one["start"] else ""
    return f"{one['first_row']:,} to {one['last_row']:,}{ends}" + (f" {one['box']}" if one["box"] else "")


def _name(one: xr.Dataset) -> str:
    return str(one.object.item() or f"row {one.first_row.item():,}")


def _dots(units: Partitions) -> str:
    """Return the losses over rows as SVG, in a colour for each split."""
    finite = units.isel(unit=np.flatnonzero(np.isfinite(units.loss.values)))
    if not finite.sizes["unit"]:
        return ""
    worst = finite.worst(SHOWN).unit.values
    chosen = np.union1d(worst, finite.unit.values[:: max(1, finite.sizes["unit"] // MOST_DOTS)])
    drawn = finite.sel(unit=chosen)
    losses, rows = drawn.loss.values, drawn.first_row.values
    to_x = Scale(float(rows.min()), float(rows.max()), LEFT, WIDTH - RIGHT)
    to_y = Scale(float(losses.min()), float(losses.max()), HEIGHT - BOTTOM, TOP)
    colours = {split: COLOURS[number_] for number_, split in enumerate(SPLITS)}
    dots = [
        f"<circle cx='{to_x(row):.1f}' cy='{to_y(loss):.1f}' r='2.5' style='fill:{colours[split]}'/>"
        for row, loss, split in zip(rows.tolist(), losses.tolist(), drawn.split.values.tolist(), strict=True)
    ]
    names = [
        f"<rect x='{LEFT + 90 * n}' y='6' width='12' height='4' style='fill:{colours[split]}'/>"
        f"<text x='{LEFT + 90 * n + 17}' y='12'>{split} </text>"
        for n, split in enumerate(split for split in SPLITS if split in drawn.split.values)
    ]
    ends = f"<text x='{LEFT}' y='{HEIGHT - 5}' opacity='.7'>row {rows.min():,} </text>"
    ends += f"<text x='{WIDTH - RIGHT}' y='{HEIGHT - 5}' text-anchor='end' opacity='.7'>{rows.max():,} </text>"
    return svg([*axes(losses.tolist(), False, to_y), *dots, *names, ends], "loss by unit over rows")
