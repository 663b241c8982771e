"""The named arrays of a Zarr group, with their dimensions and attributes: no other array is opened.

What xarray refuses in an array that nobody uses does not matter: dimensions, codec, dtype, fill value, damage.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import zarr

from dtrain.data.dimensions import dimensions
from dtrain.data.layouts.find import array_of, irrelevant_axis
from dtrain.data.layouts.hierarchy import Hierarchy
from dtrain.data.layouts.stored import Matrix
from dtrain.data.names import MOST_NAMES, unknown_variable
from dtrain.data.paths import single_array
from dtrain.data.read.kind import not_a_group
from dtrain.data.read.open import any_group, node_in, unreadable_metadata
from dtrain.data.read.retry import settle
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore
from dtrain.data.read.tree import nodes_in
from dtrain.data.variable import MISSING_CATEGORY, Categories
from dtrain.errors import (
    ChunkMissing,
    ChunkTooLarge,
    ChunkUndecodable,
    DtrainError,
    InvalidConfig,
    LengthsDiffer,
    NotZarr,
    UnsuitableVariable,
    did_you_mean,
    listed,
    one_line,
)

Dims: TypeAlias = Mapping[str, tuple[str, ...]]
"""``data.dims``: by array, the names of dimensions that the store does not name."""
NO_DIMS: Dims = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class NamedArray:
    """An array, as its metadata describe it to xarray."""

    array: ArrayLike
    dims: tuple[str, ...]
    attributes: Mapping[str, Any]
    """Undecoded; of a Zarr v2 array, the fill value is the attribute ``_FillValue``."""
    path: str
    """Of the array below the group: a categorical is named by its group, and read from its codes."""
    categories: Categories | None = None
    dropped: tuple[int, ...] = ()
    """Axes of length 1 that the array has only by convention."""
    matrix: Matrix | None = None
    """The sparse matrix whose values the array holds."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each dimension."""
        return self.array.shape if self.matrix is None else self.matrix.shape


def sizes_of(arrays: Mapping[str, NamedArray]) -> dict[str, int]:
    """Return the length of each dimension of some arrays."""
    return {dim: n for named in arrays.values() for dim, n in zip(named.dims, named.shape, strict=True)}


@dataclass(frozen=True, slots=True)
class _Opened:
    """A group, in its store."""

    hierarchy: Hierarchy
    group: zarr.Group

    @property
    def store(self) -> ReadStore:
        return self.hierarchy.store


def open_named(store: ReadStore, group: str, names: tuple[str, ...], dims: Dims = NO_DIMS) -> dict[str, NamedArray]:
    """Return the named arrays of a group; a name may be a path below the group.

    Parameters
    ----------
    store : ReadStore
    group : str
    names : tuple of str
    dims : mapping of str to tuple of str
        ``data.dims``.

    Raises
    ------
    NotZarr
        There is no group, or metadata that are needed cannot be read.
    InvalidConfig
        There is no such group in the store, or `dims` does not fit it.
    UnknownVariable
        There is no such array in the group.
    LengthsDiffer, UnsuitableVariable
        Arrays have dimensions of one name and different lengths, or cannot be read.
    """
    with _readable(store):
        opened = _open_group(store, group)
        nodes = {name: _node(opened, name, dims.get(name)) for name in names}
        arrays = {name: node for name, node in nodes.items() if isinstance(node, NamedArray)}
        arrays = _without_conventions(opened.hierarchy, arrays)
    for name, node in nodes.items():
        if name not in arrays:
            raise unknown_variable(store, group, name, list(arrays), is_group=node is not None)
    _check_lengths(store.path, arrays)
    return arrays


def find_named(store: ReadStore, group: str, name: str) -> NamedArray | None:
    """Return an array of a group; None if there is none of that name.

    Raises
    ------
    NotZarr, UnsuitableVariable
        It is there and cannot be read.
    """
    with _readable(store):
        node = _node(_open_group(store, group), name)
    return node if isinstance(node, NamedArray) else None


def list_named(store: ReadStore, group: str = "") -> tuple[dict[str, NamedArray], dict[str, DtrainError]]:
    """Return all arrays of a group, in stored order: those that have named dimensions, and why others have none.

    Raises
    ------
    NotZarr, InvalidConfig
        There is no such group.
    """
    arrays: dict[str, NamedArray] = {}
    strange: dict[str, DtrainError] = {}
    with _readable(store):
        opened = _open_group(store, group)
        for name in (name for name, kind in nodes_in(store, group).items() if kind == "array"):
            try:
                node = _node(opened, name)
                if isinstance(node, NamedArray):
                    arrays[name] = node
            except (UnsuitableVariable, NotZarr, ChunkMissing, ChunkUndecodable, ChunkTooLarge) as error:
                strange[name] = error
    return arrays, strange


