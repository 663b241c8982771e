"""Killed equals calm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client
from distributed.client import ClosedClientError

import dtrain
from dtrain import rounds as rounds_module
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.plan.units import cell_bounds
from dtrain.data.samples import Samples
from dtrain.errors import ClusterLost, Diverged, OutOfMemory, UserCodeFailed
from dtrain.events import Event, ReplicaRejected, RoundFinished, SegmentReplayed
from dtrain.runtime.cluster import ClusterRunner
from dtrain.runtime.runner import SegmentLost
from tests.runtime import models


def start(samples: Samples, tmp_path: Path, cluster: Any, model: Any = models.slow, **more: Any) -> dtrain.Run:
    report, model_args = more.pop("report", None), more.pop("model_args", None)
    average, kept = {"replicas": 3, **more.pop("average", {})}, more.pop("kept", {})
    table = {"loss": "cross_entropy", "rounds": 3, "batch_size": 16, **more}
    return dtrain.train(
        model,
        samples,
        config=dtrain.TrainConfig(train=table, average=average, run=kept),
        model_args=model_args,
        cluster=cluster,
        run_dir=tmp_path,
        progress=False,
        report=report,
    )


@pytest.fixture(scope="module")
def calm(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    run = start(samples, tmp_path_factory.mktemp("calm"), "serial", model_calm)
    return [row["params_sha256"] for row in run.rows]


def model_calm() -> Any:
    return models.slow(0.0)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "task",
    [
        "train-r00002",
        pytest.param("train-r00001", marks=SLOW),
        pytest.param("reduce-r00002", marks=SLOW),
        pytest.param("eval", marks=SLOW),
    ],
)
def test_a_worker_killed_in_a_task(
    samples: Samples,
    tmp_path: Path,
    own_client: Client,
    calm: list[str],
    kill_worker_in: Callable[[Client, str], Any],
    task: str,
) -> None:
    kill_worker_in(own_client, task)
    run = start(samples, tmp_path, own_client)
    assert [row["params_sha256"] for row in run.rows] == calm


def test_all_workers_are_killed_at_once(samples: Samples, tmp_path: Path, own_client: Client, calm: list[str]) -> None:
    """No worker runs when their tasks are released: Dask does not start these again on others."""
    killed: list[int] = []

    def report(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.result.round == 2 and not killed:
            killed.extend(own_client.run(os.getpid).values())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    run = start(samples, tmp_path, own_client, report=report)
    assert len(killed) == 2
    assert [row["params_sha256"] for row in run.rows] == calm


@pytest.mark.parametrize(
    ("tables", "killed", "replayed", "commits"),
    [
        ({}, 5, 1, [1, 2, 6]),
        pytest.param({"kept": {"commit_every": 50}}, 5, 0, [1, 5, 6], marks=SLOW),
        pytest.param({"rounds": 8, "eval_every": 2}, 7, 2, [2, 4, 8], marks=SLOW),
        pytest.param({"average": {"mix": {"topology": "ring"}}}, 5, 1, [1, 2, 6], marks=SLOW),
        pytest.param({"average": {"codec": {"name": "int8"}, "ema": 0.9}}, 5, 1, [1, 2, 6], marks=SLOW),
    ],
    ids=["auto", "fixed", "seldom evaluated", "ring", "codec"],
)
def test_a_worker_killed_late_in_a_long_segment(
    samples: Samples,
    tmp_path: Path,
    own_client: Client,
    kill_worker_in: Callable[[Client, str], Any],
    monkeypatch: pytest.MonkeyPatch,
    tables: dict[str, Any],
    killed: int,
    replayed: int,
    commits: list[int],
) -> None:
    """All rounds since the commit must be trained again; the first that can be is committed now."""
    monkeypatch.setattr(rounds_module, "commit_cadence", lambda *given: 100)
    tables = {"rounds": 6, **tables}
    calm = start(samples, tmp_path / "calm", "serial", model_calm, **tables)
    kill_worker_in(own_client, f"train-r{killed:05d}")
    run = start(samples, tmp_path / "killed", own_client, **tables)
    assert [row["params_sha256"] for row in run.rows] == [row["params_sha256"] for row in calm.rows]
    logged = [json.loads(line) for line in (run.directory / "events.jsonl").read_text().splitlines()]
    assert [one["round"] for one in logged if one["event"] == "SegmentReplayed"] == [replayed]
    assert [one["round"] for one in logged if one["event"] == "RoundCommitted"] == commits


def test_a_lost_segment_is_replayed_from_its_root(
    samples: Samples, tmp_path: Path, client: Client, calm: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, lost = ClusterRunner.collect, []

    def losing(self: ClusterRunner, held: Any, finished: int | None = None) -> Any:
        outcome = original(self, held)
        if len(lost) < 2:
            lost.append(1)
            raise SegmentLost("as if the holder had died")
        return outcome

    monkeypatch.setattr(ClusterRunner, "collect", losing)
    events: list[Event] = []
    run = start(samples, tmp_path, client, model_calm, report=events.append)
    assert [row["params_sha256"] for row in run.rows] == calm
    assert [row["retried"] for row in run.rows] == [2, 0, 0]
    assert sum(isinstance(event, SegmentReplayed) for event in events) == 2
    logged = [json.loads(line)["event"] for line in (run.directory / "events.jsonl").read_text().splitlines()]
    assert logged.count("SegmentReplayed") == 2


def test_a_client_that_cannot_submit_is_a_lost_segment(
    samples: Samples, tmp_path: Path, client: Client, calm: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, get, refused = Client.submit, Client.get, []

    def refuse(key: str, name: str) -> None:
        if name in key and name not in refused:
            refused.append(name)
            raise ClosedClientError("as if between two rounds")

    def refusing_submit(self: Client, *arguments: Any, **options: Any) -> Any:
        refuse(options["key"], "reduce-r00002")
        return submit(self, *arguments, **options)

    def refusing_get(self: Client, graph: Any, keys: list[str], **options: Any) -> Any:
        refuse(keys[0], "train-r00002")
        return get(self, graph, keys, **options)

    monkeypatch.setattr(Client, "submit", refusing_submit)
    monkeypatch.setattr(Client, "get", refusing_get)
    run = start(samples, tmp_path, client, model_calm)
    assert sorted(refused) == ["reduce-r00002", "train-r00002"]
    assert [row["params_sha256"] for row in run.rows] == calm


@pytest.mark.parametrize(
    ("lost", "error"), [({"full": True}, OutOfMemory), ({"killed": "always"}, UserCodeFailed), ({}, ClusterLost)]
)
def test_a_segment_that_is_always_lost_ends_the_run(
    samples: Samples, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch, lost: Any, error: Any
) -> None:
    def losing(self: ClusterRunner, held: Any, plan: Any) -> Any:
        raise SegmentLost("always", **lost)

    monkeypatch.setattr(ClusterRunner, "submit", losing)
    with pytest.raises(error, match="always"):
        start(samples, tmp_path, client, model_calm)


@pytest.mark.slow
def test_the_scheduler_goes_away(samples: Samples, tmp_path: Path, own_client: Client) -> None:
    def close(event: Event) -> None:
        if getattr(getattr(event, "result", None), "round", 0) == 1:
            own_client.cluster.close()

    with pytest.raises(ClusterLost, match="scheduler"):
        start(samples, tmp_path, own_client, model_calm, report=close)


def between_the_two_largest(samples: Samples) -> float:
    """A value of x[:, 0] that one training sample of three replicas exceeds."""
    plan = plan_data(samples, replicas=3, seed=0)
    rows = np.concatenate([p.cells for p in train_partitions(plan)])  # a cell is a sample here
    assert plan.cell_rows == 1
    starts, _ = cell_bounds(plan, rows)
    values = np.sort(zarr.open_group(samples.path, mode="r")["x"][:][starts, 0])
    return float(values[-2:].mean())


def test_a_replica_that_is_not_finite_is_left_out(samples: Samples, tmp_path: Path) -> None:
    events: list[Event] = []
    run = start(
        samples,
        tmp_path,
        "serial",
        models.nan_once,
        model_args={"threshold": between_the_two_largest(samples)},
        average={"max_rejected": 0.7},
        report=events.append,
    )
    assert [row["rejected"] for row in run.rows] == [1, 1, 1]
    rejected = [event for event in events if isinstance(event, ReplicaRejected)]
    assert len({event.replica for event in rejected}) == 1
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


def test_too_many_of_them_stop_the_run(samples: Samples, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="1 of 3 replicas"):
        start(
            samples,
            tmp_path,
            "serial",
            models.nan_once,
            model_args={"threshold": between_the_two_largest(samples)},
        )


@pytest.mark.slow
def test_the_driver_is_killed_and_the_same_command_continues(blobs: Path, tmp_path: Path, calm: list[str]) -> None:
    (tmp_path / "model.py").write_text(Path(models.__file__).read_text())
    (tmp_path / "dtrain.toml").write_text(
        f'''model = "model:slow"
        data = {{ path = "{blobs}", inputs = ["x"], targets = ["y"] }}
        train = {{ loss = "cross_entropy", rounds = 3, batch_size = 16 }}
        average = {{ replicas = 3 }}
        '''
    )
    command = [str(Path(sys.executable).parent / "dtrain"), "train", "dtrain.toml", "--run", "r", "-q", "--json"]
    history = tmp_path / "runs" / "r" / "history.jsonl"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (history.exists() and history.read_text().count("\n") >= 1):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    rows = [json.loads(line) for line in history.read_text().splitlines()]
    assert [row["params_sha256"] for row in rows] == calm
    assert json.loads(again.stdout.splitlines()[-1])["params_sha256"] == calm[-1]
