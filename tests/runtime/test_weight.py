"""Runs whose samples have a weight: in steps and evaluations, on clusters, beside functions of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from torch import nn

import dtrain
from dtrain.algorithm.batch import TensorBatch
from dtrain.errors import InvalidConfig, RunConflict, UnsuitableVariable, UserCodeFailed
from dtrain.runtime.tensors import _moved, apply_transform
from tests.training import bits, shas, trained

ROWS, LATS, LONS = 60, 5, 4
COSINES = np.cos(np.deg2rad(np.linspace(80, -80, LATS))).astype("float32")
TABLE = {"loss": "mse", "metrics": ["mae"], "rounds": 2, "batch_size": 8, "micro_batch": 3}


class Field(nn.Module):
    """A field from a field."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.conv(x[:, None])[:, 0]
        return out


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(0)
    dims, chunks = ("time", "lat", "lon"), (4, LATS, LONS)
    x, y = rng.normal(size=(2, ROWS, LATS, LONS)).astype("float32")
    return write_store(
        tmp_path_factory.mktemp("weight") / "s.zarr",
        {
            "x": {"dims": dims, "values": x, "chunks": chunks},
            "y": {"dims": dims, "values": 3 * y + 7, "chunks": chunks},
            "lat": {"dims": ("lat",), "values": np.linspace(80, -80, LATS), "chunks": (LATS,)},
            "ones": {"dims": ("time",), "values": np.ones(ROWS), "chunks": (ROWS,)},
            "area": {"dims": ("time", "lat"), "values": rng.random((ROWS, LATS)), "chunks": (4, LATS)},
            "zero": {"dims": ("time",), "values": np.zeros(ROWS), "chunks": (ROWS,)},
        },
    )


def opened(path: Path, weight: str, **data: Any) -> dtrain.Samples:
    return dtrain.open_samples(path, inputs=["x"], targets=["y"], **({"weight": weight} if weight else {}), **data)


def all_of(samples: dtrain.Samples, split: Any) -> TensorBatch:
    with dtrain.batches(samples, split=split, batch_size=1000) as found:
        return next(found)


