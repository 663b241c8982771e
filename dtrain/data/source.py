"""Open a Zarr group with xarray and describe its variables.

xarray defines the data set (variables, dimensions, attributes). What is read later is read through zarr, by
integer ranges.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

import numpy as np
import xarray as xr
import zarr
from zarr.core.sync import sync

from dtrain.config.schema import DataConfig
from dtrain.data.encoding import Encoding
from dtrain.data.read.decode import why_not
from dtrain.data.read.store import (
    ReadStore,
    any_group,
    has_checksums,
    is_http,
    is_remote,
    not_zarrs,
    open_store,
    settle,
    unreadable,
)
from dtrain.data.samples import Samples, Tile, Variable
from dtrain.errors import (
    DataNotFound,
    DtrainError,
    InvalidConfig,
    LengthsDiffer,
    NotZarr,
    UnknownVariable,
    UnsuitableVariable,
    did_you_mean,
    one_line,
)

METADATA_FILES = ("zarr.json", ".zgroup", ".zmetadata")
NAME_THE_GROUP = "Give the path of the group that it lies in, and its name in data.inputs or data.targets."


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
    from dtrain.config.schema import TrainConfig  # the whole schema checks the table

    if isinstance(inputs, str) or isinstance(targets, str):
        raise InvalidConfig("inputs and targets are lists of names.", 'Write inputs=["image"].')
    tables = {**data, "path": str(path), "inputs": tuple(inputs), "targets": tuple(targets)}
    return describe(TrainConfig(data=tables).data, Path.cwd())


def describe(config: DataConfig, base: Path) -> Samples:
    """Describe the samples that a ``[data]`` table names; a relative path is relative to `base`."""
    if not config.inputs or not config.targets:
        raise InvalidConfig("data.inputs and data.targets must each name at least one variable.")
    path = locate(str(config.path), base, config.storage_options)
    names = tuple(dict.fromkeys([*config.inputs, *config.targets]))
    dataset, group = _open_dataset(path, config.group, config.storage_options, names)
    for name in names:
        if name not in dataset.variables:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is no array
                known = sorted(str(key) for key, _ in group.arrays())
            raise UnknownVariable(
                f'{path}: variable "{name}" not found{did_you_mean(name, known)}',
                "An HTTP server lists no variables: consolidate the metadata (zarr.consolidate_metadata) to see them."
                if is_http(path) and not known
                else f"It has {', '.join(known) or 'no variables'}.",
            )
    sample_dim = _sample_dim(config, dataset, names)
    selected = _selected(config, dataset, names, sample_dim)
    variables = tuple(
        _variable(name, dataset[name], group[name], sample_dim, selected, standardised=name in config.normalize)
        for name in names
    )
    lengths = {v.name: v.shape[v.sample_axis] for v in variables if not v.is_static}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} has {length:,}" for name, length in lengths.items())
        raise LengthsDiffer(f"{path}: variables differ in length along {sample_dim}: {said}.")
    first, stop = 0, next(iter(lengths.values()))
    if sample_dim in selected:
        first, stop, _ = selected[sample_dim][0]
    return Samples(
        path=path,
        config=config,
        sample_dim=sample_dim,
        first_row=first,
        num_samples=stop,
        variables=variables,
        tiles=_tiles(config, variables, sample_dim),
    )


def list_variables(path: str | Path) -> dict[str, tuple[str, ...]]:
    """Return the names and dimensions of a group's data variables (not its coordinates), in stored order."""
    dataset, _ = _open_dataset(locate(str(path), Path.cwd()), "", {}, ())
    return {str(name): tuple(map(str, array.dims)) for name, array in dataset.data_vars.items()}


def locate(path: str, base: Path, storage_options: Mapping[str, Any] = {}) -> str:
    """Return the absolute path of a local store, or the URL of a remote one, once there is a group.

    Raises
    ------
    DataNotFound, NotZarr
        There is nothing, or no Zarr group.
    StoreForbidden, StoreUnavailable
        A server refuses or fails.
    InvalidConfig
        The URL holds a password.
    """
    if path.startswith("file://"):
        path = unquote(path.removeprefix("file://"))
    if is_remote(path):
        if urlsplit(path).password:  # paths are printed, and kept with the run
            raise InvalidConfig(
                "data.path holds a password.", "Give credentials in the environment or in data.storage_options."
            )
        path = path if path.endswith("://") else path.rstrip("/")
        store = open_store(path, storage_options)
        if not any(sync(store.exists(name)) for name in METADATA_FILES):
            if sync(store.exists(".zarray")):
                raise NotZarr(f"{path} is a single Zarr array; a group of named variables is needed.", NAME_THE_GROUP)
            raise DataNotFound(
                f"{path}: no Zarr group there: it has none of {', '.join(METADATA_FILES)}.",
                "data.path is the URL of a store; data.group names a group in it.",
            )
        return path
    located = Path(base, Path(path).expanduser()).absolute()
    if not located.exists():
        raise DataNotFound(f"{path}: no such file or directory.", f"Looked for {located}")
    if not any((located / name).is_file() for name in METADATA_FILES):
        if (located / ".zarray").is_file():
            raise NotZarr(f"{path} is a single Zarr array; a group of named variables is needed.", NAME_THE_GROUP)
        raise NotZarr(f"{path} is not a Zarr group: it has none of {', '.join(METADATA_FILES)}.")
    return str(located)


