"""Resolve the keys of ``[data]`` that name dimensions: ``sample_dim``, ``isel``, ``patch`` and ``normalize``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from dtrain.config.schema import DataConfig
from dtrain.config.slices import DimSlice
from dtrain.data.tiles import Cut, Tiles
from dtrain.data.variable import Variable
from dtrain.errors import InvalidConfig, LengthsDiffer, did_you_mean

Dims: TypeAlias = Mapping[str, tuple[str, ...]]
"""The dimensions of each variable, in order."""
Selected: TypeAlias = dict[str, tuple[tuple[int, int, int], bool]]
"""By dimension: start, stop and step, and True if the dimension is dropped."""


def sample_dim(config: DataConfig, dims: Dims) -> str:
    """Return the dimension of the samples: ``data.sample_dim``, or the first that all variables share.

    Raises
    ------
    LengthsDiffer
        The variables share no dimension.
    InvalidConfig
        A target, or every variable, lacks the dimension.
    """
    if config.sample_dim == "auto":
        first, *others = dims.values()
        shared = [dim for dim in first if all(dim in other for other in others)]
        if not shared:
            texts = ", ".join(f"{name}({', '.join(of)})" for name, of in dims.items())
            raise LengthsDiffer(
                f"The variables share no dimension: {texts}.",
                "Name the dimension of the samples in data.sample_dim: every target needs it, and an input without it "
                "is the same for all samples. If one dimension has two names, rename one (xarray: dataset.rename).",
            )
        return shared[0]
    known = list(dict.fromkeys(dim for of in dims.values() for dim in of))
    lacking = [name for name in config.targets if config.sample_dim not in dims[name]]
    if config.sample_dim not in known or lacking:
        where = f"of {lacking[0]}, a target" if config.sample_dim in known else "of any variable"
        guess = "" if config.sample_dim in known else did_you_mean(config.sample_dim, known)
        raise InvalidConfig(
            f'data.sample_dim = "{config.sample_dim}": not a dimension {where}{guess}',
            f"Dimensions are {', '.join(known) or 'none'}.",
        )
    return config.sample_dim


def select_dims(isel: Mapping[str, int | DimSlice], sizes: Mapping[str, int], sample_dim: str) -> Selected:
    """Resolve ``data.isel``.

    Parameters
    ----------
    isel : mapping of str to int or DimSlice
    sizes : mapping of str to int
        The length of each dimension.
    sample_dim : str

    Raises
    ------
    InvalidConfig
        There is no such dimension or place, or nothing is selected.
    """
    selected: Selected = {}
    for dim, wanted in isel.items():
        text = f"data.isel.{dim} = {wanted if isinstance(wanted, int) else wanted.model_dump(exclude_none=True)}"
        if dim not in sizes:
            raise InvalidConfig(
                f"{text}: no such dimension{did_you_mean(dim, sizes)}", f"Dimensions are {', '.join(sizes)}."
            )
        if isinstance(wanted, int):
            selected[dim] = (_one_place(text, dim, wanted, sizes[dim], is_samples=dim == sample_dim), True)
        else:
            selected[dim] = (_range(text, dim, wanted, sizes[dim], is_samples=dim == sample_dim), False)
    return selected


def _one_place(text: str, dim: str, wanted: int, size: int, *, is_samples: bool) -> tuple[int, int, int]:
    if is_samples:
        raise InvalidConfig(
            f"{text}: {dim} is the dimension of the samples, of which a single place is no run of samples.",
            f"Give a start and a stop, data.isel.{dim} = {{ start = 0, stop = {size} }}, or name another dimension in "
            "data.sample_dim.",
        )
    if not -size <= wanted < size:
        raise InvalidConfig(
            f"{text}: {dim} has {size:,} places, counted from 0.", f"Allowed are {-size} to {size - 1}."
        )
    place = wanted % size
    return place, place + 1, 1


def _range(text: str, dim: str, wanted: DimSlice, size: int, *, is_samples: bool) -> tuple[int, int, int]:
    if is_samples and wanted.step != 1:
        raise InvalidConfig(f"{text}: a step along {dim} is not for isel.", "Use data.stride for every n-th row.")
    last = size if wanted.stop is None else wanted.stop if wanted.stop >= 0 else wanted.stop + size
    if wanted.is_list and not (-size <= wanted.start and last <= size):
        raise InvalidConfig(f"{text}: {dim} has {size:,} places, counted from 0.")
    start, stop, step = slice(wanted.start, wanted.stop, wanted.step).indices(size)
    if start >= stop:
        raise InvalidConfig(
            f"{text}: selects nothing of the {size:,} places of {dim}.",
            "Places are counted from 0, and stop is not included.",
        )
    return start, stop, step


def tiles(config: DataConfig, variables: tuple[Variable, ...], sample_dim: str) -> Tiles:
    """Cut the dimensions of ``data.patch``.

    Raises
    ------
    InvalidConfig
        There is no such dimension, or it is shorter than a patch.
    """
    sizes: dict[str, int] = {}
    for v in variables:
        sizes.update((v.dims[axis], length) for axis, length in zip(v.row_axes, v.row_shape, strict=True))
    cuts = []
    for dim, size in config.patch.items():
        if dim == sample_dim or dim not in sizes:
            why = "is the dimension of the samples" if dim == sample_dim else "is not a dimension of any variable"
            raise InvalidConfig(
                f"data.patch.{dim} = {size}: {dim} {why}{did_you_mean(dim, sizes)}",
                f"Dimensions are {', '.join(sizes)}.",
            )
        if size > sizes[dim]:
            raise InvalidConfig(f"data.patch.{dim} = {size}: {dim} has {sizes[dim]:,} places.", "Cut smaller patches.")
        cuts.append(Cut(dim, sizes[dim], size))
    return Tiles(tuple(cuts))


def mean_axes(
    config: DataConfig, name: str, dims: tuple[str, ...], sample_dim: str, selected: Selected
) -> tuple[int, ...] | None:
    """Return the axes of a row of which each index has its own mean; None if ``data.normalize`` lacks the variable.

    A dimension of which ``data.isel`` selects a single place is no axis of a row: naming it changes nothing.

    Parameters
    ----------
    config : DataConfig
    name : str
        The variable.
    dims : tuple of str
        Its dimensions, in stored order.
    sample_dim : str
    selected : Selected

    Raises
    ------
    InvalidConfig
        The variable has no such dimension, or it is the dimension of the samples, or cut into patches.
    """
    wanted = config.mean_dims.get(name)
    if wanted is None:
        return None
    for dim in wanted:
        _check_mean_dim(config, name, dim, dims, sample_dim)
    row = [dim for dim in dims if dim != sample_dim and not (dim in selected and selected[dim][1])]
    return tuple(axis for axis, dim in enumerate(row) if dim in wanted)


def _check_mean_dim(config: DataConfig, name: str, dim: str, dims: tuple[str, ...], sample_dim: str) -> None:
    text = f'data.normalize.{name} names "{dim}"'
    others = [other for other in dims if other != sample_dim]
    allowed = f"Allowed are dimensions of {name} that are not cut: {', '.join(others)}." if others else ""
    if dim == sample_dim and dim in dims:
        raise InvalidConfig(
            f"{text}: that is the dimension of the samples, and means are taken over samples.",
            f"{allowed} Without any, {name} has one mean of all values.".lstrip(),
        )
    if dim not in dims:
        raise InvalidConfig(
            f"{text}: {name} has no such dimension{did_you_mean(dim, others)}",
            allowed or f"Write data.normalize.{name} = []: one mean of all values.",
        )
    if dim in config.patch:
        raise InvalidConfig(
            f"{text}: data.patch cuts {dim}, and a patch has the same means wherever it is cut.",
            f"Leave {dim} out of data.patch, or out of data.normalize.{name}.",
        )
