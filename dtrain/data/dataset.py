"""The named arrays of a Zarr group, with their dimensions and attributes: no other array is opened.

What xarray refuses in an array that nobody uses does not matter: dimensions, codec, dtype, fill value, damage.
"""

from __future__ import annotations

import json
import posixpath
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from dtrain.data.paths import single_array
from dtrain.data.read.kind import not_a_group
from dtrain.data.read.open import any_group, node_in, unreadable_metadata
from dtrain.data.read.retry import settle
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore
from dtrain.data.read.tree import arrays_named, nodes_in
from dtrain.errors import (
    DtrainError,
    InvalidConfig,
    LengthsDiffer,
    NotZarr,
    UnknownVariable,
    UnsuitableVariable,
    did_you_mean,
    listed,
    one_line,
)

UNSUPPORTED = ("nknown codec", "codec not available", "No Zarr data type", "An implementation for codec")
"""How zarr says that it lacks a codec, or knows no such dtype."""
DIMENSIONS = "_ARRAY_DIMENSIONS"
"""The attribute in which xarray names the dimensions of a Zarr v2 array."""
MOST_NAMES = 20
"""Names that a message lists."""


@dataclass(frozen=True, slots=True)
class NamedArray:
    """An array, as its metadata describe it to xarray."""

    array: ArrayLike
    dims: tuple[str, ...]
    attributes: Mapping[str, Any]
    """Undecoded; of a Zarr v2 array, the fill value is the attribute ``_FillValue``."""


def open_named(store: ReadStore, group: str, names: tuple[str, ...]) -> dict[str, NamedArray]:
    """Return the named arrays of a group; a name may be a path below the group.

    Parameters
    ----------
    store : ReadStore
    group : str
    names : tuple of str

    Raises
    ------
    NotZarr
        There is no group, or metadata that are needed cannot be read.
    InvalidConfig
        There is no such group in the store.
    UnknownVariable
        There is no such array in the group.
    LengthsDiffer, UnsuitableVariable
        Arrays have dimensions of one name and different lengths, or cannot be read.
    """
    with _readable(store):
        opened = _open_group(store, group)
        nodes = {name: _node(store, opened, name) for name in names}
    arrays = {name: node for name, node in nodes.items() if isinstance(node, NamedArray)}
    for name, node in nodes.items():
        if name not in arrays:
            raise _unknown(store, group, name, list(arrays), is_group=node is not None)
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
        node = _node(store, _open_group(store, group), name)
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
                node = _node(store, opened, name)
                if isinstance(node, NamedArray):
                    arrays[name] = node
            except (UnsuitableVariable, NotZarr) as error:
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


def _open_group(store: ReadStore, name: str) -> zarr.Group:
    root = any_group(store, "")
    if not name.strip("/"):
        return root
    try:
        return any_group(store, name)  # not from the root's consolidated metadata: they may be old
    except (zarr.errors.GroupNotFoundError, zarr.errors.ContainsArrayError, FileNotFoundError):
        known = sorted(found for found, kind in nodes_in(store, "").items() if kind == "group")
    raise InvalidConfig(
        f'data.group = "{name}": no such group in {store.path}{did_you_mean(name, known)}',
        f"It has {listed(known, MOST_NAMES) or 'no groups'}.",
    )


def _node(store: ReadStore, group: zarr.Group, name: str) -> NamedArray | zarr.Group | None:
    """Return what a group holds under a name; raise if it cannot be read.

    Raises
    ------
    UnsuitableVariable, NotZarr
    """
    try:
        node = node_in(store, group, name)
        if not isinstance(node, zarr.Array):
            return node
        attributes = dict(node.attrs)
    except DtrainError:
        raise
    except Exception as error:
        settle()
        if any(text in str(error) for text in UNSUPPORTED):
            raise UnsuitableVariable(
                f"{store.path}: {name} cannot be read here: {one_line(error)}",
                "If it is a codec: install the package that has it, here and on the workers. Else write the "
                "variable with a dtype of numbers.",
            ) from None
        raise unreadable_metadata(store.path, name, error) from None
    if node.metadata.zarr_format == 2 and node.fill_value is not None:
        attributes["_FillValue"] = node.fill_value  # as xarray understands it
    return NamedArray(node, _dimensions(store, name, node, attributes), attributes)


def _check_lengths(path: str, arrays: Mapping[str, NamedArray]) -> None:
    """Refuse arrays that have dimensions of one name and different lengths."""
    lengths: dict[str, dict[str, int]] = {}
    for name, named in arrays.items():
        for dim, length in zip(named.dims, named.array.shape, strict=True):
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


