"""Runs whose samples are left out or repeated: what was counted at the first start is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from torch import nn

import dtrain
from dtrain.config.schema import TrainConfig
from dtrain.data.plan.multiplicity import multiplicities
from dtrain.errors import FirstLossNotFinite, NonFiniteData, RunConflict, TooFewSamples
from dtrain.events import COUNTING, SamplesLeftOut, StepsTaken
from dtrain.job import job_from_config
from dtrain.report.lines import fault_line, steps_line
from dtrain.report.progress import terminal_progress
from dtrain.trainer import train_job
from tests.runtime.test_averaging import lose_rounds
from tests.training import bits, evaluated

COUNT = 400
Write = Callable[..., Path]


def store_of(write_store: Write, path: Path, seed: int = 0, *, bad: bool = True, rare: int = 10) -> Path:
    """Write x(n, k), y(n) and c(n): every `rare`-th sample is of class 1; 40 samples are not finite."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(COUNT, 4)).astype("float32")
    y = x.sum(axis=1)
    if bad:
        x[100:130, 0], y[125:140] = np.nan, np.inf
    arrays = {
        "x": {"dims": ("n", "k"), "values": x, "chunks": (40, 4)},
        "y": {"dims": ("n",), "values": y, "chunks": (40,)},
        "c": {"dims": ("n",), "values": (np.arange(COUNT) % rare == 0), "chunks": (COUNT,)},
    }
    return write_store(path, arrays)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))


def train(store: Path, tmp_path: Path, name: str, cluster: Any, **data: Any) -> dtrain.Run:
    table = {"normalize": ["x"], "split": {"val": 0.2, "test": 0.2}, **data}
    return dtrain.train(
        build,
        dtrain.open_samples(store, inputs=["x"], targets=["y"], **table),
        train={"loss": "mse", "metrics": ["mae"], "rounds": 3, "local_steps": 10, "batch_size": 8, "eval_every": 1},
        average={"replicas": 3},
        cluster=cluster,
        run=name,
        run_dir=tmp_path,
        progress=False,
    )