def _open_dataset(
    path: str, group: str, storage_options: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[xr.Dataset, zarr.Group]:
    """Return a group as xarray sees it, undecoded, and as Zarr does."""
    store = open_store(path, storage_options)
    store.members[group.strip("/")] = names if is_remote(path) else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a store without consolidated metadata is as good
        try:
            opened = _open_group(store, path, group)
            arrays, strange = _arrays_of(store, opened, names)
            if strange:
                store.hidden = frozenset(strange)
                opened = zarr.open_group(store, path=group or None, mode="r", use_consolidated=False)
            consolidated = False if strange else None
            if unnamed := _without_dimensions(arrays, path, names):
                # xarray would refuse the whole group for them: it is asked for the others one by one
                backend = xr.backends.ZarrStore.open_group(
                    store, group=group or None, mode="r", consolidated=consolidated
                )
                others = [name for name in arrays if name not in unnamed]
                return xr.Dataset({name: backend.open_store_variable(name) for name in others}), opened
            dataset = xr.open_dataset(
                store,  # type: ignore[arg-type]
                engine="zarr",
                group=group or None,
                chunks=None,
                decode_cf=False,
                consolidated=consolidated,
                # what is not used may have any shape
                drop_variables=[name for name in arrays if names and name not in names],
            )
            return dataset, opened
        except DtrainError:
            raise
        except zarr.errors.ContainsArrayError:
            raise NotZarr(
                f"{path} is a single Zarr array; a group of named variables is needed.", NAME_THE_GROUP
            ) from None
        except zarr.errors.GroupNotFoundError:
            raise NotZarr(f"{path} is not a Zarr group of variables.") from None
        except Exception as error:  # broken metadata makes zarr raise whatever its first wrong guess leads to
            settle()
            text = one_line(error)
            if "conflicting sizes" in text:
                raise LengthsDiffer(f"{path}: variables differ in length: {text}.") from None
            raise NotZarr(
                f"{path}: its Zarr metadata cannot be read: {text}", "Restore it from a copy of the store."
            ) from None


UNSUPPORTED = ("nknown codec", "codec not available", "No Zarr data type", "An implementation for codec")
"""How zarr says that it lacks a codec, or knows no such dtype."""


def _open_group(store: ReadStore, path: str, name: str) -> zarr.Group:
    root = any_group(store, "")
    if not name:
        return root
    if not isinstance(root.get(name.strip("/")), zarr.Group):
        known = sorted(str(key) for key, _ in root.groups())
        raise InvalidConfig(
            f'data.group = "{name}": no such group in {path}{did_you_mean(name, known)}',
            f"It has {', '.join(known) or 'no groups'}.",
        )
    return any_group(store, name)  # not from what the root has consolidated: that may be old


def _arrays_of(
    store: ReadStore, group: zarr.Group, names: tuple[str, ...]
) -> tuple[dict[str, zarr.Array[Any]], list[str]]:
    """Return the arrays of a group, and the names of those that zarr cannot open: their dtype, a codec, or damage.

    Raises for such a one that is asked for.
    """
    try:
        return dict(group.arrays()), []
    except DtrainError:
        raise
    except Exception:
        settle()
    found, strange = {}, []
    for name in store.names(group.path):
        try:
            node = zarr.open(store, path=f"{group.path}/{name}".lstrip("/"), mode="r", use_consolidated=False)
        except FileNotFoundError:
            pass  # a file of the group itself
        except DtrainError:
            raise
        except Exception as error:
            if _is_unsupported(error) and name in names:
                raise UnsuitableVariable(
                    f"{store.path}: {name} cannot be read here: {one_line(error)}",
                    "If it is a codec: install the package that has it, here and on the workers. Else write the "
                    "variable with a dtype of numbers.",
                ) from None
            if name in names or not (names or _is_unsupported(error)):
                raise unreadable(store.path, name, error) from None
            strange.append(name)
        else:
            if isinstance(node, zarr.Array):
                found[name] = node
    return found, strange


def _is_unsupported(error: Exception) -> bool:
    return any(said in str(error) for said in UNSUPPORTED)


def _without_dimensions(arrays: Mapping[str, zarr.Array[Any]], path: str, names: tuple[str, ...]) -> list[str]:
    """Return the arrays without dimension names, which xarray would refuse together with all others."""
    found = []
    for name, array in arrays.items():
        named = array.metadata.zarr_format == 3 and getattr(array.metadata, "dimension_names", None) is not None
        if (
            (array.ndim or array.metadata.zarr_format == 2)
            and not named
            and "_ARRAY_DIMENSIONS" not in array.attrs
            and "_NCZARR_ARRAY" not in array.attrs
        ):
            found.append(name)
    if needed := [name for name in names if name in found]:
        raise UnsuitableVariable(
            f"{path}: {needed[0]} has no dimension names, so its sample dimension is unknown.",
            "Write the store with xarray, or give the arrays dimension_names.",
        )
    return found


def _sample_dim(config: DataConfig, dataset: xr.Dataset, names: tuple[str, ...]) -> str:
    shared = [str(dim) for dim in dataset[names[0]].dims if all(dim in dataset[name].dims for name in names)]
    if config.sample_dim == "auto":
        if not shared:
            said = ", ".join(f"{name}({', '.join(map(str, dataset[name].dims))})" for name in names)
            raise LengthsDiffer(
                f"The variables share no dimension: {said}.",
                "Name the dimension of the samples in data.sample_dim; variables without it are the same for all.",
            )
        return shared[0]
    known = list(dict.fromkeys(str(dim) for name in names for dim in dataset[name].dims))
    lacking = [name for name in config.targets if config.sample_dim not in dataset[name].dims]
    if config.sample_dim not in known or lacking:
        where = f"of {lacking[0]}, a target" if config.sample_dim in known else "of any variable"
        guess = "" if config.sample_dim in known else did_you_mean(config.sample_dim, known)
        raise InvalidConfig(
            f'data.sample_dim = "{config.sample_dim}": not a dimension {where}{guess}',
            f"Dimensions are {', '.join(known) or 'none'}.",
        )
    return config.sample_dim


Selected: TypeAlias = dict[str, tuple[tuple[int, int, int], bool]]
"""By dimension: start, stop and step, and whether the dimension is dropped."""


def _selected(config: DataConfig, dataset: xr.Dataset, names: tuple[str, ...], sample_dim: str) -> Selected:
    """Check ``data.isel`` against the dimensions there are."""
    sizes = {str(dim): int(size) for name in names for dim, size in dataset[name].sizes.items()}
    found: Selected = {}
    for dim, wanted in config.isel.items():
        said = f"data.isel.{dim} = {wanted if isinstance(wanted, int) else wanted.model_dump()}"
        if dim not in sizes:
            raise InvalidConfig(
                f"{said}: no such dimension{did_you_mean(dim, sizes)}", f"Dimensions are {', '.join(sizes)}."
            )
        if isinstance(wanted, int):
            if dim == sample_dim:
                raise InvalidConfig(f"{said}: {dim} is the dimension of the samples; give a start and a stop.")
            if not -sizes[dim] <= wanted < sizes[dim]:
                raise InvalidConfig(f"{said}: {dim} has {sizes[dim]:,} places, counted from 0.")
            place = wanted % sizes[dim]
            found[dim] = ((place, place + 1, 1), True)
            continue
        if dim == sample_dim and wanted.step != 1:
            raise InvalidConfig(f"{said}: a step along {dim} is not for isel.", "Use data.stride for every n-th row.")
        start, stop, step = slice(wanted.start, wanted.stop, wanted.step).indices(sizes[dim])
        if start >= stop:
            raise InvalidConfig(f"{said}: selects nothing of the {sizes[dim]:,} places of {dim}.")
        found[dim] = ((start, stop, step), False)
    return found


def _tiles(config: DataConfig, variables: tuple[Variable, ...], sample_dim: str) -> tuple[Tile, ...]:
    """Cut the dimensions of ``data.patch``; the last patch of each begins earlier, so that it is whole."""
    sizes: dict[str, int] = {}
    for v in variables:
        sizes.update((v.dims[axis], length) for axis, length in zip(v.row_axes, v.row_shape, strict=True))
    ranges = []
    for dim, size in config.patch.items():
        if dim == sample_dim or dim not in sizes:
            why = "is the dimension of the samples" if dim == sample_dim else "is not a dimension of any variable"
            raise InvalidConfig(
                f"data.patch.{dim} = {size}: {dim} {why}{did_you_mean(dim, sizes)}",
                f"Dimensions are {', '.join(sizes)}.",
            )
        if size > sizes[dim]:
            raise InvalidConfig(f"data.patch.{dim} = {size}: {dim} has {sizes[dim]:,} places.", "Cut smaller patches.")
        starts = dict.fromkeys(min(start, sizes[dim] - size) for start in range(0, sizes[dim], size))
        ranges.append([(dim, start, start + size) for start in starts])
    return tuple(Tile(parts) for parts in itertools.product(*ranges))


def _to_float(dtype: np.dtype[Any]) -> Encoding | None:
    """Return how integers become the floats that can be standardised; they are kept in memory as they are stored."""
    if dtype.kind == "f":
        return None
    return Encoding(dtype="float32" if dtype.itemsize <= 2 else "float64")


def _variable(
    name: str, described: xr.DataArray, array: Any, sample_dim: str, selected: Selected, *, standardised: bool
) -> Variable:
    dtype = np.dtype(array.dtype)
    if dtype.kind not in "fiub":
        raise UnsuitableVariable(f"{name} has dtype {dtype}; only float, integer and bool arrays can be trained on.")
    objects = tuple(int(n) for n in (array.shards or array.chunks))
    dims = tuple(str(dim) for dim in described.dims)
    shape = tuple(int(n) for n in array.shape)
    whole = [selected.get(dim, ((0, n, 1), False)) for dim, n in zip(dims, shape, strict=True)]
    return Variable(
        name=name,
        dims=dims,
        shape=shape,
        dtype=str(dtype),
        chunks=tuple(int(n) for n in array.chunks),
        objects=objects,
        sample_axis=dims.index(sample_dim) if sample_dim in dims else -1,
        checksums=has_checksums(array),
        select=tuple(part for part, _ in whole),
        dropped=tuple(axis for axis, (_, dropped) in enumerate(whole) if dropped),
        encoding=_encoding(name, described, array) or (_to_float(dtype) if standardised else None),
        not_zarrs=not_zarrs(array),
        not_numcodecs=why_not(array),
    )


def _encoding(name: str, described: xr.DataArray, array: Any) -> Encoding | None:
    """Ask xarray what the CF attributes of a variable mean: it decodes one value, and says the dtype."""
    attributes = dict(described.attrs)
    packed = "scale_factor" in attributes or "add_offset" in attributes
    if array.metadata.zarr_format == 2 and not packed and attributes.get("_FillValue") == 0:
        # what zarr itself writes as fill value of a v2 array, and says nothing of missing values
        del attributes["_FillValue"]
    if not {"scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned"} & set(attributes):
        return None
    stored = np.dtype(array.dtype)
    attributes = {key: value for key, value in attributes.items() if key in CF_ATTRIBUTES}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of several fill values; all are missing
            decoded = xr.conventions.decode_cf_variable(
                name, xr.Variable((), np.zeros((), stored), attributes), decode_times=False
            )
        scale, offset = (_number(attributes.get(key)) for key in ("scale_factor", "add_offset"))
        kind = {"true": "u", "false": "i"}.get(str(attributes.get("_Unsigned", "")).lower(), stored.kind)
        unsigned = f"{kind}{stored.itemsize}" if stored.kind in "iu" and kind != stored.kind else ""
        marks = [_numbers(attributes.get(key)) for key in ("_FillValue", "missing_value")]
        if unsigned:  # the fill value is meant as it is stored, with other signs
            bits = 8 * stored.itemsize
            wrapped = [int(v) % 2**bits for v in marks[0]]
            marks[0] = [v - 2**bits if kind == "i" and v >= 2 ** (bits - 1) else v for v in wrapped]
        values = tuple(dict.fromkeys(v for found in marks for v in found))
    except Exception as error:
        raise UnsuitableVariable(f"{name}: its CF attributes cannot be understood: {error}") from None
    dtype = str(decoded.dtype)
    if scale is None and offset is None and not unsigned and all(v != v for v in values):
        return None  # NaN marks NaN
    return Encoding(dtype=dtype, scale=scale, offset=offset, missing=values, unsigned=unsigned)


CF_ATTRIBUTES = ("scale_factor", "add_offset", "_FillValue", "missing_value", "_Unsigned")


def _numbers(value: Any) -> list[Any]:
    found = [] if value is None else np.atleast_1d(np.asarray(value)).tolist()
    return [v if isinstance(v, int) else float(v) for v in found]  # float64 does not hold all int64


def _number(value: Any) -> float | None:
    return None if value is None else float(np.asarray(value).reshape(-1)[0])