def weighted_mse(outputs: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    return (((outputs - targets) ** 2) * weight).sum(), weight.sum()


def bias(outputs: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ((outputs - targets) * weight).sum(), weight.sum()


def plain_bias(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs - targets).mean()


# Runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["cos(lat)", "area"])
def test_a_step_over_everything_is_that_of_the_weighted_mean(tmp_path: Path, path: Path, weight: str) -> None:
    """Micro-batches and replicas apart; metrics are in the units of the data."""
    samples = opened(path, weight, split={"val": 0.3, "test": 0.0}, normalize=["y"])
    table = {"rounds": 1, "batch_size": "full", "micro_batch": 4, "optimizer_args": {"lr": 0.1}}
    run = trained(Field, samples, tmp_path, {**TABLE, **table}, average={"replicas": 1})
    torch.manual_seed(0)
    module = Field()  # as the run builds it, with train.seed = 0
    batch = all_of(samples, "train")
    assert isinstance(batch.targets, torch.Tensor)
    assert isinstance(batch.weight, torch.Tensor)
    assert batch.weight.shape == batch.targets.shape
    total, count = weighted_mse(module(*batch.inputs), batch.targets, batch.weight)
    (total / count).backward()
    assert run.rows[0]["train_loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert run.rows[0]["samples"] == batch.size  # rows, whatever their weights
    with torch.no_grad():
        for parameter, own in zip(module.parameters(), run.model.parameters(), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(own, parameter - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6)
        held = all_of(samples, "val")
        outputs = run.model(*held.inputs)
        total, count = weighted_mse(outputs, held.targets, held.weight)
        assert run.rows[0]["val_loss"] == pytest.approx((total / count).item(), rel=1e-5)
        error = ((outputs - held.targets).abs() * held.weight).sum() / count
        std = run.resolved.scalings["y"].std[0]
        assert run.rows[0]["val_mae"] == pytest.approx(error.item() * std, rel=1e-5)


def test_weights_of_1_change_nothing_but_rounding(tmp_path: Path, path: Path) -> None:
    plain = trained(Field, opened(path, ""), tmp_path, TABLE)
    ones = trained(Field, opened(path, "ones"), tmp_path, TABLE)
    for row, other in zip(plain.rows, ones.rows, strict=True):
        assert (row["samples"], row["steps"]) == (other["samples"], other["steps"])
        for key in ("train_loss", "val_loss", "val_mae"):
            assert other[key] == pytest.approx(row[key], rel=1e-5)


@pytest.mark.parametrize("weight", ["cos(lat)", "area"])
def test_a_cluster_gives_the_bits_of_one_process(tmp_path: Path, path: Path, client: Client, weight: str) -> None:
    samples = opened(path, weight, patch={"lat": 2})
    here = trained(Field, samples, tmp_path, TABLE)
    there = trained(Field, samples, tmp_path, TABLE, client)
    assert shas(here) == shas(there)
    assert [row["val_loss"] for row in bits(here.rows)] == [row["val_loss"] for row in bits(there.rows)]
    assert shas(here) != shas(trained(Field, opened(path, "", patch={"lat": 2}), tmp_path, TABLE))


def test_a_run_keeps_its_weight(tmp_path: Path, path: Path) -> None:
    run = trained(Field, opened(path, "area"), tmp_path, TABLE, run="one")
    assert run.evaluate(split="val")["loss"] == run.rows[-1]["val_loss"]
    again = run.evaluate(dtrain.open_samples(path, inputs=["x"], targets=["y"]), split="val")
    assert again["loss"] == run.rows[-1]["val_loss"]  # what samples leave out is the run's
    plain = run.evaluate(dtrain.open_samples(path, inputs=["x"], targets=["y"], weight=""), split="val")
    assert plain["loss"] != again["loss"]
    with pytest.raises(RunConflict, match=r"data\.weight"):
        trained(Field, opened(path, "cos(lat)"), tmp_path, {**TABLE, "rounds": 3}, run="one")


def test_weights_that_are_all_0_end_the_run(tmp_path: Path, path: Path) -> None:
    with pytest.raises(UnsuitableVariable, match=r'samples have weight 0 \(data\.weight = "zero"\)'):
        trained(Field, opened(path, "zero"), tmp_path, TABLE)


def test_plan_prints_the_weight(path: Path) -> None:
    plan = dtrain.plan(Field, opened(path, "cos(lat)"), train={"loss": "mse"}, cluster="serial")
    rows = dict(plan.rows)
    assert rows["weight cos(lat)"] == "float64[lat] (5,), chunks 5"
    assert rows["sample weights"] == plan.record["weight"] == f"{COSINES.min():.6g} to 1"
    unweighted = dtrain.plan(Field, opened(path, ""), train={"loss": "mse"}, cluster="serial")
    assert unweighted.record["weight"] == ""
    assert "sample weights" not in dict(unweighted.rows)


def test_batches_unpack_as_before(path: Path) -> None:
    with dtrain.batches(opened(path, "cos(lat)"), batch_size=6) as found:
        for (x,), y in found:
            assert x.shape == y.shape
    batch = all_of(opened(path, "cos(lat)"), "val")
    assert isinstance(batch.weight, torch.Tensor)
    np.testing.assert_array_equal(batch.weight[0, :, 0], COSINES)
    assert all_of(opened(path, ""), "val").weight is None


# Functions of the user's ----------------------------------------------------------------------------------------


def test_a_loss_and_metrics_of_the_users_get_the_weight(tmp_path: Path, path: Path) -> None:
    built_in = trained(Field, opened(path, "area"), tmp_path, TABLE)
    own = {"loss": weighted_mse, "metrics": [bias, plain_bias]}
    run = trained(Field, opened(path, "area"), tmp_path, {**TABLE, **own})
    assert run.rows[-1]["val_loss"] == pytest.approx(built_in.rows[-1]["val_loss"], rel=1e-5)
    batch = all_of(opened(path, "area"), "val")
    with torch.no_grad():
        error = run.model(*batch.inputs) - batch.targets
    assert run.rows[-1]["val_bias"] == pytest.approx(
        ((error * batch.weight).sum() / batch.weight.sum()).item(), rel=1e-4
    )
    assert run.rows[-1]["val_plain_bias"] == pytest.approx(error.mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("weight", "table", "said"),
    [
        ("area", {"loss": plain_bias}, r"plain_bias, which takes no weight of samples, and data.weight = \"area\""),
        ("area", {"loss": nn.MSELoss()}, r"an object of MSELoss, which takes no weight"),
        ("area", {"loss": nn.functional.cross_entropy}, r"the function cross_entropy, which takes no weight"),
        ("", {"loss": weighted_mse}, r"cannot be called with 2 arguments"),
        ("", {"loss": "mse", "metrics": [bias]}, r"bias.*cannot be called with 2 arguments"),
    ],
)
def test_a_function_that_does_not_fit_is_refused(path: Path, weight: str, table: Any, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said) as caught:
        dtrain.plan(Field, opened(path, weight), train=table, cluster="serial")
    if not weight:
        assert 'With data.weight = "VARIABLE" a third argument is the weight.' in caught.value.hint


def test_a_gpu_is_sent_weights_once_that_are_repeated() -> None:
    targets = torch.zeros(8, 5, 4)
    weight = torch.ones(1, 5, 1).expand(8, 5, 4)
    batch = TensorBatch((targets,), (targets, targets), 8, weight=(weight, torch.ones(8, 5, 4)))
    moved = _moved(batch, "meta")
    assert isinstance(moved.weight, tuple)
    assert [w.shape for w in moved.weight] == [(8, 5, 4)] * 2
    assert [w.untyped_storage().nbytes() for w in moved.weight] == [4 * 5, 4 * 8 * 5 * 4]
    assert _moved(replace(batch, weight=None), "meta").weight is None


# Transforms -----------------------------------------------------------------------------------------------------


def without_the_first(batch: TensorBatch, generator: torch.Generator) -> TensorBatch:
    assert isinstance(batch.weight, tuple)
    weight = batch.weight[0].clone()
    weight[:, 0] = 0
    return replace(batch, weight=(weight,))


def test_a_transform_may_change_the_weight(tmp_path: Path, path: Path) -> None:
    batch = all_of(opened(path, "area", transform=without_the_first), "val")
    assert isinstance(batch.weight, torch.Tensor)
    assert not batch.weight[:, 0].any()
    assert batch.weight[:, 1:].all()
    run = trained(Field, opened(path, "area", transform=without_the_first), tmp_path, TABLE)
    with torch.no_grad():
        total, count = weighted_mse(run.model(*batch.inputs), batch.targets, batch.weight)
    assert run.rows[-1]["val_loss"] == pytest.approx((total / count).item(), rel=1e-5)


def lost(batch: TensorBatch, generator: torch.Generator) -> TensorBatch:
    return TensorBatch(batch.inputs, batch.targets, batch.size)


def by_sample(batch: TensorBatch, generator: torch.Generator) -> TensorBatch:
    return replace(batch, weight=torch.ones(batch.size))


@pytest.mark.parametrize(
    ("weight", "transform", "said"),
    [
        (torch.ones(2, 3), lost, r"weights of shapes None for targets of shapes \[2, 3\]"),
        (torch.ones(2, 3), by_sample, r"weights of shapes \[2\] for targets of shapes \[2, 3\]"),
        (None, by_sample, "returned a batch with weights, and data.weight is not set"),
    ],
)
def test_a_transform_keeps_weights_that_fit(weight: Any, transform: Any, said: str) -> None:
    batch = TensorBatch((torch.ones(2, 3),), torch.ones(2, 3), 2, weight=weight)
    with pytest.raises(UserCodeFailed, match=said):
        apply_transform(transform, batch, 1)


def test_a_transform_of_several_targets_sees_a_weight_for_each() -> None:
    targets = (torch.ones(2, 3), torch.ones(2))
    batch = TensorBatch((torch.ones(2),), targets, 2, weight=targets)
    found = apply_transform(lambda batch, generator: batch, batch, 1)
    assert isinstance(found.weight, tuple)
    assert [w.shape for w in found.weight] == [(2, 3), (2,)]
