"""Arrays that stand for something else than their numbers: codes with the names of categories, parts of a matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import zarr

from dtrain.data.layouts.hierarchy import Hierarchy
from dtrain.data.read.extent import MOST_COLUMN_BYTES, check_grid
from dtrain.data.read.retry import settle
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import key_of
from dtrain.data.variable import Categories
from dtrain.errors import ChunkMissing, ChunkUndecodable, DtrainError, NotZarr, OutOfMemory, one_line

MOST_NAMES = 4096
"""Names of categories that are kept; they travel with the samples."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The array that holds a variable, and what its values stand for."""

    array: ArrayLike
    categories: Categories


@dataclass(frozen=True, slots=True)
class Matrix:
    """A sparse matrix: a group of three arrays."""

    path: str
    """Of the group."""
    shape: tuple[int, int]
    axis: int
    """Its values are stored row by row (0), or column by column (1)."""
    indptr: ArrayLike
    indices: ArrayLike
    data: ArrayLike
    ndim: int = 2


class HasAxes(Protocol):
    """An array, or a matrix, whose axes have names."""

    @property
    def path(self) -> str:
        """Path from the root of the store."""
        ...

    @property
    def ndim(self) -> int:
        """Number of axes."""
        ...


def read_categories(hierarchy: Hierarchy, path: str) -> Categories:
    """Return the names of a categorical's categories, from the array that lists them.

    Raises
    ------
    NotZarr
        There is no such array.
    ChunkMissing, ChunkUndecodable
        Its names cannot be read.
    """
    node = hierarchy.node(path)
    if isinstance(node, zarr.Group):
        node = hierarchy.node(f"{path}/values")  # strings beside a mask
    if not isinstance(node, zarr.Array) or node.ndim != 1:
        raise NotZarr(
            f"{hierarchy.store.path}: {path}, the names of categories, is no array of one dimension.",
            "Restore it from a copy of the store.",
        )
    return Categories(int(node.shape[0]), read_names(hierarchy, node, MOST_NAMES, "the names of categories"))


def read_names(hierarchy: Hierarchy, array: ArrayLike, most: int, what: str) -> tuple[str, ...]:
    """Return the first values of an array of one dimension as text.

    Parameters
    ----------
    hierarchy : Hierarchy
    array : array[name]
    most : int
    what : str
        Says in errors what the names are.

    Raises
    ------
    ChunkMissing, ChunkUndecodable, UnsuitableVariable, ChunkTooLarge, OutOfMemory
    """
    count, store = min(most, int(array.shape[0])), hierarchy.store
    if not count:
        return ()
    sizes = array.shape, array.chunks, array.shards or array.chunks
    check_grid(store.path, array.path, *sizes, np.dtype(array.dtype).itemsize, most=MOST_COLUMN_BYTES)
    try:
        values: list[object] = np.asarray(array[:count]).tolist()
    except DtrainError:
        raise
    except MemoryError as error:
        raise OutOfMemory(
            f"{store.path}: no memory for {array.path}, {what}.",
            "Use a machine with more memory. If they should be short, restore them from a copy of the store.",
        ) from error
    except Exception as error:
        settle()
        raise ChunkUndecodable(
            f"{store.path}: {array.path}, {what}, cannot be decoded: {one_line(error)}",
            "Restore it from a copy of the store.",
        ) from None
    (rows,) = array.shards or array.chunks
    for place in range(math.ceil(count / rows)):
        is_one = min(rows, int(array.shape[0]) - place * rows) == 1
        # names differ, so that the fill value can stand for one of them and not for several
        if store.is_absent(key := key_of(array, (place,))) and not is_one:
            raise ChunkMissing(
                f"{store.path}: chunk {key} of {array.path}, {what}, is missing.",
                "Restore it from a copy of the store.",
            )
    return tuple(map(_text, values))


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
