"""Forecasts: how far ahead each prediction is, ``lead``, and the time that it is for, ``valid_time``.

Where the rows of the samples' dimension are equally far apart, but for jumps, the lead is a time and the valid time is
that of the anchor plus the lead, also beyond the end of the data. Elsewhere the lead counts rows, and the valid time is
that of the row, where it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtrain.data.cf import unit_nanoseconds
from dtrain.data.encoding import Array, Floats
from dtrain.data.outcoords import BLOCK_ROWS, OutputCoordinate, OutputCoordinates
from dtrain.data.plan.hashing import Ints
from dtrain.data.plan.predicted import Anchors

LEAD, VALID_TIME = "lead", "valid_time"
TOLERANCE = 1e-6
"""Of steps between times that are floats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """How far ahead the predictions of an anchor are."""

    offsets: tuple[int, ...]
    """In rows."""
    is_axis: bool
    """True if predictions have the dimension `LEAD`."""
    step: int | float | None
    """From one row to the next, in the coordinate's numbers; None if rows are not equally far apart."""
    time: OutputCoordinate | None
    """The coordinate of the samples' dimension, if it holds times."""
    jumps: Ints

    @property
    def coordinates(self) -> list[OutputCoordinate]:
        """``lead``, and ``valid_time``, whose values `valid_times` gives."""
        values, attributes = self._lead()
        shape = (len(self.offsets),) if self.is_axis else ()
        dims = (LEAD,) if self.is_axis else ()
        lead = OutputCoordinate(
            name=LEAD, dims=dims, shape=shape, dtype="i8", attributes=attributes, values=values.reshape(shape)
        )
        if self.time is None:
            return [lead]
        kept = {key: value for key, value in self.time.attributes.items() if key in ("units", "calendar")}
        valid = OutputCoordinate(
            name=VALID_TIME,
            dims=(*self.time.dims, *dims),
            shape=(*self.time.shape, *shape),
            dtype=self.time.dtype if self.step is not None else "f8",
            attributes={**kept, "long_name": "time that is predicted"},
        )
        return [lead, valid]

    def _lead(self) -> tuple[Array, dict[str, Any]]:
        offsets = np.array(self.offsets, np.int64)
        unit = None if self.time is None else unit_nanoseconds(self.time.attributes.get("units"))
        if self.step is None or unit is None:
            return offsets, {"long_name": "rows from the anchor to the row that is predicted"}
        nanoseconds = offsets * round(self.step * unit)
        for word, size in (("hours", 3_600 * 10**9), ("minutes", 60 * 10**9), ("seconds", 10**9)):
            if not (nanoseconds % size).any():
                return nanoseconds // size, {"units": word, "dtype": "timedelta64[ns]", "long_name": "lead time"}
        return nanoseconds, {"units": "nanoseconds", "dtype": "timedelta64[ns]", "long_name": "lead time"}

    def valid_times(self, coordinates: OutputCoordinates, anchors: Anchors, start: int, stop: int) -> Array:
        """Return the valid times of some places, [place] or [place, lead]."""
        assert self.time is not None
        offsets = np.array(self.offsets)
        if self.step is not None:
            begin = coordinates.blocks(self.time, start, stop)
            times: Array = (begin[:, None] + (offsets * self.step)[None, :]).astype(begin.dtype)
        else:
            times = np.concatenate([self._stored(coordinates, part) for part in anchors.parts(start, stop)])
        return times if self.is_axis else times[:, 0]

    def _stored(self, coordinates: OutputCoordinates, part: Any) -> Floats:
        """Return the times of the rows that are predicted; NaN for those that are not stored, or beyond a jump."""
        assert self.time is not None
        store, begin = coordinates.store_at(part.low)
        low = max(part.low, int(part.rows[0]) + min(self.offsets))
        high = min(part.high, int(part.rows[-1]) + max(self.offsets) + 1)
        times = np.full((len(part.rows), len(self.offsets)), np.nan)
        if low < high:
            stored = coordinates.at_rows(self.time, store, np.arange(low, high) - begin).astype(np.float64)
            run = np.searchsorted(self.jumps, np.arange(low, high), side="right")
            of_anchor = np.searchsorted(self.jumps, part.rows, side="right")
            for k, offset in enumerate(self.offsets):
                at = part.rows + offset - low
                known = (at >= 0) & (at < high - low)
                known[known] = run[at[known]] == of_anchor[known]
                times[known, k] = stored[at[known]]
        return times


def find_lead(
    coordinates: OutputCoordinates, anchors: Anchors, offsets: Sequence[int], is_axis: bool, jumps: Ints, dim: str
) -> Lead | None:
    """Return how far ahead predictions are; None if they are those of their own anchor.

    Parameters
    ----------
    coordinates : OutputCoordinates
    anchors : Anchors
    offsets : sequence of int
        ``data.target_offsets``.
    is_axis : bool
        True if they are a list.
    jumps : int64[jump]
        As of `predicted_anchors`.
    dim : str
        The dimension of the samples.
    """
    if not is_axis and not any(offsets):
        return None
    found = next((one for one in coordinates.found if one.name == dim and one.dims == (dim,)), None)
    is_time = found is not None and found.dtype != "str" and unit_nanoseconds(found.attributes.get("units")) is not None
    packed = found is not None and any(key in found.attributes for key in ("scale_factor", "add_offset"))
    time = found if is_time and not packed else None
    step = None if time is None else _step(coordinates, anchors, time, jumps)
    return Lead(offsets=tuple(offsets), is_axis=is_axis, step=step, time=time, jumps=jumps)


def _step(coordinates: OutputCoordinates, anchors: Anchors, time: OutputCoordinate, jumps: Ints) -> int | float | None:
    """Return the step between rows, if all steps but those to jumps are equal."""
    least = most = None
    for low, high in zip(anchors.low.tolist(), anchors.high.tolist(), strict=True):
        store, begin = coordinates.store_at(low)
        for start in range(low, high - 1, BLOCK_ROWS):
            rows = np.arange(start, min(start + BLOCK_ROWS, high - 1) + 1)
            steps = np.diff(coordinates.at_rows(time, store, rows - begin))
            steps = steps[~np.isin(rows[1:], jumps)]
            if len(steps):
                least = steps.min() if least is None else min(least, steps.min())
                most = steps.max() if most is None else max(most, steps.max())
    if least is None or most is None or not np.isfinite([least, most]).all() or least <= 0:
        return None
    is_equal = most - least <= (TOLERANCE * abs(most) if np.asarray(most).dtype.kind == "f" else 0)
    step: int | float = np.asarray(least).item()
    return step if is_equal else None
