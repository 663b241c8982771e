"""Trackers as such: which are allowed, that each has a thread of its own, and that none stops training."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import InvalidConfig
from dtrain.events import ClusterOpening, Event, RoundFinished, RunFinished, RunStarted, StepsTaken
from dtrain.report import tracking
from dtrain.report.history import row_of
from dtrain.report.points import LAST, MOST_REPLICAS, points, settings_of
from dtrain.report.tracking import NamedTracker, named_tracker, own_tracker, tracker_names
from tests.report.helpers import result_of

STARTED = RunStarted(run="runs/a", round=0, rounds=3, replicas=2, samples=9, workers=2, dashboard="")
FINISHED = RunFinished(reason="rounds", rounds=3, params_sha256="ab", val_loss=None, run="runs/a")
STEPS = StepsTaken(round=1, replica=0, step=1, steps=2, samples=3, seconds=0.1)


def test_built_in_trackers_are_the_modules_of_their_folder() -> None:
    assert tracker_names() == ["mlflow", "tensorboard"]
    assert named_tracker("tensorboard").name == "tensorboard"


def test_a_misspelt_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfig) as caught:
        named_tracker("tensorbord")
    assert caught.value.message == (
        'run.trackers: "tensorbord"; allowed are mlflow, tensorboard, "module:function"; did you mean "tensorboard"?'
    )


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_a_package_that_is_missing_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracking, "is_installed", lambda package: False)
    with pytest.raises(InvalidConfig) as caught:
        named_tracker(name)
    assert caught.value.message == f'run.trackers: "{name}" needs the package {name}, which is not installed.'
    assert caught.value.hint == f'pip install "dtrain[{name}]", or leave "{name}" out.'
    assert caught.value.code == 3


class NeedsArguments:
    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, event: Event) -> None: ...


@pytest.mark.parametrize(
    ("tracker", "words"),
    [
        (3, ["an object of int cannot be called"]),
        (lambda: None, ["the function <lambda> is called with one event: too many positional arguments"]),
        (NeedsArguments, ["the class NeedsArguments is called without arguments", "'url'"]),
    ],
)
def test_what_is_no_tracker(tracker: Any, words: list[str]) -> None:
    with pytest.raises(InvalidConfig) as caught:
        own_tracker("m:x", tracker)
    for word in words:
        assert word in caught.value.message


def test_functions_classes_and_objects() -> None:
    seen: list[Any] = []
    made = NeedsArguments("u")
    for tracker in (seen.append, made, print):
        assert own_tracker("m:x", tracker).make() is tracker
    assert isinstance(own_tracker("m:x", list).make(), list)


# Threads ---------------------------------------------------------------------------------------------------------


def followed(tracker: Any, *events: Event) -> None:
    with tracking.tracking([own_tracker("m:x", tracker)]) as report:
        for event in events:
            report(event)


def test_a_tracker_gets_the_events_from_the_start_to_the_end_in_a_thread_of_its_own() -> None:
    seen: list[Event] = []
    threads = set()

    def track(event: Event) -> None:
        seen.append(event)
        threads.add(threading.current_thread())

    opening = ClusterOpening(run="runs/a", scheduler="local")
    followed(track, opening, STEPS, STARTED, RoundFinished(result_of(1)), FINISHED)
    assert seen == [STARTED, RoundFinished(result_of(1)), FINISHED]
    (thread,) = threads
    assert thread.name == "dtrain-tracker-m:x"
    assert not thread.is_alive()


def test_without_a_start_nothing_is_made() -> None:
    made = []

    class Counted:
        def __init__(self) -> None:
            made.append(self)

        def __call__(self, event: Event) -> None: ...

    followed(Counted, FINISHED)
    assert made == []
    followed(Counted, STARTED)
    assert len(made) == 1


def test_a_result_comes_without_its_state() -> None:
    seen: list[Any] = []
    followed(seen.append, STARTED, RoundFinished(result_of(1, state=object())))
    assert seen[1].result == result_of(1)


def test_close_is_called_at_the_end_also_after_a_fault() -> None:
    calls: list[str] = []

    class Closes:
        def __call__(self, event: Event) -> None:
            calls.append(type(event).__name__)

        def close(self) -> None:
            calls.append("close")

    def fail() -> None:
        with tracking.tracking([NamedTracker("a", Closes), NamedTracker("b", Closes)]) as report:
            report(STARTED)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert sorted(calls) == ["RunStarted", "RunStarted", "close", "close"]


def test_a_tracker_that_fails_is_named_once_and_gets_what_follows(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Event] = []

    def track(event: Event) -> None:
        seen.append(event)
        if isinstance(event, RoundFinished):
            raise ConnectionError("the server\nis gone")

    followed(track, STARTED, RoundFinished(result_of(1)), RoundFinished(result_of(2)), FINISHED)
    assert len(seen) == 4
    assert [record.getMessage() for record in caplog.records] == [
        'run.trackers: "m:x" fails, and training goes on: the server is gone'
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_a_tracker_that_cannot_be_made_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Any:
        raise ImportError("no module named x")

    with tracking.tracking([NamedTracker("x", make)]) as report:
        report(STARTED)
        report(FINISHED)
    assert [record.getMessage() for record in caplog.records] == [
        'run.trackers: "x" fails, and training goes on: no module named x'
    ]


def test_a_tracker_that_hangs_is_waited_for_no_longer_than_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("CLOSE_SECONDS", "FAULT_SECONDS", "PATIENCE_SECONDS"):
        monkeypatch.setattr(tracking, name, 0.01)
    release, seen = threading.Event(), []

    def track(event: Event) -> None:
        release.wait(60)
        seen.append(event)

    with tracking.tracking([own_tracker("m:x", track)]) as report:
        report(STARTED)
        for _ in range(100):
            report(STEPS)
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for m:x, at most 0 s",
        'run.trackers: "m:x" fails, and training goes on: it did not take all events in time. The same command gives '
        "it what it lacks.",
    ]
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "dtrain-tracker-m:x"]
    assert thread.daemon
    release.set()
    thread.join(60)
    assert len(seen) <= 3  # of the steps that came meanwhile only those that nothing waited before


def test_events_beyond_the_most_are_lost_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking, "MOST_EVENTS", 3)
    release, seen = threading.Event(), []

    def track(event: Event) -> None:
        release.wait(60)
        seen.append(event)

    with tracking.tracking([own_tracker("m:x", track)]) as report:
        report(STARTED)
        for number in range(1, 9):
            report(RoundFinished(result_of(number)))
        release.set()
        while len(seen) < 3:  # there is room again for the end
            threading.Event().wait(0.01)
    assert "it is too slow: 3 events wait for it" in caplog.text
    assert 3 <= len(seen) <= 5


# Points ----------------------------------------------------------------------------------------------------------


def test_the_points_of_a_round() -> None:
    assert points(row_of(result_of(3))) == {
        "round/bytes_reduced": 800.0,
        "round/rejected": 0.0,
        "replica_loss/0": 0.25,
        "replica_loss/1": 0.75,
        "round/retried": 1.0,
        "round/samples": 20.0,
        "round/samples_per_second": 20 / 1.2346,
        "round/seconds": 1.2346,
        "stages/decode": 0.02,
        "stages/evaluate": 0.125,
        "stages/fetch": 0.03,
        "stages/gather": 0.01,
        "stages/model": 0.14,
        "stages/reduce": 0.01,
        "stages/steps": 0.15,
        "stages/waiting": 0.05,
        "round/steps": 4.0,
        "train_loss": 0.5,
        "round/update_cosine": 0.5,
        "update_norm/0": 1.5,
        "update_norm/1": 2.5,
        "val_accuracy": 0.875,
        "val_loss": 0.75,
    }


def test_no_point_is_the_folder_of_another() -> None:
    names = list(points(row_of(result_of(1))))
    assert not [name for name in names if any(other.startswith(f"{name}/") for other in names)]


def test_of_many_replicas_the_ends_are_points() -> None:
    many = tuple(float(k) for k in range(MOST_REPLICAS + 1))
    found = points(row_of(result_of(1, replica_loss=(*many, float("nan")))))
    assert (found["replica_loss/min"], found["replica_loss/max"]) == (0.0, float(MOST_REPLICAS))
    assert "replica_loss/0" not in found


@given(
    st.lists(st.floats(), max_size=40),
    st.floats(),
    st.dictionaries(st.sampled_from(["val_loss", "val_x"]), st.floats()),
)
def test_points_are_finite_and_the_last_one_marks_a_whole_round(losses: Any, loss: float, metrics: Any) -> None:
    found = points(row_of(result_of(2, replica_loss=tuple(losses), train_loss=loss, metrics=metrics)))
    assert all(value == value and abs(value) != float("inf") for value in found.values())
    assert list(found)[-1] == LAST


def test_settings_are_flat() -> None:
    settings = {"model": "m:f", "train.rounds": 3, "model_args": {"deep": {"er": [1, 2]}}, "data.split.val": {"t": "x"}}
    assert settings_of({**settings, "run.trackers": [], "average.outer": None, "group": ""}) == {
        "model": "m:f",
        "train.rounds": 3,
        "model_args.deep.er": "1, 2",
        "data.split.val.t": "x",
    }
