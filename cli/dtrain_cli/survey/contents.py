"""List the arrays of a store with what their metadata say. No chunk is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr

from dtrain.data.cf import encoding_of
from dtrain.data.dataset import NamedArray, list_named
from dtrain.data.layouts.find import layout_at
from dtrain.data.layouts.hierarchy import Hierarchy
from dtrain.data.paths import locate, single_array
from dtrain.data.read.open import any_group, group_in
from dtrain.data.read.store import ReadStore
from dtrain.errors import DtrainError, NotZarr, TooFewSamples, UnsuitableVariable, UsageError, listed
from dtrain_cli.survey.roles import BOUNDS, ArrayFacts, Attributes, Contents, has_word, natural, words

KINDS = {"O": "objects", "S": "strings", "U": "strings", "T": "strings", "M": "dates", "m": "times", "c": "complex"}
"""By kind of dtype: what an array holds that is no number."""
REFERENCES = {"bounds": "bounds", "climatology": "bounds", "grid_mapping": "grid mapping", "cell_measures": "areas"}
"""CF attributes that name other variables, and what those are."""
AT = "Name one with --data"
MOST_DEPTH = 3
"""Of groups that are looked into."""


@dataclass(frozen=True, slots=True)
class Place:
    """An open store, and the path or URL that was given for it."""

    path: str
    store: ReadStore
    root: zarr.Group

    @property
    def hierarchy(self) -> Hierarchy:
        """Its groups by their path."""
        return Hierarchy(self.store, self.root)


def open_place(path: str) -> Place:
    """Open the store at a path or URL.

    Raises
    ------
    DataNotFound, NotZarr
        There is nothing, or no Zarr group.
    """
    store = locate(path, Path.cwd())
    try:
        return Place(path, store, any_group(store, ""))
    except zarr.errors.ContainsArrayError:
        raise single_array(path) from None
    except Exception:
        return Place(path, store, group_in(store, ""))  # says what is wrong


def layout_of(place: Place, group: str) -> str:
    """Return the name of a group's layout; empty if it has none that is known."""
    try:
        return layout_at(place.hierarchy, group)
    except (NotZarr, UnsuitableVariable):  # metadata that zarr cannot read
        return ""


def named_at_root(place: Place) -> Contents | None:
    """Return the arrays of the root that have named dimensions, and those beside them; None if there are none."""
    variables, strange = _variables(place.store, place.root)
    if not any(variable.dims for variable in variables.values()):
        return None
    return contents_of(place, "", variables, strange)


def named_below(place: Place) -> Contents:
    """Return the arrays of the only group below the root that has arrays with named dimensions.

    Raises
    ------
    NotZarr, UsageError
        No array has dimension names, or several groups have such.
    TooFewSamples
        All arrays are empty.
    """
    below = {name: _variables(place.store, group) for name, group in groups_below(place.root)}
    named = {name: arrays for name, arrays in below.items() if any(v.dims for v in arrays[0].values())}
    if len(named) != 1:
        raise _nothing_named(place.path, place.store, place.root, list(named))
    name, (variables, strange) = next(iter(named.items()))
    return contents_of(place, name, variables, strange)


def groups_below(root: zarr.Group, depth: int = MOST_DEPTH) -> Iterator[tuple[str, zarr.Group]]:
    """Yield the groups below one, with their paths from there."""
    try:
        groups = sorted(root.groups())
    except DtrainError:
        raise
    except Exception:  # an array beside them that zarr cannot open
        return
    for name, group in groups:
        yield name, group
        if depth > 1:
            yield from ((f"{name}/{inner}", below) for inner, below in groups_below(group, depth - 1))


def _variables(store: ReadStore, group: zarr.Group) -> tuple[dict[str, NamedArray], dict[str, str]]:
    """Return the arrays of a group, and why others cannot be used, by name."""
    arrays, strange = list_named(store, group.path)
    return {name: arrays[name] for name in sorted(arrays, key=natural)}, {
        name: "no dimension names" if "dimension names" in error.message else "cannot be opened"
        for name, error in sorted(strange.items(), key=lambda item: natural(item[0]))
    }


def _has_arrays(root: zarr.Group) -> bool:
    try:
        return any(True for _ in root.array_keys())
    except DtrainError:
        raise
    except Exception:  # metadata that zarr cannot read
        return True


def _nothing_named(path: str, store: ReadStore, root: zarr.Group, groups: list[str]) -> DtrainError:
    """Return the error for a group in which there are no named dimensions, with what to do."""
    if groups:
        return UsageError(f"{path} holds several groups of variables: {listed(groups)}.", f"{AT} {path}/{groups[0]}.")
    images = 'xr.Dataset({"image": (("n", "y", "x"), images)}).to_zarr("new.zarr")'
    if _has_arrays(root):
        return NotZarr(f"{path}: its arrays have no named dimensions.", f"Write the store with xarray: {images}.")
    if not store.facts.can_list:
        return NotZarr(
            f"{path}: the server does not list the arrays of the group.",
            "Consolidate the metadata where the store lies: zarr.consolidate_metadata(path).",
        )
    return NotZarr(f"{path} is a Zarr group without arrays.", f"Write the store with xarray: {images}.")


# What each array is -----------------------------------------------------------------------------------------


