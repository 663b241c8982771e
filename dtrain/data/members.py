"""Several stores as one: the rows of each follow those of the one before, on one axis of rows.

    stores     |-- a: 365 --| |-- b: 366 --| |-- c: 365 --|
    rows       0 . . . . . 365 366 . . . . 732 732 . . . . . . 1097
    units      |--------------|--------------|--------------|      of 366 rows: no stored object lies in two of them

Each store begins at a multiple of the rows that a unit of whole objects has; the rows between two stores are padding,
which nobody reads. All arithmetic of plans is that of a single store with these rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from dtrain.data.variable import Categories, Sparse, Variable
from dtrain.errors import LengthsDiffer, UnsuitableVariable

LONGEST_UNIT_BYTES = 32 << 20
"""Units of whole objects of all stores grow up to this size, where their chunks have different lengths."""

KEPT_STORES = 32
"""Stores that a process keeps open, beside those that are being read."""


def same_length(lengths: Sequence[int], sizes: Sequence[int], most: int) -> int:
    """Return the interval at which objects of several stores can be cut, if each store begins at a multiple of it.

    It is the least common multiple of the objects' lengths; an object that holds all of its store need only fit. Where
    the multiple is beyond `most` and 4 times the longest, it is the longest: objects of some stores lie in two units,
    and are decoded for each.

    Parameters
    ----------
    lengths : sequence of int
        Of the dimension, by store.
    sizes : sequence of int
        Of an object along it, by store.
    most : int

    Examples
    --------
    >>> same_length([365, 366], [365, 366], 1000), same_length([900, 250, 30], [300, 100, 300], 1000)
    (366, 300)
    >>> same_length([9000, 9000], [1000, 999], 10_000)
    1000
    """
    inside = [(n, size) for n, size in zip(lengths, sizes, strict=True)]
    common = math.lcm(*(size for n, size in inside if n > size))
    longest = max(min(n, size) for n, size in inside)
    if common > max(most, 4 * longest):
        common = max(size for n, size in inside if n > size)
    return math.ceil(longest / common) * common


def joined_variable(members: Sequence[Variable], row_bytes: int, most_bytes: int = LONGEST_UNIT_BYTES) -> Variable:
    """Describe a variable of several stores as if it were stored in one; its rows are those of the first store.

    Along each dimension, its chunks and objects have the lengths at which those of all stores can be cut. Rows of a
    sparse variable may be cut anywhere: its chunks and objects are those of the first store.

    Parameters
    ----------
    members : sequence of Variable
        By store; alike (`check_alike`).
    row_bytes : int
        Of a row of all variables, in memory.
    most_bytes : int
        Of the rows of an object in memory.
    """
    first = members[0]
    if first.is_static:
        return first
    if first.sparse is not None:
        sparse, checksums = _end_to_end(members), all(v.checksums for v in members)
        return with_values(replace(first, sparse=sparse, checksums=checksums), members)
    chunks, objects = list(first.chunks), list(first.objects)
    for axis in range(len(first.shape)):
        lengths = [v.shape[axis] for v in members]
        most = most_bytes // max(1, row_bytes) if axis == first.sample_axis else 0
        whole = same_length(lengths, [v.objects[axis] for v in members], most)
        inner = same_length(lengths, [v.chunks[axis] for v in members], most)
        both = math.lcm(whole, inner)
        is_long = both > max(most, 4 * whole)
        chunks[axis], objects[axis] = (whole, whole) if is_long else (inner, both)
    joined = replace(
        first,
        chunks=tuple(chunks),
        objects=tuple(objects),
        checksums=all(v.checksums for v in members),
        means_bool=all(v.means_bool for v in members),
        categories=_categories(members),
    )
    return with_values(joined, members)


def _end_to_end(members: Sequence[Variable]) -> Sparse:
    """Return the arrays of a sparse variable of several stores as if the values of each followed the ones before."""
    each = [v.sparse for v in members if v.sparse is not None]
    count = sum(one.count for one in each)
    return Sparse(
        indptr=_long([one.indptr for one in each], sum(one.rows for one in each) + 1),
        indices=_long([one.indices for one in each], count),
        data=_long([one.data for one in each], count),
    )


def _long(arrays: Sequence[Variable], length: int) -> Variable:
    """Return arrays of one dimension as one of some length; its chunks are as long as the longest that is read."""
    chunk = max(min(array.chunks[0], max(1, array.shape[0])) for array in arrays)
    widest = max(arrays, key=lambda array: np.dtype(array.dtype).itemsize)
    return replace(widest, shape=(length,), chunks=(chunk,), objects=(chunk,), select=((0, length, 1),))


def with_values(joined: Variable, members: Sequence[Variable]) -> Variable:
    """Return a variable of several stores with the dtype, encoding and standardising that its values have in memory.

    Where stores differ in dtype, encoding or categories, as yearly files that are packed one by one, values are decoded
    store by store: floats are kept as float32, or float64 if they are standardised; integers as int64.
    """
    first = members[0]
    if first.is_static or not differ(members):
        return replace(joined, dtype=first.dtype, encoding=first.encoding, mean_axes=first.mean_axes)
    dtype = "float64" if any(v.model_dtype.kind == "f" for v in members) else "int64"
    return replace(joined, dtype=dtype, encoding=None, mean_axes=first.mean_axes)


def differ(members: Sequence[Variable]) -> bool:
    """Return whether values of a variable are stored in different ways, or codes stand for different categories."""
    first, longest = members[0], _names(members)
    return any(
        (v.dtype, v.encoding) != (first.dtype, first.encoding) or _own_names(v) != longest[: len(_own_names(v))]
        for v in members
    )


def _own_names(v: Variable) -> tuple[str, ...]:
    return () if v.categories is None else v.categories.names


def _names(members: Iterable[Variable]) -> tuple[str, ...]:
    """Return the names of the categories of all stores, in the order in which they are met first."""
    return tuple(dict.fromkeys(name for v in members for name in _own_names(v)))


def _categories(members: Sequence[Variable]) -> Categories | None:
    """Return the categories of all stores together."""
    known = [v.categories for v in members if v.categories is not None]
    if any(one.count > len(one.names) for one in known):  # too many to name: they are the same (`check_alike`)
        return max(known, key=lambda one: one.count)
    names = _names(members)
    return Categories(len(names), names) if known else None


def codes_in(joined: Variable, own: Variable) -> npt.NDArray[np.int64]:
    """Return, by code of one store, the code of the same category in all stores together."""
    place = {name: code for code, name in enumerate(_own_names(joined))}
    return np.array([place[name] for name in _own_names(own)], np.int64)


# Alike ------------------------------------------------------------------------------------------------------


def check_alike(paths: Sequence[str], members: Sequence[Variable]) -> None:
    """Refuse a variable that is not the same in all stores.

    Raises
    ------
    LengthsDiffer
        Its dimensions, or the shape of a row, differ.
    UnsuitableVariable
        Its values mean different things.
    """
    first = members[0]
    for path, v in zip(paths[1:], members[1:], strict=True):
        if (v.dims, v.sample_axis, _axes(v)) != (first.dims, first.sample_axis, _axes(first)):
            raise LengthsDiffer(
                f"{path}: {v.name} has the dimensions {_axes_text(v)}; in {paths[0]} they are {_axes_text(first)}.",
                "Stores that are one may differ in the number of rows alone: write them alike, or choose the same part "
                "of each (data.sel).",
            )
        if (v.sparse is None) != (first.sparse is None):
            kinds = ["dense" if one.sparse is None else "a sparse matrix" for one in (v, first)]
            raise UnsuitableVariable(
                f"{path}: {v.name} is {kinds[0]}; in {paths[0]} it is {kinds[1]}.",
                f"Write {v.name} dense in all stores, or sparse in all.",
            )
        if (v.model_dtype, v.mean_axes) != (first.model_dtype, first.mean_axes):
            raise UnsuitableVariable(
                f"{path}: {v.name} holds {_values_text(v)}; in {paths[0]} it holds {_values_text(first)}.",
                f"Write {v.name} as integers in all stores or as floats in all; an integer that may be missing is a "
                "float.",
            )
        check_coding(path, v, paths[0], first)


def _axes(v: Variable) -> list[tuple[str, int]]:
    """Return dimension and length of each axis of a row."""
    return [(v.dims[axis], length) for axis, length in zip(v.row_axes, v.row_shape, strict=True)]


def _axes_text(v: Variable) -> str:
    lengths = dict(_axes(v))
    return ", ".join(f"{dim} {lengths[dim]:,}" if dim in lengths else dim for dim in v.dims) or "none"


def _values_text(v: Variable) -> str:
    marks = () if v.encoding is None else v.encoding.missing
    missing = f" of which {marks[0]:g} marks a missing one" if marks else ""
    return f"{'floats' if v.model_dtype.kind == 'f' else 'integers'} ({v.dtype}{missing})"


def check_coding(path: str, v: Variable, first_path: str, first: Variable) -> None:
    """Refuse categories that cannot be put together: of one store alone, or too many to be compared by name."""
    if (v.categories is None) != (first.categories is None):
        kinds = ["numbers" if one.categories is None else "categories" for one in (v, first)]
        raise UnsuitableVariable(
            f"{path}: {v.name} holds {kinds[0]}; in {first_path} it holds {kinds[1]}.",
            "Write it as a categorical in all stores, or as the same integers.",
        )
    if v.categories is None or first.categories is None:
        return
    many = any(one.count > len(one.names) for one in (v.categories, first.categories))
    if many and v.categories != first.categories:
        raise UnsuitableVariable(
            f"{path}: {v.name} has {v.categories.count:,} categories, in {first_path} {first.categories.count:,}: too "
            "many to compare by name.",
            "Write all stores with the same categories in one order (pandas: column.cat.set_categories([...])).",
        )
