"""The names of an array's dimensions: those in its store, those of a known layout, or those of ``data.dims``."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from dtrain.data.layouts.find import dims_of
from dtrain.data.layouts.hierarchy import Hierarchy
from dtrain.data.layouts.stored import Matrix
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore
from dtrain.errors import InvalidConfig, UnsuitableVariable

DIMENSIONS = "_ARRAY_DIMENSIONS"
"""The attribute in which xarray names the dimensions of a Zarr v2 array."""
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
"""A key that TOML takes without quotes."""


def dimensions(
    hierarchy: Hierarchy,
    name: str,
    array: ArrayLike | Matrix,
    attributes: Mapping[str, Any],
    named: Sequence[str] | None,
) -> tuple[str, ...]:
    """Return the names of an array's dimensions.

    Parameters
    ----------
    hierarchy : Hierarchy
        The store of the array.
    name : str
    array : zarr.Array or Matrix
    attributes : mapping
        Of the array, or of the group of a matrix.
    named : sequence of str or None
        Its dimensions in ``data.dims``.

    Raises
    ------
    UnsuitableVariable
        It names none, or not as many as it has.
    InvalidConfig
        ``data.dims`` has other names, or not as many.
    """
    given = _stored_dimensions(hierarchy.store, array, attributes)
    if given is None and array.ndim:
        given = dims_of(hierarchy, array)
    if named is not None:
        given = _completed(name, array, given, named)
    if given is None and not array.ndim:
        return ()
    if isinstance(given, list | tuple) and len(given) == array.ndim:
        return tuple(str(dim) if dim else f"{name} axis {axis}" for axis, dim in enumerate(given))
    raise _nameless(hierarchy.store, name, array, given)


def _completed(name: str, array: ArrayLike | Matrix, given: Any, named: Sequence[str]) -> list[str]:
    """Return the names of ``data.dims``, if the store has no others."""
    text = f"data.dims.{_toml_key(name)} = {json.dumps(list(named))}"
    if len(named) != array.ndim:
        raise InvalidConfig(
            f"{text}: {name} has the shape {list(array.shape)}.", f"Name each of its {array.ndim} dimensions, in order."
        )
    is_list = isinstance(given, list | tuple) and len(given) == len(named)
    stored = list(given) if is_list else [given] * len(named)
    if any(has and str(has) != wanted for has, wanted in zip(stored, named, strict=True)):
        raise InvalidConfig(
            f"{text}: the store names the dimensions of {name} {json.dumps(given)}.",
            f"Leave {name} out of data.dims: it is for arrays whose dimensions have no names.",
        )
    return list(named)


def _nameless(store: ReadStore, name: str, array: ArrayLike | Matrix, given: Any) -> UnsuitableVariable:
    names = json.dumps(["sample", *(f"dim{axis}" for axis in range(1, array.ndim))])
    in_store = (
        f'zarr.open_group("{store.path}")["{array.path}"].attrs["{DIMENSIONS}"] = {names}; if metadata are '
        "consolidated, run zarr.consolidate_metadata again."
    )
    if given is None:
        return UnsuitableVariable(
            f"{store.path}: {name} has no dimension names, so its sample dimension is unknown.",
            f"Name each: data.dims = {{ {_toml_key(name)} = {names} }}; or in the store, {in_store}",
        )
    return UnsuitableVariable(
        f"{store.path}: {name} of shape {list(array.shape)} has the dimension names {json.dumps(given)}.",
        f"Name each, for example {in_store}",
    )


def _toml_key(name: str) -> str:
    return name if BARE_KEY.fullmatch(name) else json.dumps(name)


def _stored_dimensions(store: ReadStore, array: ArrayLike | Matrix, attributes: Mapping[str, Any]) -> Any:
    """Return the names of dimensions as the array itself has them; None if it has none."""
    if isinstance(array, Matrix):
        return attributes.get(DIMENSIONS)
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
