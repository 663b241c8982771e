"""Runs of many kinds of data, each trained for a round or two: what an exported module has to know differs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import dtrain
from tests.data.layouts import fixtures
from tests.exporting import nets
from tests.training import trained


@dataclass(frozen=True)
class Case:
    write: Callable[[Path], Any]
    samples: dict[str, Any]
    model: Any
    loss: Any = "mse"
    model_args: dict[str, Any] | None = None

    def train(self, folder: Path, **more: Any) -> dtrain.Run:
        store = folder / "data.zarr"
        if not store.exists():
            self.write(store)
        samples = dtrain.open_samples(store, **self.samples)
        table = {"loss": self.loss, "rounds": 2, "batch_size": 16, "optimizer_args": {"lr": 0.01}}
        args = {} if self.model_args is None else {"model_args": self.model_args}
        return trained(self.model, samples, folder / "runs", table, **args, **more)


def _forecast(path: Path) -> None:
    """Temperatures of three levels, packed as int16: means and spread differ from level to level."""
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(120, 3, 4, 5)).cumsum(0) * 0.3
    t = steps * np.array([1.0, 3.0, 10.0])[:, None, None] + np.array([290.0, 250.0, 220.0])[:, None, None]
    ds = xr.Dataset({"t": (("time", "level", "y", "x"), t)})
    packing = {"dtype": "int16", "scale_factor": 0.01, "add_offset": 250.0, "_FillValue": -32768}
    ds.to_zarr(path, encoding={"t": {**packing, "chunks": (10, 3, 4, 5)}}, zarr_format=3, consolidated=False)


def _several(path: Path) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 6)) * 5 + 100
    ds = xr.Dataset(
        {
            "x": (("n", "f"), x.astype("float32")),
            "mask": (("f",), np.array([1, 0, 1, 1, 0, 1], "float32")),
            "code": (("n",), rng.integers(0, 5, 200)),
            "sum": (("n",), x.sum(1)),
        }
    )
    ds.to_zarr(path, encoding={"x": {"chunks": (20, 6)}}, zarr_format=3, consolidated=False)


def _tokens(path: Path) -> None:
    tokens = np.random.default_rng(2).integers(0, 17, 3000).astype("uint8")
    xr.Dataset({"tokens": (("place",), tokens)}).to_zarr(
        path, encoding={"tokens": {"chunks": (100,)}}, zarr_format=3, consolidated=False
    )


def _gaps(path: Path) -> None:
    """A fifth of the values is missing."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(300, 6)) * 2 + 7
    y = x.sum(1, keepdims=True)
    x[rng.random(x.shape) < 0.2] = np.nan
    ds = xr.Dataset({"x": (("n", "f"), x.astype("float32")), "y": (("n", "one"), y)})
    ds.to_zarr(path, encoding={"x": {"chunks": (30, 6)}}, zarr_format=3, consolidated=False)


def _cells(path: Path) -> None:
    import zarr
    from scipy import sparse

    rng = np.random.default_rng(4)
    dense = rng.poisson(0.7, (150, 12)).astype("float32")
    root = zarr.open_group(path, mode="w", zarr_format=3)
    root.attrs.update(fixtures.encoding("anndata", "0.1.0"))
    fixtures.write_sparse(root, "X", sparse.csr_matrix(dense))
    obs = fixtures.frame(root, "obs", 150, ["kind"])
    fixtures.write_categorical(obs, "kind", (dense[:, 0].astype(int) % 3).astype("int8"), ["B cell", "T cell", "other"])
    fixtures.frame(root, "var", 12, [])


def _patches(path: Path) -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(12, 2, 16, 16)) * np.array([1.0, 50.0])[:, None, None]
    ds = xr.Dataset({"image": (("n", "band", "y", "x"), x.astype("float32")), "mean": (("n", "y", "x"), x.mean(1))})
    ds.to_zarr(path, encoding={"image": {"chunks": (2, 2, 8, 8)}}, zarr_format=3, consolidated=False)


CASES = {
    "forecast": Case(
        _forecast,
        {
            "inputs": ["t"],
            "targets": ["t"],
            "input_offsets": [-1, 0],
            "target_offsets": 1,
            "normalize": {"t": ["level"]},
        },
        nets.Forecast,
        model_args={"levels": 3},
    ),
    "several": Case(
        _several,
        {"inputs": ["x", "mask", "code"], "targets": ["x", "sum"], "normalize": ["x", "sum"], "sample_dim": "n"},
        nets.Several,
        nets.both,
    ),
    "tokens": Case(
        _tokens,
        {
            "inputs": ["tokens"],
            "targets": ["tokens"],
            "input_offsets": {"start": 0, "stop": 8},
            "target_offsets": {"start": 1, "stop": 9},
            "stride": 8,
        },
        nets.Tokens,
        "cross_entropy",
        {"width": 6},
    ),
    "gaps": Case(
        _gaps,
        {"inputs": ["x"], "targets": ["y"], "normalize": {"x": ["f"], "y": []}, "non_finite": {"min_valid": 0.3}},
        nets.linear,
    ),
    "cells": Case(
        _cells,
        {"inputs": ["X"], "targets": ["obs/kind"], "normalize": {"X": ["gene"]}},
        nets.Classes,
        "cross_entropy",
        {"genes": 12},
    ),
    "patches": Case(
        _patches,
        {"inputs": ["image"], "targets": ["mean"], "patch": {"y": 8, "x": 8}, "normalize": {"image": ["band"]}},
        nets.Bands,
    ),
}
