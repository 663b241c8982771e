"""What the driver makes of workers that end or freeze, by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.errors import OutOfMemory, UserCodeFailed
from dtrain.runtime import watched
from dtrain.runtime.worker_losses import MemoryExceeded, TaskPlace, WorkerLoss, WorkerLosses, described, task_place

GB = 1 << 30
PLACE = TaskPlace(
    worker="tcp://a",
    key="dtrain-train-r00002-k1-0a1b2c3d-a3-watched",
    batch=17,
    function="model (model:build)",
    parameters=0,
    memory=GB // 4,
    limit=GB,
    host="node",
    ended=0,
)


def again(worker: str, attempt: int = 4, **changes: Any) -> TaskPlace:
    return replace(PLACE, worker=worker, key=f"dtrain-train-r00002-k1-0a1b2c3d-a{attempt}-watched", **changes)


def test_one_death_is_an_accident() -> None:
    known = WorkerLosses().reported(PLACE).only(["tcp://b"])
    assert known.losses == (WorkerLoss(PLACE, "ended"),)
    assert known.last == {}
    assert known.error(lost=True) is None
    assert known.only([]) == known


def test_three_deaths_at_one_place_are_none() -> None:
    known = WorkerLosses().reported(PLACE).only([]).reported(again("tcp://b")).only(["tcp://c"])
    assert known.error(lost=True) is None
    error = known.reported(again("tcp://c", 5)).only(["tcp://d"]).error(lost=False)
    assert isinstance(error, UserCodeFailed)
    assert error.message == (
        "Round 2, replica 1, batch 17, model (model:build): 3 workers that ran it ended (tcp://a, tcp://b, tcp://c)."
    )
    assert "os._exit" in error.hint


def test_two_are_none_if_no_worker_is_left_to_try_it_again() -> None:
    known = WorkerLosses().reported(PLACE).only([]).reported(again("tcp://b")).only([])
    assert isinstance(known.error(lost=True, alone=True), UserCodeFailed)


@pytest.mark.parametrize(("batch", "sure"), [(17, 5), (0, None)])
def test_deaths_outside_of_the_users_functions_may_be_accidents(batch: int, sure: int | None) -> None:
    known = WorkerLosses()
    for number in range(1, 9):
        known = known.reported(again(f"tcp://{number}", function="", batch=batch)).only([])
        is_sure = sure is not None and number >= sure
        assert isinstance(known.error(lost=True, alone=True), UserCodeFailed) == is_sure


def test_a_place_that_a_task_has_passed_ended_no_worker() -> None:
    known = WorkerLosses().reported(PLACE).only([]).reported(again("tcp://b")).only(["tcp://c"])
    assert len(known.losses) == 2
    assert known.reported(again("tcp://c", batch=18)).losses == ()


def test_a_task_that_is_done_is_at_no_place() -> None:
    assert WorkerLosses().reported(PLACE).reported(replace(PLACE, key="")).only([]).losses == ()


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 18},
        {"function": "train.loss (model:loss)"},
        {"key": "dtrain-train-r00003-k1-0a1b2c3d-a4-watched"},
        {"key": "dtrain-train-r00002-k0-0a1b2c3d-a4-watched"},
        {"key": "dtrain-eval-val-r00002-p1-01234567-0a1b2c3d-a4-watched"},
    ],
)
def test_deaths_at_two_places_are_accidents(changes: dict[str, Any]) -> None:
    other = replace(again("tcp://b"), **changes)
    assert WorkerLosses().reported(PLACE).only([]).reported(other).only([]).error(lost=True) is None


def test_submissions_of_one_evaluation_are_one_place() -> None:
    keys = [
        "dtrain-eval-val-r00003-p0-11111111-0a1b2c3d-a3-watched",
        "dtrain-eval-val-r00003-p0-2222eeee-0a1b2c3d-a9-watched",
    ]
    one, other = (replace(PLACE, worker=f"tcp://{n}", key=key, batch=1) for n, key in enumerate(keys))
    error = WorkerLosses().reported(one).only([]).reported(other).only([]).error(lost=True, alone=True)
    assert error is not None
    assert error.message.startswith("Round 3, evaluation, batch 1, model (model:build): 2 workers")


@pytest.mark.parametrize("source", ["nanny", "kernel", "its own"])
def test_memory_at_death(source: str) -> None:
    known = WorkerLosses()
    for worker in ("tcp://a", "tcp://b"):
        place = again(worker, memory=GB * 9 // 10 if source == "its own" else GB // 4)
        known = known.reported(place)
        known = known.exceeded(MemoryExceeded(worker, GB)) if source == "nanny" else known
        known = known.only([])
    if source == "kernel":
        assert known.error(lost=True) is None
        known = known.reported(again("tcp://c", ended=1))
    error = known.error(lost=True)
    assert isinstance(error, OutOfMemory)
    assert "2 workers ran out of memory (tcp://a, tcp://b). Before, a worker used " in error.message


def test_the_arithmetic_of_a_step() -> None:
    place = again("tcp://b", memory=GB, limit=GB, parameters=GB // 2)
    error = WorkerLosses().reported(place).only([]).reported(replace(place, worker="tcp://c")).only([]).error(lost=True)
    assert error is not None
    assert "With 512.00 MiB of parameters a step takes about 3 times that more" in error.message
    assert "over 2.50 GiB in all" in error.message


def test_nannies_that_end_workers_count_once_work_was_lost() -> None:
    known = WorkerLosses()
    for number in range(3):
        assert known.error(lost=True) is None
        known = known.exceeded(MemoryExceeded(f"tcp://{number}", GB + number))
    assert known.error(lost=False) is None
    error = known.error(lost=True)
    assert isinstance(error, OutOfMemory)
    assert "3 workers were ended because their memory was full; the last one used 1.00 GiB" in error.message


def test_two_workers_that_freeze_at_one_place() -> None:
    known = (
        WorkerLosses()
        .reported(PLACE)
        .lost(["tcp://a"], "frozen")
        .reported(again("tcp://b"))
        .lost(["tcp://b"], "frozen")
    )
    error = known.error(lost=True, alone=True)
    assert isinstance(error, UserCodeFailed)
    assert "2 workers that ran it did not answer any more" in error.message


def test_workers_that_said_nothing_are_not_counted() -> None:
    assert WorkerLosses().lost(["tcp://a"], "frozen") == WorkerLosses()


@pytest.mark.parametrize(
    ("key", "batch", "function", "text"),
    [
        ("dtrain-initialise-0a1b2c3d-a1-watched", 0, "", "The first step, between the user's functions"),
        ("dtrain-units-p3-0a1b2c3d-a1-watched", 2, "train.loss (m:f)", "Evaluation, batch 2, train.loss (m:f)"),
        ("dtrain-train-r00120-k007-0a1b2c3d-a1-watched", 1, "x", "Round 120, replica 007, batch 1, x"),
        ("dtrain-predict-000003-0a1b2c3d-a1-watched", 5, "model (m:b)", "Prediction, batch 5, model (m:b)"),
        ("dtrain-try-0a1b2c3d-a1-watched", 1, "model (m:b)", "Trying the model, batch 1, model (m:b)"),
    ],
)
def test_places_in_words(key: str, batch: int, function: str, text: str) -> None:
    assert described(replace(PLACE, key=key, batch=batch, function=function)) == text


def test_what_a_task_says_comes_as_a_message() -> None:
    message = {name: getattr(PLACE, name) for name in TaskPlace.__slots__}
    assert task_place({**message, "more": 1}) == PLACE


def test_a_forward_pass_is_reported_once_not_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "_memory", lambda: (0, 0))
    sent: list[dict[str, Any]] = []
    watch = watched.Watch(sent.append, "train-r1-k0")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.layers(x)
            return output

    class Loss(nn.Module):
        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return outputs - targets

    model = Model()
    watch.know({"train.loss": Loss()})  # its __call__ is that of all modules
    watch.know_module(model, "models:build")
    sys.setprofile(watch.on_call)
    try:
        model(torch.zeros(1, 2))
    finally:
        sys.setprofile(None)
    assert [message["function"] for message in sent] == ["model (models:build)", ""]
