"""Predictions of patches: every place, blended where patches overlap, the same whatever the box."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import dtrain
from dtrain.data.plan import prediction
from dtrain.data.plan.blend import hann
from dtrain.errors import ShapesDiffer
from tests.predict import models
from tests.predict.test_values import both


@pytest.fixture
def store(tmp_path: Path, write_store: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(0)
    field = rng.normal(size=(3, 23, 30)).astype("float32")
    classes = rng.integers(0, 3, (3, 23, 30)).astype("uint8")
    return write_store(
        tmp_path / "fields.zarr",
        {
            "field": {"dims": ("t", "y", "x"), "values": field, "chunks": (1, 5, 7)},
            "noisy": {"dims": ("t", "y", "x"), "values": classes + 0.2 * field, "chunks": (1, 5, 7)},
            "kind": {"dims": ("t", "y", "x"), "values": classes, "chunks": (1, 5, 7)},
            "label": {"dims": ("t",), "values": np.arange(3.0), "chunks": (1,)},
        },
    )


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of these small stores are cut into blocks, as large ones are."""
    monkeypatch.setattr(prediction, "ROW_BYTES", 1)


def patched(path: Path, inputs: str, target: str, **more: object) -> dtrain.Samples:
    return dtrain.open_samples(path, inputs=[inputs], targets=[target], **{"patch": {"y": 8, "x": 6}, **more})


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("overlap", "cut"), [(0, False), (0.25, True), (0.9, True)])
def test_every_place_is_predicted_once_and_exactly(
    store: Path,
    tmp_path: Path,
    run_of: Callable[..., dtrain.Run],
    overlap: float,
    cut: bool,
    request: pytest.FixtureRequest,
) -> None:
    if cut:
        request.getfixturevalue("in_blocks")
    run = run_of(models.identity, patched(store, "field", "field"), loss="mse")
    found = both(run, tmp_path, overlap=overlap)
    np.testing.assert_array_equal(found.field.values, xr.open_zarr(store, consolidated=False).field.values)


def test_patches_are_blended_by_hand(store: Path, tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    run = run_of(models.context, patched(store, "field", "field"), loss="mse")
    found, field = both(run, tmp_path, overlap=0.5).field.values, xr.open_zarr(store, consolidated=False).field.values
    sums, weights = np.zeros(field.shape), np.zeros(field.shape)
    window = hann(8)[:, None] * hann(6)[None, :]
    with torch.inference_mode():
        for y in (0, 4, 8, 12, 15):
            for x in (0, 3, 6, 9, 12, 15, 18, 21, 24):
                patch = torch.from_numpy(field[:, y : y + 8, x : x + 6].copy())
                sums[:, y : y + 8, x : x + 6] += run.model(patch).numpy() * window
                weights[:, y : y + 8, x : x + 6] += window
    np.testing.assert_allclose(found, sums / weights, rtol=1e-5, atol=1e-6)


def test_blocks_give_what_whole_rows_give(
    store: Path, tmp_path: Path, run_of: Callable[..., dtrain.Run], request: pytest.FixtureRequest
) -> None:
    run = run_of(models.context, patched(store, "field", "field"), loss="mse")
    whole = both(run, tmp_path).field.values
    request.getfixturevalue("in_blocks")
    np.testing.assert_allclose(both(run, tmp_path).field.values, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("in_blocks")
def test_classes_of_patches_are_blended_as_probabilities(
    store: Path, tmp_path: Path, run_of: Callable[..., dtrain.Run]
) -> None:
    run = run_of(models.pixels, patched(store, "noisy", "kind"), loss="cross_entropy")
    found, noisy = both(run, tmp_path), xr.open_zarr(store, consolidated=False).noisy.values.astype("float32")
    logits = torch.from_numpy(-2 * (noisy[:, None] - np.arange(3).reshape(1, 3, 1, 1)) ** 2)
    assert found.kind.dtype == "uint8"
    np.testing.assert_array_equal(found.kind.values, logits.argmax(1).numpy())
    np.testing.assert_allclose(found.kind_probability.values, logits.softmax(1).max(1).values, rtol=1e-5)
    every = both(run, tmp_path, values="probabilities")
    assert every.kind_probability.dims == ("t", "class", "y", "x")
    np.testing.assert_allclose(every.kind_probability.values, logits.softmax(1).numpy(), rtol=1e-5, atol=1e-7)


def test_patches_of_one_target_are_averaged(store: Path, tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    run = run_of(models.mean, patched(store, "field", "label", patch={"x": 15}), loss="mse")
    field = xr.open_zarr(store, consolidated=False).field.values
    wanted = np.mean([field[:, :, start : start + 15].mean((1, 2)) for start in (0, 15)], axis=0)
    np.testing.assert_allclose(both(run, tmp_path, overlap=0).label.values, wanted, rtol=1e-5)


def any_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.mean() ** 2


def test_patches_whose_outputs_have_another_shape_are_refused(store: Path, run_of: Callable[..., dtrain.Run]) -> None:
    run = run_of(
        models.linear, patched(store, "field", "field"), loss=any_loss, model_args={"inputs": 48, "outputs": 2}
    )
    with pytest.raises(ShapesDiffer, match=r"field_output: the output for a patch has shape \[2\]"):
        run.predict()


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("share", ["skip", 0.9])
def test_patches_that_are_left_out_do_not_count(
    write_store: Callable[..., Path], tmp_path: Path, run_of: Callable[..., dtrain.Run], share: object
) -> None:
    field = np.random.default_rng(1).normal(size=(2, 40)).astype("float32")
    field[0, 10] = np.nan
    store = write_store(tmp_path / "holes.zarr", {"field": {"dims": ("t", "x"), "values": field, "chunks": (1, 4)}})
    non_finite = share if share == "skip" else {"min_valid": share}
    samples = dtrain.open_samples(
        store, inputs=["field"], targets=["field"], patch={"x": 8}, non_finite=non_finite, split={"val": 0, "test": 0}
    )
    run = run_of(models.identity, samples, loss="mse")
    found = both(run, tmp_path, overlap=0.5).field.values
    # patches of 8 begin at 0, 4, 8 ...: those from 4 and from 8 hold the hole, and nothing else covers 8 to 11
    known = np.ones((2, 40), bool)
    known[0, 8:12] = False
    np.testing.assert_array_equal(np.isfinite(found), known)
    np.testing.assert_allclose(found[known], field[known], rtol=1e-6)
    written = run.predict_to(tmp_path / "counted.zarr", overlap=0.5)
    assert (written.samples, written.left_out) == (18, 2)
