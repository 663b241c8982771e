"""The coordinates that predictions take over from a store: found by name, read block by block, as they are stored.

A coordinate keeps its numbers and its attributes, so that dates and packed values mean what they meant. Those of the
dimension of the samples have the places of the anchors that are predicted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from dtrain.data.cf import PACKING, dates_as_numbers, in_units, stored_mark
from dtrain.data.column import TEXTS, find_coordinate, groups_above
from dtrain.data.dataset import NamedArray, find_named, hierarchy_of, open_named
from dtrain.data.encoding import Array
from dtrain.data.layouts.anndata import row_names
from dtrain.data.layouts.hierarchy import Hierarchy
from dtrain.data.plan.hashing import Ints
from dtrain.data.plan.predicted import Anchors
from dtrain.data.read.kind import at_snapshot
from dtrain.data.read.open import open_store
from dtrain.data.read.retry import settle
from dtrain.data.read.store import ReadStore, objects_of
from dtrain.data.samples import Samples
from dtrain.data.variable import Variable
from dtrain.errors import ChunkMissing, DataNotFound, DtrainError, one_line

LOG = logging.getLogger("dtrain")

BLOCK_ROWS = 1 << 18
"""Rows that are read at once, at most."""
Range = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputCoordinate:
    """A coordinate that is written beside predictions."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    """``str`` for texts."""
    attributes: Mapping[str, Any]
    values: Array | None = None
    """None where it has the dimension of the samples: `OutputCoordinates.blocks` reads it."""


class OutputCoordinates:
    """Finds and reads the coordinates of predictions.

    Parameters
    ----------
    samples : Samples
        Of the inputs alone, or with the targets.
    anchors : Anchors
    dims : sequence of str
        Of all predictions.
    """

    def __init__(self, samples: Samples, anchors: Anchors, dims: Sequence[str]) -> None:
        self._samples, self._anchors = samples, anchors
        self._dims = tuple(dim for dim in dict.fromkeys(dims) if dim in _sizes(samples))
        self._selected, self._dropped = _selections(samples)
        self._stores = [_opened(one) for one in samples.stores]
        config = samples.config
        self._arrays = open_named(self._stores[0], config.group, tuple(v.name for v in samples.variables), config.dims)

    @cached_property
    def hierarchy(self) -> Hierarchy:
        """The groups of the first store."""
        return hierarchy_of(self._stores[0])

    @cached_property
    def found(self) -> tuple[OutputCoordinate, ...]:
        """The coordinates: those of the dimensions, and those that the attributes of variables name."""
        named = [*self._of_dimensions(), *self._of_attributes()]
        coordinates: dict[str, OutputCoordinate] = {}
        for name, array in named:
            if name in coordinates or any(v.name == name for v in self._samples.variables):
                continue
            try:
                described = self._described(name, array)
            except Exception as error:  # whatever its codec or its dtype makes zarr raise
                settle()
                LOG.warning("The coordinate %s is left out of the predictions: %s", name, one_line(error))
                continue
            if described is not None:
                coordinates[name] = described
        return tuple(coordinates.values())

    # Found ----------------------------------------------------------------------------------------------------

    def _of_dimensions(self) -> Iterator[tuple[str, NamedArray]]:
        for dim in (*self._dims, *self._dropped):
            found = self._dimension(0, dim)
            if found is not None:
                yield dim, found

    def _dimension(self, store: int, dim: str) -> NamedArray | None:
        """Return the coordinate of a dimension in one of the stores."""
        one = self._samples.stores[store]
        names = [v.name for v in one.variables if dim in v.dims]
        found = find_coordinate(self._stores[store], one.config.group, names, dim, _sizes(one)[dim])
        if not isinstance(found, str):
            return found[1]
        hierarchy = self.hierarchy if store == 0 else hierarchy_of(self._stores[store])
        paths = ("/".join(filter(None, (one.config.group.strip("/"), one.variable(n).array_path))) for n in names)
        arrays = (row_names(hierarchy, path, dim) for path in paths)
        named = next((array for array in arrays if array is not None and array.shape == (_sizes(one)[dim],)), None)
        return None if named is None else NamedArray(named, (dim,), {}, named.path)

    def _of_attributes(self) -> Iterator[tuple[str, NamedArray]]:
        """Yield the arrays that ``coordinates`` and ``grid_mapping`` of variables, and of the group, name."""
        group = self._samples.config.group
        texts = {name: named.attributes for name, named in self._arrays.items()}
        of_group = self.hierarchy.attributes(group.strip("/")).get("coordinates", "")
        names = [
            (name, word)
            for name, attributes in texts.items()
            for key in ("coordinates", "grid_mapping")
            for word in f"{attributes.get(key, '')} {of_group if key == 'coordinates' else ''}".split()
        ]
        for beside, word in dict.fromkeys(names):
            for path in groups_above([beside], word):
                found = self._named(0, path)
                if found is not None:
                    yield word, found
                    break

    def _named(self, store: int, path: str) -> NamedArray | None:
        try:
            return find_named(self._stores[store], self._samples.config.group, path)
        except DtrainError:
            return None

    # Described ------------------------------------------------------------------------------------------------

    def _described(self, name: str, named: NamedArray) -> OutputCoordinate | None:
        """Return a coordinate as it is written; None if it has other dimensions, or holds nothing that can be."""
        sample_dim, sizes = self._samples.sample_dim, _sizes(self._samples.stores[0])
        known = {dim: sizes[dim] for dim in (*self._dims, *self._dropped)}
        if any(known.get(dim) != n for dim, n in zip(named.dims, named.shape, strict=True)):
            return None
        if sample_dim in named.dims and named.dims[0] != sample_dim:
            return None
        dims = tuple(dim for dim in named.dims if dim not in self._dropped)
        attributes = _kept_attributes(named)
        sample = self._part(named, 0, np.array([0], np.int64)) if sample_dim in named.dims else self._part(named, 0)
        values, more = _writable(sample)
        if values is None:
            return None
        attributes |= more
        shape = tuple(self._anchors.total if dim == sample_dim else values.shape[k] for k, dim in enumerate(dims))
        dtype = "str" if values.dtype.kind == "O" else values.dtype.str.lstrip("<>|=")
        if sample_dim in dims and len(self._samples.members) > 1 and self._differ(name, named):
            dtype = "f8"
        plain = OutputCoordinate(name=name, dims=dims, shape=shape, dtype=dtype, attributes=attributes)
        return plain if sample_dim in dims else replace(plain, values=values)

    def _differ(self, name: str, first: NamedArray) -> bool:
        """Return whether stores have the coordinate in different units."""
        kept = _kept_attributes(first)
        return any(
            (other := self._in_store(store, name)) is None
            or _kept_attributes(other) != kept
            or other.array.dtype != first.array.dtype
            for store in range(1, len(self._samples.members))
        )

    def _in_store(self, store: int, name: str) -> NamedArray | None:
        found = self._dimension(store, name) if name in self._dims else None
        if found is not None:
            return found
        names = [v.name for v in self._samples.stores[store].variables]
        return next((one for path in groups_above(names, name) if (one := self._named(store, path))), None)

    # Read -----------------------------------------------------------------------------------------------------

    def blocks(self, coordinate: OutputCoordinate, start: int, stop: int) -> Array:
        """Return the values of a coordinate with the dimension of the samples, at the places of some anchors."""
        parts: list[Array] = []
        for part in self._anchors.parts(start, stop):
            store, begin = self.store_at(part.low)
            parts.append(self.at_rows(coordinate, store, part.rows - begin))
        return np.concatenate(parts)

    def at_rows(self, coordinate: OutputCoordinate, store: int, rows: Ints) -> Array:
        """Return the values of such a coordinate at rows of one store, as they are written."""
        named = self._in_store(store, coordinate.name)
        if named is None:
            raise DataNotFound(
                f"{self._samples.stores[store].path}: it has no coordinate {coordinate.name}; the first store has one.",
                "Write the stores alike.",
            )
        values, more = _writable(self._part(named, store, rows))
        assert values is not None
        own = {**_kept_attributes(named), **more}
        if coordinate.dtype == "f8" and values.dtype.kind in "iuf":
            if own.get("units") != coordinate.attributes.get("units"):
                values = in_units(values, own, coordinate.attributes)
            return values.astype(np.float64, copy=False)
        return values

    def store_at(self, row: int) -> tuple[int, int]:
        """Return the number of the store that holds a row, and the row that it begins at."""
        if not self._samples.members:
            return 0, 0
        store = int(np.searchsorted(np.array(self._samples.begins), row, side="right")) - 1
        return store, self._samples.begins[store]

    def _part(self, named: NamedArray, store: int, rows: Ints | None = None) -> Array:
        """Return the selected part of an array; a missing chunk of several values is a fault."""
        index: list[Any] = []
        select: list[Range] = []
        for dim, n in zip(named.dims, named.shape, strict=True):
            if rows is not None and dim == self._samples.sample_dim:
                low, high = int(rows[0]), int(rows[-1]) + 1
                index.append(slice(low, high))
                select.append((low, high, 1))
            elif dim in self._dropped:
                index.append(self._dropped[dim])
                select.append((self._dropped[dim], self._dropped[dim] + 1, 1))
            else:
                part = self._selected.get(dim, (0, n, 1))
                index.append(slice(*part))
                select.append(part)
        values: Array = np.asarray(named.array[tuple(index)])
        self._check(named, store, tuple(select))
        return values if rows is None else values[rows - int(rows[0])]

    def _check(self, named: NamedArray, store: int, select: tuple[Range, ...]) -> None:
        """Raise if a chunk that was read is not stored; of a single value, zarr leaves out the fill value."""
        array = named.array
        sizes = array.shards or array.chunks
        if np.prod([min(size, n) for size, n in zip(sizes, array.shape, strict=True)]) <= 1:
            return
        variable = Variable(
            name=named.path,
            dims=named.dims,
            shape=tuple(array.shape),
            dtype="float32",
            chunks=tuple(sizes),
            objects=tuple(sizes),
            sample_axis=-1,
            checksums=False,
            select=select,
        )
        for _, key in objects_of(array, variable, select):
            if self._stores[store].is_absent(key):
                raise ChunkMissing(
                    f"{self._stores[store].path}: chunk {key} of {named.path}, a coordinate, is missing."
                )


def attributes_in(samples: Samples, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the attributes of some variables, as the first store has them."""
    one = samples.stores[0]
    arrays = open_named(_opened(one), one.config.group, tuple(names), one.config.dims)
    return {name: dict(named.attributes) for name, named in arrays.items()}


