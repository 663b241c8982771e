"""Describe the samples of a Zarr group: named dimensions and attributes as xarray understands them, storage as in zarr.

Later everything is read through zarr or its files, by integer ranges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.config.names import cosine_of
from dtrain.config.schema import DataConfig
from dtrain.config.split import SplitConfig
from dtrain.data.cf import encoding_of, float_encoding
from dtrain.data.choose import choose_dims
from dtrain.data.coordinate import coordinate_of
from dtrain.data.dataset import NamedArray, open_named, sizes_of
from dtrain.data.given import row_column, split_column
from dtrain.data.joined import Member, check_once, describe_all, shared_coordinates
from dtrain.data.layouts.stored import Matrix
from dtrain.data.matrix import check_order, check_sparse, rows_together
from dtrain.data.paths import identity, locate
from dtrain.data.read.codecs import chunk_format, has_checksums
from dtrain.data.read.extent import check_grid
from dtrain.data.read.kind import at_snapshot
from dtrain.data.read.open import kind_of, remember
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore
from dtrain.data.samples import Samples
from dtrain.data.selection import Selected, mean_axes, sample_dim, select_dims, tiles
from dtrain.data.variable import Sparse, Variable
from dtrain.data.weight import as_cosine, check_weight, cosine_array
from dtrain.errors import InvalidConfig, UnsuitableVariable


def open_samples(
    path: str | Path | Sequence[str | Path],
    *,
    inputs: list[str] | tuple[str, ...],
    targets: list[str] | tuple[str, ...],
    **data: Any,
) -> Samples:
    """Describe the samples of a Zarr group. Reads metadata only, names of categories, and coordinates of ``sel``.

    Parameters
    ----------
    path : path, or list of paths
        A Zarr v2 or v3 group, chunked or sharded: as xarray writes it, OME-Zarr, AnnData (dense or CSR), or any with
        data.dims. In a directory, behind a URL, in a zip archive, as kerchunk references (.json, .parq, .parquet), or
        in an icechunk repository. Several stores are one: the rows of each follow those of the one before.
    inputs, targets : list of str
        Variables that the model is called with, in order, and that the loss compares with: names, or paths below the
        group.
    **data
        The other keys of the table ``[data]``, for example ``split=dict(val=0.2, test=0.0)``,
        ``sel=dict(time=slice("2000", "2017"), level=850)``, ``weight="cos(lat)"`` or ``transform=augment``, a function
        of a batch and a `torch.Generator`.

    Returns
    -------
    Samples

    Raises
    ------
    DataNotFound, NotZarr
        There is nothing at the path, or it is not a Zarr group.
    UnknownVariable, LengthsDiffer, UnsuitableVariable
        A variable is not there, has another number of samples, or cannot be trained on.
    InvalidConfig
        A key of `data` is wrong.

    Examples
    --------
    >>> samples = open_samples("digits.zarr", inputs=["image"], targets=["label"])  # doctest: +SKIP
    """
    from dtrain.config.schema import TrainConfig  # the whole schema checks the table

    if isinstance(inputs, str) or isinstance(targets, str):
        raise InvalidConfig("inputs and targets are lists of names.", 'Write inputs=["image"].')
    paths = str(path) if isinstance(path, str | Path) else [str(one) for one in path]
    tables = {**data, "path": paths, "inputs": tuple(inputs), "targets": tuple(targets)}
    config = TrainConfig(data=tables)
    return replace(describe(config.data, Path.cwd()), transform=config.functions.get("data.transform"))


def describe(config: DataConfig, base: Path, snapshot: str = "") -> Samples:
    """Describe the samples that a ``[data]`` table names; relative paths are relative to `base`.

    A repository is read at a snapshot, if one is given, in place of what ``data.storage_options`` choose.

    Raises
    ------
    DtrainError
        As `open_samples`.
    """
    if not config.inputs or not config.targets:
        raise InvalidConfig(
            "data.inputs and data.targets must each name at least one variable.",
            'Write the names of arrays of the group, for example inputs = ["image"].',
        )
    return _described(config, base, snapshot)


def describe_inputs(config: DataConfig, base: Path, snapshot: str = "") -> Samples:
    """Describe the inputs of samples alone: targets, weights and splits need not be there.

    Raises
    ------
    DtrainError
        As `open_samples`.
    """
    alone = {"targets": (), "weight": "", "balance": "", "val_path": "", "split": SplitConfig(val=0.0, test=0.0)}
    return _described(config.model_copy(update=alone), base, snapshot)


def _described(config: DataConfig, base: Path, snapshot: str) -> Samples:
    if isinstance(config.path, str):
        return _describe(config, base, snapshot, all_rows=False)[0]
    paths = [kind_of(str(path)).locate(str(path), base) for path in config.path]
    check_once(paths, [identity(path, base) for path in paths])
    return describe_all(config, paths, snapshot, lambda own, at: _describe_member(own, base, at))


def _describe_member(config: DataConfig, base: Path, snapshot: str) -> Member:
    samples, store = _describe(config, base, snapshot, all_rows=True)
    return Member(samples, shared_coordinates(samples, store))


def _describe(config: DataConfig, base: Path, snapshot: str, *, all_rows: bool) -> tuple[Samples, ReadStore]:
    """Describe a single store; `all_rows`: ``data.isel`` does not select rows of it."""
    own = dict.fromkeys([*config.inputs, *config.targets])
    names = tuple(own | dict.fromkeys([config.weight] if config.weight and not cosine_of(config.weight) else []))
    store = locate(str(config.path), base, at_snapshot(config.storage_options, snapshot))
    arrays = open_named(store, config.group, names, config.dims)
    arrays |= cosine_array(config, store, arrays)
    dims = {name: arrays[name].dims for name in own}
    sizes = sizes_of(arrays)
    along = sample_dim(config, dims)
    by_coordinate, chosen = choose_dims(config, store, arrays, along) if config.sel else ({}, ())
    isel = {dim: wanted for dim, wanted in config.isel.items() if dim != along or not all_rows}
    selected = select_dims(isel, sizes, along) | by_coordinate
    selected |= {named.dims[axis]: ((0, 1, 1), True) for named in arrays.values() for axis in named.dropped}
    variables = tuple(_variable(store.path, name, arrays[name], along, selected, config) for name in arrays)
    check_sparse(store.path, config, variables)
    first, stop = selected[along][0][:2] if along in selected else (0, sizes[along])
    samples = Samples(
        path=store.path,
        config=config,
        sample_dim=along,
        first_row=first,
        num_samples=stop,
        variables=variables,
        tiles=tiles(config, variables, along),
        store=store.facts,
        chosen=chosen,
    ).labelled("ignored")
    check_weight(samples)
    samples = replace(samples, coordinate=coordinate_of(samples, store), split_column=split_column(samples, store))
    if config.balance:
        samples = replace(samples, class_column=row_column(samples, store, config.balance))
    columns = (
        column
        for column in (samples.coordinate, samples.split_column, samples.class_column)
        if not isinstance(column, str)
    )
    stored = (*variables, *(column.variable for column in columns))
    paths = (array.array_path for variable in stored for array in variable.arrays)
    remember(store, at_snapshot(config.storage_options, store.facts.snapshot), config.group, paths)
    return samples, store


def _variable(
    path: str, name: str, named: NamedArray, sample_dim: str, selected: Selected, config: DataConfig
) -> Variable:
    if named.matrix is not None:
        return _sparse(path, name, named, named.matrix, sample_dim, selected, config)
    array, dims, dtype = named.array, named.dims, np.dtype(named.array.dtype)
    if dtype.kind not in "fiub":
        raise UnsuitableVariable(
            f"{path}: {name} has dtype {dtype}; only float, integer and bool arrays can be trained on.",
            f"Store {name} as numbers, for example each different value as an integer, or name another variable.",
        )
    shape = tuple(int(n) for n in array.shape)
    chunks, objects = (tuple(int(n) for n in sizes) for sizes in (array.chunks, array.shards or array.chunks))
    check_grid(path, name, shape, chunks, objects, dtype.itemsize)
    _check_dims(path, name, dims, shape, sample_dim)
    whole = [selected.get(dim, ((0, n, 1), False)) for dim, n in zip(dims, shape, strict=True)]
    encoding = encoding_of(path, name, named.attributes, dtype, zarr_format=array.metadata.zarr_format)
    axes = mean_axes(config, name, dims, sample_dim, selected)
    variable = Variable(
        name=name,
        dims=dims,
        shape=shape,
        dtype=str(dtype),
        chunks=chunks,
        objects=objects,
        sample_axis=dims.index(sample_dim) if sample_dim in dims else -1,
        checksums=has_checksums(array),
        select=tuple(part for part, _ in whole),
        dropped=tuple(axis for axis, (_, dropped) in enumerate(whole) if dropped),
        encoding=encoding or (None if axes is None else float_encoding(dtype)),
        chunk_format=chunk_format(array),
        fill_value=_fill_value(array),
        means_bool=dtype.kind in "iu" and named.attributes.get("dtype") == "bool",
        mean_axes=axes,
        path="" if named.path == name else named.path,
        categories=named.categories,
    )
    return as_cosine(variable, named) if name == config.weight and cosine_of(name) else variable


def _sparse(
    path: str, name: str, named: NamedArray, matrix: Matrix, sample_dim: str, selected: Selected, config: DataConfig
) -> Variable:
    """Describe a sparse matrix by its three arrays."""
    check_order(path, name, named.dims, matrix, sample_dim)
    _check_dims(path, name, named.dims, matrix.shape, sample_dim)

    def part(of: str) -> Variable:
        along = f"{name}/{of}"
        array = NamedArray(getattr(matrix, of), (along,), {}, f"{named.path}/{of}")
        return replace(_variable(path, along, array, along, {}, config), part_of=name)

    sparse = Sparse(indptr=part("indptr"), indices=part("indices"), data=part("data"))
    whole = [selected.get(dim, ((0, n, 1), False)) for dim, n in zip(named.dims, matrix.shape, strict=True)]
    together = tuple(rows_together(sparse) if axis == matrix.axis else n for axis, n in enumerate(matrix.shape))
    return Variable(
        name=name,
        dims=named.dims,
        shape=matrix.shape,
        dtype=sparse.data.dtype,
        chunks=together,
        objects=together,
        sample_axis=matrix.axis,
        checksums=all(array.checksums for array in sparse.arrays),
        select=tuple(part for part, _ in whole),
        dropped=tuple(axis for axis, (_, dropped) in enumerate(whole) if dropped),
        mean_axes=mean_axes(config, name, named.dims, sample_dim, selected),
        path="" if named.path == name else named.path,
        sparse=sparse,
    )


def _fill_value(array: ArrayLike) -> float | None:
    """Return the fill value as a plain number, None for NaN; a Zarr v2 array without one is filled with zeros."""
    value: float = np.asarray(0 if array.fill_value is None else array.fill_value, array.dtype).item()
    return value if value == value else None


def _check_dims(path: str, name: str, dims: tuple[str, ...], shape: tuple[int, ...], sample_dim: str) -> None:
    """Refuse rows without values, and samples along two dimensions."""
    empty = [dim for dim, n in zip(dims, shape, strict=True) if not n and dim != sample_dim]
    if empty:
        raise UnsuitableVariable(
            f"{path}: {name} holds no values: its dimension {empty[0]} has length 0.", "Name another variable."
        )
    if dims.count(sample_dim) > 1:
        raise UnsuitableVariable(
            f"{path}: {name} has the dimension of the samples, {sample_dim}, more than once: {', '.join(dims)}.",
            "Give its dimensions different names, or name another one in data.sample_dim.",
        )
