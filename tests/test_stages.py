"""Which stage limits: by hand, and in runs one of whose stages is made slow."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from tests.training import shas, trained

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
    assert keys
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
    assert tie.cure == f"{CURES['model']} {CURES['fetch']}"
    assert str(tie) == f"model 47% and fetch 45% of the time alike. {tie.cure}"


def test_other_large_stages_are_named() -> None:
    limit = limit_of(decode=61.0, model=10.0, reduce=20.0, evaluate=9.0)
    assert str(limit) == f"decode 61% of the time (reduce 20%, model 10%). {CURES['decode']}"


def test_nothing_measured_limits_nothing() -> None:
    assert limiting_stage(StageSeconds()) is None
    assert limiting_stage(StageSeconds(model=float("nan"))) is None


# Runs -------------------------------------------------------------------------------------------------------------


def small() -> nn.Module:
    return models.small()


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


@pytest.fixture(scope="module")
def undisturbed(blobs: Path, tmp_path_factory: pytest.TempPathFactory) -> dtrain.Run:
    return run_of(blobs, tmp_path_factory.mktemp("undisturbed"), [], val=0.1)


def run_of(blobs: Path, where: Path, events: list[Event], val: float) -> dtrain.Run:
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"], cache="0", split={"val": val, "test": 0.0})
    table = {"loss": "cross_entropy", "rounds": 3, "eval_every": 1}
    return trained(small, samples, where, table, report=events.append)


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


def test_counting_changes_no_bits(
    undisturbed: dtrain.Run, blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "read_part", late(store_module.read_part, 0.01))
    assert shas(run_of(blobs, tmp_path, [], val=0.1)) == shas(undisturbed)
