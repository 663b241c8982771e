"""What is predicted: values in the target's units, classes, probabilities, outputs as they are; their coordinates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import xarray as xr

import dtrain
from dtrain.errors import InvalidConfig, ShapesDiffer
from tests import foreign
from tests.predict import models


def opened(path: Path) -> xr.Dataset:
    return xr.open_zarr(path).load()


def both(run: dtrain.Run, tmp_path: Path, *data: Any, **options: Any) -> xr.Dataset:
    """Predictions that were written, after a look that those that are lazy are the same."""
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}.zarr"
    run.predict_to(out, *data, **options)
    written, lazy = opened(out), run.predict(*data, **options).load()
    xr.testing.assert_identical(written.drop_attrs(), lazy.drop_attrs())
    assert dict(written.sizes) == dict(lazy.sizes)
    return written


@pytest.fixture(scope="module")
def climate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return foreign.climate(tmp_path_factory.mktemp("climate") / "climate.zarr")


def forecast(path: Path, **more: Any) -> dtrain.Samples:
    return dtrain.open_samples(
        path, inputs=["t2m"], targets=["t2m"], **{"input_offsets": [-1, 0], "target_offsets": [1, 2, 3], **more}
    )


def test_a_forecast_has_leads_valid_times_and_the_coordinates_of_its_store(
    climate: Path, tmp_path: Path, run_of: Callable[..., dtrain.Run]
) -> None:
    run = run_of(models.steps, forecast(climate), loss="mse")
    found, store = both(run, tmp_path), xr.open_zarr(climate)
    assert found.t2m.dims == ("time", "lead", "latitude", "longitude")
    ahead = np.arange(1, 4, dtype="float32")
    wanted = store.t2m.values.astype("float32")[1:, None] + ahead[:, None, None]
    np.testing.assert_array_equal(found.t2m.values, wanted)
    np.testing.assert_array_equal(found.time.values, store.time.values[1:])
    np.testing.assert_array_equal(found.lead.values, ahead.astype("m8[h]").astype("m8[ns]"))
    np.testing.assert_array_equal(found.valid_time.values, found.time.values[:, None] + found.lead.values)
    for name in ("latitude", "longitude"):
        xr.testing.assert_identical(found[name].variable, store[name].load().variable)
    assert found.t2m.attrs == {"units": "K", "standard_name": "air_temperature", "grid_mapping": "crs"}
    assert found.crs.attrs == {"grid_mapping_name": "latitude_longitude"}


def test_normalisation_is_undone_as_metrics_undo_it(
    climate: Path, tmp_path: Path, run_of: Callable[..., dtrain.Run]
) -> None:
    samples = forecast(climate, target_offsets=1, normalize={"t2m": ["latitude"]}, input_offsets=[-1, 0])
    run = run_of(models.last, samples, loss="mae", metrics=["mae"])
    found, store = both(run, tmp_path), xr.open_zarr(climate).t2m.load()
    np.testing.assert_allclose(found.t2m.values, store.values[1:], rtol=1e-6)  # the model gives its last row
    truth = store.values[2:]
    error = np.abs(found.t2m.values[:-1].astype("float64") - truth).mean()
    assert run.evaluate(split="all")["mae"] == pytest.approx(error, rel=1e-6)
    assert found.lead.values == np.timedelta64(1, "h")
    np.testing.assert_array_equal(found.valid_time.values, found.time.values + found.lead.values)


def test_the_target_need_not_be_there(climate: Path, tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    samples = dtrain.open_samples(climate, inputs=["z"], targets=["t2m"], isel={"level": 0})
    run = run_of(models.identity, samples, loss="mse")
    bare = tmp_path / "bare.zarr"
    foreign.write(xr.open_zarr(climate)[["z"]].isel(time=slice(0, 30)).load().drop_encoding(), bare)
    found = both(run, tmp_path, bare)
    z = xr.open_zarr(bare).z.isel(level=0)
    np.testing.assert_array_equal(found.t2m.values, z.values)
    assert found.t2m.attrs["units"] == "K"
    assert float(found.level) == 500.0
    assert "lead" not in found.variables


def test_classes_are_the_targets_codes_with_their_probability(
    blobs: Path, tmp_path: Path, run_of: Callable[..., dtrain.Run]
) -> None:
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"])
    run = run_of(models.linear, samples, loss="cross_entropy", metrics=["accuracy"])
    found, truth = both(run, tmp_path), xr.open_zarr(blobs, consolidated=False)
    with torch.inference_mode():
        logits = torch.cat([run.model(x) for (x,), _ in dtrain.batches(samples, split="all", batch_size=7)])
    assert found.y.dtype == "int32"
    np.testing.assert_array_equal(found.y.values, logits.argmax(1).numpy())
    np.testing.assert_allclose(found.y_probability.values, logits.softmax(1).max(1).values.numpy(), rtol=1e-5)
    assert run.evaluate(split="all")["accuracy"] == (found.y.values == truth.y.values).mean()
    alone = both(run, tmp_path, values="classes")
    assert list(alone.data_vars) == ["y"]
    every = both(run, tmp_path, values="probabilities")
    assert every.y_probability.dims == ("n", "class")
    np.testing.assert_allclose(every.y_probability.sum("class"), 1, rtol=1e-6)
    raw = both(run, tmp_path, values="raw")
    np.testing.assert_allclose(raw.y_output.values, logits.numpy(), rtol=1e-5, atol=1e-6)


def test_bce_gives_the_probability_and_with_classes_what_it_means(
    write_store: Callable[..., Path], tmp_path: Path, run_of: Callable[..., dtrain.Run]
) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "x": {"dims": ("n", "y", "x"), "values": rng.normal(size=(20, 4, 4)).astype("float32"), "chunks": (5, 4, 4)},
        "mask": {"dims": ("n", "y", "x"), "values": rng.random((20, 4, 4)) > 0.5, "chunks": (5, 4, 4)},
    }
    store = write_store(tmp_path / "masks.zarr", arrays)
    run = run_of(models.identity, dtrain.open_samples(store, inputs=["x"], targets=["mask"]), loss="bce")
    chance, classes = both(run, tmp_path), both(run, tmp_path, values="classes")
    np.testing.assert_allclose(chance.mask.values, 1 / (1 + np.exp(-arrays["x"]["values"])), rtol=1e-6)
    assert classes.mask.dtype == bool
    np.testing.assert_array_equal(classes.mask.values, arrays["x"]["values"] > 0)


def own_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).abs().mean()


def any_loss(outputs: Any, targets: Any) -> torch.Tensor:
    first = outputs[0] if isinstance(outputs, tuple) else outputs
    return first.mean() ** 2


def test_a_loss_of_ones_own(climate: Path, blobs: Path, tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    run = run_of(models.last, forecast(climate, target_offsets=1, normalize=["t2m"]), loss=own_loss)
    np.testing.assert_allclose(both(run, tmp_path).t2m.values, xr.open_zarr(climate).t2m.values[1:], rtol=1e-6)
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"])
    run = run_of(models.linear, samples, loss=any_loss)
    found = both(run, tmp_path)
    assert found.y_output.dims == ("n", "y_output_axis_0")
    assert both(run, tmp_path, values="classes").y.dtype == "int32"
    several = both(run_of(models.two, samples, loss=any_loss), tmp_path)
    assert {name: v.dims for name, v in several.items()} == {
        "y_output_0": ("n", "y_output_0_axis_0"),
        "y_output_1": ("n",),
    }


def test_values_that_do_not_fit_are_refused(climate: Path, run_of: Callable[..., dtrain.Run]) -> None:
    run = run_of(models.steps, forecast(climate), loss="mse")
    with pytest.raises(InvalidConfig, match='train.loss = "mse" is for numbers, so that there are no classes'):
        run.predict(values="classes")
    with pytest.raises(InvalidConfig, match='values = "class": allowed are auto, classes, .* did you mean "classes"'):
        run.predict(values="class")
    with pytest.raises(InvalidConfig, match="overlap = 1.5: a number from 0 to 0.9"):
        run.predict(overlap=1.5)


def test_data_that_do_not_fit_the_model_are_refused(
    blobs: Path, tmp_path: Path, write_store: Callable[..., Path], run_of: Callable[..., dtrain.Run]
) -> None:
    run = run_of(models.linear, dtrain.open_samples(blobs, inputs=["x"], targets=["y"]), loss="cross_entropy")
    wide = write_store(
        tmp_path / "wide.zarr", {"x": {"dims": ("n", "f"), "values": np.zeros((9, 7)), "chunks": (4, 7)}}
    )
    with pytest.raises(ShapesDiffer, match=r"does not accept the inputs x float32\[2, 7\]"):
        run.predict(wide)
    other = write_store(tmp_path / "other.zarr", {"z": {"dims": ("n",), "values": np.zeros(9), "chunks": (4,)}})
    with pytest.raises(dtrain.errors.UnknownVariable, match='variable "x" not found'):
        run.predict(other)


def test_a_run_whose_data_are_gone_predicts_what_the_store_explains(
    blobs: Path, tmp_path: Path, run_of: Callable[..., dtrain.Run]
) -> None:
    gone, kept = tmp_path / "gone.zarr", tmp_path / "kept.zarr"
    dataset = xr.open_zarr(blobs, consolidated=False).load()
    foreign.write(dataset, gone)
    foreign.write(dataset.isel(n=slice(0, 50)), kept)
    bare = foreign.write(dataset[["x"]], tmp_path / "bare.zarr")
    run = run_of(models.linear, dtrain.open_samples(gone, inputs=["x"], targets=["y"]), loss="cross_entropy")
    gone.rename(tmp_path / "moved.zarr")
    assert both(run, tmp_path, kept).y.shape == (50,)
    with pytest.raises(InvalidConfig, match="It is not known what the outputs mean: the store lacks the targets, and"):
        run.predict(bare)
    assert both(run, tmp_path, bare, values="raw").output.shape == (611, 3)


def halved_and_flipped(batch: Any, generator: torch.Generator) -> Any:
    """Halves the inputs of all splits, and turns those of training around."""
    (x,) = batch.inputs
    assert len(batch.targets) == 1
    x = x / 2
    return dataclasses.replace(batch, inputs=((x.flip(-1) if batch.split == "train" else x),))


def test_a_transform_sees_samples_as_an_evaluation_of_all_does(
    climate: Path, tmp_path: Path, run_of: Callable[..., dtrain.Run]
) -> None:
    samples = dtrain.open_samples(
        climate, inputs=["t2m"], targets=["t2m"], transform=halved_and_flipped, split={"val": 0.0, "test": 0.0}
    )
    run = run_of(models.identity, samples, loss="mse")
    np.testing.assert_allclose(both(run, tmp_path).t2m.values, xr.open_zarr(climate).t2m.values / 2, rtol=1e-6)


def test_precision_is_that_of_the_run(climate: Path, tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    samples = dtrain.open_samples(climate, inputs=["t2m"], targets=["t2m"], normalize=["t2m"])
    exact = run_of(models.context, samples, loss="mse")
    short = run_of(models.context, samples, loss="mse", precision="bfloat16")
    found, wanted = both(short, tmp_path).t2m, both(exact, tmp_path).t2m
    assert found.dtype == "float32"
    error = np.abs(found.values - wanted.values).max()
    assert 0 < error < 0.1


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_coordinates_of_two_dimensions_bands_and_calendars(
    tmp_path: Path, run_of: Callable[..., dtrain.Run], zarr_format: Literal[2, 3]
) -> None:
    rng = np.random.default_rng(0)
    lat, lon = np.meshgrid(np.linspace(50, 60, 5), np.linspace(0, 9, 4), indexing="ij")
    times = xr.date_range("2001-02-26", periods=12, freq="D", calendar="noleap", use_cftime=True)
    dataset = xr.Dataset(
        {"sst": (("time", "band", "y", "x"), rng.normal(size=(12, 3, 5, 4)).astype("float32"), {"units": "K"})},
        {
            "time": times,
            "band": np.array(["red", "green", "blue"], object),
            "lat": (("y", "x"), lat, {"units": "degrees_north"}),
            "lon": (("y", "x"), lon, {"units": "degrees_east"}),
            "cloud": ("time", rng.integers(0, 9, 12).astype("int16")),
            "area": (("x", "y"), rng.random((4, 5))),
            "height": 2.0,
        },
    )
    store = foreign.write(dataset, tmp_path / "swath.zarr", {"sst": {"chunks": (5, 3, 5, 4)}}, zarr_format=zarr_format)
    samples = dtrain.open_samples(
        store,
        inputs=["sst"],
        targets=["sst"],
        input_offsets=[-1, 0],
        target_offsets=[1, 7],
        isel={"y": [1, 2, 3]},
        split={"val": 0.0, "test": 0.0},
    )
    run = run_of(models.steps, samples, loss="mse", model_args={"leads": 2})
    found = both(run, tmp_path)
    part = xr.open_zarr(store).isel(time=slice(1, None), y=slice(1, 4)).load()
    for name in ("time", "band", "lat", "lon", "cloud", "area", "height"):
        assert found[name].dims == part[name].dims
        np.testing.assert_array_equal(found[name].values, part[name].values)
    assert found.lead.values.tolist() == np.array([1, 7], "m8[D]").astype("m8[ns]").tolist()
    assert str(found.valid_time.values[2, 0]) == "2001-03-02 00:00:00"  # after 1 March: noleap
    assert str(found.valid_time.values[-1, 1]).startswith("2001-03-16")
