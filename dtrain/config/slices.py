"""What selects places of a dimension in the configuration: by index (``isel``), or by coordinate (``sel``)."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, PrivateAttr

from dtrain.config.table import FROZEN, Finite, Int, Positive
from dtrain.config.values import plain_value


class Slice(BaseModel):
    """``{ start, stop, step }`` along one dimension."""

    model_config = FROZEN

    start: Int = 0
    """The first."""
    stop: Int
    """The end, which is not included."""
    step: Positive = 1
    """From one to the next."""


def _sequence(given: Any) -> Any:
    """Return a range or a one-dimensional array of Python as a list, anything else as it is."""
    is_array = type(given).__module__ == "numpy" and getattr(given, "ndim", None) == 1
    return plain_value(list(given)) if isinstance(given, range) or is_array else given


class DimSlice(BaseModel):
    """``{ start, stop, step }`` of a dimension, as a slice of Python: ends may be left out, or count from the end."""

    model_config = FROZEN

    start: Int = 0
    """The first index; a negative one counts from the end."""
    stop: Int | None = None
    """The end, which is not included; left out: the end of the dimension."""
    step: Positive = 1
    """From one index to the next."""
    _listed: bool = PrivateAttr(False)

    @property
    def is_list(self) -> bool:
        """Whether each index was named: then each of them must be there, whereas a slice may reach beyond the end."""
        return self._listed


def _table(given: slice) -> dict[str, Any]:
    """Return a slice of Python as a table."""
    named = {"start": given.start, "stop": given.stop, "step": given.step}
    return {key: plain_value(value) for key, value in named.items() if value is not None}


def _selector(given: Any) -> Any:
    """Return a slice as a table of `DimSlice`, and a list of indices as a `DimSlice`; anything else as it is."""
    if isinstance(given, slice):
        return _table(given)
    indices = _sequence(given)
    return _slice_of_indices(list(indices)) if isinstance(indices, list | tuple) else given


def _slice_of_indices(indices: list[Any]) -> DimSlice:
    """Return the slice that selects the same indices as a list."""
    if not all(type(index) is int for index in indices):
        raise ValueError("a list holds integers only; allowed are an index, a start and a stop, or a list of indices")
    first, last = (indices[0], indices[-1]) if indices else (0, -1)
    step = indices[1] - first if len(indices) > 1 else 1
    if not indices or step < 1 or indices != list(range(first, last + 1, step)) or first < 0 <= last:
        raise ValueError("a list selects indices at equal intervals, upwards, such as [0, 1, 2] or [0, 5, 10]")
    selected = DimSlice(start=first, stop=None if last == -1 else last + 1, step=step)
    selected._listed = True
    return selected


# By coordinate --------------------------------------------------------------------------------------------


def _label(given: Any) -> Any:
    """Return a date as text: a whole day, or exactly a time; anything else as it is."""
    is_date = isinstance(given, date) or (hasattr(given, "calendar") and hasattr(given, "isoformat"))  # or of cftime
    return given.isoformat() if is_date else given


Label = Annotated[str | Int | Finite, BeforeValidator(_label)]
"""A value of a coordinate. Dates are texts, of which pandas understands parts: ``2017``, ``2017-06``."""


class LabelSlice(BaseModel):
    """``{ start, stop, step }`` of a dimension, by values of its coordinate: both ends are included, as in xarray."""

    model_config = FROZEN

    start: Label | None = None
    """The first value of the coordinate; left out: its beginning."""
    stop: Label | None = None
    """The last value, which is included; left out: its end."""
    step: Positive = 1
    """Take every n-th."""


def _labels(given: Any) -> Any:
    """Return a slice as a table of `LabelSlice`, a range or an array as a list, and a date as text."""
    return _table(given) if isinstance(given, slice) else _label(_sequence(given))


Offsets = Annotated[Int | tuple[Int, ...] | Slice, BeforeValidator(_sequence)]
"""Whole numbers along one dimension: one, several, or a slice."""
Selector = Annotated[
    Int | DimSlice, BeforeValidator(_selector, json_schema_input_type=Int | DimSlice | tuple[Int, ...])
]
"""One index of a dimension, or a slice of it."""
LabelSelector = Annotated[str | Int | Finite | tuple[Label, ...] | LabelSlice, BeforeValidator(_labels)]
"""A value of a dimension's coordinate, several values, or a slice."""
LabelRange = Annotated[str | Int | Finite | LabelSlice, BeforeValidator(_labels)]
"""A value of a coordinate, or a slice: rows that belong together."""
