"""The different values of a coordinate, and the label of each row or place: the number of its value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dtrain.data.cf import date_part, decoded_times, missing_times
from dtrain.data.column import DATES, NUMBERS, TEXTS, ColumnReader, describe_column, find_coordinate, groups_above
from dtrain.data.dataset import NamedArray, find_named, list_named
from dtrain.data.encoding import Array, is_missing, unpack
from dtrain.data.plan.hashing import Ints
from dtrain.data.read.inventory import of_each
from dtrain.data.read.kind import at_snapshot
from dtrain.data.read.open import open_store
from dtrain.data.read.store import ReadStore
from dtrain.data.samples import Coordinate, Field, Samples
from dtrain.errors import InvalidConfig, did_you_mean, listed

PARTS = ("year", "season", "month", "day", "hour", "dayofyear")
"""Parts of a date that a coordinate may be taken by."""
SEASONS = ("DJF", "MAM", "JJA", "SON")


@dataclass(frozen=True, slots=True)
class Distinct:
    """The different values of a coordinate."""

    dim: str
    values: Array
    """Those that occur, each once."""
    labels: Ints
    """int64[row] or int64[place]; -1 without a value."""


def target_fields(samples: Samples) -> Sequence[Field]:
    """Return the targets of a sample."""
    first = len(samples.config.inputs)
    return samples.fields[first : first + len(samples.config.targets)]


def newest_input(samples: Samples, target: Field) -> tuple[int, int | None]:
    """Return the number of the input that is the target's variable, and the place of its newest row in the window.

    -1: there is none. The place is None where the input has no window.
    """
    names = samples.config.inputs
    if target.name not in names:
        return -1, None
    number = names.index(target.name)
    field = samples.fields[number]
    return number, field.offsets.index(max(field.offsets)) if field.window else None


def store_of(samples: Samples) -> ReadStore:
    """Open the store of samples, a repository at the snapshot that they were described at."""
    options = at_snapshot(samples.config.storage_options, samples.store.snapshot)
    return open_store(samples.path, options, samples.store)


def joined(columns: Sequence[Distinct]) -> tuple[Array, tuple[Ints, ...]]:
    """Return the values of several columns as one list, and the labels of each column in it."""
    if len(columns) == 1:
        return columns[0].values, (columns[0].labels,)
    whole = np.concatenate([column.values for column in columns])
    if whole.dtype.kind in TEXTS:  # categories keep their order
        values = np.array(list(dict.fromkeys(whole.tolist())), whole.dtype)
        place = {value: number for number, value in enumerate(values.tolist())}
        numbers = np.array([place[value] for value in whole.tolist()], np.int64)
    else:
        values, numbers = np.unique(whole, return_inverse=True)
    labels, before = [], 0
    for column in columns:
        own = np.append(numbers[before : before + len(column.values)], -1)
        labels.append(own[column.labels])
        before += len(column.values)
    return values, tuple(labels)


def read_distinct(samples: Samples, name: str) -> Distinct:
    """Read the coordinate of a name, or the numbers of the places of a dimension that has none.

    Raises
    ------
    InvalidConfig
        There is none, or it does not lie along one dimension of the target.
    """
    if samples.members:
        return _of_stores(samples, of_each(samples, partial(read_distinct, name=name)))
    base, part = _parted(name)
    dims = _dims(samples)
    store = store_of(samples)
    if base in dims:
        names = [v.name for v in samples.variables if base in v.dims]
        found = find_coordinate(store, samples.config.group, names, base, dims[base])
        if isinstance(found, str):
            if part:
                raise InvalidConfig(f"by {name}: {samples.path}: {found}, so that there are no dates.")
            numbers = _Values(np.arange(dims[base]), np.zeros(dims[base], bool))
            return _distinct(samples, base, numbers, is_own=True)
        path, named = found
    else:
        path, named = _coordinate(samples, store, name, base, dims)
    read = _values(samples, path, named, name, part)
    return _distinct(samples, named.dims[0], read, is_own=base in dims and not part)


def _of_stores(samples: Samples, columns: Sequence[Distinct]) -> Distinct:
    """Return the column of several stores that are one: their rows lie on one axis."""
    first = columns[0]
    if first.dim != samples.sample_dim:
        return first
    values, labels = joined(columns)
    rows = np.full(samples.num_samples, -1, np.int64)
    for begin, own in zip(samples.begins, labels, strict=True):
        rows[begin : begin + len(own)] = own
    return Distinct(first.dim, values, rows)


def _parted(name: str) -> tuple[str, str]:
    """Return a name without the part of a date, and that part.

    >>> _parted("time.month"), _parted("obs/donor")
    (('time', 'month'), ('obs/donor', ''))
    """
    base, _, part = name.rpartition(".")
    return (base, part) if base and part in PARTS else (name, "")


def _dims(samples: Samples) -> dict[str, int]:
    """Return the dimensions of the targets, with their stored lengths."""
    sizes: dict[str, int] = {}
    for field in target_fields(samples):
        variable = samples.variable(field.name)
        kept = {samples.sample_dim, *variable.row_dims}
        sizes |= {dim: n for dim, n in zip(variable.dims, variable.shape, strict=True) if dim in kept}
    if samples.sample_dim not in sizes:  # of a target that is the same in all samples
        sizes[samples.sample_dim] = samples.moving[0].shape[samples.moving[0].sample_axis]
    return sizes


def _coordinate(
    samples: Samples, store: ReadStore, name: str, base: str, dims: dict[str, int]
) -> tuple[str, NamedArray]:
    """Return a coordinate that is no dimension, with its path below the group."""
    group = samples.config.group
    beside = [*samples.config.targets, *samples.config.inputs]
    for path in (*groups_above(beside, base), base):
        named = find_named(store, group, path)
        if named is None:
            continue
        if len(named.dims) == 1 and dims.get(named.dims[0]) == named.shape[0]:
            return path, named
        raise InvalidConfig(
            f"by {name}: {path} has the dimensions {', '.join(named.dims) or 'none'} of lengths {list(named.shape)}; a "
            f"coordinate lies along one dimension of the target: {_listed(dims)}.",
        )
    known = [*dims, *_coordinates(samples, store, dims)]
    raise InvalidConfig(
        f"by {name}: {samples.path} has no dimension or coordinate of the target with that name"
        f"{did_you_mean(base, ['lead', 'variable', *known])}",
        f"Allowed are lead, variable, {listed(known, 12)}; and of dates their parts, such as time.month "
        f"({', '.join(PARTS)}).",
    )


def _listed(dims: dict[str, int]) -> str:
    return ", ".join(f"{dim} {length:,}" for dim, length in dims.items())


def _coordinates(samples: Samples, store: ReadStore, dims: dict[str, int]) -> list[str]:
    """Return the names of arrays of one dimension of the target."""
    arrays, _ = list_named(store, samples.config.group)
    return [
        name
        for name, named in arrays.items()
        if len(named.dims) == 1 and dims.get(named.dims[0]) == named.shape[0] and name not in dims
    ]


@dataclass(frozen=True, slots=True)
class _Values:
    """All values of a dimension's coordinate."""

    values: Array
    is_missing: Array
    names: Array | None = None
    """What the values are numbers of: categories, or seasons."""


