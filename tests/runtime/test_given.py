"""Runs whose splits are given by coordinate or by group: what was found at the first start is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client
from torch import nn

import dtrain
from dtrain.config.schema import TrainConfig
from dtrain.data.plan.labels import LABELS, REST, from_text
from dtrain.errors import ChunkUndecodable, InvalidConfig, RunConflict
from dtrain.job import job_from_config
from dtrain.planning import plan_job
from dtrain.planrecord import plan_record
from dtrain.trainer import train_job
from tests.runtime.test_averaging import lose_rounds
from tests.training import bits, evaluated

COUNT = 365 * 3
DAYS = {"units": "days since 2017-01-01"}
BY_DATE = {"val": {"time": "2018-12"}, "test": {"time": {"start": "2019"}}, "gap": 5}
BY_DONOR = {"by": "donor", "val": 0.1, "test": 0.2}


def store_of(write_store: Callable[..., Path], path: Path, count: int = COUNT) -> Path:
    """Write x(time, k), y(time) and donor(time), with dates."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 3)).astype("float32")
    arrays = {
        "x": {"dims": ("time", "k"), "values": x, "chunks": (40, 3)},
        "y": {"dims": ("time",), "values": x.sum(axis=1), "chunks": (40,)},
        "time": {"dims": ("time",), "values": np.arange(count), "chunks": (400,), "attributes": DAYS},
        "donor": {"dims": ("time",), "values": rng.integers(0, 50, count), "chunks": (400,)},
    }
    return write_store(path, arrays)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))


def train(store: Path, tmp_path: Path, name: str, cluster: Any, split: Any, **data: Any) -> dtrain.Run:
    table = {"normalize": ["x"], "split": split, **data}
    return dtrain.train(
        build,
        dtrain.open_samples(store, inputs=["x"], targets=["y"], **table),
        train={"loss": "mse", "rounds": 3, "local_steps": 10, "batch_size": 8, "eval_every": 1},
        average={"replicas": 3},
        cluster=cluster,
        run=name,
        run_dir=tmp_path,
        progress=False,
    )


@pytest.mark.parametrize("split", [BY_DATE, BY_DONOR], ids=["by date", "by donor"])
def test_serial_equals_cluster_equals_resumed(
    write_store: Callable[..., Path], tmp_path: Path, client: Client, split: Any
) -> None:
    store = store_of(write_store, tmp_path / "s.zarr")
    serial = train(store, tmp_path, "serial", "serial", split)
    cluster = train(store, tmp_path, "cluster", client, split)
    assert bits(cluster.rows) == bits(serial.rows)
    lose_rounds(cluster, 1)
    assert bits(train(store, tmp_path, "cluster", client, split).rows) == bits(serial.rows)
    assert serial.evaluate(split="test") == cluster.evaluate(split="test")
    with pytest.raises(RunConflict):
        train(store, tmp_path, "serial", "serial", {**split, "val": 0.0, "gap": 0})


def test_a_copy_is_evaluated_by_the_splits_of_the_run_and_another_store_by_its_own_dates(
    write_store: Callable[..., Path], tmp_path: Path
) -> None:
    run = train(store_of(write_store, tmp_path / "s.zarr"), tmp_path, "dates", "serial", BY_DATE)
    copy = dtrain.open_samples(store_of(write_store, tmp_path / "copy.zarr"), inputs=["x"], targets=["y"])
    more = dtrain.open_samples(store_of(write_store, tmp_path / "more.zarr", COUNT + 30), inputs=["x"], targets=["y"])
    counts = [evaluated(run, s, "test")[2] for s in (None, copy, more)]
    assert counts == [365, 365, 395]
    expected = pytest.approx(run.evaluate(split="test", cluster="serial"), rel=1e-6)  # it is summed in other pieces
    assert run.evaluate(copy, split="test", cluster="serial") == expected


def test_groups_are_known_in_copies_alone(write_store: Callable[..., Path], tmp_path: Path) -> None:
    run = train(store_of(write_store, tmp_path / "s.zarr"), tmp_path, "donors", "serial", BY_DONOR)
    copy = dtrain.open_samples(store_of(write_store, tmp_path / "copy.zarr"), inputs=["x"], targets=["y"])
    more = dtrain.open_samples(store_of(write_store, tmp_path / "more.zarr", COUNT + 30), inputs=["x"], targets=["y"])
    assert run.evaluate(copy, split="test", cluster="serial") == run.evaluate(split="test", cluster="serial")
    with pytest.raises(InvalidConfig, match="groups of donor in its split test may have been trained on"):
        run.evaluate(more, split="test", cluster="serial")
    assert evaluated(run, more, "all")[2] == COUNT + 30


@pytest.fixture
def job(tmp_path: Path, write_store: Callable[..., Path]) -> Callable[..., Any]:
    """Write stores of some lengths, and make a job of them."""

    def make(split: Any, *counts: int, rounds: int = 2) -> Any:
        paths = [tmp_path / f"{count}.zarr" for count in counts]
        for path, count in zip(paths, counts, strict=True):
            if not path.exists():
                store_of(write_store, path, count)
        table = {"path": [{"path": str(path)} for path in paths], "inputs": ["x"], "targets": ["y"], "split": split}
        config = {"model": "tests.runtime.test_given:build", "data": table, "cluster": {"scheduler": "serial"}}
        return job_from_config(TrainConfig(**config, train={"loss": "mse", "rounds": rounds}), tmp_path)

    return make


def test_each_of_several_stores_has_its_own_dates(job: Callable[..., Any], tmp_path: Path) -> None:
    run = train_job(job(BY_DATE, COUNT, 800), tmp_path / "r")
    test = [np.flatnonzero(from_text(plan.row_labels) == LABELS["test"]).tolist() for plan in run.plan.plans]
    assert test == [list(range(730, COUNT)), list(range(730, 800))]
    record = plan_record(plan_job(job(BY_DATE, COUNT, 800)))
    assert [one["splits"]["test"]["samples"] for one in record["stores"]] == [365, 70]
    assert record["stores"][1]["splits"]["test"]["ranges"] == (("2019-01-01", "2019-03-11"),)


def test_a_group_of_several_stores_is_in_one_split(job: Callable[..., Any], tmp_path: Path) -> None:
    run = train_job(job(BY_DONOR, COUNT, 800), tmp_path / "r")
    label_of: dict[int, int] = {}
    for plan, count in zip(run.plan.plans, (COUNT, 800), strict=True):
        donors = zarr.open_array(tmp_path / f"{count}.zarr/donor", mode="r")[:]
        for donor, label in zip(donors.tolist(), from_text(plan.row_labels).tolist(), strict=True):
            assert label_of.setdefault(donor, label) == label
    assert set(label_of.values()) == {REST, *LABELS.values()}


@pytest.mark.parametrize(("split", "name"), [(BY_DATE, "time"), (BY_DONOR, "donor")])
def test_a_run_goes_on_with_the_splits_that_it_began_with(
    job: Callable[..., Any], tmp_path: Path, split: Any, name: str
) -> None:
    run = train_job(job(split, COUNT), tmp_path / "r")
    (tmp_path / f"{COUNT}.zarr/{name}/c/2").write_bytes(b"damaged")  # it is not read again
    longer = train_job(job(split, COUNT, rounds=3), tmp_path / "r")
    assert (len(longer.rows), longer.plan) == (3, run.plan)
    with pytest.raises(ChunkUndecodable, match=f"{name}/c/2"):
        train_job(job(split, COUNT), tmp_path / "new")
