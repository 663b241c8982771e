"""Predictions of stores as people have them: images, cells, several stores, repositories; jumps, strides, holes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from scipy import sparse

import dtrain
from dtrain.data.layouts.hierarchy import Hierarchy
from dtrain.data.layouts.ome import dims_of
from dtrain.data.paths import locate
from dtrain.data.read.open import any_group
from dtrain.errors import ChunkMissing, CoordinateJumps, DataChanged, InvalidConfig, NonFiniteData, TooFewSamples
from tests import foreign
from tests.data.layouts.fixtures import write_anndata, write_cells, write_ome
from tests.predict import models
from tests.predict.test_values import both, forecast

pytestmark = pytest.mark.filterwarnings("ignore")  # zarr's own, of strings that version 3 does not specify
NONE = {"val": 0.0, "test": 0.0}


# Layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.3", "0.5"])
def test_predictions_of_an_image_are_an_image(tmp_path: Path, run_of: Callable[..., dtrain.Run], version: str) -> None:
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 3, (6, 16, 12)).astype("uint8")
    image = (mask + 0.1 * rng.normal(size=mask.shape)).astype("float32")
    path = write_ome(tmp_path / "image.zarr", image, "zyx", version=version, labels={"nuclei": (mask, "zyx")})
    root = zarr.open_group(path / "labels" / "nuclei", mode="r+")
    scale = {"type": "scale", "scale": [2.0, 0.5, 0.5]}
    table = dict(root.attrs["ome"]) if version == "0.5" else dict(root.attrs)
    table["multiscales"][0]["datasets"][0]["coordinateTransformations"] = [scale]
    root.attrs.update({"ome": table} if version == "0.5" else table)
    samples = dtrain.open_samples(
        path,
        inputs=["0"],
        targets=["labels/nuclei/0"],
        isel={"z": {"start": 2, "stop": 6}, "y": {"start": 4, "stop": 16}},
        split=NONE,
    )
    run = run_of(models.pixels, samples, loss="cross_entropy")
    found = both(run, tmp_path)
    np.testing.assert_array_equal(found.nuclei.values, mask[2:, 4:])
    assert found.nuclei.dims == ("z", "y", "x")
    written = run.predict_to(tmp_path / "masks.zarr")
    hierarchy = Hierarchy(store := locate(written.out, tmp_path), any_group(store, ""))
    assert dims_of(hierarchy, zarr.open_array(tmp_path / "masks.zarr", path="nuclei", mode="r")) == ["z", "y", "x"]
    (level,) = hierarchy.root.attrs["ome"]["multiscales"][0]["datasets"]
    assert level["coordinateTransformations"] == [scale, {"type": "translation", "translation": [4.0, 2.0, 0.0]}]
    assert [axis["type"] for axis in hierarchy.root.attrs["ome"]["multiscales"][0]["axes"]] == ["space"] * 3


def test_axes_of_an_image_keep_their_order(tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    image = np.random.default_rng(0).normal(size=(2, 5, 8, 8)).astype("float32")
    path = write_ome(tmp_path / "image.zarr", image, "czyx")
    samples = dtrain.open_samples(path, inputs=["0"], targets=["0"], sample_dim="z", split=NONE)
    found = both(run_of(models.identity, samples, loss="mse"), tmp_path)["0"]
    assert found.dims == ("c", "z", "y", "x")
    np.testing.assert_array_equal(found.values, image)


@pytest.mark.parametrize("how", ["v3", "legacy"])
def test_cells_keep_their_names_and_classes_theirs(tmp_path: Path, run_of: Callable[..., dtrain.Run], how: str) -> None:
    path = write_anndata(tmp_path / "cells.zarr", how)
    run = run_of(
        models.linear, dtrain.open_samples(path, inputs=["X"], targets=["obs/cell_type"]), loss="cross_entropy"
    )
    found = both(run, tmp_path)
    assert found.cell_type.dtype == "int8"
    assert found.cell.values.tolist() == [f"obs-{i}" for i in range(30)]
    assert found.cell_type.attrs["class_names"] == ["B cell", "T cell", "monocyte"]
    assert found.cell_type.attrs["flag_meanings"] == "B_cell T_cell monocyte"
    every = both(run, tmp_path, values="probabilities").cell_type_probability
    assert every["class"].values.tolist() == ["B cell", "T cell", "monocyte"]
    other = write_anndata(tmp_path / "other.zarr", how, names=["T cell", "B cell", "monocyte"])
    with pytest.raises(DataChanged, match="code 0 of obs/cell_type stands for T cell, in the run for B cell"):
        run.predict(other)


def test_genes_of_predictions_keep_their_names(tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    path = write_anndata(tmp_path / "cells.zarr")
    run = run_of(models.identity, dtrain.open_samples(path, inputs=["X"], targets=["layers/counts"]), loss="mse")
    found = both(run, tmp_path)
    assert found.counts.dims == ("cell", "gene")
    assert found.gene.values.tolist() == [f"var-{i}" for i in range(6)]


def test_a_sparse_matrix(tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    matrix = sparse.random(300, 40, 0.1, "csr", "float32", np.random.default_rng(0))
    path = write_cells(tmp_path / "sparse.zarr", matrix)
    samples = dtrain.open_samples(path, inputs=["X"], targets=["obs/y"], normalize=["X"], split=NONE)
    run = run_of(models.mean, samples, loss="mse")
    dense = matrix.toarray().astype("float64")
    wanted = ((dense - dense.mean()) / dense.std()).mean(1)
    np.testing.assert_allclose(both(run, tmp_path).y.values, wanted, rtol=1e-4, atol=1e-6)


# Several stores -----------------------------------------------------------------------------------------------


def windows(path: Any, **more: Any) -> dtrain.Samples:
    return dtrain.open_samples(path, inputs=["t"], targets=["t"], split=NONE, **more)


def years(tmp_path: Path, lengths: tuple[int, ...] = (30, 17, 25)) -> list[Path]:
    paths, begin = [], np.datetime64("2020-01-01T00", "ns")
    for number, length in enumerate(lengths):
        values = 1000.0 * number + np.arange(length, dtype="float32")[:, None] + np.zeros(3, "float32")
        times = begin + np.arange(length) * np.timedelta64(6, "h")
        begin = times[-1] + np.timedelta64(300, "h")
        dataset = xr.Dataset({"t": (("time", "x"), values)}, {"time": times, "x": [1.0, 2.0, 3.0]})
        encoding = {"t": {"chunks": (6, 3)}, "time": {"units": f"hours since 2020-0{number + 1}-01", "dtype": "int64"}}
        paths.append(foreign.write(dataset, tmp_path / f"year{number}.zarr", encoding))
    return paths


def test_several_stores_are_one_and_no_window_crosses(tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    paths = years(tmp_path)
    samples = dtrain.open_samples(
        paths, inputs=["t"], targets=["t"], input_offsets=[-2, 0], target_offsets=1, split=NONE
    )
    run = run_of(models.last, samples, loss="mse")
    found = both(run, tmp_path)
    stores = [xr.open_zarr(path).load() for path in paths]
    np.testing.assert_array_equal(found.t.values, np.concatenate([one.t.values[2:] for one in stores]))
    np.testing.assert_array_equal(found.time.values, np.concatenate([one.time.values[2:] for one in stores]))
    assert found.lead.values == np.timedelta64(6, "h")
    np.testing.assert_array_equal(found.valid_time.values, found.time.values + np.timedelta64(6, "h"))
    again = both(run, tmp_path, paths[1:])
    np.testing.assert_array_equal(again.t.values, np.concatenate([one.t.values[2:] for one in stores[1:]]))


def test_several_stores_with_replicas_of_their_own_must_be_named(tmp_path: Path, blobs: Path) -> None:
    data = {"path": [{"path": str(blobs)}, {"path": str(blobs)}], "inputs": ["x"], "targets": ["y"]}
    config = dtrain.TrainConfig(data=data, train={"loss": "cross_entropy", "rounds": 1})
    run = dtrain.train(models.linear, config=config, cluster="serial", run_dir=tmp_path / "runs", progress=False)
    with pytest.raises(InvalidConfig, match="The run has several stores"):
        run.predict()
    assert both(run, tmp_path, blobs).y.shape == (611,)


@pytest.mark.parametrize("kind", ["icechunk", "zip"])
def test_other_kinds_of_stores(tmp_path: Path, blobs: Path, run_of: Callable[..., dtrain.Run], kind: str) -> None:
    run = run_of(models.linear, dtrain.open_samples(blobs, inputs=["x"], targets=["y"]), loss="cross_entropy")
    wanted = run.predict().y.values
    if kind == "zip":
        path = tmp_path / "blobs.zarr.zip"
        with zarr.storage.ZipStore(path, mode="w") as store:
            for name, array in zarr.open_group(blobs, mode="r").arrays():
                options = {"chunks": array.chunks, "dimension_names": array.metadata.dimension_names}
                with zarr.config.set({"array.write_empty_chunks": True}):
                    zarr.create_array(store, name=name, data=array[...], **options)
            zarr.open_group(store, mode="a")
    else:
        from tests.runtime.test_store_kinds import copy_into

        path = tmp_path / "blobs.icechunk"
        copy_into(path, blobs)
    np.testing.assert_array_equal(both(run, tmp_path, path).y.values, wanted)


# Rows ---------------------------------------------------------------------------------------------------------


def series(path: Path, hours: np.ndarray, **options: Any) -> Path:
    values = np.arange(len(hours), dtype="float32")[:, None] * np.ones(2, "float32")
    times = np.datetime64("2021-01-01", "ns") + hours * np.timedelta64(1, "h")
    return foreign.write(
        xr.Dataset({"t": (("time", "x"), values)}, {"time": times}), path, {"t": {"chunks": (5, 2)}}, **options
    )


def test_windows_across_jumps_are_not_predicted(tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    hours = np.concatenate([np.arange(50), np.arange(60, 110)])
    store = series(tmp_path / "s.zarr", hours)
    samples = dtrain.open_samples(
        store, inputs=["t"], targets=["t"], input_offsets=[-1, 0], target_offsets=[1, 2], split=NONE
    )
    run = run_of(models.steps, samples, loss="mse", model_args={"leads": 2})
    found = both(run, tmp_path)
    rows = np.r_[1:50, 51:100]
    np.testing.assert_array_equal(found.t.values[:, 0, 0], rows + 1)
    np.testing.assert_array_equal(found.time.values, xr.open_zarr(store).time.values[rows])
    np.testing.assert_array_equal(found.valid_time.values[48], found.time.values[48] + np.array([1, 2], "m8[h]"))
    jumpy = series(tmp_path / "j.zarr", np.arange(40) + 20 * (np.arange(40) // 4))
    with pytest.raises(CoordinateJumps, match='data.gaps = "auto" leaves out at most 5%'):
        run.predict(jumpy)


def test_rows_that_are_not_equally_far_apart_have_leads_in_rows(
    tmp_path: Path, run_of: Callable[..., dtrain.Run]
) -> None:
    months = np.cumsum(np.array([0, 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]) * 24)
    store = series(tmp_path / "m.zarr", months)
    samples = dtrain.open_samples(
        store, inputs=["t"], targets=["t"], input_offsets=[-1, 0], target_offsets=[1, 3], split=NONE
    )
    run = run_of(models.steps, samples, loss="mse", model_args={"leads": 2})
    found, times = both(run, tmp_path), xr.open_zarr(store).time.values
    assert found.lead.values.tolist() == [1, 3]
    np.testing.assert_array_equal(found.valid_time.values[:, 0][:-1], times[2:])
    np.testing.assert_array_equal(found.valid_time.values[:, 1][:-3], times[4:])
    assert np.isnat(found.valid_time.values[-1]).all()


def test_strides_and_a_selection(tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    store = foreign.tokens(tmp_path / "tokens.zarr", length=5000)
    offsets = {"input_offsets": {"start": 0, "stop": 16}, "target_offsets": {"start": 1, "stop": 17}}
    samples = dtrain.open_samples(
        store,
        inputs=["tokens"],
        targets=["tokens"],
        stride=16,
        isel={"position": {"start": 40, "stop": 4000}},
        **offsets,
    )
    run = run_of(models.pixels, samples, loss="cross_entropy", model_args={"classes": 300}, class_axis=1)
    found, tokens = both(run, tmp_path, values="classes").tokens, xr.open_zarr(store).tokens.values
    anchors = np.arange(48, 4000 - 15, 16)
    assert (found.dims, found.dtype) == (("position", "lead"), "uint16")
    np.testing.assert_array_equal(found.values, np.stack([tokens[a : a + 16] for a in anchors]))
    assert found.lead.values.tolist() == list(range(1, 17))


def test_too_few_rows_for_a_window(tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    run = run_of(models.last, forecast(foreign.climate(tmp_path / "c.zarr"), target_offsets=1), loss="mse")
    short = series(tmp_path / "short.zarr", np.arange(1))
    dataset = xr.open_zarr(tmp_path / "c.zarr").isel(time=[0]).load().drop_encoding()
    short = foreign.write(dataset[["t2m"]], tmp_path / "one.zarr")
    with pytest.raises(TooFewSamples, match="no run of the 1 rows of time holds a whole input window of 2 rows"):
        run.predict(short)


def test_a_static_input_is_the_same_for_all(tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    store = foreign.climate(tmp_path / "c.zarr")
    samples = dtrain.open_samples(
        store,
        inputs=["z", "lsm"],
        targets=["t2m"],
        isel={"level": 1},
        patch={"latitude": 5, "longitude": 7},
        sample_dim="time",
    )
    run = run_of(models.product, samples, loss="mse")
    found, data = both(run, tmp_path), xr.open_zarr(store).load()
    np.testing.assert_allclose(found.t2m.values, (data.z.isel(level=1) * data.lsm).values, rtol=1e-6)


def test_holes_are_refused_allowed_or_left_out(
    tmp_path: Path, write_store: Callable[..., Path], run_of: Callable[..., dtrain.Run]
) -> None:
    x = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")
    arrays = {
        "x": {"dims": ("n", "f"), "values": x, "chunks": (10, 6)},
        "y": {"dims": ("n",), "values": np.arange(40, dtype="int8") % 3, "chunks": (10,)},
    }
    store = write_store(tmp_path / "whole.zarr", arrays)
    x[7, 2] = x[23, 0] = np.nan
    holes = write_store(tmp_path / "holes.zarr", arrays)
    run = run_of(models.linear, dtrain.open_samples(store, inputs=["x"], targets=["y"]), loss="cross_entropy")
    with pytest.raises(NonFiniteData, match=r"x\[(7, 2|23, 0)\] in chunk .* is nan"):
        run.predict(holes).compute()
    allowed = run.predict(dtrain.open_samples(holes, inputs=["x"], targets=["y"], non_finite="allow"))
    assert np.isnan(allowed.y_probability.values[7])
    skipping = dtrain.open_samples(holes, inputs=["x"], targets=["y"], non_finite="skip")
    written = run.predict_to(tmp_path / "out.zarr", skipping)
    assert (written.left_out, written.samples) == (2, 40)
    found = xr.open_zarr(tmp_path / "out.zarr", mask_and_scale=False).load()
    assert found.y.dtype == "int8"
    assert np.flatnonzero(found.y.values == -1).tolist() == [7, 23]
    assert np.flatnonzero(np.isnan(found.y_probability.values)).tolist() == [7, 23]
    assert found.y.attrs["_FillValue"] == -1
    filled = run.predict(dtrain.open_samples(holes, inputs=["x"], targets=["y"], non_finite={"min_valid": 0.5})).load()
    with torch.inference_mode():
        wanted = run.model(torch.from_numpy(np.nan_to_num(x))).argmax(1).numpy()
    np.testing.assert_array_equal(filled.y.values, wanted)


def test_missing_chunks_of_inputs_are_found_first(
    tmp_path: Path, blobs: Path, run_of: Callable[..., dtrain.Run], write_store: Callable[..., Path]
) -> None:
    run = run_of(models.linear, dtrain.open_samples(blobs, inputs=["x"], targets=["y"]), loss="cross_entropy")
    data = xr.open_zarr(blobs, consolidated=False)
    arrays = {
        "x": {"dims": ("n", "f"), "values": data.x.values, "chunks": (40, 6)},
        "y": {"dims": ("n",), "values": data.y.values, "chunks": (60,)},
    }
    store = write_store(tmp_path / "missing.zarr", arrays)
    (store / "x/c/3/0").unlink()
    with pytest.raises(ChunkMissing, match="x/c/3/0"):
        run.predict_to(tmp_path / "out.zarr", store)
    assert not (tmp_path / "out.zarr").exists()
    found = run.predict(dtrain.open_samples(store, inputs=["x"], targets=["y"], missing="skip"))
    kept = np.r_[0:120, 160:611]
    np.testing.assert_array_equal(found.y.values, run.predict(blobs).y.values[kept])


def test_rows_of_the_run_do_not_concern_another_store(tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    store = foreign.climate(tmp_path / "c.zarr")
    chosen = {"level": 850, "time": {"start": "2020-01-01", "stop": "2020-01-02"}}
    samples = dtrain.open_samples(store, inputs=["z"], targets=["t2m"], sel=chosen)
    run = run_of(models.identity, samples, loss="mse")
    assert run.predict().sizes["time"] == run.predict(store).sizes["time"] == 48
    later = xr.open_zarr(store).isel(time=slice(60, 90)).load().drop_encoding()
    found = run.predict(foreign.write(later, tmp_path / "later.zarr"))
    assert found.sizes["time"] == 30
    np.testing.assert_array_equal(found.t2m.values, later.z.sel(level=850).values)
