"""Jumps of the sample dimension's coordinate in whole runs: every way to a plan looks for them, once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from torch import nn

import dtrain
from dtrain.config.schema import TrainConfig
from dtrain.data.plan.partition import JointPlan
from dtrain.errors import CoordinateJumps
from dtrain.job import job_from_config
from dtrain.planning import plan_job
from dtrain.planrecord import plan_record
from dtrain.plantext import plan_rows
from dtrain.resolved import from_json
from dtrain.trainer import train_job
from tests.training import evaluated


class Last(nn.Module):
    """Forecasts from the last row of a window."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        forecast: torch.Tensor = self.linear(x if x.ndim == 2 else torch.stack([x, x], dim=1))
        return forecast[:, 0]


def build() -> nn.Module:
    return Last()


WINDOWS: dict[str, Any] = {"inputs": ["x"], "targets": ["x"], "input_offsets": [-1, 0], "target_offsets": 1}
HOURS = {"units": "hours since 2001-01-01"}


@pytest.fixture
def store(tmp_path: Path, write_store: Callable[..., Path]) -> Callable[..., Path]:
    """A function that writes x(time) with hours among which some are missing."""

    def write(name: str, *hours: range) -> Path:
        times = np.concatenate([np.array(some) for some in hours])
        x = np.sin(times / 24 * np.pi).astype("float32")
        path = tmp_path / name / "hourly.zarr"
        path.parent.mkdir()
        arrays = {
            "x": {"dims": ("time",), "values": x, "chunks": (40,)},
            "time": {"dims": ("time",), "values": times, "chunks": (40,), "attributes": HOURS},
        }
        return write_store(path, arrays)

    return write


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Any]:
    def make(**tables: Any) -> Any:
        config = {
            "model": "tests.runtime.test_gaps:build",
            "data": {**WINDOWS, **tables.pop("data")},
            "train": {"loss": "mse", "rounds": 2, "batch_size": 16, **tables.pop("train", {})},
            "average": {"replicas": 2},
            "cluster": {"scheduler": "serial"},
            **tables,
        }
        return job_from_config(TrainConfig(**config), tmp_path)

    return make


GAP = (range(300), range(700, 1100))


def test_training_leaves_out_windows_across_a_gap_and_keeps_the_jumps(
    store: Callable[..., Path], job: Callable[..., Any], tmp_path: Path, client: Client
) -> None:
    path = store("a", *GAP)
    run = train_job(job(data={"path": str(path)}), tmp_path / "r")
    stored = json.loads((run.directory / "plan.json").read_text())
    assert stored["data"]["jumps"] == [300]
    assert from_json(stored).plan == run.plan
    anchors = {a for p in run.plan.partitions for part in range(len(p.units)) for a in p.part_anchors(part).tolist()}
    assert {298, 301} <= anchors
    assert not anchors & {299, 300}
    again = train_job(job(data={"path": str(path)}), tmp_path / "cluster", client=client)
    assert [row["params_sha256"] for row in again.rows] == [row["params_sha256"] for row in run.rows]
    # it goes on with the jumps that it began with: the coordinate is not read again
    (path / "time/c/2").write_bytes(b"damaged")
    longer = train_job(job(data={"path": str(path)}, train={"rounds": 3}), tmp_path / "r")
    assert len(longer.rows) == 3


def test_a_run_that_was_stored_without_jumps_goes_on_without(
    store: Callable[..., Path], job: Callable[..., Any], tmp_path: Path
) -> None:
    path = store("a", *GAP)
    allowed = {"data": {"path": str(path), "gaps": "allow"}}
    run = train_job(job(**allowed), tmp_path / "r")
    stored = json.loads((run.directory / "plan.json").read_text())
    assert "jumps" not in stored["data"]
    assert run.plan.plans[0].jumps == ""
    longer = train_job(job(**allowed, train={"rounds": 3}), tmp_path / "r")
    assert longer.plan == run.plan


