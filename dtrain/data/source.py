"""Describe the samples of a Zarr group: xarray defines the data set, zarr how it is stored.

Later everything is read through zarr or its files, by integer ranges.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from dtrain.config.schema import DataConfig
from dtrain.data.cf import encoding_of, float_encoding
from dtrain.data.coordinate import coordinate_of
from dtrain.data.dataset import open_dataset
from dtrain.data.paths import locate
from dtrain.data.read.codecs import chunk_format, has_checksums
from dtrain.data.read.open import array_in, remember
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore
from dtrain.data.samples import Samples, Variable
from dtrain.data.selection import Selected, mean_axes, sample_dim, select_dims, tiles
from dtrain.errors import InvalidConfig, LengthsDiffer, UnknownVariable, UnsuitableVariable, did_you_mean


def open_samples(
    path: str | Path, *, inputs: list[str] | tuple[str, ...], targets: list[str] | tuple[str, ...], **data: Any
) -> Samples:
    """Describe the samples of a Zarr group. Reads metadata only.

    Parameters
    ----------
    path : path
        A Zarr v2 or v3 group, chunked or sharded, with named dimensions (as xarray writes it).
    inputs, targets : list of str
        Variables that the model is called with, in order, and that the loss compares with.
    **data
        The other keys of the table ``[data]``, for example ``split=dict(val=0.2, test=0.0)``,
        ``isel=dict(time=slice(0, 500), level=3)`` or ``transform=augment``, a function of a batch and a
        `torch.Generator`.

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
    tables = {**data, "path": str(path), "inputs": tuple(inputs), "targets": tuple(targets)}
    config = TrainConfig(data=tables)
    return replace(describe(config.data, Path.cwd()), transform=config.functions.get("data.transform"))


def describe(config: DataConfig, base: Path) -> Samples:
    """Describe the samples that a ``[data]`` table names; a relative path is relative to `base`.

    Raises
    ------
    DtrainError
        As `open_samples`.
    """
    if not config.inputs or not config.targets:
        raise InvalidConfig("data.inputs and data.targets must each name at least one variable.")
    names = tuple(dict.fromkeys([*config.inputs, *config.targets]))
    store = locate(str(config.path), base, config.storage_options)
    dataset, group = open_dataset(store, config.group, names)
    _check_names(store, dataset, group, names)
    dims = {name: tuple(str(dim) for dim in dataset[name].dims) for name in names}
    sizes = {str(dim): int(size) for name in names for dim, size in dataset[name].sizes.items()}
    along = sample_dim(config, dims)
    selected = select_dims(config, sizes, along)
    variables = tuple(
        _variable(dataset[name], array_in(group, store.path, name), along, selected, config) for name in names
    )
    first, stop = _rows(store.path, variables, along, selected)
    samples = Samples(
        path=store.path,
        config=config,
        sample_dim=along,
        first_row=first,
        num_samples=stop,
        variables=variables,
        tiles=tiles(config, variables, along),
        store=store.facts,
    )
    samples = replace(samples, coordinate=coordinate_of(samples, group))
    also = () if isinstance(samples.coordinate, str) else (along,)
    remember(store, config.storage_options, config.group, (*names, *also))
    return samples


def list_variables(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Return the names and dimensions of a group's data variables (not its coordinates), in stored order."""
    dataset, _ = open_dataset(locate(str(path), Path.cwd()), "", ())
    return {str(name): tuple(map(str, array.dims)) for name, array in dataset.data_vars.items()}


def _check_names(store: ReadStore, dataset: xr.Dataset, group: zarr.Group, names: tuple[str, ...]) -> None:
    for name in names:
        if name not in dataset.variables:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about files that are no arrays
                known = sorted(str(key) for key, _ in group.arrays())
            raise UnknownVariable(
                f'{store.path}: variable "{name}" not found{did_you_mean(name, known)}',
                f"It has {', '.join(known) or 'no variables'}."
                if known or store.facts.can_list
                else "The server lists no variables: consolidate the metadata (zarr.consolidate_metadata) to see them.",
            )


def _rows(path: str, variables: tuple[Variable, ...], sample_dim: str, selected: Selected) -> tuple[int, int]:
    """Return the first selected row, and the row after the last."""
    lengths = {v.name: v.shape[v.sample_axis] for v in variables if not v.is_static}
    if len(set(lengths.values())) > 1:
        texts = ", ".join(f"{name} has {length:,}" for name, length in lengths.items())
        raise LengthsDiffer(f"{path}: variables differ in length along {sample_dim}: {texts}.")
    if sample_dim in selected:
        first, stop, _ = selected[sample_dim][0]
        return first, stop
    return 0, next(iter(lengths.values()))


def _variable(
    described: xr.DataArray, array: ArrayLike, sample_dim: str, selected: Selected, config: DataConfig
) -> Variable:
    name, dtype = str(described.name), np.dtype(array.dtype)
    if dtype.kind not in "fiub":
        raise UnsuitableVariable(f"{name} has dtype {dtype}; only float, integer and bool arrays can be trained on.")
    dims = tuple(str(dim) for dim in described.dims)
    shape = tuple(int(n) for n in array.shape)
    whole = [selected.get(dim, ((0, n, 1), False)) for dim, n in zip(dims, shape, strict=True)]
    encoding = encoding_of(name, described.attrs, dtype, zarr_format=array.metadata.zarr_format)
    axes = mean_axes(config, name, dims, sample_dim, selected)
    return Variable(
        name=name,
        dims=dims,
        shape=shape,
        dtype=str(dtype),
        chunks=tuple(int(n) for n in array.chunks),
        objects=tuple(int(n) for n in (array.shards or array.chunks)),
        sample_axis=dims.index(sample_dim) if sample_dim in dims else -1,
        checksums=has_checksums(array),
        select=tuple(part for part, _ in whole),
        dropped=tuple(axis for axis, (_, dropped) in enumerate(whole) if dropped),
        encoding=encoding or (None if axes is None else float_encoding(dtype)),
        chunk_format=chunk_format(array),
        mean_axes=axes,
    )
