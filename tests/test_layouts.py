"""Whole runs on OME-Zarr and AnnData as they are, by the serial runner."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import dtrain
from dtrain.errors import DataChanged
from dtrain_cli.main import run as cli
from tests.data.layouts.fixtures import FORMATS, write_anndata, write_ome
from tests.training import shas, trained

pytestmark = pytest.mark.filterwarnings("ignore")  # zarr's own, of strings that version 3 does not specify


# OME-Zarr ---------------------------------------------------------------------------------------------------


def segment() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))


def nuclei(count: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Images of two channels, one of which shows discs, and the discs."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[:16, :16]
    centre = rng.integers(4, 12, (2, count, 1, 1))
    mask = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 16
    image = np.stack([20_000 * mask + 500, np.full(mask.shape, 9_000)], axis=1) + rng.integers(
        0, 900, (count, 2, 16, 16)
    )
    return image.astype("uint16"), mask.astype("uint8")


@pytest.mark.sampled(2)
@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("channel", [True, False], ids=["labels with a channel", "labels without"])
def test_a_conv_net_on_an_image_and_its_labels(tmp_path: Path, version: str, channel: bool) -> None:
    image, mask = nuclei()
    labels = {"nuclei": (mask[:, None], "tcyx") if channel else (mask, "tyx")}
    path = write_ome(tmp_path / "image.zarr", image, "tcyx", version=version, labels=labels)
    samples = dtrain.open_samples(
        path, inputs=["0"], targets=["labels/nuclei/0"], normalize={"0": ["c"]}, split={"val": 0.2, "test": 0.2}
    )
    table = {"loss": "cross_entropy", "metrics": ["accuracy"], "rounds": 6, "batch_size": 4}
    table["optimizer_args"] = {"lr": 0.2, "momentum": 0.9}
    run = trained(segment, samples, tmp_path / "runs", table)
    assert run.rows[-1]["val_loss"] < 0.6 * run.rows[0]["train_loss"]
    assert run.evaluate(split="test")["accuracy"] > 0.9
    plain = write_ome(tmp_path / "plain.zarr", image, "tcyx", labels={"nuclei": (mask, "tyx")})
    expected = trained(segment, dtrain.open_samples(plain, **keys(samples)), tmp_path / "plain", table)
    assert shas(run) == shas(expected)


def keys(samples: dtrain.Samples) -> dict[str, Any]:
    return {key: getattr(samples.config, key) for key in ("inputs", "targets", "normalize", "split")}


# AnnData ----------------------------------------------------------------------------------------------------


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 3)


def cells(count: int = 240, missing: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Expression of six genes in cells of three types; of some cells the type is not known."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 3, count)
    x = rng.normal(size=(3, 6))[codes] * 2 + rng.normal(size=(count, 6))
    return x.astype("float32"), np.where(np.arange(count) % missing == 0, -1, codes).astype("int8")


@pytest.fixture
def store(tmp_path: Path) -> Any:
    def write(how: str = "v3", name: str = "cells.zarr", **options: Any) -> Path:
        x, codes = cells()
        return write_anndata(tmp_path / name, how, x=x, codes=codes, **options)

    return write


TABLE = {"loss": "cross_entropy", "metrics": ["accuracy"], "rounds": 4, "batch_size": 16}
NAMES = {"inputs": ["X"], "targets": ["obs/cell_type"]}


def start(path: Path, tmp_path: Path, name: str = "r", rounds: int = 4, **data: Any) -> dtrain.Run:
    samples = dtrain.open_samples(path, **NAMES, **data)
    return trained(linear, samples, tmp_path / "runs", {**TABLE, "rounds": rounds}, run=name)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", FORMATS)
def test_a_linear_model_of_the_cell_type(store: Any, tmp_path: Path, how: str) -> None:
    run = start(store(how), tmp_path)
    assert run.rows[-1]["val_accuracy"] > 0.8
    assert run.rows[-1]["val_loss"] < run.rows[0]["train_loss"]
    kept = json.loads((run.directory / "plan.json").read_text())["categories"]
    assert kept == {"obs/cell_type": {"count": 3, "names": ["B cell", "T cell", "monocyte"]}}
    assert run.evaluate(dtrain.open_samples(tmp_path / "cells.zarr", **NAMES), split="test") == run.evaluate()


def test_codes_mean_the_same_in_every_store_of_a_run(store: Any, tmp_path: Path) -> None:
    path, other = store(), store(name="other.zarr", names=["T cell", "B cell", "monocyte"])
    run = start(path, tmp_path)
    said = "code 0 of obs/cell_type stands for T cell, in the run for B cell"
    with pytest.raises(DataChanged, match=said):
        run.evaluate(dtrain.open_samples(other, **NAMES), split="all")
    with pytest.raises(DataChanged, match=said):
        start(path, tmp_path, "v", val_path=str(other), split={"val": 0.0, "test": 0.1})
    config = dtrain.TrainConfig(data={**NAMES, "path": [{"path": str(path)}, {"path": str(other)}]}, train=TABLE)
    with pytest.raises(DataChanged, match=said):
        dtrain.train(linear, config=config, cluster="serial", run_dir=tmp_path / "runs", progress=False)
    path.rename(tmp_path / "away.zarr")
    other.rename(path)
    with pytest.raises(DataChanged, match=said):
        start(path, tmp_path, rounds=6)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("how", FORMATS)
def test_columns_are_the_same_genes_in_all_that_a_run_evaluates(store: Any, tmp_path: Path, how: str) -> None:
    path, other = store(how), store(how, name="other.zarr")
    run = start(path, tmp_path)
    assert list(json.loads((run.directory / "plan.json").read_text())["genes"]) == ["X"]
    run.evaluate(dtrain.open_samples(other, **NAMES), split="all")
    var = zarr.open_group(other, use_consolidated=False)["var"]
    names = var[var.attrs["_index"]]
    names[:] = names[:][::-1]
    said = "the columns of X are other genes, or in another order, than those that the run was trained on"
    with pytest.raises(DataChanged, match=said) as caught:
        run.evaluate(dtrain.open_samples(other, **NAMES), split="all")
    assert "adata[:, genes]" in caught.value.hint
    path.rename(tmp_path / "away.zarr")
    other.rename(path)
    with pytest.raises(DataChanged, match=said):
        start(path, tmp_path, rounds=6)


def test_plan_shows_the_classes(store: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = dtrain.open_samples(store(), **NAMES)
    plan = dtrain.plan(linear, samples, train={"loss": "cross_entropy"}, cluster="serial")
    assert ("classes obs/cell_type", "3: B cell, T cell, monocyte") in plan.rows
    assert plan.record["categories"]["obs/cell_type"]["count"] == 3
    assert plan.record["checksums"].keys() == {"X", "obs/cell_type"}
    capsys.readouterr()
    (tmp_path / "model.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(6, 3)\n")
    config = 'model = "model:build"\n[data]\npath = "cells.zarr"\ninputs = ["X"]\ntargets = ["obs/cell_type"]\n'
    (tmp_path / "dtrain.toml").write_text(f'{config}[train]\nloss = "cross_entropy"\n')
    assert cli(["plan", str(tmp_path / "dtrain.toml"), "--scheduler", "serial"]) == 0
    assert "3: B cell, T cell, monocyte" in capsys.readouterr().out


def test_an_embedding_of_a_categorical(tmp_path: Path) -> None:
    x, codes = cells(missing=10**9)
    path = write_anndata(tmp_path / "cells.zarr", x=x, codes=np.where(codes < 0, 0, codes))
    samples = dtrain.open_samples(path, inputs=["obs/cell_type"], targets=["obs/n_counts"])
    run = trained(
        lambda: nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 1), nn.Flatten(0)),
        samples,
        tmp_path / "runs",
        {"loss": "mse", "rounds": 1, "batch_size": 16, "optimizer_args": {"lr": 1e-5}},
    )
    assert np.isfinite(run.rows[-1]["train_loss"])
