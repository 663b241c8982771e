"""Open a Zarr group with xarray and describe its variables.

xarray defines the data set (variables, dimensions, attributes). What is read later is read through zarr, by
integer ranges.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from dtrain.config import DataConfig
from dtrain.data.samples import Samples, Variable
from dtrain.data.store import has_checksums, open_group
from dtrain.errors import (
    DataNotFound,
    DtrainError,
    InvalidConfig,
    LengthsDiffer,
    NotSupportedYet,
    NotZarr,
    UnknownVariable,
    UnsuitableVariable,
    did_you_mean,
)

METADATA_FILES = ("zarr.json", ".zgroup", ".zmetadata")


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
        The other keys of the table ``[data]``, for example ``split=dict(val=0.2, test=0.0)``.

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
    from dtrain.config import TrainConfig  # the whole schema checks the table

    if isinstance(inputs, str) or isinstance(targets, str):
        raise InvalidConfig("inputs and targets are lists of names.", 'Write inputs=["image"].')
    tables = {**data, "path": str(path), "inputs": tuple(inputs), "targets": tuple(targets)}
    return describe(TrainConfig(data=tables).data, Path.cwd())


def describe(config: DataConfig, base: Path) -> Samples:
    """Describe the samples that a ``[data]`` table names; a relative path is relative to `base`."""
    if not config.inputs or not config.targets:
        raise InvalidConfig("data.inputs and data.targets must each name at least one variable.")
    path = locate(str(config.path), base)
    dataset = _open_dataset(path, config.group)
    group = open_group(str(path), config.group)
    names = tuple(dict.fromkeys([*config.inputs, *config.targets]))
    for name in names:
        if name not in dataset.variables:
            known = [str(key) for key in dataset.variables]
            raise UnknownVariable(
                f'{path}: variable "{name}" not found{did_you_mean(name, known)}',
                f"It has {', '.join(known) or 'no variables'}.",
            )
    sample_dim = _sample_dim(config, dataset, names)
    variables = tuple(_variable(name, dataset[name], group[name], sample_dim) for name in names)
    lengths = {v.name: v.shape[v.sample_axis] for v in variables}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} has {length:,}" for name, length in lengths.items())
        raise LengthsDiffer(f"{path}: variables differ in length along {sample_dim}: {said}.")
    num_samples = next(iter(lengths.values()))
    return Samples(path=str(path), config=config, sample_dim=sample_dim, num_samples=num_samples, variables=variables)


def list_variables(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Return the names and dimensions of a group's data variables (not its coordinates), in stored order."""
    dataset = _open_dataset(locate(str(path), Path.cwd()), "")
    return {str(name): tuple(map(str, array.dims)) for name, array in dataset.data_vars.items()}


def locate(path: str, base: Path) -> Path:
    """Return the absolute path of a local store.

    Raises
    ------
    DataNotFound, NotZarr, NotSupportedYet
        There is nothing, no Zarr group, or a URL.
    """
    if "://" in path:
        raise NotSupportedYet(f'data.path = "{path}": this version reads local stores only.')
    located = Path(base, Path(path).expanduser()).absolute()
    if not located.exists():
        raise DataNotFound(f"{path}: no such file or directory.", f"Looked for {located}")
    if not any((located / name).is_file() for name in METADATA_FILES):
        if (located / ".zarray").is_file():
            raise NotZarr(f"{path} is a single Zarr array; a group of named variables is needed.")
        raise NotZarr(f"{path} is not a Zarr group: it has none of {', '.join(METADATA_FILES)}.")
    return located


def _open_dataset(path: Path, group: str) -> xr.Dataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a store without consolidated metadata is as good
        try:
            _check_group(path, group)
            return xr.open_dataset(
                path, engine="zarr", group=group or None, chunks=None, decode_cf=False, consolidated=None
            )
        except DtrainError:
            raise
        except zarr.errors.ContainsArrayError:
            raise NotZarr(f"{path} is a single Zarr array; a group of named variables is needed.") from None
        except zarr.errors.GroupNotFoundError:
            raise NotZarr(f"{path} is not a Zarr group of variables.") from None
        except Exception as error:  # broken metadata makes zarr raise whatever its first wrong guess leads to
            text = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, KeyError) and "dimension" in text:
                raise UnsuitableVariable(
                    f"{path}: an array has no dimension names, so its sample dimension is unknown.",
                    "Write the store with xarray, or give the arrays dimension_names.",
                ) from None
            if "conflicting sizes" in text:
                raise LengthsDiffer(f"{path}: variables differ in length: {text}.") from None
            raise NotZarr(f"{path}: its Zarr metadata cannot be read: {text}") from None


def _check_group(path: Path, group: str) -> None:
    root = zarr.open_group(str(path), mode="r")
    if group and not isinstance(root.get(group.strip("/")), zarr.Group):
        known = sorted(str(key) for key, _ in root.groups())
        raise InvalidConfig(
            f'data.group = "{group}": no such group in {path}{did_you_mean(group, known)}',
            f"It has {', '.join(known) or 'no groups'}.",
        )


def _sample_dim(config: DataConfig, dataset: xr.Dataset, names: tuple[str, ...]) -> str:
    shared = [str(dim) for dim in dataset[names[0]].dims if all(dim in dataset[name].dims for name in names)]
    if config.sample_dim == "auto":
        if not shared:
            said = ", ".join(f"{name}({', '.join(map(str, dataset[name].dims))})" for name in names)
            raise LengthsDiffer(f"The variables share no dimension: {said}.", "All must have the sample dimension.")
        return shared[0]
    if config.sample_dim not in shared:
        raise InvalidConfig(
            f'data.sample_dim = "{config.sample_dim}": not a dimension of every variable'
            f"{did_you_mean(config.sample_dim, shared)}",
            f"They share {', '.join(shared) or 'none'}.",
        )
    return config.sample_dim


def _variable(name: str, described: xr.DataArray, array: Any, sample_dim: str) -> Variable:
    dtype = np.dtype(array.dtype)
    if dtype.kind not in "fiub":
        raise UnsuitableVariable(f"{name} has dtype {dtype}; only float, integer and bool arrays can be trained on.")
    _check_encoding(name, described.attrs, dtype)
    objects = tuple(int(n) for n in (array.shards or array.chunks))
    return Variable(
        name=name,
        dims=tuple(str(dim) for dim in described.dims),
        shape=tuple(int(n) for n in array.shape),
        dtype=str(dtype),
        chunks=tuple(int(n) for n in array.chunks),
        objects=objects,
        sample_axis=list(map(str, described.dims)).index(sample_dim),
        checksums=has_checksums(array),
    )


def _check_encoding(name: str, attributes: dict[Any, Any], dtype: np.dtype[Any]) -> None:
    """Refuse CF encodings rather than train on numbers that mean something else."""
    for key in ("scale_factor", "add_offset"):
        if key in attributes:
            raise NotSupportedYet(f"{name} is stored with {key}; this version does not decode it.")
    for key in ("_FillValue", "missing_value"):
        # 0 is what zarr itself writes as fill value of a v2 array, and says nothing of missing values
        if attributes.get(key) not in (None, 0) and not np.isnan(np.asarray(attributes[key], np.float64)).all():
            raise NotSupportedYet(
                f"{name} ({dtype}) marks missing values with {key} = {attributes[key]}; this version does not decode "
                "it."
            )