def contents_of(
    place: Place, group: str, variables: Mapping[str, NamedArray], strange: Mapping[str, str], layout: str = ""
) -> Contents:
    """Return what some arrays of a group are.

    Parameters
    ----------
    place : Place
    group : str
        Its path; empty for the root.
    variables : mapping of str to NamedArray
    strange : mapping of str to str
        By name: why further arrays cannot be used.
    layout : str, optional
        Name of the layout of the group.

    Raises
    ------
    TooFewSamples
        All arrays are empty.
    """
    path, root = place.path, place.root
    attributes = (root[group] if group else root).attrs.asdict()
    references = _references(variables, attributes)
    is_axis = {name for name in variables if _is_axis(name, variables)}
    arrays: dict[str, ArrayFacts] = {}
    left_out = {**strange, **_conflicts(variables)}
    zarr_format = root.metadata.zarr_format
    for name, variable in variables.items():
        if name in is_axis or name in left_out:
            continue
        reason = _why_unsuitable(name, variable, references)
        facts = _facts(path, group, name, variable, zarr_format, references) if not reason else None
        if facts is None:
            left_out[name] = reason or "its CF attributes cannot be understood"
        else:
            arrays[name] = facts
    empty = [name for name, reason in left_out.items() if reason == "no values"]
    if not arrays and empty:
        raise TooFewSamples(f"{path} holds no samples: {empty[0]} has the shape {list(variables[empty[0]].shape)}.")
    return Contents(
        path=path,
        group=group,
        arrays=arrays,
        axes={name: variables[name].attributes for name in is_axis},
        time_dims=frozenset(name for name in is_axis if _holds_dates(variables[name])),
        strings=frozenset(name for name, reason in left_out.items() if reason in ("strings", "objects")),
        left_out=left_out,
        attributes=attributes,
        layout=layout,
    )


def _is_axis(name: str, variables: Mapping[str, NamedArray]) -> bool:
    """Return True for the coordinate of a dimension that other variables have; alone, it is data with a double name."""
    if variables[name].dims != (name,):
        return False
    is_used = any(name in variable.dims for other, variable in variables.items() if other != name)
    return is_used or variables[name].array.dtype.kind not in "iuf" or _holds_dates(variables[name])


def _conflicts(variables: Mapping[str, NamedArray]) -> dict[str, str]:
    """Return the variables that have a dimension in another length than most others, and why they cannot be used."""
    lengths: dict[str, Counter[int]] = {}
    for variable in variables.values():
        for dim, size in zip(variable.dims, variable.shape, strict=True):
            lengths.setdefault(dim, Counter())[size] += 1
    usual = {dim: counts.most_common(1)[0][0] for dim, counts in lengths.items()}
    return {
        name: f"another length along {dim}"
        for name, variable in variables.items()
        for dim, size in zip(variable.dims, variable.shape, strict=True)
        if size != usual[dim]
    }


def _references(variables: Mapping[str, NamedArray], attributes: Attributes) -> dict[str, str]:
    """Return what a variable is that others refer to, by name: coordinates and the rest of `REFERENCES`."""
    referred: dict[str, str] = {}
    for given in (attributes, *(variable.attributes for variable in variables.values())):
        for key, kind in (("coordinates", "coordinate"), *REFERENCES.items()):
            text = given.get(key)
            names = text.split() if isinstance(text, str) else []
            referred.update((name, kind) for name in names if name in variables)
    return referred


def _why_unsuitable(name: str, variable: NamedArray, references: Mapping[str, str]) -> str:
    """Return why an array can be neither input nor target; empty if it can."""
    kind = variable.array.dtype.kind
    if kind not in "fiub":
        return KINDS.get(kind, f"dtype {variable.array.dtype}")
    if not variable.dims:
        return "no dimensions"
    if len(set(variable.dims)) < len(variable.dims):
        return "a dimension twice"
    if references.get(name, "coordinate") != "coordinate":
        return references[name]
    if set(variable.dims) & BOUNDS and len(variable.dims) > 1 and has_word(name, BOUNDS):
        return "bounds"
    if _holds_dates(variable):
        return "dates"
    return "no values" if 0 in variable.shape else ""


def _holds_dates(variable: NamedArray) -> bool:
    return variable.array.dtype.kind == "M" or "since" in words(str(variable.attributes.get("units", "")))


def _facts(
    path: str, group: str, name: str, variable: NamedArray, zarr_format: int, references: Mapping[str, str]
) -> ArrayFacts | None:
    """Return what the metadata of an array of numbers say; None if they cannot be understood."""
    dtype = np.dtype(variable.array.dtype)
    try:
        encoding = encoding_of(path, name, variable.attributes, dtype, zarr_format=zarr_format)
    except DtrainError:
        return None
    axes = [axis for axis in range(len(variable.dims)) if axis not in variable.dropped]
    return ArrayFacts(
        name=name,
        dims=tuple(variable.dims[axis] for axis in axes),
        shape=tuple(int(variable.shape[axis]) for axis in axes),
        stored=dtype.kind,
        kind=np.dtype(encoding.dtype).kind if encoding else dtype.kind,
        itemsize=dtype.itemsize,
        encoding=encoding,
        attributes=variable.attributes,
        is_coordinate=references.get(name) == "coordinate",
        at=variable.array.path.removeprefix(f"{group}/" if group else ""),
        chunks=tuple(variable.array.chunks[axis] for axis in axes)
        if variable.matrix is None
        else variable.array.chunks,
        categories=variable.categories.count if variable.categories else 0,
    )
