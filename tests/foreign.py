"""Stores as other software writes them: xarray's ``to_zarr`` with its defaults, in the layouts that people have.

xarray leaves out chunks that hold only the fill value: `tests/conftest.py` lets zarr write them, this file does not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr


def write(dataset: xr.Dataset, path: Path, encoding: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """Write a data set as a user would."""
    with warnings.catch_warnings(), zarr.config.set({"array.write_empty_chunks": False}):
        warnings.simplefilter("ignore")  # zarr warns of strings, which version 3 does not specify
        dataset.to_zarr(path, encoding=dict(encoding or {}), **options)
    return path


def climate(path: Path, *, hours: int = 120, chunk: int = 24, packed: bool = True, **options: Any) -> Path:
    """Reanalysis: packed fields over time, latitude and longitude, levels, a land mask, and what CF adds."""
    rng = np.random.default_rng(0)
    lat, lon, level = np.linspace(60, 50, 12), np.linspace(0, 20, 16), np.array([500.0, 700.0, 850.0])
    day = np.arange(hours)[:, None, None]
    wave = np.sin(2 * np.pi * (day / 24 + np.arange(16) / 16)) * np.cos(np.radians(lat))[None, :, None]
    t2m = 285 + 8 * wave + rng.normal(size=(hours, 12, 16)) / 2
    z = np.array([54000.0, 30000.0, 14000.0])[:, None, None] + 300 * t2m[:, None] / 285
    dims = ("time", "latitude", "longitude")
    dataset = xr.Dataset(
        {
            "t2m": (dims, t2m, {"units": "K", "standard_name": "air_temperature", "grid_mapping": "crs"}),
            "z": (("time", "level", *dims[1:]), z.astype("float32"), {"units": "m**2 s**-2"}),
            "lsm": (dims[1:], (rng.random((12, 16)) > 0.5).astype("int8"), {"flag_meanings": "sea land"}),
            "crs": ((), 0, {"grid_mapping_name": "latitude_longitude"}),
            "time_bnds": (("time", "bnds"), np.arange(2 * hours).reshape(hours, 2)),
            "expver": (("time",), np.array(["0001"] * hours, dtype=object)),
        },
        coords={
            "time": ("time", np.datetime64("2020-01-01", "ns") + np.arange(hours) * np.timedelta64(1, "h")),
            "latitude": ("latitude", lat, {"units": "degrees_north"}),
            "longitude": ("longitude", lon, {"units": "degrees_east"}),
            "level": ("level", level, {"units": "hPa", "positive": "down"}),
        },
    )
    dataset.time.attrs["bounds"] = "time_bnds"
    packing = {"dtype": "int16", "scale_factor": 0.001, "add_offset": 285.0, "_FillValue": -32768}
    encoding = {
        "t2m": {**(packing if packed else {}), "chunks": (chunk, 12, 16)},
        "z": {"chunks": (chunk, 3, 12, 16)},
    }
    return write(dataset, path, encoding, **options)


def nuclei(path: Path, *, count: int = 40, channels: int = 0, **options: Any) -> Path:
    """Microscopy: a stack of images and their masks; chunks of masks that are all background are left out."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[:32, :32]
    cy, cx = rng.integers(8, 24, (2, count, 1, 1))
    mask = (y - cy) ** 2 + (x - cx) ** 2 < 36
    mask[::4] = False
    image = (200 + 40_000 * mask + rng.integers(0, 2000, mask.shape)).astype("uint16")
    dims = ("n", "y", "x")
    if channels:
        image, dims = np.stack([image] * channels, axis=1), ("n", "c", "y", "x")
    dataset = xr.Dataset({"image": (dims, image), "mask": (("n", "y", "x"), mask.astype("uint8"))})
    encoding = {"image": {"chunks": (1, *image.shape[1:])}, "mask": {"chunks": (1, 32, 32)}}
    return write(dataset, path, encoding, **options)


def table(path: Path, *, rows: int = 400, **options: Any) -> Path:
    """Columns of a data frame, each a variable of its own; some values are missing."""
    rng = np.random.default_rng(2)
    age, income = rng.integers(18, 90, rows), rng.lognormal(10, 1, rows)
    height = rng.normal(170, 10, rows)
    height[rng.random(rows) < 0.1] = np.nan
    spending = 0.2 * income + 50 * age + rng.normal(0, 100, rows)
    visits = rng.integers(0, 3_000_000, rows)
    columns = {"age": age, "height": height, "income": income, "visits": visits, "spending": spending}
    columns["city"] = np.array([["Oslo", "Lima", "Pune"][i % 3] for i in range(rows)], dtype=object)
    columns["since"] = np.datetime64("2001-01-01", "ns") + np.arange(rows) * np.timedelta64(1, "D")
    dataset = xr.Dataset({name: (("index",), values) for name, values in columns.items()})
    dataset = dataset.assign_coords(index=np.arange(rows))
    return write(dataset, path, {name: {"chunks": (100,)} for name in columns}, **options)


