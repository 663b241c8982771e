"""Places of values in a coordinate, as the indexes of xarray and pandas find them.

A long coordinate is read and looked up in blocks: what a slice selects of the whole is what it selects of each block.
One that descends is looked up from its end, so that parts of dates select there too.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.config.slices import LabelSlice
from dtrain.data.cf import texts_of
from dtrain.data.column import DATES, NUMBERS, ColumnReader
from dtrain.data.encoding import Array
from dtrain.errors import InvalidConfig, NothingSelected, UnsuitableVariable, one_line

if TYPE_CHECKING:
    import xarray as xr
    from xarray.indexes import PandasIndex


@dataclass(frozen=True, slots=True)
class Places:
    """Neighbouring places of a dimension."""

    start: int
    stop: int
    is_one: bool = False
    """True for a value that stands at one place, and is no part of a date that covers it."""


@dataclass(frozen=True, slots=True)
class _Block:
    """Some values of the coordinate, ascending where it is sorted."""

    start: int
    stop: int
    index: PandasIndex
    is_sorted: bool
    """They follow each other, and those of the block before."""


class CoordinateIndex:
    """Finds values in the coordinate of a dimension.

    Parameters
    ----------
    reader : ColumnReader
        Reads the coordinate, at the places that are looked at.
    path : str
        Names the store in errors.
    dim : str
    """

    def __init__(self, reader: ColumnReader, path: str, dim: str) -> None:
        self._reader, self._path, self._dim = reader, path, dim
        self._descends = False
        first, last = self._stored(reader.first), self._stored(reader.stop - 1)
        ends = self._index(np.concatenate([first, last])).index
        self._descends = bool(ends.is_monotonic_decreasing and not ends.is_monotonic_increasing)

    def texts(self, *places: int) -> list[str]:
        """Return the values at some places in the coordinate's own words."""
        column, stored = self._reader.column, [self._stored(place) for place in places]
        return texts_of(column.variable.name, np.concatenate(stored), column.attributes)

    def range(self, key: str, wanted: str | float | LabelSlice) -> Places:
        """Return the places of a value, or of a slice: both ends are included.

        Parameters
        ----------
        key : str
            The key of the configuration that asks for it.
        wanted : value or LabelSlice
            Without its step.

        Raises
        ------
        NothingSelected
            There is no such value, or none between both ends.
        InvalidConfig
            The values are no neighbours, or of another kind than the coordinate's.
        """
        if not isinstance(wanted, LabelSlice):
            return self._value(f"{key} = {json.dumps(wanted)}", wanted)
        ends = {name: end for name, end in (("start", wanted.start), ("stop", wanted.stop)) if end is not None}
        text = f"{key} = {{ {', '.join(f'{name} = {json.dumps(end)}' for name, end in ends.items())} }}"
        for end in ends.values():
            self._check_kind(text, end)
        found = self._slice(text, wanted.start, wanted.stop)
        if found is None:
            raise self._nothing(text, wanted)
        return found

    # Slices -------------------------------------------------------------------------------------------------

    def _slice(self, text: str, start: Any, stop: Any) -> Places | None:
        low, high = (stop, start) if self._descends else (start, stop)
        first = after = None
        for block in self._blocks():
            if not block.is_sorted:
                raise InvalidConfig(
                    f"{text}: {self._path}: {self._dim} neither ascends nor descends, or has missing values: it has no "
                    "ranges.",
                    f"Sort the store along {self._dim}, or choose by index (data.isel).",
                )
            part = self._ask(text, block, slice(low, high))
            if part.stop > part.start:
                first, after = part.start if first is None else first, part.stop
        return None if first is None or after is None else Places(first, after)

    def _nothing(self, text: str, wanted: LabelSlice) -> NothingSelected:
        ends = " to ".join(self.texts(self._reader.first, self._reader.stop - 1))
        said = f"{text}: selects nothing of {self._dim}, which goes from {ends}."
        if wanted.start is not None and wanted.stop is not None and self._slice(text, wanted.stop, wanted.start):
            order = "descends" if self._descends else "ascends"
            start, stop = json.dumps(wanted.stop), json.dumps(wanted.start)
            return NothingSelected(said, f"It {order}: write start = {start}, stop = {stop}.")
        return NothingSelected(said, "Choose values between these; both ends are included.")

    # Values -------------------------------------------------------------------------------------------------

    def _value(self, text: str, wanted: Any) -> Places:
        self._check_kind(text, wanted)
        found: list[Places] = []
        for block in self._blocks():
            try:
                found.append(self._ask(text, block, wanted))
            except KeyError:
                continue
        if not found:
            raise NothingSelected(
                f"{text}: {self._dim} of {self._path} has no such value.", self._nearest(text, wanted)
            )
        start, stop = found[0].start, found[-1].stop
        if sum(part.stop - part.start for part in found) < stop - start:
            raise self._scattered(text)
        return Places(start, stop, is_one=len(found) == 1 and found[0].is_one)

    def _scattered(self, text: str) -> InvalidConfig:
        return InvalidConfig(
            f"{text}: {self._dim} of {self._path} has this value at places that are no neighbours.",
            f"Sort the store along {self._dim}, or choose by index (data.isel).",
        )

    def _nearest(self, text: str, wanted: Any) -> str:
        """Name the values before and after one that is not there; the first ones if they are not sorted."""
        before = after = None
        for block in self._blocks():
            if not block.is_sorted:
                few = range(self._reader.first, min(self._reader.stop, self._reader.first + 5))
                more = ", ..." if few.stop < self._reader.stop else ""
                return f"It has {', '.join(self.texts(*few))}{more}."
            place = self._ask(text, block, slice(wanted, None))
            low, high = place.start, place.stop
            if self._descends:  # the values from the wanted one on are the first of the block
                after = high - 1 if high > low else after
                before = high if before is None and high < block.stop else before
            else:
                before = low - 1 if low > block.start else before
                after = low if after is None and high > low else after
        near = sorted(place for place in (before, after) if place is not None)
        return f"The nearest {'is' if len(near) == 1 else 'are'} {' and '.join(self.texts(*near))}."

    # Asked --------------------------------------------------------------------------------------------------

    def _ask(self, text: str, block: _Block, wanted: Any) -> Places:
        """Return the places of a block that a value or a slice of the sorted values selects.

        Raises
        ------
        KeyError
            The value is not there.
        """
        try:
            answer: Any = block.index.sel({self._dim: wanted}).dim_indexers[self._dim]
        except KeyError:
            if isinstance(wanted, slice) or self._is_unknown(wanted, block):
                raise self._not_understood(text) from None
            raise
        except (TypeError, ValueError) as error:
            raise self._not_understood(text, one_line(error)) from None
        size = block.stop - block.start
        if isinstance(answer, slice):
            low, high, _ = answer.indices(size)
        elif np.ndim(answer):  # a mask or the places: the value stands at several places
            where = np.flatnonzero(answer) if answer.dtype == bool else np.sort(answer)
            low, high = int(where[0]), int(where[-1]) + 1
            if len(where) < high - low:
                raise self._scattered(text)
        else:
            low, high = int(answer), int(answer) + 1
        if self._descends:
            low, high = size - high, size - low
        return Places(block.start + low, block.start + high, is_one=not isinstance(answer, slice) and high - low == 1)

    def _is_unknown(self, wanted: Any, block: _Block) -> bool:
        """Return True if a text is no date, which pandas does not tell from one that is not there."""
        if block.index.index.dtype.kind not in DATES:
            return False
        try:
            block.index.index.slice_indexer(wanted, wanted)
        except (TypeError, ValueError):
            return True
        except KeyError:
            return False
        return False

    def _not_understood(self, text: str, why: str = "") -> InvalidConfig:
        (value,) = self.texts(self._reader.first)
        return InvalidConfig(
            f"{text}: is no value of {self._dim}{f' ({why})' if why else ''}.", f"{self._dim} begins with {value}."
        )

    def _check_kind(self, text: str, wanted: str | float) -> None:
        """Refuse a number where texts are needed, and the reverse: xarray would compare them somehow."""
        kind = self._index(self._stored(self._reader.first)).index.dtype.kind
        if kind in NUMBERS and isinstance(wanted, str):
            raise InvalidConfig(f"{text}: {self._dim} holds numbers.", "Write a number, without quotes.")
        if kind not in NUMBERS and not isinstance(wanted, str):
            what = "dates or times" if kind in DATES else "texts or dates"
            raise InvalidConfig(f"{text}: {self._dim} holds {what}.", f'Write a text: "{wanted}".')

    # Read ---------------------------------------------------------------------------------------------------

    def _blocks(self) -> Iterator[_Block]:
        last: Array | None = None
        for start, stored in self._reader.blocks():
            together = stored if last is None else np.concatenate([last, stored])
            is_sorted = bool(self._index(together).index.is_monotonic_increasing)
            yield _Block(start, start + len(stored), self._index(stored), is_sorted)
            last = stored[-1:].copy()

    def _stored(self, place: int) -> Array:
        return self._reader.values(place, place + 1)

    def _index(self, stored: Array) -> PandasIndex:
        """Return the index of decoded values, from the last to the first if the coordinate descends."""
        from xarray.indexes import PandasIndex

        decoded = self._decoded(stored)
        return PandasIndex(decoded[::-1] if self._descends else decoded, self._dim, coord_dtype=decoded.dtype)

    def _decoded(self, stored: Array) -> xr.Variable:
        import xarray as xr

        column = self._reader.column
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of dates that numpy does not hold
            try:
                decoded: xr.Variable = xr.conventions.decode_cf_variable(
                    column.variable.name, xr.Variable((self._dim,), stored, dict(column.attributes))
                )
                decoded.load()
            except Exception as error:
                has_calendar = "calendar" in column.attributes and find_spec("cftime") is None
                needs = "install the package cftime, or " if has_calendar else ""
                raise UnsuitableVariable(
                    f"{self._path}: {column.variable.name} cannot be decoded: {one_line(error)}",
                    f"Its attributes are {dict(column.attributes)}: {needs}choose by index (data.isel).",
                ) from None
        if decoded.dtype.kind == "b":
            raise UnsuitableVariable(
                f"{self._path}: {column.variable.name} holds bools, which order nothing.",
                "Choose by index (data.isel).",
            )
        return decoded