KEYS = [
    {"non_finite": "skip"},
    {"non_finite": {"min_valid": 0.5}},
    {"balance": "c", "non_finite": "skip", "partition": "contiguous"},
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("data", KEYS, ids=["skip", "min_valid", "balance"])
def test_serial_equals_cluster_equals_resumed(
    write_store: Write, tmp_path: Path, client: Client, data: dict[str, Any]
) -> None:
    store = store_of(write_store, tmp_path / "s.zarr")
    serial = train(store, tmp_path, "serial", "serial", **data)
    cluster = train(store, tmp_path, "cluster", client, **data)
    assert bits(cluster.rows) == bits(serial.rows)
    assert np.isfinite([row["train_loss"] for row in serial.rows]).all()
    plan = json.loads((cluster.directory / "plan.json").read_text())
    lose_rounds(cluster, 1)
    assert bits(train(store, tmp_path, "cluster", client, **data).rows) == bits(serial.rows)
    assert json.loads((cluster.directory / "plan.json").read_text()) == plan
    assert serial.evaluate(split="test") == cluster.evaluate(split="test", cluster=client)
    with pytest.raises(RunConflict, match="non_finite"):
        train(store, tmp_path, "serial", "serial", **{**data, "non_finite": "allow"})
    if "balance" in data:
        with pytest.raises(RunConflict, match="balance"):
            train(store, tmp_path, "serial", "serial", **{**data, "balance": ""})


def test_the_run_says_what_is_left_out_and_keeps_it(write_store: Write, tmp_path: Path) -> None:
    store = store_of(write_store, tmp_path / "s.zarr")
    run = train(store, tmp_path, "a", "serial", non_finite="skip")
    events = [json.loads(line) for line in (run.directory / "events.jsonl").read_text().splitlines()]
    left_out = [event for event in events if event["event"] == "SamplesLeftOut"]
    assert [(e["samples"], e["of"], e["by_variable"]) for e in left_out] == [(40, 400, {"x": 30, "y": 15})]
    event = SamplesLeftOut(path="s", samples=412, of=10_000, by_variable={"t2m": 400, "sst": 12})
    assert fault_line(event) == "412 of 10,000 samples left out: non-finite values in t2m (400), sst (12)"
    kept = multiplicities(run.plan.plans[0])[:, 0]
    assert np.flatnonzero(kept == 0).tolist() == list(range(100, 140))
    sizes = run.plan.sizes
    assert max(sizes) - min(sizes) <= 1
    train(store, tmp_path, "a", "serial", non_finite="skip")  # is over; says nothing again
    assert len((run.directory / "events.jsonl").read_text().splitlines()) == len(events)


def test_progress_of_the_pass_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    step = StepsTaken(round=COUNTING, replica=0, step=3, steps=10, samples=300, seconds=1.0)
    assert steps_line([step]) == "looking for non-finite values, units: replica 0 3/10, 300 samples/s"
    with terminal_progress(color=False) as report:
        report(step)
        report(SamplesLeftOut(path="s", samples=1, of=2, by_variable={"x": 1}))
    assert "1 of 2 samples left out: non-finite values in x (1)" in capsys.readouterr().err


def test_each_chunk_is_decoded_once_for_it(write_store: Write, tmp_path: Path, monkeypatch: Any) -> None:
    from dtrain.data.read.units import UnitReader

    store, boxes, read = store_of(write_store, tmp_path / "s.zarr"), [], UnitReader.read
    monkeypatch.setattr(UnitReader, "read", lambda self, box: boxes.append(box) or read(self, box))
    run = train(store, tmp_path, "a", "serial", non_finite="skip", normalize=[])
    assert sorted((box.start, box.stop) for box in boxes) == [(start, start + 40) for start in range(0, COUNT, 40)]
    boxes.clear()
    lose_rounds(run, 1)
    train(store, tmp_path, "a", "serial", non_finite="skip", normalize=[])
    run.evaluate(split="test")
    assert not boxes  # it is kept in the run


def test_other_stores_are_counted_when_they_are_evaluated(write_store: Write, tmp_path: Path) -> None:
    store, other = (store_of(write_store, tmp_path / f"{name}.zarr", seed) for seed, name in enumerate("st"))
    run = train(store, tmp_path, "a", "serial", non_finite="skip")
    for path in (store, other):
        samples = dtrain.open_samples(path, inputs=["x"], targets=["y"])
        _, _, count = evaluated(run, samples, "all")
        assert count == COUNT - 40
    strided = dtrain.open_samples(store, inputs=["x"], targets=["y"], stride=2)
    assert evaluated(run, strided, "all")[2] == (COUNT - 40) // 2
    clean = store_of(write_store, tmp_path / "clean.zarr", 2, bad=False)
    assert evaluated(run, run.other_samples(str(clean)), "all")[2] == COUNT
    own = dtrain.load_run(run.directory, model=build, settings=("data.non_finite=error",))
    with pytest.raises(NonFiniteData):
        own.evaluate(split="all")
    most = dtrain.load_run(run.directory, model=build, settings=("data.non_finite={ min_valid = 0.7 }",))
    assert evaluated(most, None, "all")[2] == COUNT - 5  # both are bad: 3 of 5


def test_val_path_and_several_stores_are_counted_too(write_store: Write, tmp_path: Path, client: Client) -> None:
    first, second = (store_of(write_store, tmp_path / f"{name}.zarr", rare=r) for name, r in (("a", 10), ("b", 4)))
    held = store_of(write_store, tmp_path / "held.zarr", 5)
    config = {
        "model": "tests.runtime.test_counting:build",
        "data": {
            "path": [{"path": str(first), "replicas": 1}, {"path": str(second), "replicas": 2}],
            "inputs": ["x"],
            "targets": ["y"],
            "split": {"val": 0.0, "test": 0.0},
            "val_path": str(held),
            "non_finite": "skip",
            "balance": "c",
        },
        "train": {"loss": "mse", "rounds": 2, "local_steps": 5, "batch_size": 8, "eval_every": 1},
        "cluster": {"scheduler": "serial"},
    }
    job = job_from_config(TrainConfig(**config), tmp_path)
    serial = train_job(job, tmp_path / "serial")
    # of the 720 samples left, the rare class has 36 in one store and 90 in the other: 594 / 126 = 4.7
    assert [max(multiplicities(plan).ravel()) for plan in serial.plan.plans] == [5, 5]
    assert sum(serial.plan.sizes) == 594 + 5 * 126
    held_out = serial.resolved.held_out
    assert held_out is not None
    assert int((multiplicities(held_out) == 0).sum()) == 40
    assert bits(train_job(job, tmp_path / "cluster", client=client).rows) == bits(serial.rows)


def test_plan_says_that_samples_will_be_counted_and_shows_classes(write_store: Write, tmp_path: Path) -> None:
    store = store_of(write_store, tmp_path / "s.zarr")
    samples = dtrain.open_samples(
        store, inputs=["x"], targets=["y"], non_finite="skip", balance="c", split={"val": 0.0, "test": 0.0}
    )
    planned = dtrain.plan(
        build, samples, train={"loss": "mse", "batch_size": 400}, average={"replicas": 1}, cluster="serial"
    )
    rows = dict(planned.rows)
    assert "the first start counts them, in one pass over the data" in rows["non-finite"]
    assert rows["balance"] == "by c: 0: 360 x 1, 1: 40 x 9"
    assert planned.record["balance"]["classes"][1] == {"class": 1, "samples": 40, "factor": 9}
    assert np.isfinite(planned.initial.loss)


def test_nothing_left_of_a_split_is_refused(write_store: Write, tmp_path: Path) -> None:
    x = np.full((20, 2), np.nan, "float32")
    path = write_store(tmp_path / "s", {"x": {"dims": ("n", "k"), "values": x, "chunks": (2, 2)}})
    samples = dtrain.open_samples(path, inputs=["x"], targets=["x"], non_finite="skip")
    with pytest.raises(TooFewSamples, match=r"all of the 16 samples of train.*x \(20\)"):
        dtrain.train(build, samples, train={"loss": "mse"}, cluster="serial", run_dir=tmp_path, progress=False)
    assert not list(tmp_path.glob("run*"))
    with pytest.raises(FirstLossNotFinite):
        dtrain.plan(lambda: nn.Linear(2, 2), samples, train={"loss": "mse"}, cluster="serial")
