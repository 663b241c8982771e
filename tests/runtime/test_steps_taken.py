"""Tasks report their progress, replica by replica."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dtrain
from dtrain.data.samples import Samples
from dtrain.events import Event, RoundFinished, RunStarted, StepsTaken
from dtrain.runtime import tasks
from tests.runtime import models


def events_of(samples: Samples, tmp_path: Path, cluster: Any) -> list[Event]:
    events: list[Event] = []
    dtrain.train(
        models.slow,
        samples,
        train={"loss": "cross_entropy", "rounds": 1, "local_steps": 45, "batch_size": 8},
        average={"replicas": 2},
        model_args={"seconds": 0.05},
        cluster=cluster,
        run_dir=tmp_path,
        progress=False,
        report=events.append,
    )
    return events


@pytest.mark.parametrize("place", ["serial", "cluster"])
def test_steps_come_before_the_round_is_finished(
    samples: Samples, tmp_path: Path, request: pytest.FixtureRequest, place: str
) -> None:
    where = "serial" if place == "serial" else request.getfixturevalue("client")
    events = events_of(samples, tmp_path, where)
    finished = next(i for i, event in enumerate(events) if isinstance(event, RoundFinished))
    steps = [event for event in events[:finished] if isinstance(event, StepsTaken)]
    assert {event.replica for event in steps} == {0, 1}
    for replica in (0, 1):
        own = [event.step for event in steps if event.replica == replica]
        assert own == sorted(own)
        assert len(set(own)) >= 2
    assert all(event.samples == event.step * 8 and event.steps == 45 for event in steps)
    logged = (tmp_path / "run-1" / "events.jsonl").read_text()
    assert "StepsTaken" not in logged


@pytest.mark.parametrize("place", ["serial", "cluster"])
def test_the_pass_for_normalisation_tells_how_far_it_is(
    blobs: Path, tmp_path: Path, request: pytest.FixtureRequest, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: Any = "serial"
    if place == "cluster":
        where = request.getfixturevalue("client")
        where.run(set_interval, 0.0)
        request.addfinalizer(lambda: where.run(set_interval, tasks.PROGRESS_SECONDS))
    else:
        monkeypatch.setattr(tasks, "PROGRESS_SECONDS", 0.0)
    events: list[Event] = []
    dtrain.train(
        models.small,
        dtrain.open_samples(blobs, inputs=["x"], targets=["y"], normalize=["x"]),
        train={"loss": "cross_entropy", "rounds": 1, "batch_size": 16},
        average={"replicas": 2},
        cluster=where,
        run_dir=tmp_path,
        progress=False,
        report=events.append,
    )
    started = next(i for i, event in enumerate(events) if isinstance(event, RunStarted))
    steps = [event for event in events[:started] if isinstance(event, StepsTaken)]
    assert {event.round for event in steps} == {0}
    assert {event.replica for event in steps} == {0, 1}
    for event in steps:
        assert 1 <= event.step <= event.steps


def set_interval(seconds: float) -> None:
    tasks.PROGRESS_SECONDS = seconds