def tokens(path: Path, *, length: int = 20_000, dtype: str = "uint16", **options: Any) -> Path:
    """Text as one array of token numbers."""
    rng = np.random.default_rng(3)
    text = np.repeat(rng.integers(0, 300, length // 4), 4).astype(dtype)
    return write(xr.Dataset({"tokens": (("position",), text)}), path, {"tokens": {"chunks": (4096,)}}, **options)


def cells(path: Path, *, count: int = 200, genes: int = 50, as_coords: bool = False, **options: Any) -> Path:
    """Single cells: counts of cells x genes, cell types as strings and as codes, names of genes."""
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 3, count)
    counts = rng.poisson(rng.gamma(1, 3, (3, genes))[codes]).astype("float32")
    names = np.array(["B cell", "T cell", "monocyte"], dtype=object)
    dataset = xr.Dataset(
        {
            "X": (("cell", "gene"), counts),
            "cell_type": (("cell",), names[codes]),
            "cell_type_code": (("cell",), codes.astype("int8")),
            "n_counts": (("cell",), counts.sum(1)),
            "mean_counts": (("gene",), counts.mean(0)),
        },
        coords={
            "cell": np.array([f"AAAC-{i}" for i in range(count)], dtype=object),
            "gene": np.array([f"G{i}" for i in range(genes)], dtype=object),
        },
    )
    if as_coords:
        dataset = dataset.set_coords(["cell_type", "cell_type_code", "n_counts", "mean_counts"])
    return write(dataset, path, {"X": {"chunks": (64, genes)}}, **options)


STORES: dict[str, Callable[..., Path]] = {
    "climate": climate,
    "nuclei": nuclei,
    "table": table,
    "tokens": tokens,
    "cells": cells,
}
"""By kind of user: a function that writes a store."""


# Any store --------------------------------------------------------------------------------------------------

DIMS = (
    "time",
    "lat",
    "lon",
    "level",
    "n",
    "y",
    "x",
    "c",
    "z",
    "cell",
    "gene",
    "dim_0",
    "dim_1",
    "station",
    "band",
    "t",
)
NAMES = ("t2m", "image", "mask", "label", "y", "target", "X", "tokens", "a", "b", "lsm", "crs", "time_bnds", "codes")
NAMES = (*NAMES, "cell_type", "count", "sst", "class", "weights", "id", "segmentation", "z")
KINDS = ("f4", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u8", "?", "c8", "O", "M8[ns]", "packed", "nan", "const")


def anything(path: Path, seed: int) -> Path:
    """A group of variables that nobody has thought of: names, dimensions, dtypes, chunks and marks by chance."""
    rng = np.random.default_rng(seed)
    dims = rng.choice(DIMS, rng.integers(1, 6), replace=False).tolist()
    sizes = {dim: int(rng.choice([1, 2, 3, 5, 8, 9, 12, 20, 33, 60])) for dim in dims}
    variables, encoding = {}, {}
    for name in rng.choice(NAMES, rng.integers(1, 7), replace=False).tolist():
        own = rng.permutation(dims)[: rng.choice([0, 1, 1, 2, 2, 3, 3, 4])].tolist()
        if name in dims and own != [name]:
            continue
        shape = tuple(sizes[dim] for dim in own)
        values, packing = _any_values(rng, shape)
        chunks = tuple(int(rng.choice([n, max(1, n // 3), 1 if n < 9 else n])) for n in shape)
        variables[name], encoding[name] = (own, values), {**packing, **({"chunks": chunks} if chunks else {})}
    dated = {
        dim: _hours(sizes[dim]) for dim in dims if dim in ("time", "t") and dim not in variables and rng.random() < 0.5
    }
    return write(xr.Dataset(variables, dated), path, encoding, zarr_format=2 + seed % 2)


def _hours(count: int) -> Any:
    return np.datetime64("2020-01-01", "ns") + np.arange(count) * np.timedelta64(1, "h")


def _any_values(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Any, dict[str, Any]]:
    kind = str(rng.choice(KINDS))
    floats = rng.normal(size=shape)
    if kind == "packed":
        return 280 + floats, {"dtype": "int16", "scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -9999}
    if kind == "nan":
        return np.where(rng.random(shape) < 0.3, np.nan, 50 * floats), {}
    if kind == "const":
        return np.full(shape, rng.choice([0.0, 7.0, 1e6])), {}
    if kind == "O":
        return np.full(shape, "text", dtype=object), {}
    if kind[0] in "iu":
        most = min(int(rng.choice([2, 3, 10, 300, 60_000])), np.iinfo(kind).max)
        marks = {"_FillValue": int(rng.choice([0, 1]))} if kind == "i2" else {}
        return rng.integers(0, most, shape).astype(kind), marks
    return (floats * 10.0 ** rng.integers(-3, 3)).astype(kind), {}