@contextmanager
def _readable(store: ReadStore) -> Iterator[None]:
    """Turn the errors of zarr about a store into sentences, in this context."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a store without consolidated metadata is as good
        try:
            yield
        except DtrainError:
            raise
        except zarr.errors.ContainsArrayError:
            raise single_array(store.path) from None
        except zarr.errors.GroupNotFoundError:
            raise not_a_group(store.path) from None
        except Exception as error:  # broken metadata make zarr raise whatever its first wrong guess leads to
            settle()
            raise NotZarr(
                f"{store.path}: its Zarr metadata cannot be read: {one_line(error)}",
                "Restore it from a copy of the store.",
            ) from None


def hierarchy_of(store: ReadStore) -> Hierarchy:
    """Return the groups of a store.

    Raises
    ------
    NotZarr
        There are none, or the metadata of its root cannot be read.
    """
    with _readable(store):
        return Hierarchy(store, any_group(store, ""))


def _open_group(store: ReadStore, name: str) -> _Opened:
    hierarchy = hierarchy_of(store)
    if not name.strip("/"):
        return _Opened(hierarchy, hierarchy.root)
    try:
        return _Opened(hierarchy, any_group(store, name))  # not from the root's consolidated metadata: they may be old
    except (zarr.errors.GroupNotFoundError, zarr.errors.ContainsArrayError, FileNotFoundError):
        known = sorted(found for found, kind in nodes_in(store, "").items() if kind == "group")
    raise InvalidConfig(
        f'data.group = "{name}": no such group in {store.path}{did_you_mean(name, known)}',
        f"It has {listed(known, MOST_NAMES) or 'no groups'}.",
    )


def _node(opened: _Opened, name: str, dims: Sequence[str] | None = None) -> NamedArray | zarr.Group | None:
    """Return what a group holds under a name; raise if it cannot be read.

    Raises
    ------
    DtrainError
        As `open_named`.
    """
    store = opened.store
    try:
        node = node_in(store, opened.group, name)
        if node is None:
            return None
        stored = array_of(opened.hierarchy, node)
        if isinstance(stored, Matrix):
            named = dimensions(opened.hierarchy, name, stored, dict(node.attrs), dims)
            return NamedArray(stored.data, named, {}, _below(opened.group, stored.path), matrix=stored)
        array = node if stored is None else stored.array
        if not isinstance(array, zarr.Array):
            return array
        attributes = dict(array.attrs)
        if array.metadata.zarr_format == 2 and array.fill_value is not None:
            attributes["_FillValue"] = array.fill_value  # as xarray understands it
        named = dimensions(opened.hierarchy, name, array, attributes, dims)
    except DtrainError:
        raise
    except Exception as error:
        settle()
        raise unreadable_metadata(store.path, name, error) from None
    path = _below(opened.group, array.path)
    if stored is None:
        return NamedArray(array, named, attributes, path)
    return NamedArray(array, named, {"missing_value": MISSING_CATEGORY}, path, stored.categories)


def _below(group: zarr.Group, path: str) -> str:
    """Return a path from a group on."""
    return path.removeprefix(f"{group.path}/") if group.path else path


def _without_conventions(hierarchy: Hierarchy, arrays: Mapping[str, NamedArray]) -> dict[str, NamedArray]:
    """Return arrays without the axes that they have only by convention, where others have them in another length."""
    longer = {dim for named in arrays.values() for dim, n in zip(named.dims, named.shape, strict=True) if n != 1}
    own = {}
    for name, named in arrays.items():
        single = [dim for dim, n in zip(named.dims, named.shape, strict=True) if n == 1 and dim in longer]
        axis = irrelevant_axis(hierarchy, named.array) if single else None
        if axis is not None and named.dims[axis] in single:
            dims = tuple(f"{name} {dim}" if at == axis else dim for at, dim in enumerate(named.dims))
            named = replace(named, dims=dims, dropped=(axis,))
        own[name] = named
    return own


def _check_lengths(path: str, arrays: Mapping[str, NamedArray]) -> None:
    """Refuse arrays that have dimensions of one name and different lengths."""
    lengths: dict[str, dict[str, int]] = {}
    for name, named in arrays.items():
        for dim, length in zip(named.dims, named.shape, strict=True):
            if lengths.setdefault(dim, {}).setdefault(name, length) != length:
                raise UnsuitableVariable(
                    f"{path}: {name} has the dimension {dim} twice, with different lengths.",
                    "Give its dimensions different names.",
                )
    for dim, by_name in lengths.items():
        if len(set(by_name.values())) > 1:
            texts = ", ".join(f"{name} has {length:,}" for name, length in by_name.items())
            raise LengthsDiffer(
                f"{path}: variables differ in length along {dim}: {texts}.",
                "Dimensions of one name must have one length; rename one of them, or cut the longer variable.",
            )