# Dimensions -----------------------------------------------------------------------------------------------


def _dimensions(store: ReadStore, name: str, array: ArrayLike, attributes: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of an array's dimensions.

    Raises
    ------
    UnsuitableVariable
        It names none, or not as many as it has.
    """
    given = _given_dimensions(store, array, attributes)
    if given is None and not array.ndim:
        return ()
    if isinstance(given, list | tuple) and len(given) == array.ndim:
        return tuple(str(dim) if dim else f"{name} axis {axis}" for axis, dim in enumerate(given))
    names = json.dumps(["sample", *(f"dim{axis}" for axis in range(1, array.ndim))])
    raise UnsuitableVariable(
        f"{store.path}: {name} has no dimension names, so its sample dimension is unknown."
        if given is None
        else f"{store.path}: {name} of shape {list(array.shape)} has the dimension names {json.dumps(given)}.",
        f'Name each, for example zarr.open_group("{store.path}")["{array.path}"].attrs["{DIMENSIONS}"] = {names}; if '
        "metadata are consolidated, run zarr.consolidate_metadata again.",
    )


def _given_dimensions(store: ReadStore, array: ArrayLike, attributes: Mapping[str, Any]) -> Any:
    """Return the names of dimensions as they are stored; None if there are none."""
    names = getattr(array.metadata, "dimension_names", None)
    for given in (names, attributes.get(DIMENSIONS)):
        if given is not None and not (isinstance(given, list | tuple) and given and not any(given)):
            return given
    return _netcdf_dimensions(store, array, attributes) if array.metadata.zarr_format == 2 else None


def _netcdf_dimensions(store: ReadStore, array: ArrayLike, attributes: Mapping[str, Any]) -> Any:
    """Return the names that the netCDF library writes into a Zarr v2 array of its own format, NCZarr."""
    document = sync(store.get(f"{array.path}/.zarray", default_buffer_prototype()))
    inside = {} if document is None else json.loads(document.to_bytes()).get("_NCZARR_ARRAY")
    for described in (attributes.get("_nczarr_array"), attributes.get("_NCZARR_ARRAY"), inside):
        if isinstance(described, Mapping):
            references = described.get("dimension_references", described.get("dimrefs"))
            if isinstance(references, list):
                return [posixpath.basename(str(reference)) for reference in references]
    return None


# Names ----------------------------------------------------------------------------------------------------


def _unknown(store: ReadStore, group: str, name: str, opened: list[str], *, is_group: bool) -> UnknownVariable:
    """Return the error for a name that is no array of a group: the names that are, or where it lies."""
    if is_group:
        inside = sorted(
            f"{name}/{found}" for found, kind in nodes_in(store, f"{group}/{name}").items() if kind == "array"
        )
        return UnknownVariable(
            f'{store.path}: "{name}" is a group, not a variable.',
            f"It holds {listed(inside, MOST_NAMES) or 'no variables'}.",
        )
    known = sorted({*opened, *(found for found, kind in nodes_in(store, group).items() if kind == "array")})
    message = f'{store.path}: variable "{name}" not found{did_you_mean(name, known)}'
    if elsewhere := [path for path in arrays_named(store, name.rpartition("/")[2]) if path.strip("/")]:
        return UnknownVariable(message, _way_to(group.strip("/"), elsewhere, opened))
    if known or store.facts.can_list:
        return UnknownVariable(message, f"It has {listed(known, MOST_NAMES) or 'no variables'}.")
    return UnknownVariable(
        message, "The server lists no variables: consolidate the metadata (zarr.consolidate_metadata) to see them."
    )


def _way_to(group: str, elsewhere: list[str], opened: list[str]) -> str:
    """Say how an array of another group is named: by its path below ``data.group``."""
    path = elsewhere[0]
    found = f"{listed(elsewhere, MOST_NAMES)} {'has' if len(elsewhere) == 1 else 'have'} that name"
    if not group:
        whole = posixpath.dirname(path)
        also = f', or set data.group = "{whole}" if all variables are there' if whole and not opened else ""
        return f'{found}: write "{path}"{also}.'
    if path.startswith(f"{group}/"):
        return f'{found}: write "{path.removeprefix(f"{group}/")}".'
    common = posixpath.commonpath([group, posixpath.dirname(path)])
    names = [posixpath.relpath(one, common or ".") for one in (path, *(f"{group}/{name}" for name in opened))]
    others = "".join(f', and "{name}" in place of {old}' for name, old in zip(names[1:], opened, strict=True))
    return f'{found}: set data.group = "{common}" and write "{names[0]}"{others}.'
