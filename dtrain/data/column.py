"""Columns: arrays of one dimension beside the variables, such as coordinates. Found, described, read in blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from dtrain.data.cf import CF_ATTRIBUTES, TIME_ATTRIBUTES, encoding_of
from dtrain.data.dataset import NamedArray, find_named
from dtrain.data.encoding import Array
from dtrain.data.read.extent import MOST_COLUMN_BYTES, check_grid
from dtrain.data.read.faults import Faults, chunk_missing
from dtrain.data.read.open import open_arrays
from dtrain.data.read.presence import absent_chunks, some_absent
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore
from dtrain.data.read.zarr import ZarrReader, best_settings
from dtrain.data.samples import Coordinate, Samples
from dtrain.data.variable import Variable
from dtrain.errors import ChunkMissing, ChunkTooLarge, DtrainError, StoreUnavailable, UnsuitableVariable, one_line

BLOCK_ROWS = 1 << 18
"""About so many values are read at once."""
NUMBERS, DATES, TEXTS = "iuf", "mM", "TOUS"
"""Kinds of dtypes."""


# Described ------------------------------------------------------------------------------------------------


def find_coordinate(
    store: ReadStore, group: str, names: Iterable[str], dim: str, size: int
) -> tuple[str, NamedArray] | str:
    """Return name and array of a dimension's coordinate, or why there is none.

    It is looked for in the groups of the variables that have the dimension, the nearest first.

    Parameters
    ----------
    store : ReadStore
    group : str
        ``data.group``.
    names : iterable of str
        Variables that have the dimension.
    dim : str
    size : int
        Length of the dimension.
    """
    for name in groups_above(names, dim):
        try:
            named = find_named(store, group, name)
        except StoreUnavailable:
            raise
        except DtrainError as error:  # a dtype or codec that zarr does not know, or a server that hides what is absent
            return f"the coordinate {name} cannot be opened: {one_line(error)}"
        if named is not None and (named.shape != (size,) or named.dims != (dim,)):
            return f"{name} has no coordinate of one dimension"
        if named is not None:
            return claims_too_much(store.path, name, named) or (name, named)
    return f"{dim} has no coordinate"


def groups_above(names: Iterable[str], wanted: str) -> list[str]:
    """Return the paths that a name may have beside variables, and in the groups above them: the nearest first.

    >>> groups_above(["era5/wind/u10", "era5/t2m"], "lat")
    ['era5/wind/lat', 'era5/lat', 'lat']
    """
    places = (
        [*parts[:depth], wanted] for parts in (n.split("/")[:-1] for n in names) for depth in range(len(parts), -1, -1)
    )
    return list(dict.fromkeys(map("/".join, places)))


def claims_too_much(path: str, name: str, named: NamedArray) -> str:
    """Return why a column is larger than any that is read; empty if it is not."""
    array = named.array
    sizes = array.shape, array.chunks, array.shards or array.chunks
    try:
        check_grid(path, name, *sizes, np.dtype(array.dtype).itemsize, most=MOST_COLUMN_BYTES)
    except (UnsuitableVariable, ChunkTooLarge) as error:
        return one_line(error)
    return ""


def describe_column(path: str, name: str, named: NamedArray) -> Coordinate | str:
    """Describe an array of one dimension, or return why its attributes cannot be understood."""
    array, dtype = named.array, np.dtype(named.array.dtype)
    known = (*CF_ATTRIBUTES, *TIME_ATTRIBUTES) if dtype.kind in NUMBERS else ()
    attributes = {key: named.attributes[key] for key in known if key in named.attributes}
    if why := claims_too_much(path, name, named):
        return why
    try:
        encoding = encoding_of(path, name, attributes, dtype, zarr_format=array.metadata.zarr_format)
    except UnsuitableVariable as error:
        return one_line(error)
    shape, chunks, objects = (
        tuple(int(n) for n in lengths) for lengths in (array.shape, array.chunks, array.shards or array.chunks)
    )
    variable = Variable(
        name=name,
        dims=named.dims,
        shape=shape,
        dtype="T" if dtype.kind == "T" else dtype.str,
        chunks=chunks,
        objects=objects,
        sample_axis=0,
        checksums=False,
        select=((0, shape[0], 1),),
        encoding=encoding,
        path="" if named.path == name else named.path,
    )
    return Coordinate(variable=variable, attributes=attributes)


# Read -----------------------------------------------------------------------------------------------------


class ColumnReader:
    """Reads a column, block by block.

    Parameters
    ----------
    samples : Samples
        Of the store.
    column : Coordinate
    first, stop : int
        The places that are read.
    fills : bool
        True if a chunk that is not stored may stand for its fill value (``data.missing = "auto"``).

    Raises
    ------
    ChunkMissing
        A chunk of more than one value is not stored.
    """

    def __init__(self, samples: Samples, column: Coordinate, first: int, stop: int, *, fills: bool = False) -> None:
        self.column, self.first, self.stop = column, first, stop
        self.absent = 0
        """Chunks that are not stored, where they may be."""
        config = samples.config.model_copy(update={"missing": "fill"})
        variables = (*samples.variables, column.variable)
        both = replace(samples, config=config, variables=variables, first_row=first, num_samples=stop)
        with best_settings(both):
            store, arrays = open_arrays(both)
        store.watch(arrays[column.variable.name])
        if samples.config.missing == "error" or (samples.config.missing == "auto" and not fills):
            _check_presence(both, store, arrays, column.variable)
        elif samples.config.missing == "auto":
            self.absent = sum(chunk.chunks for chunk in absent_chunks(both, store, arrays, column.variable, full=True))
        self._reader = ZarrReader(store, arrays, Faults(both, arrays))

    def values(self, start: int, stop: int) -> Array:
        """Return stored values of places ``start:stop``, numbers in native byte order."""
        variable = self.column.variable
        out = np.empty(stop - start, variable.dtype)
        self._reader.read(variable, variable.selection(start, stop), out)
        if out.dtype.kind == "S":
            return np.char.decode(out, "utf-8", "replace")
        return out if out.dtype.kind in TEXTS else out.astype(out.dtype.newbyteorder("="), copy=False)

    def blocks(self) -> Iterator[tuple[int, Array]]:
        """Yield the first place of each block, and its stored values."""
        chunk = self.column.variable.chunk_rows
        together = chunk * max(1, BLOCK_ROWS // chunk)
        for start in range(self.first - self.first % together, self.stop, together):
            first = max(start, self.first)
            values = self.values(first, min(start + together, self.stop))
            for low in range(0, len(values), BLOCK_ROWS):  # a chunk may be long
                yield first + low, values[low : low + BLOCK_ROWS]


def _check_presence(samples: Samples, store: ReadStore, arrays: Mapping[str, ArrayLike], variable: Variable) -> None:
    """Raise for a missing chunk of more than one row; of one row, zarr leaves it out if it holds the fill value."""
    looks = samples.store.is_local and variable.object_rows > 1
    if looks and (gone := some_absent(samples, arrays[variable.name], variable)) is not None:
        raise gone
    for chunk in absent_chunks(samples, store, arrays, variable, full=True):
        if chunk.stop - chunk.start <= 1:
            continue
        if np.dtype(variable.dtype).kind in TEXTS:
            raise ChunkMissing(
                f"{samples.path}: chunk {chunk.key} of {variable.name} is missing; Zarr would read it as empty texts.",
                'Repair the store. If it leaves out chunks of empty texts: data.missing = "fill".',
            )
        raise chunk_missing(samples, variable, chunk.key, 1, chunk.inner)
