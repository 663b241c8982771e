"""Places of values in a coordinate are those that xarray selects, also where it is read in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import example, given
from hypothesis import strategies as st

from dtrain.config.slices import LabelSlice
from dtrain.data.places import CoordinateIndex
from dtrain.data.samples import Coordinate
from dtrain.errors import InvalidConfig, UnsuitableVariable
from tests.data.helpers import variable

DAYS = {"units": "days since 2001-01-01"}


class Stored:
    """A coordinate in memory, read in blocks."""

    def __init__(self, values: Any, attributes: dict[str, Any] | None = None, block: int = 3, first: int = 0) -> None:
        self._values = np.asarray(values)
        self._block = block
        described = variable("t", len(self._values), 5)
        self.column = Coordinate(variable=described, attributes=attributes or {})
        self.first, self.stop = first, len(self._values)

    def values(self, start: int, stop: int) -> np.ndarray:
        return self._values[start:stop]

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(self.first, self.stop, self._block):
            yield start, self._values[start : start + self._block]


def index_of(values: Any, attributes: dict[str, Any] | None = None, block: int = 3) -> CoordinateIndex:
    return CoordinateIndex(Stored(values, attributes, block), "s.zarr", "t")  # type: ignore[arg-type]


def found(values: Any, wanted: Any, attributes: dict[str, Any] | None = None, block: int = 3) -> tuple[int, int, bool]:
    places = index_of(values, attributes, block).range("data.sel.t", wanted)
    return places.start, places.stop, places.is_one


def by_xarray(values: Any, wanted: Any, attributes: dict[str, Any] | None = None) -> list[int]:
    coordinate = xr.conventions.decode_cf_variable("t", xr.Variable(("t",), np.asarray(values), attributes or {}))
    array = xr.DataArray(np.arange(len(values)), coords={"t": coordinate}, dims="t")
    asked = slice(wanted.start, wanted.stop) if isinstance(wanted, LabelSlice) else wanted
    return np.atleast_1d(array.sel(t=asked).values).tolist()


values = st.integers(-9, 9) | st.sampled_from([0.5, 1.25, -7.75])


@given(
    some=st.lists(values, min_size=1, max_size=20),
    ends=st.tuples(values | st.none(), values | st.none()),
    descends=st.booleans(),
    dtype=st.sampled_from(["int64", "float32", "float64"]),
    block=st.integers(1, 25),
)
@example(some=[0, 0, 1, 1, 2], ends=(1, 1), descends=False, dtype="int64", block=1)
def test_a_slice_includes_both_ends(
    some: list[float], ends: tuple[float | None, float | None], descends: bool, dtype: str, block: int
) -> None:
    stored = np.sort(np.asarray(some, dtype))[:: -1 if descends else 1]
    start, stop = ends
    low, high = (stop, start) if descends and len(set(stored.tolist())) > 1 else (start, stop)
    inside = np.ones(len(stored), bool)
    inside &= True if low is None else stored >= low
    inside &= True if high is None else stored <= high
    expected = np.flatnonzero(inside).tolist()
    wanted = LabelSlice(start=start, stop=stop)
    if expected:
        first, after, is_one = found(stored, wanted, block=block)
        assert (list(range(first, after)), is_one) == (expected, False)
    else:
        with pytest.raises(InvalidConfig, match="selects nothing of t"):
            found(stored, wanted, block=block)


@given(
    some=st.lists(values, min_size=1, max_size=12),
    wanted=values,
    dtype=st.sampled_from(["int64", "float32", "float64"]),
    block=st.integers(1, 13),
)
@example(some=[3, 0, 0, 3], wanted=0, dtype="int64", block=3)
@example(some=[3, 0, 1, 3], wanted=3, dtype="int64", block=4)
def test_a_value_is_found_in_any_order(some: list[float], wanted: float, dtype: str, block: int) -> None:
    stored = np.asarray(some, dtype)
    where = np.flatnonzero(stored == wanted)
    if not len(where):
        with pytest.raises(InvalidConfig, match="t of s.zarr has no such value"):
            found(stored, wanted, block=block)
    elif len(where) < where[-1] + 1 - where[0]:
        with pytest.raises(InvalidConfig, match="at places that are no neighbours"):
            found(stored, wanted, block=block)
    else:
        assert found(stored, wanted, block=block) == (where[0], where[-1] + 1, len(where) == 1)


def test_numbers_as_they_are_written_find_those_stored_in_float32() -> None:
    stored = np.arange(0, 3, 0.1, dtype="float32")
    assert found(stored, 0.3) == (3, 4, True)
    assert found(stored, LabelSlice(start=0.3, stop=0.6)) == (3, 7, False)
    assert index_of(stored).texts(3) == ["0.3"]


YEARS = np.arange(800)  # days from 2001-01-01 to 2003-03-11
HOURS = {"units": "hours since 2001-01-01"}
DATES = {
    "a year": (YEARS, DAYS, "2001", (0, 365, False)),
    "a month": (YEARS, DAYS, "2002-02", (365 + 31, 365 + 59, False)),
    "a day of a coordinate of days": (YEARS, DAYS, "2001-01-03", (2, 3, True)),
    "a day of a coordinate of hours": (np.arange(0, 96, 6), HOURS, "2001-01-03", (8, 12, False)),
    "a time": (np.arange(0, 96, 6), HOURS, "2001-01-03T06:00", (9, 10, True)),
    "years": (YEARS, DAYS, LabelSlice(start="2001", stop="2002"), (0, 730, False)),
    "from a year on": (YEARS, DAYS, LabelSlice(start="2002"), (365, 800, False)),
    "to the end of a month": (YEARS, DAYS, LabelSlice(stop="2001-02"), (0, 59, False)),
    "a day, as a range": (
        np.arange(0, 96, 6),
        HOURS,
        LabelSlice(start="2001-01-03", stop="2001-01-03"),
        (8, 12, False),
    ),
    "between rows": (np.arange(0, 100, 7), DAYS, LabelSlice(start="2001-01-02", stop="2001-01-15"), (1, 3, False)),
    "a year, descending": (YEARS[::-1], DAYS, "2001", (435, 800, False)),
    "scattered years": ([0, 1, 400, 401, 800], DAYS, "2002", (2, 4, False)),
    "unsorted": ([0, 400, 401, 2], DAYS, "2002", (1, 3, False)),
}


@pytest.mark.sampled(7)
@pytest.mark.parametrize("block", [1, 4, 10_000])
@pytest.mark.parametrize("kind", DATES)
def test_parts_of_dates(kind: str, block: int) -> None:
    stored, attributes, wanted, expected = DATES[kind]
    assert found(stored, wanted, attributes, block=max(block, 1))[:2] == expected[:2]
    if block == 10_000:
        assert found(stored, wanted, attributes, block)[2] == expected[2]
        assert by_xarray(stored, wanted, attributes) == list(range(*expected[:2]))


def test_a_range_of_dates_that_descend_goes_from_the_later_one_to_the_earlier() -> None:
    wanted = LabelSlice(start="2002", stop="2001-12-30")
    assert found(YEARS[::-1], wanted, DAYS, 100) == (70, 437, False)  # 2002-12-31 is row 729 of 800, counted from 0
    assert index_of(YEARS[::-1], DAYS).texts(70, 436) == ["2002-12-31", "2001-12-30"]


def test_texts_and_durations() -> None:
    assert found(np.array(["a", "b", "c", "e"]), "b") == (1, 2, True)
    assert found(np.array(["a", "b", "c", "e"]), LabelSlice(start="b", stop="d")) == (1, 3, False)
    durations = (np.arange(0, 48, 6).astype("m8[h]")).astype("m8[s]")
    assert found(durations, "6h") == (1, 2, True)
    assert found(durations, LabelSlice(start="6h", stop="12h")) == (1, 3, False)


REFUSED = {
    "no such number": ([1000, 850, 500], {}, 700, "no such value.\nThe nearest are 850 and 500."),
    "beyond the end": ([1, 5, 9], {}, 300, "no such value.\nThe nearest is 9."),
    "before the first": ([1, 5, 9], {}, -1, "no such value.\nThe nearest is 1."),
    "no such date": (YEARS, DAYS, "2005", "no such value.\nThe nearest is 2003-03-11."),
    "no date": (YEARS, DAYS, "soon", 'data.sel.t = "soon": is no value of t.\nt begins with 2001-01-01.'),
    "no end": (YEARS, DAYS, LabelSlice(start="soon"), 'data.sel.t = { start = "soon" }: is no value of t'),
    "a number for dates": (YEARS, DAYS, 2001, 't holds dates or times.\nWrite a text: "2001".'),
    "a text for numbers": ([1, 5, 9], {}, "5", "t holds numbers.\nWrite a number, without quotes."),
    "the other way round": (
        [1000, 850, 500],
        {},
        LabelSlice(start=500, stop=900),
        "selects nothing of t, which goes from 1000 to 500.\nIt descends: write start = 900, stop = 500.",
    ),
    "nothing": (
        [1, 5, 9],
        {},
        LabelSlice(start=6, stop=8),
        "selects nothing of t, which goes from 1 to 9.\nChoose values between these; both ends are included.",
    ),
    "a range without order": ([1, 9, 5], {}, LabelSlice(start=5), "t neither ascends nor descends"),
    "a range with a missing value": (
        [1, np.nan, 5],
        {},
        LabelSlice(start=1),
        "or has missing values: it has no ranges",
    ),
    "a range with a missing date": (
        np.array(["2001-01-01", "NaT", "2001-01-03"], "M8[s]"),
        {},
        LabelSlice(start="2001"),
        "or has missing values: it has no ranges",
    ),
    "scattered": ([0, 0, 5, 0], {}, 0, "has this value at places that are no neighbours"),
    "a year that is scattered": ([0, 400, 1], DAYS, "2001", "has this value at places that are no neighbours"),
}


@pytest.mark.sampled(21)
@pytest.mark.parametrize("block", [1, 2, 10_000])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_says_what_is_there(kind: str, block: int) -> None:
    stored, attributes, wanted, said = REFUSED[kind]
    with pytest.raises(InvalidConfig) as refused:
        found(stored, wanted, attributes, block)
    assert str(refused.value).startswith("data.sel.t = ")
    assert said in str(refused.value)


def test_bools_order_nothing() -> None:
    with pytest.raises(UnsuitableVariable, match="t holds bools"):
        found(np.array([True, False]), 1)


@pytest.mark.parametrize(("has_cftime", "cure"), [(False, "install the package cftime, or choose"), (True, ": choose")])
def test_a_calendar_that_cannot_be_decoded_says_so(
    monkeypatch: pytest.MonkeyPatch, has_cftime: bool, cure: str
) -> None:
    monkeypatch.setattr("dtrain.data.places.find_spec", lambda name: object() if has_cftime else None)
    with pytest.raises(UnsuitableVariable, match=rf"s\.zarr: t cannot be decoded.*\n.*{cure} by index"):
        found(YEARS, "2001", {**DAYS, "calendar": "a calendar of mine"})


OTHER_CALENDARS = {
    "no leap day": ("noleap", 1500, "2004-03-01", (3 * 365 + 59, 3 * 365 + 60)),
    "a month without a leap day": ("noleap", 1500, "2004-02", (3 * 365 + 31, 3 * 365 + 59)),
    "every year is a leap year": ("all_leap", 800, "2001-02-29", (59, 60)),
    "30 days in February": ("360_day", 800, "2001-02-30", (59, 60)),
    "a year of 360 days": ("360_day", 800, "2002", (360, 720)),
    "a slice of months": ("360_day", 800, LabelSlice(start="2001-12", stop="2002-01"), (330, 390)),
    "the Julian calendar": ("julian", 800, "2002", (365, 730)),
    "the usual calendar by its full name": ("proleptic_gregorian", 400, "2001", (0, 365)),
}


@pytest.mark.parametrize("descends", [False, True])
@pytest.mark.parametrize("kind", OTHER_CALENDARS)
def test_dates_of_other_calendars_are_found_by_their_parts(kind: str, descends: bool) -> None:
    pytest.importorskip("cftime")
    calendar, days, wanted, (start, stop) = OTHER_CALENDARS[kind]
    stored, attributes = np.arange(days), {**DAYS, "calendar": calendar}
    if descends:
        stored, start, stop = stored[::-1], days - stop, days - start
        if isinstance(wanted, LabelSlice):
            wanted = LabelSlice(start=wanted.stop, stop=wanted.start)
    assert found(stored, wanted, attributes, block=100)[:2] == (start, stop)