def _opened(samples: Samples) -> ReadStore:
    config = samples.config
    store = open_store(samples.path, at_snapshot(config.storage_options, samples.store.snapshot), samples.store)
    return store


def _sizes(samples: Samples) -> dict[str, int]:
    return {dim: n for v in samples.variables for dim, n in zip(v.dims, v.shape, strict=True)}


def _selections(samples: Samples) -> tuple[dict[str, Range], dict[str, int]]:
    """Return, by dimension, what is selected of it; and of those of which a single place is, the place."""
    selected: dict[str, Range] = {}
    dropped: dict[str, int] = {}
    for v in samples.variables:
        for axis, (dim, part) in enumerate(zip(v.dims, v.select, strict=True)):
            if axis in v.dropped:
                dropped[dim] = part[0]
            elif axis != v.sample_axis:
                selected[dim] = part
    return selected, dropped


def _kept_attributes(named: NamedArray) -> dict[str, Any]:
    """Return the attributes of a coordinate as Zarr v3 has them."""
    attributes = {key: value for key, value in named.attributes.items() if key not in ("_ARRAY_DIMENSIONS", "bounds")}
    mark, dtype = attributes.get("_FillValue"), np.dtype(named.array.dtype)
    if named.array.metadata.zarr_format == 2 and mark is not None:
        is_default = mark == 0 and not any(key in attributes for key in PACKING)
        if dtype.kind not in "iuf" or is_default or mark != mark:
            del attributes["_FillValue"]
        else:
            attributes["_FillValue"] = stored_mark(float(mark), dtype)
    return attributes


def _writable(values: Array) -> tuple[Array | None, dict[str, Any]]:
    """Return values as they are written, with what their attributes have to say more; None if they cannot be."""
    kind = values.dtype.kind
    if kind in "mM":
        return dates_as_numbers(values)
    if kind == "S":
        return np.char.decode(values, "utf-8", "replace").astype(object), {}
    if kind in TEXTS:
        return values.astype(object), {}
    if kind in "iufb":
        return values.astype(values.dtype.newbyteorder("=")), {}
    return None, {}


def coordinate_names(coordinates: Iterable[OutputCoordinate], dims: Sequence[str]) -> str:
    """Return what the attribute ``coordinates`` of an array lists: those that fit it, but of its own dimensions."""
    names = (one.name for one in coordinates if set(one.dims) <= set(dims) and one.dims != (one.name,))
    return " ".join(sorted(names))