def test_plan_tells_of_jumps_and_counts_what_is_dropped(store: Callable[..., Path], job: Callable[..., Any]) -> None:
    one = job(data={"path": str(store("a", *GAP)), "split": {"val": 0.1, "test": 0.1}})
    plan = plan_job(one)
    record, lines = plan_record(plan), dict(plan_rows(one, plan))
    assert (record["jumps"], record["dropped"]) == (1, {"split": 6, "gaps": 2, "missing": 0})
    assert record["dropped_samples"] == 8
    assert lines["gaps"] == record["gaps"]
    assert record["gaps"] == (
        "1 in 699 steps of time (median 1 hours): windows across them are left out; "
        "the first is from 2001-01-13 11:00:00 to 2001-01-30 04:00:00 at row 300"
    )
    assert "dropped: 6 whose window leaves its split, 2 whose window crosses a jump of time" in lines["splits"]
    plain = job(data={"path": str(store("b", *GAP)), "input_offsets": 0, "target_offsets": 0})
    assert "gaps" not in dict(plan_rows(plain, plan_job(plain)))


def test_a_store_for_validation_and_other_data_are_looked_at_too(
    store: Callable[..., Path], job: Callable[..., Any], tmp_path: Path
) -> None:
    complete, broken = store("a", range(600)), store("b", *GAP)
    weekly = store("c", *(range(first, first + 9) for first in range(0, 990, 11)))
    run = train_job(job(data={"path": str(complete), "val_path": str(broken)}), tmp_path / "r")
    assert run.resolved.held_out is not None
    assert run.resolved.held_out.jumps == "300"
    assert json.loads((run.directory / "plan.json").read_text())["held_out"]["jumps"] == [300]
    told = job(data={"path": str(complete), "val_path": str(broken)})
    lines = dict(plan_rows(told, plan_job(told)))
    assert lines["gaps"].startswith("none in 599 steps")
    assert lines["gaps of val_path"].startswith("1 in 699 steps")
    with pytest.raises(CoordinateJumps, match="time jumps 89 times in 809 steps"):
        train_job(job(data={"path": str(complete), "val_path": str(weekly)}), tmp_path / "refused")
    other = dtrain.open_samples(broken, **WINDOWS)
    assert evaluated(run, other, "all")[2] == 700 - 2 - 2
    with pytest.raises(CoordinateJumps, match="time jumps 89 times"):
        evaluated(run, dtrain.open_samples(weekly, **WINDOWS), "test")
    with pytest.raises(CoordinateJumps, match="time jumps 89 times"):
        next(dtrain.batches(dtrain.open_samples(weekly, **WINDOWS)))


def test_every_store_of_several_has_jumps_of_its_own(
    store: Callable[..., Path], job: Callable[..., Any], tmp_path: Path
) -> None:
    paths = [{"path": str(store("a", range(500)))}, {"path": str(store("b", *GAP))}]
    run = train_job(job(data={"path": paths}, average={}), tmp_path / "r")
    assert [plan.jumps for plan in run.plan.plans] == ["", "300"]
    record = plan_record(plan_job(job(data={"path": paths}, average={})))
    assert [one["jumps"] for one in record["stores"]] == [0, 1]
    assert record["stores"][0]["gaps"].startswith("none in 499 steps")


@pytest.mark.slow
def test_a_coordinate_that_only_a_worker_sees_is_read_there(
    store: Callable[..., Path], job: Callable[..., Any], tmp_path: Path, own_client: Client
) -> None:
    workers = sorted(own_client.nthreads())
    folders = [store("a", range(500)).parent, store("b", *GAP).parent]
    for worker, folder in zip(workers, folders, strict=True):
        own_client.run(os.chdir, str(folder), workers=[worker])
    private = [{"path": "/proc/self/cwd/hourly.zarr", "workers": [worker]} for worker in workers]
    run = train_job(job(data={"path": private}, average={}), tmp_path / "r", client=own_client)
    assert isinstance(run.plan, JointPlan)
    assert [plan.jumps for plan in run.plan.plans] == ["", "300"]
