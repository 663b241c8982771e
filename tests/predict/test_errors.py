"""What cannot be predicted is refused in a sentence that says what to do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pytest
import torch
import xarray as xr
import zarr

import dtrain
from dtrain.algorithm.outputs import OutputFacts, facts_of, named_tensors
from dtrain.data.write.icechunk import IcechunkSink
from dtrain.data.write.local import LocalSink
from dtrain.errors import ClusterLost, DiskFull, InvalidConfig, NotZarr, OutputExists, ShapesDiffer
from dtrain.predict.heads import Asked, heads_of
from dtrain.predict.targets import Target
from dtrain.runtime.predicting import _cluster_lost
from tests import foreign
from tests.predict import models


def asked(loss: str = "m:loss") -> Asked:
    return Asked(values="auto", loss=loss, class_axis="auto", sample_dim="n", patch={}, blended=False, leaves_out=False)


def target(name: str = "y", shape: tuple[int, ...] = (4,), dtype: str = "float32") -> Target:
    dims = tuple(f"d{k}" for k in range(len(shape)))
    return Target(
        name=name,
        written=name,
        dims=dims,
        shape=shape,
        stored=("n", *dims),
        dtype=dtype,
        is_number=dtype == "float32",
        missing=None,
        scaling=None,
        classes=(),
        attributes={},
    )


def facts(*shape: int, key: str = "", dtype: str = "float32") -> OutputFacts:
    return OutputFacts(key, shape, dtype)


def test_outputs_that_are_no_tensors() -> None:
    for wrong, said in (("text", "str"), ((), "tuple of 0"), ([torch.zeros(2), 3], "list of 2"), ({}, "dict")):
        with pytest.raises(ShapesDiffer, match=f"The model returned {said}; predictions are made of a tensor"):
            named_tensors(wrong)
    assert [name for name, _ in named_tensors({"mean": torch.zeros(2), "std": torch.ones(2)})] == ["mean", "std"]
    with pytest.raises(ShapesDiffer, match=r"output b is float32\[3\] for 2 samples; its first axis must be"):
        facts_of({"a": torch.zeros(2), "b": torch.zeros(3)}, 2)


def test_outputs_that_do_not_fit_the_target() -> None:
    for loss in ("mse", "cross_entropy"):
        with pytest.raises(ShapesDiffer, match=rf'\[5\] a sample, which does not fit y of shape \[4\] .* "{loss}"'):
            heads_of([facts(5)], [target()], "", asked(loss), 9)
    with pytest.raises(ShapesDiffer, match="y_output: outputs of dtype complex64 cannot be written"):
        heads_of([facts(5, dtype="complex64")], [target()], "", asked(), 9)
    both = [target(shape=(), dtype="int8"), target("y_probability", ())]
    with pytest.raises(InvalidConfig, match="Two arrays of predictions would be named y_probability"):
        heads_of([facts(3), facts(4)], both, "", asked("cross_entropy"), 9)


def test_outputs_that_change_their_shape(blobs: Path, run_of: Callable[..., dtrain.Run]) -> None:
    run = run_of(models.growing, dtrain.open_samples(blobs, inputs=["x"], targets=["y"]), loss=any_loss)
    with pytest.raises(ShapesDiffer, match=r"a tensor of shape \[7\] a sample for y_output; at first it was \[2\]"):
        run.predict().compute()


def any_loss(outputs: Any, targets: Any) -> torch.Tensor:
    result: torch.Tensor = outputs.mean() ** 2
    return result


def test_samples_that_are_none(blobs: Path, run_of: Callable[..., dtrain.Run]) -> None:
    run = run_of(models.linear, dtrain.open_samples(blobs, inputs=["x"], targets=["y"]), loss="cross_entropy")
    wrong: Any
    for wrong in (3, [], [3], {"a": 1}):
        with pytest.raises(InvalidConfig, match=f"samples is a {type(wrong).__name__}, not what open_samples returns"):
            run.predict(wrong)


def test_a_coordinate_with_a_missing_chunk_is_left_out_loudly(
    tmp_path: Path, run_of: Callable[..., dtrain.Run], caplog: pytest.LogCaptureFixture
) -> None:
    store = foreign.climate(tmp_path / "c.zarr")
    run = run_of(models.identity, dtrain.open_samples(store, inputs=["t2m"], targets=["t2m"]), loss="mse")
    (store / "latitude/c/0").unlink()
    with caplog.at_level(logging.WARNING):
        found = run.predict()
    assert "latitude" not in found.coords
    assert "The coordinate latitude is left out of the predictions" in caplog.text
    assert "latitude/c/0 of latitude, a coordinate, is missing" in caplog.text
    assert "longitude" in found.coords


def test_a_group_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "out.zarr").mkdir()
    (tmp_path / "out.zarr/zarr.json").write_text("{")
    with pytest.raises(NotZarr, match="zarr.json cannot be read"):
        LocalSink(str(tmp_path / "out.zarr")).attributes()


def test_a_repository_that_is_moved_or_cannot_be_written(
    tmp_path: Path, blobs: Path, run_of: Callable[..., dtrain.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(models.linear, dtrain.open_samples(blobs, inputs=["x"], targets=["y"]), loss="cross_entropy")
    path = tmp_path / "out.icechunk"
    real = IcechunkSink.commit

    def after_another(sink: IcechunkSink, message: str) -> None:
        session = icechunk.Repository.open(icechunk.local_filesystem_storage(str(path))).writable_session("main")
        zarr.create_group(session.store)
        session.commit("somebody else's")
        real(sink, message)

    monkeypatch.setattr(IcechunkSink, "commit", after_another)
    with pytest.raises(OutputExists, match="branch main was moved while predictions were written"):
        run.predict_to(path)
    monkeypatch.undo()
    (tmp_path / "file.icechunk").write_text("mine")
    with pytest.raises(OutputExists):
        run.predict_to(tmp_path / "file.icechunk")

    def full(*_: Any, **__: Any) -> Any:
        raise icechunk.IcechunkError("no space left on device")

    monkeypatch.setattr(icechunk.Repository, "create", full)
    with pytest.raises(DiskFull, match="the repository cannot be written: .*no space left on device"):
        run.predict_to(tmp_path / "full.icechunk")


def test_a_cluster_that_is_lost() -> None:
    lost = _cluster_lost(ClusterLost("Lost the Dask scheduler. Committed rounds are safe.", "again"))
    assert (lost.message, lost.hint) == (
        "Lost the Dask scheduler.",
        "What is written stays: run the same command with --continue.",
    )


def test_inputs_without_the_dimension_of_samples(tmp_path: Path, run_of: Callable[..., dtrain.Run]) -> None:
    store = foreign.climate(tmp_path / "c.zarr")
    samples = dtrain.open_samples(store, inputs=["t2m", "lsm"], targets=["t2m"], sample_dim="time")
    run = run_of(models.product, samples, loss="mse")
    bare = xr.Dataset(
        {"t2m": (("latitude", "longitude"), np.zeros((12, 16))), "lsm": (("latitude", "longitude"), np.ones((12, 16)))}
    )
    with pytest.raises(
        InvalidConfig, match="no input has the dimension of the samples|not a dimension of any variable"
    ):
        run.predict(foreign.write(bare, tmp_path / "bare.zarr"))
