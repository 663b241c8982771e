"""Which stage limits: by hand, and in runs one of whose stages is made slow."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

import dtrain
from dtrain.data.load.gather import BatchGatherer
from dtrain.data.read import store as store_module
from dtrain.data.read.decode import Decoder
from dtrain.events import Event, RunFinished
from dtrain.runtime import tasks
from dtrain.stages import CURES, Limit, Stage, StageSeconds, limiting_stage
from tests.runtime import models
from tests.training import rewrite, trained

STAGES: tuple[Stage, ...] = ("fetch", "decode", "gather", "model", "reduce", "evaluate")


def limit_of(**seconds: float) -> Limit:
    limit = limiting_stage(StageSeconds(**seconds))
    assert limit is not None
    return limit


# By hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_its_own_cure(stage: Stage) -> None:
    limit = limit_of(**{**dict.fromkeys(STAGES, 1.0), stage: 5.0})
    assert limit.stages == (stage,)
    assert limit.shares == {name: 0.5 if name == stage else 0.1 for name in STAGES}
    assert limit.cure == CURES[stage]
    assert [name for name in STAGES if CURES[name] == limit.cure] == [stage]


def test_keys_in_the_cures_are_those_of_the_configuration() -> None:
    words = {word.strip(".,;()") for cure in CURES.values() for word in cure.split()}
    keys = {word for word in words if "." in word}
    assert {"data.cache", "train.eval_every"} < keys
    for key in keys:
        value: Any = dtrain.TrainConfig()
        for part in key.split("."):
            value = getattr(value, part)


def test_stages_that_take_nearly_as_much_are_a_tie() -> None:
    assert limit_of(fetch=10.0, decode=9.0, model=8.9).stages == ("fetch", "decode")
    assert limit_of(fetch=9.0, model=10.0).stages == ("model", "fetch")  # the larger one first
    assert limit_of(fetch=8.9, model=10.0).stages == ("model",)
    assert limit_of(**dict.fromkeys(STAGES, 1.0)).stages == STAGES
    tie = limit_of(fetch=45.0, model=47.0, evaluate=8.0)
    assert tie.cure == f"model: {CURES['model']} fetch: {CURES['fetch']}"
    assert str(tie) == f"model (47% of the time) and fetch (45%), a tie. {tie.cure}"


def test_other_large_stages_are_named() -> None:
    limit = limit_of(decode=61.0, model=10.0, reduce=20.0, evaluate=9.0)
    assert str(limit) == f"decode (61% of the time); then reduce 20%, model 10%. {CURES['decode']}"


def test_nothing_measured_limits_nothing() -> None:
    assert limiting_stage(StageSeconds()) is None
    assert limiting_stage(StageSeconds(model=float("nan"))) is None


# Runs -------------------------------------------------------------------------------------------------------------


def late(function: Callable[..., Any], seconds: float = 0.05) -> Callable[..., Any]:
    """The same function, which takes a while."""

    def called(*given: Any, **named: Any) -> Any:
        time.sleep(seconds)  # latency, as of a server or of a codec
        return function(*given, **named)

    return called


SLOW: dict[Stage, tuple[Any, str]] = {
    "fetch": (store_module, "read_part"),
    "decode": (Decoder, "decode"),
    "gather": (BatchGatherer, "fill"),
    "model": (nn.Linear, "forward"),
    "reduce": (tasks, "combine"),
    "evaluate": (tasks, "evaluate"),
}


def run_of(blobs: Path, where: Path, events: list[Event], val: float, rounds: int = 3, **more: Any) -> dtrain.Run:
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"], cache="0", split={"val": val, "test": 0.0})
    table = {"loss": "cross_entropy", "rounds": rounds, "eval_every": 1}
    return trained(models.small, samples, where, table, report=events.append, **more)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("stage", STAGES)
def test_a_slow_stage_is_named_at_the_end(
    stage: Stage, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = SLOW[stage]
    monkeypatch.setattr(owner, name, late(getattr(owner, name), 0.4 if stage in ("reduce", "evaluate") else 0.05))
    events: list[Event] = []
    run_of(blobs, tmp_path, events, val=0.1 if stage == "evaluate" else 0.0)
    (finished,) = [event for event in events if isinstance(event, RunFinished)]
    assert finished.limited_by is not None
    assert finished.limited_by.stages == (stage,), finished.limited_by.shares


def test_a_run_whose_history_says_nothing_of_stages_goes_on(blobs: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    first = run_of(blobs, tmp_path, events, val=0.0, rounds=2)
    stages = {f"seconds_{stage}" for stage in STAGES} - {"seconds_reduce", "seconds_evaluate"}
    old = [{key: value for key, value in row.items() if key not in stages} for row in first.rows]
    rewrite(first.directory, old)
    run_of(blobs, tmp_path, events, val=0.0, rounds=2, run=first.directory.name)
    longer = run_of(blobs, tmp_path, events, val=0.0, rounds=3, run=first.directory.name)
    assert len(longer.rows) == 3
    assert np.isnan(longer.history.seconds_model[:2]).all()
    assert longer.history.seconds_model[2] > 0
    ended = [event.limited_by is not None for event in events if isinstance(event, RunFinished)]
    assert ended == [True, False, True]
