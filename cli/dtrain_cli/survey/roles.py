"""The roles of dimensions and variables, by their names and their CF attributes. Nothing is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dtrain.data.encoding import Encoding

Attributes: TypeAlias = Mapping[str, Any]

TIME = {"time", "times", "datetime", "date", "dates", "timestamp", "t", "hour", "day", "week", "month", "year"}
EARTH = {"lat", "latitude", "lon", "longitude", "rlat", "rlon", "lats", "lons"}
PLANE = {"y", "x", "height", "width", "h", "w", "row", "rows", "col", "cols", "column", "columns", "i", "j"}
DEPTH = {"z", "depth", "slice", "slices", "plane", "planes"}
LEVEL = {"level", "levels", "lev", "plev", "pressure", "isobaric", "altitude", "alt", "height", "depth", "z", "layer"}
CHANNEL = {"c", "channel", "channels", "band", "bands", "rgb", "color", "colour", "wavelength", "spectral"}
SAMPLE = {"n", "sample", "samples", "image", "images", "cell", "cells", "obs", "index", "id", "row", "batch", "frame"}
SAMPLE |= {"case", "patient", "subject", "item", "observation", "record", "event", "station", "idx", "num", "number"}
BOUNDS = {"bnds", "bnd", "bound", "bounds", "nv", "nbnd", "nvertex", "vertices", "vertex", "nvertices"}

MOST_COLOURS = 4
"""An unnamed last dimension of an image is one of colours if it is at most so long."""
MIN_PLACES = 8
"""Unnamed dimensions are those of an image if they are at least so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayFacts:
    """An array of numbers, as its metadata describe it."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    stored: str
    """Kind of the stored dtype: ``f``, ``i``, ``u`` or ``b``."""
    kind: str
    """Kind of the decoded dtype."""
    itemsize: int
    """Bytes of a stored value."""
    encoding: Encoding | None
    attributes: Attributes
    is_coordinate: bool = False
    """Other variables name it among their coordinates; it can be a target, and is no input."""
    at: str = ""
    """Path below the group of the array that holds the values, if it has another name than the variable."""
    chunks: tuple[int, ...] = ()
    """Lengths of a chunk of that array."""
    categories: int = 0
    """Number of categories whose names the store keeps."""

    @property
    def sizes(self) -> dict[str, int]:
        """Length by dimension."""
        return dict(zip(self.dims, self.shape, strict=True))

    @property
    def is_packed(self) -> bool:
        """True if stored values are other numbers than they mean."""
        return self.encoding is not None and self.encoding.is_packed

    @property
    def is_integer(self) -> bool:
        """True if values are whole numbers or bools as they are stored; some of them may mark a missing value."""
        return self.stored in "iub" and not self.is_packed

    def without(self, *dims: str) -> tuple[str, ...]:
        """Return the other dimensions, in stored order."""
        return tuple(dim for dim in self.dims if dim not in dims)


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """The arrays of a group."""

    path: str
    group: str
    """Below the path; empty for the root."""
    arrays: Mapping[str, ArrayFacts]
    """Arrays of numbers that may be inputs or targets, by name."""
    axes: Mapping[str, Attributes]
    """By dimension: the attributes of its coordinate, if it has one."""
    time_dims: frozenset[str]
    """Dimensions whose coordinate holds dates."""
    strings: frozenset[str]
    """Variables of strings."""
    left_out: Mapping[str, str]
    """By name: why an array can be neither input nor target."""
    attributes: Attributes
    """Of the group."""
    layout: str = ""
    """Name of the layout of the group; empty if xarray reads it."""
    others: tuple[str, ...] = ()
    """Groups of the same layout that are not looked into."""


def words(name: str) -> list[str]:
    """Return the words of a name, in lower case.

    >>> words("cellType_2"), words("x_geostationary")
    (['cell', 'type', '2'], ['x', 'geostationary'])
    """
    parts = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    return [word.lower() for word in re.findall(r"[A-Za-z]+|\d+", parts)]


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Return a key that sorts names with numbers by the numbers.

    >>> sorted(["x10", "x9", "a"], key=natural)
    ['a', 'x9', 'x10']
    """
    parts = re.findall(r"\d+|\D+", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def has_word(name: str, wanted: Iterable[str]) -> bool:
    """Return True if one of the words of a name is wanted."""
    return not set(words(name)).isdisjoint(wanted)


def is_time(dim: str, contents: Contents) -> bool:
    """Return True if a dimension is time: its coordinate holds dates, or it is called so."""
    return dim in contents.time_dims or (has_word(dim, TIME) and not is_channel(dim))


def is_earth(dim: str, contents: Contents) -> bool:
    """Return True if a dimension is a direction on the earth, also of a projection."""
    attributes = contents.axes.get(dim, {})
    named = f"{attributes.get('units', '')} {attributes.get('standard_name', '')}".lower()
    said = any(text in named for text in ("degrees_n", "degrees_e", "degree_n", "degree_e", "projection_", "grid_l"))
    return said or str(attributes.get("axis", "")).upper() in ("X", "Y") or has_word(dim, EARTH)


def is_channel(dim: str) -> bool:
    """Return True if a dimension is called like one of channels."""
    return has_word(dim, CHANNEL)


def is_level(dim: str, contents: Contents) -> bool:
    """Return True if a dimension is one of heights, depths or pressures."""
    attributes = contents.axes.get(dim, {})
    return "positive" in attributes or str(attributes.get("axis", "")).upper() == "Z" or has_word(dim, LEVEL)


def is_place(dim: str, contents: Contents) -> bool:
    """Return True if a dimension is called like one of an image or a map."""
    return is_earth(dim, contents) or words(dim)[:1] in [[name] for name in PLANE]


def space_of(array: ArrayFacts, contents: Contents) -> tuple[str, ...]:
    """Return the dimensions of an array that are places of an image or a map, in stored order; empty for none.

    They are found by their names and attributes; else the last two are, if they are long enough and neither time,
    channels, levels nor samples.
    """
    sizes = array.sizes
    named = [dim for dim in array.dims if is_place(dim, contents) and not is_time(dim, contents)]
    if len(named) >= 2:
        volume = [dim for dim in array.dims if dim in named or (words(dim)[:1] in [[name] for name in DEPTH])]
        is_volume = len(volume) == 3 and not any(is_earth(dim, contents) for dim in named)
        is_volume = is_volume and min(sizes[dim] for dim in volume) >= MIN_PLACES
        return tuple(volume if is_volume else named[-2:])
    rest = [dim for dim in array.dims if not is_channel(dim) and not is_time(dim, contents)]
    rest = [dim for dim in rest if words(dim)[:1] not in [[name] for name in SAMPLE]]
    if len(array.dims) > 3 and rest[-3:] == list(array.dims[-3:]) and sizes[rest[-1]] <= MOST_COLOURS:
        rest = rest[:-1]
    elif array.dims[-2:] != tuple(rest[-2:]):
        return ()
    if len(rest) < 2 or len(array.dims) < 3:
        return ()
    return tuple(rest[-2:]) if min(sizes[dim] for dim in rest[-2:]) >= MIN_PLACES else ()
