"""dtrain predict: what it prints, refuses and keeps; killed at any time it goes on to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from tests.cli.helpers import SCRIPT, Outcome, Project, blobs, last
from tests.predict.test_output import contents


@pytest.fixture
def trained(cli: Callable[..., Outcome], project: Callable[..., Project]) -> Project:
    made = project()
    assert cli("train", made.config).code == 0
    return made


def test_predictions_are_written_and_what_to_do_next_is_said(cli: Callable[..., Outcome], trained: Project) -> None:
    outcome = cli("predict", "job", "--out", "out.zarr")
    assert outcome.code == 0, outcome.err
    words = " ".join(outcome.out.split())
    assert words == "predictions out.zarr run job/runs/job round 2 label 60 label_probability 60 samples 60"
    assert "next: python -c" in outcome.err
    assert xr.open_zarr("out.zarr").label.shape == (60,)
    again = cli("--json", "predict", "job", "--out", "again.zarr", "--values", "probabilities", "--round", "1")
    found = last(again)
    assert (found["event"], found["out"], found["round"], found["samples"]) == ("done", "again.zarr", 1, 60)
    assert found["shapes"] == {"label_probability": [60, 4]}


def test_other_data_need_no_targets_and_settings_select_of_them(
    cli: Callable[..., Outcome], trained: Project, write_store: Callable[..., Path], tmp_path: Path
) -> None:
    write_store(tmp_path / "other.zarr", {"x": blobs(30)["x"]})
    assert cli("predict", "job", "--data", "other.zarr", "--out", "a.zarr").code == 0
    view = ("--set", "data.isel={ sample = { start = 5, stop = 12 } }")
    outcome = cli("--json", "predict", "job", "--data", "other.zarr", "--out", "b.zarr", *view)
    assert last(outcome)["samples"] == 7
    whole, part = xr.open_zarr("a.zarr").load(), xr.open_zarr("b.zarr").load()
    np.testing.assert_array_equal(part.label.values, whole.label.values[5:12])
    own = cli("--json", "predict", "job", "--out", "c.zarr", *view)
    assert last(own)["samples"] == 7
    both = cli("--json", "predict", "job", "--data", "other.zarr", "--data", "job/train.zarr", "--out", "d.zarr")
    assert last(both)["samples"] == 90


def refused(outcome: Outcome, code: int, *words: str) -> None:
    assert outcome.code == code, outcome.err
    lines = outcome.err.splitlines()
    assert lines[-1].startswith(("error:", "  "))
    assert "Traceback" not in outcome.err
    text = " ".join(outcome.err.split())
    for word in words:
        assert word in text


def test_what_cannot_be_is_refused(cli: Callable[..., Outcome], trained: Project) -> None:
    refused(cli("predict", "job"), 2, "--out is needed")
    refused(cli("predict", "jb", "--out", "a.zarr"), 2, "jb: no such run", "job")
    refused(cli("predict", "job", "--out", "a.zip"), 2, "--out a.zip")
    refused(cli("predict", "job", "--out", "a.zarr", "--round", "9"), 2, 'keeps no round "9"')
    refused(cli("predict", "job", "--out", "a.zarr", "--values", "clases"), 3, "did you mean", "classes")
    refused(cli("predict", "job", "--out", "a.zarr", "--data", "nowhere.zarr"), 5, "nowhere.zarr")
    refused(cli("predict", "job", "--out", "a.zarr", "--set", "train.rounds=3"), 3, "train.rounds")
    assert cli("predict", "job", "--out", "a.zarr").code == 0
    refused(cli("predict", "job", "--out", "a.zarr"), 4, "is there already", "--continue")
    refused(
        cli("predict", "job", "--out", "a.zarr", "--continue", "--round", "1"), 4, "round was 2, is 1", "params_sha256"
    )
    outcome = cli("predict", "job", "--out", "a.zarr", "--continue")
    assert outcome.code == 0
    assert "nothing was left to do" in " ".join(outcome.out.split())


def test_changed_code_is_refused_and_trusted(cli: Callable[..., Outcome], trained: Project) -> None:
    file = trained.dir / "model.py"
    file.write_text(file.read_text() + "\n# changed\n")
    refused(cli("predict", "job", "--out", "a.zarr"), 4, "was started with other code of model")
    assert not Path("a.zarr").exists()
    assert cli("predict", "job", "--out", "a.zarr", "--trust-code").code == 0


# Stopped ----------------------------------------------------------------------------------------------------


def slow(out: Path, scheduler: str = "serial") -> subprocess.Popen[str]:
    command = [str(SCRIPT), "-q", "--json", "predict", "job", "--out", str(out), "--scheduler", scheduler]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "NAP": "0.1"},
        start_new_session=True,
    )


@pytest.mark.sampled(1)
@pytest.mark.alone
@pytest.mark.parametrize(
    ("number", "code", "scheduler"),
    [(signal.SIGTERM, 75, "serial"), (signal.SIGINT, 130, "local"), (signal.SIGKILL, -9, "serial")],
    ids=["TERM", "INT", "KILL"],
)
def test_stopped_at_any_time_it_goes_on_to_the_same_bytes(
    cli: Callable[..., Outcome], project: Callable[..., Project], number: int, code: int, scheduler: str
) -> None:
    arrays: Mapping[str, Any] = blobs(400, 10)
    made = project({"cluster": {"workers": 2}}, arrays=arrays)
    assert cli("train", made.config, "--scheduler", "serial").code == 0
    assert cli("predict", "job", "--out", "calm.zarr", "--scheduler", "serial").code == 0
    calm, out = contents(Path("calm.zarr")), Path("out.zarr").absolute()
    with slow(out, scheduler) as driver:
        deadline = time.monotonic() + 100
        while len(list(out.glob("label/c/*"))) < 4:
            assert time.monotonic() < deadline
            assert driver.poll() is None, driver.communicate()
            time.sleep(0.02)
        os.killpg(driver.pid, number) if number == signal.SIGINT else driver.send_signal(number)
        said, errors = driver.communicate(timeout=60)
    assert driver.returncode == code, errors
    assert len(list(out.glob("label/c/*"))) < 40
    if number != signal.SIGKILL:
        assert "--continue" in errors
        assert "Traceback" not in errors
        assert '"event": "error"' in said
    refused(cli("predict", "job", "--out", out, "--scheduler", "serial"), 4, "is there already")
    outcome = cli("--json", "predict", "job", "--out", out, "--continue", "--scheduler", "serial")
    assert outcome.code == 0, outcome.err
    assert 0 < last(outcome)["new"] < 400
    assert contents(out) == calm


def test_memory_that_does_not_suffice_is_told_with_the_arithmetic(
    cli: Callable[..., Outcome], trained: Project
) -> None:
    refused(
        cli("predict", "job", "--out", "a.zarr", "--set", "data.memory=1kB"),
        8,
        "predicting needs",
        "data.memory is 1.0 kB",
    )
    assert not Path("a.zarr").exists()


def test_the_output_says_what_made_it(cli: Callable[..., Outcome], trained: Project) -> None:
    assert cli("predict", "job", "--out", "a.zarr").code == 0
    attributes = dict(zarr.open_group("a.zarr", mode="r").attrs)
    assert attributes["dtrain_run"] == "job"
    assert attributes["dtrain_round"] == 2
    assert attributes["dtrain_version"] == "0.1.0"
    assert str(attributes["dtrain_data"]).endswith("job/train.zarr")
    assert len(str(attributes["dtrain_data_fingerprint"])) == 64
