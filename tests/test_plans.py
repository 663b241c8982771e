"""`dtrain.plan`, `dtrain.last_run`, and a run that is opened without its data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from torch import nn

import dtrain
from dtrain.config.files import load_config
from dtrain.errors import InvalidConfig, RunNotFound, ShapesDiffer, UsageError
from dtrain.job import job_from_config
from dtrain.planning import plan_job
from dtrain.planrecord import plan_record
from tests.runtime import models

TABLES: dict[str, Any] = {
    "train": {"loss": "cross_entropy", "rounds": 2, "local_steps": 3, "batch_size": 16, "eval_every": 1},
    "average": {"replicas": 2},
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dtrain.runs._TRAINED", {})
    return tmp_path


# plan -------------------------------------------------------------------------------------------------------------


def test_plan_takes_what_train_takes_and_writes_nothing(samples: dtrain.Samples, here: Path) -> None:
    arguments: dict[str, Any] = {**TABLES, "run": "a", "run_dir": "other", "progress": False, "cluster": "serial"}
    plan = dtrain.plan(models.small, samples, **arguments)
    assert list(here.iterdir()) == []
    run = dtrain.train(models.small, samples, **arguments)
    assert plan.steps == (3, 3)
    assert plan.data.fingerprint == run.resolved.plan.fingerprint
    assert plan.samples == run.rows[0]["samples"]
    assert plan.record["num_params"] == plan.initial.num_params


def test_plan_has_the_numbers_of_the_command(blobs: Path, here: Path) -> None:
    (here / "dtrain.toml").write_text(
        f"""model = "tests.runtime.models:small"
data = {{ path = "{blobs}", inputs = ["x"], targets = ["y"] }}
train = {{ loss = "cross_entropy" }}
cluster = {{ scheduler = "serial" }}
"""
    )
    expected = plan_record(plan_job(job_from_config(load_config(here / "dtrain.toml"), here)))
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"])
    record = dtrain.plan(models.small, samples, train={"loss": "cross_entropy"}, cluster="serial").record
    measured = {"round_seconds": 0, "worker_bytes": 0}
    assert {**record, **measured} == {**expected, **measured}


def test_a_plan_is_text_and_html(samples: dtrain.Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(samples.path).parent)  # a path is not broken, and from here it is short
    plan = dtrain.plan(models.small, samples, **TABLES, cluster="serial")
    assert max(map(len, str(plan).splitlines())) <= 80
    assert repr(plan).startswith("<dtrain.Plan>\nrows ")
    for label, _ in plan.rows:
        assert label in str(plan)
        assert f">{label}</th>" in plan._repr_html_()


def test_plan_refuses_what_train_refuses(samples: dtrain.Samples, here: Path) -> None:
    with pytest.raises(ShapesDiffer):
        dtrain.plan(lambda: nn.Linear(5, 3), samples, **TABLES, cluster="serial")
    with pytest.raises(InvalidConfig, match="cluster is the class Path"):
        dtrain.plan(models.small, samples, **TABLES, cluster=Path)  # type: ignore[arg-type]
    assert list(here.iterdir()) == []


def test_plan_on_a_cluster_that_was_given(samples: dtrain.Samples, client: Client) -> None:
    plan = dtrain.plan(models.small, samples, train=TABLES["train"], cluster=client)
    assert plan.workers == len(client.nthreads())


# Numbers of NumPy -------------------------------------------------------------------------------------------------


def test_numbers_of_numpy_and_paths_give_the_same_run(blobs: Path) -> None:
    samples = dtrain.open_samples(blobs, inputs=np.array(["x"]), targets=("y",), stride=np.int64(1), isel={})
    tables = {
        "train": {**TABLES["train"], "rounds": np.int32(2), "optimizer_args": {"lr": np.float64(0.01)}},
        "average": {"replicas": np.uint8(2)},
    }
    given = dtrain.train(models.small, samples, **tables, cluster="serial", run_dir=Path("runs"), progress=False)
    plain = {**TABLES, "train": {**TABLES["train"], "optimizer_args": {"lr": 0.01}}}
    other = dtrain.train(models.small, samples, **plain, cluster="serial", progress=False)
    assert given.rows[-1]["params_sha256"] == other.rows[-1]["params_sha256"]
    assert given.config.train == other.config.train


@pytest.mark.parametrize("run", [3, 3.5, b"a", ("a",)])
def test_the_name_of_a_run_is_text(samples: dtrain.Samples, here: Path, run: Any) -> None:
    with pytest.raises(UsageError, match="run is an object of .*; a name is needed"):
        dtrain.train(models.small, samples, **TABLES, run=run, cluster="serial", progress=False)
    assert list(here.iterdir()) == []
    named = dtrain.train(models.small, samples, **TABLES, run=Path("a"), cluster="serial", progress=False)
    assert named.directory == here / "runs/a"


# Runs that are opened ---------------------------------------------------------------------------------------------


def test_the_last_run_is_the_newest(samples: dtrain.Samples, tmp_path: Path) -> None:
    with pytest.raises(RunNotFound):
        dtrain.last_run()
    first = dtrain.train(models.small, samples, **TABLES, cluster="serial", progress=False)
    second = dtrain.train(models.small, samples, **TABLES, cluster="serial", progress=False)
    assert dtrain.last_run().directory.name == second.directory.name
    later = second.directory.stat().st_mtime + 100
    for file in first.directory.iterdir():
        os.utime(file, (later, later))
    assert dtrain.last_run().directory.name == first.directory.name
    assert dtrain.last_run(model=models.small).rows == first.rows


def test_the_last_run_of_this_process_has_its_functions(
    samples: dtrain.Samples, tmp_path_factory: pytest.TempPathFactory
) -> None:
    build = lambda: nn.Linear(6, 3)  # noqa: E731
    run = dtrain.train(
        build, samples, **TABLES, cluster="serial", run_dir=tmp_path_factory.mktemp("far"), progress=False
    )
    last = dtrain.last_run()
    assert last.directory == run.directory
    assert last.evaluate(split="val") == run.evaluate(split="val")
    assert isinstance(last.model, nn.Linear)


def test_the_model_of_a_run_needs_no_data(blobs: Path) -> None:
    shutil.copytree(blobs, "blobs.zarr")
    samples = dtrain.open_samples("blobs.zarr", inputs=["x"], targets=["y"])
    trained = dtrain.train(models.small, samples, **TABLES, cluster="serial", progress=False)
    shutil.rmtree("blobs.zarr")
    run = dtrain.load_run(trained.directory)
    assert run.model.state_dict().keys() == trained.model.state_dict().keys()
    assert run.history.to_pandas().shape[0] == 2
    assert "2 of 2 rounds" in repr(run)
    assert dtrain.load_run(str(trained.directory), model=models.small).model_of("1") is not None


def test_events_and_errors_are_there_at_once() -> None:
    code = "import dtrain; dtrain.events.RoundFinished; dtrain.errors.DtrainError"
    subprocess.run([sys.executable, "-c", code], check=True)
