"""What decides bits is resolved once and read back from plan.json."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dtrain
from dtrain.calls import job_from_python
from dtrain.data.plan.partition import eval_partitions
from dtrain.directory import read_plan
from dtrain.errors import LengthsDiffer, RunConflict
from dtrain.job import with_scheduler
from dtrain.prepare import open_runner
from dtrain.resolved import VERSION, from_json, to_json
from dtrain.runfiles import sealed
from tests.runtime import models
from tests.training import rewrite


@pytest.fixture
def held_out(blobs: Path, tmp_path: Path, write_store: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(5)
    return write_store(
        tmp_path / "val.zarr",
        {
            "x": {"dims": ("n", "f"), "values": rng.normal(size=(90, 6)), "chunks": (10, 6)},
            "y": {"dims": ("n",), "values": rng.integers(0, 3, size=90, dtype="int32"), "chunks": (10,)},
        },
    )


@pytest.fixture
def samples(blobs: Path, held_out: Path) -> dtrain.Samples:
    return dtrain.open_samples(
        blobs, inputs=["x"], targets=["y"], val_path=str(held_out), split={"val": 0.0, "test": 0.1}
    )


def start(samples: dtrain.Samples, tmp_path: Path, rounds: int) -> dtrain.Run:
    return dtrain.train(
        models.small,
        samples,
        train={"loss": "cross_entropy", "rounds": rounds, "local_steps": 2, "batch_size": 16},
        average={"replicas": 3},
        cluster="serial",
        run="r",
        run_dir=tmp_path / "runs",
        progress=False,
    )


def job_of(run: dtrain.Run, samples: dtrain.Samples) -> Any:
    job = job_from_python(models.small, samples, {}, with_scheduler(run.config, "serial"))
    return job


def test_the_held_out_plan_is_read_back_from_plan_json(samples: dtrain.Samples, tmp_path: Path) -> None:
    run = start(samples, tmp_path, 1)
    stored = json.loads((run.directory / "plan.json").read_text())
    assert stored["held_out"]["eval_pieces"] == 3
    stored["held_out"]["eval_pieces"] = 2
    rewrite(run.directory, plan=stored)
    job = job_of(run, samples)
    known = read_plan(run.directory, job)
    assert known is not None
    with open_runner(job, "again", known=known) as (runner, resolved):
        assert resolved.held_out is not None
        assert runner.spec.held_out is not None
        assert runner.spec.held_out.plan == resolved.held_out
        assert len(eval_partitions(runner.spec.held_out.plan, "all")) == 2
        assert len(runner._resident.pieces("val")) == 2


def test_plan_json_comes_back_as_it_was(samples: dtrain.Samples, tmp_path: Path) -> None:
    run = start(samples, tmp_path, 1)
    stored = json.loads((run.directory / "plan.json").read_text())
    assert stored["version"] == VERSION
    resolved = from_json(stored)
    assert json.loads(json.dumps(sealed(to_json(job_of(run, samples), resolved)))) == stored


def test_a_plan_of_another_version_is_refused(samples: dtrain.Samples, tmp_path: Path) -> None:
    run = start(samples, tmp_path, 1)
    stored = json.loads((run.directory / "plan.json").read_text())
    rewrite(run.directory, plan={**stored, "version": VERSION + 1})
    with pytest.raises(RunConflict, match=f"another version of dtrain: its plan has version {VERSION + 1}"):
        start(samples, tmp_path, 2)
    del stored["sha256"]
    (run.directory / "plan.json").write_text(json.dumps({**stored, "version": 2}))
    manifest = run.directory / "rounds/round-000001/manifest.json"
    manifest.write_text(json.dumps({"format": 1, "round": 1, "files": json.loads(manifest.read_text())["files"]}))
    for opened in (lambda: start(samples, tmp_path, 2), lambda: dtrain.load_run(run.directory, model=models.small)):
        with pytest.raises(RunConflict, match="another version of dtrain: its rounds have format 1"):
            opened()
    shutil.rmtree(run.directory / "rounds")
    with pytest.raises(RunConflict, match="another version of dtrain: its plan has version 2"):
        start(samples, tmp_path, 2)


def test_stores_with_means_along_other_axes_are_refused(tmp_path: Path, write_store: Callable[..., Path]) -> None:
    values = np.random.default_rng(0).normal(size=(60, 4, 4))

    def write(name: str, dims: tuple[str, ...]) -> str:
        arrays = {
            "x": {"dims": dims, "values": values, "chunks": (10, 4, 4)},
            "y": {"dims": ("n",), "values": np.arange(60) % 3, "chunks": (10,)},
        }
        return str(write_store(tmp_path / name, arrays))

    one, other = write("one", ("n", "lat", "lon")), write("other", ("n", "lon", "lat"))
    split = {"val": 0.0, "test": 0.0}
    for normalize, fits in (({"x": ["lat"]}, False), (["x"], True), ({"x": ["lat", "lon"]}, True)):
        samples = dtrain.open_samples(
            one, inputs=["x"], targets=["y"], val_path=other, split=split, normalize=normalize
        )
        job = job_from_python(models.small, samples, {"train": {"loss": "cross_entropy"}}, None)
        job = replace(job, config=with_scheduler(job.config, "serial"))
        if fits:
            with open_runner(job, "id"):
                continue
        said = "x has the dimensions n, lon, lat; in .* they are n, lat, lon"
        with pytest.raises(LengthsDiffer, match=said), open_runner(job, "id"):
            pass


def test_a_run_goes_on_with_the_plan_that_it_was_started_with(samples: dtrain.Samples, tmp_path: Path) -> None:
    start(samples, tmp_path, 2)
    resumed = start(samples, tmp_path, 4)
    whole = start(samples, tmp_path / "whole", 4)
    assert [row["params_sha256"] for row in resumed.rows] == [row["params_sha256"] for row in whole.rows]
    evaluated = {row["round"]: row["val_loss"] for row in resumed.rows if "val_loss" in row}
    assert set(evaluated) == {2, 4}  # the last round of each start
    assert {row["round"]: row["val_loss"] for row in whole.rows if "val_loss" in row} == {4: evaluated[4]}
