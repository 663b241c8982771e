"""Stores in the layouts of OME-Zarr and AnnData, written with plain Zarr, their attributes by hand as the texts say."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

# OME-Zarr ---------------------------------------------------------------------------------------------------

TYPES = {"t": "time", "c": "channel", "z": "space", "y": "space", "x": "space"}


def write_ome(
    path: Path,
    image: np.ndarray,
    axes: str,
    *,
    version: str = "0.5",
    labels: Mapping[str, tuple[np.ndarray, str]] | None = None,
    levels: Sequence[str] = ("0", "1"),
    named: bool = True,
    group: str = "",
    consolidated: bool = False,
) -> Path:
    """Write an image as a pyramid, and label images below ``labels``; `named`: 0.5 with names in the arrays too."""
    zarr_format = 3 if version == "0.5" else 2
    with warnings.catch_warnings(), zarr.config.set({"array.write_empty_chunks": True}):
        warnings.simplefilter("ignore")  # zarr warns of consolidated metadata in v3
        zarr.open_group(path, mode="w", zarr_format=zarr_format)
        root = zarr.open_group(path, path=group or None, mode="a", zarr_format=zarr_format)
        _write_pyramid(root, image, axes, version, levels, named)
        if labels:
            index = root.create_group("labels")
            for name, (values, own_axes) in labels.items():
                own = index.create_group(name)
                _write_pyramid(own, values, own_axes, version, levels, named, {"image-label": {"version": version}})
            _set(index, version, {"labels": list(labels)})
        if consolidated:
            zarr.consolidate_metadata(path)
    return path


def _write_pyramid(
    group: Any,
    values: np.ndarray,
    axes: str,
    version: str,
    levels: Sequence[str],
    named: bool,
    more: Mapping[str, Any] | None = None,
) -> None:
    for number, name in enumerate(levels):
        level = values[(..., *[slice(None, None, 2**number)] * 2)]
        chunks = tuple(max(1, n // 2) if axis in "yx" else min(n, 2) for axis, n in zip(axes, level.shape, strict=True))
        options: dict[str, Any] = {"shape": level.shape, "dtype": level.dtype, "chunks": chunks}
        if version == "0.5":
            options["dimension_names"] = list(axes) if named else None
        else:
            options["chunk_key_encoding"] = {"name": "v2", "separator": "/"}
        group.create_array(name, **options)[...] = level
    described: dict[str, Any] = {"datasets": [{"path": name} for name in levels], "name": "image"}
    if version in ("0.4", "0.5"):
        described["axes"] = [{"name": axis, "type": TYPES[axis]} for axis in axes]
    elif version == "0.3":
        described["axes"] = list(axes)
    if version != "0.5":
        described["version"] = version
    _set(group, version, {"multiscales": [described], **(more or {})})


def _set(group: Any, version: str, attributes: Mapping[str, Any]) -> None:
    if version == "0.5":
        group.attrs["ome"] = {"version": version, **attributes}
    else:
        group.attrs.update(attributes)


# AnnData ----------------------------------------------------------------------------------------------------

NAMES = ["B cell", "T cell", "monocyte"]
COUNT, GENES = 30, 6
CODES = (np.arange(COUNT) * 7 % 3).astype("int8")
X = np.random.default_rng(0).normal(size=(COUNT, GENES)).astype("float32")
N_COUNTS = np.arange(COUNT) * 1.5
PCA = np.random.default_rng(1).normal(size=(COUNT, 4))
FORMATS = ["v2", "v3", "legacy"]
"""How AnnData writes into Zarr v2 and v3, and how its version 0.7 wrote."""


def write_anndata(
    path: Path,
    how: str = "v3",
    *,
    x: np.ndarray = X,
    codes: np.ndarray = CODES,
    names: Sequence[Any] = NAMES,
    group: str = "",
    consolidated: bool = False,
) -> Path:
    """Write X, layers, obsm, and columns of obs and var: numbers, bools, strings and categoricals."""
    zarr_format, old = (3 if how == "v3" else 2), how == "legacy"
    count, genes = x.shape
    with warnings.catch_warnings(), zarr.config.set({"array.write_empty_chunks": True}):
        warnings.simplefilter("ignore")  # zarr warns of strings and of consolidated metadata in v3
        zarr.open_group(path, mode="w", zarr_format=zarr_format)
        root = zarr.open_group(path, path=group or None, mode="a", zarr_format=zarr_format)
        if not old:
            root.attrs.update(encoding("anndata", "0.1.0"))
        write(root, "X", x, (8, 4), old)
        obs = frame(root, "obs", count, ["cell_type", "n_counts", "age", "control"], old)
        write_categorical(obs, "cell_type", codes, names, old)
        write(obs, "n_counts", np.arange(count) * 1.5, (12,), old)
        write(obs, "age", np.arange(count), (12,), old)
        write(obs, "control", np.arange(count) % 2 == 0, (12,), old)
        var = frame(root, "var", genes, ["variable"], old)
        write(var, "variable", np.arange(genes) % 2 == 0, (genes,), old)
        for name in ("layers", "obsm", "uns"):
            root.create_group(name).attrs.update({} if old else encoding("dict", "0.1.0"))
        write(root["layers"], "counts", x * 2, (8, 4), old)
        write(root["obsm"], "X_pca", np.resize(PCA, (count, 4)), (8, 4), old)
        if consolidated:
            zarr.consolidate_metadata(path)
    return path


def encoding(kind: str, version: str) -> dict[str, str]:
    return {"encoding-type": kind, "encoding-version": version}


def frame(root: Any, name: str, count: int, columns: list[str], old: bool = False) -> Any:
    """Write a data frame with an index of strings and no columns yet."""
    group = root.create_group(name)
    group.attrs.update(encoding("dataframe", "0.1.0" if old else "0.2.0"))
    group.attrs.update({"_index": "_index", "column-order": columns})
    write(group, "_index", strings([f"{name}-{i}" for i in range(count)]), (count,), old)
    return group


def strings(values: Sequence[str]) -> np.ndarray:
    return np.array(values, np.dtypes.StringDType())


def write(group: Any, name: str, values: np.ndarray, chunks: tuple[int, ...], old: bool = False) -> Any:
    array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=chunks)
    if not old:
        array.attrs.update(encoding("string-array" if values.dtype.kind == "T" else "array", "0.2.0"))
    array[...] = values
    return array


def write_categorical(obs: Any, name: str, codes: np.ndarray, names: Sequence[Any], old: bool = False) -> None:
    values = strings(names) if names and isinstance(names[0], str) else np.asarray(names)
    chunks, name_chunks = (11,), (max(1, len(values)),)
    if old:
        write(obs, f"__categories/{name}", values, name_chunks, old).attrs["ordered"] = False
        write(obs, name, codes, chunks, old).attrs["categories"] = f"__categories/{name}"
        return
    group = obs.create_group(name)
    group.attrs.update({**encoding("categorical", "0.2.0"), "ordered": False})
    write(group, "codes", codes, chunks)
    write(group, "categories", values, name_chunks)


def write_sparse(
    group: Any,
    name: str,
    matrix: Any,
    kind: str = "csr_matrix",
    *,
    chunks: Mapping[str, int] | int = 64,
    shards: Mapping[str, int] | None = None,
    **arrays: np.ndarray,
) -> Any:
    """Write a matrix of scipy as AnnData does: a group of three arrays; `arrays`: others in place of its own."""
    sparse = group.create_group(name)
    sparse.attrs.update({**encoding(kind, "0.1.0"), "shape": [int(n) for n in matrix.shape]})
    with zarr.config.set({"array.write_empty_chunks": True}):
        for part in ("data", "indices", "indptr"):
            values = arrays.get(part, getattr(matrix, part))
            length = chunks if isinstance(chunks, int) else chunks[part]
            shard = None if shards is None else (length * shards[part],)
            array = sparse.create_array(
                part, shape=values.shape, dtype=values.dtype, chunks=(length,), shards=shard, fill_value=0
            )
            array.attrs.update(encoding("array", "0.2.0"))
            if len(values):
                array[...] = values
    return sparse


def write_cells(path: Path, matrix: Any, zarr_format: int = 3, y_chunk: int = 8, **options: Any) -> Path:
    """Write X as a sparse matrix, and the number of each cell as obs/y."""
    root = zarr.open_group(path, mode="w", zarr_format=zarr_format)
    root.attrs.update(encoding("anndata", "0.1.0"))
    write_sparse(root, "X", matrix, **options)
    obs = frame(root, "obs", 1, ["y"])
    with zarr.config.set({"array.write_empty_chunks": True}):
        write(obs, "y", np.arange(matrix.shape[0]), (y_chunk,))
    return path