def _distinct(samples: Samples, dim: str, read: _Values, *, is_own: bool) -> Distinct:
    """Return the column of the values of a whole dimension; places of a dimension's own coordinate are told apart."""
    values, missing = read.values, read.is_missing
    if dim == samples.sample_dim:
        places = np.arange(samples.num_samples)
        missing = missing | (np.arange(len(values)) < samples.first_row)
    else:
        variable = next(v for v in samples.variables if dim in v.row_dims)
        places = np.arange(len(values))[slice(*variable.select[variable.dims.index(dim)])]
        if is_own:
            return Distinct(dim, values[places], np.arange(len(places)))
    labels = np.full(len(places), -1, np.int64)
    kept = np.flatnonzero(~missing[places])
    different, labels[kept] = np.unique(values[places][kept], return_inverse=True)
    return Distinct(dim, different if read.names is None else read.names[different], labels)


def _values(samples: Samples, path: str, named: NamedArray, name: str, part: str) -> _Values:
    """Return all values of a coordinate, decoded."""
    column = describe_column(samples.path, path, named)
    if isinstance(column, str):
        raise InvalidConfig(f"by {name}: {column}")
    stored = whole_column(samples, column)
    if named.categories is not None:
        names = np.array(named.categories.names, dtype=str)
        is_named = len(names) == named.categories.count
        return _Values(stored, (stored < 0) | (stored >= named.categories.count), names if is_named else None)
    if stored.dtype.kind in TEXTS or column.variable.dtype == "T":
        return _Values(stored.astype(object).astype(str), np.zeros(len(stored), bool))
    times = decoded_times(path, stored, column.attributes)
    if times is not None:
        return _Values(times, missing_times(times)) if not part else _part_of(times, part)
    if part:
        raise InvalidConfig(
            f"by {name}: {path} holds no dates ({np.dtype(named.array.dtype)}), so that there is no {part}.",
            f"Name the coordinate itself: --by {path}.",
        )
    encoding = column.variable.encoding
    values = unpack(stored, encoding)
    if values.dtype.kind == "f":
        return _Values(values, np.isnan(values))
    return _Values(values, is_missing(stored, encoding) if encoding is not None else np.zeros(len(values), bool))


def dates_along(samples: Samples, dim: str, length: int) -> Array | None:
    """Return the dates of a dimension's coordinate; None if it has none."""
    store = store_of(samples)
    names = [v.name for v in samples.variables if dim in v.dims]
    found = find_coordinate(store, samples.config.group, names, dim, length)
    column = found if isinstance(found, str) else describe_column(samples.path, *found)
    if isinstance(column, str) or np.dtype(column.variable.dtype).kind not in NUMBERS + DATES:
        return None
    return decoded_times(dim, whole_column(samples, column), column.attributes)


def whole_column(samples: Samples, column: Coordinate) -> Array:
    """Read all values of a coordinate."""
    reader = ColumnReader(samples, column, 0, column.variable.shape[0], fills=True)
    return np.concatenate([values for _, values in reader.blocks()] or [np.zeros(0, np.int64)])


def _part_of(times: Array, part: str) -> _Values:
    missing = missing_times(times)
    values = np.zeros(len(times), np.int64)
    values[~missing] = date_part(times[~missing], "month" if part == "season" else part)
    if part == "season":
        return _Values(values % 12 // 3, missing, np.array(SEASONS))
    return _Values(values, missing)
