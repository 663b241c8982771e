"""The memory that predicting takes is what is printed, whatever the data's size."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dtrain
from dtrain.data.plan.prediction_budget import PredictionBudget
from dtrain.errors import ChunkTooLarge, OutOfMemory
from dtrain.events import PredictionStarted
from dtrain.predict import prepare
from tests.predict import models

NONE = {"val": 0.0, "test": 0.0}


@pytest.fixture
def budgets(monkeypatch: pytest.MonkeyPatch) -> list[PredictionBudget]:
    """The budgets of what is predicted."""
    made: list[PredictionBudget] = []
    real = prepare.plan_budget

    def keep(*arguments: Any) -> PredictionBudget:
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(prepare, "plan_budget", keep)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "chunks", "data", "ahead"),
    [
        ((96, 200, 300), (6, 200, 300), {"input_offsets": [-1, 0], "target_offsets": 1}, True),
        ((2, 1000, 1500), (1, 250, 250), {"patch": {"y": 128, "x": 128}}, True),
        ((2, 1000, 1500), (1, 250, 250), {"patch": {"y": 128, "x": 128}}, False),
        ((30_000, 200, 1), (30_000, 200, 1), {}, True),
    ],
    ids=["windows", "patches", "patches in little memory", "one chunk"],
)
def test_the_peak_is_within_the_budget(
    tmp_path: Path,
    write_store: Callable[..., Path],
    run_of: Callable[..., dtrain.Run],
    budgets: list[PredictionBudget],
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    data: dict[str, Any],
    ahead: bool,
) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype("float32")
    arrays = {"f": {"dims": ("t", "y", "x"), "values": values, "chunks": chunks}}
    store = write_store(tmp_path / "s.zarr", arrays)
    few = {"isel": {"t": {"start": 0, "stop": 4}}, **data}
    train = {"loss": "mse", "batch_size": 2, "local_steps": 1}
    build = models.last if "input_offsets" in data else models.identity
    run = run_of(build, dtrain.open_samples(store, inputs=["f"], targets=["f"], split=NONE, **few), **train)
    samples = dtrain.open_samples(store, inputs=["f"], targets=["f"], split=NONE, isel={}, **data)
    if not ahead:
        run.predict(samples)
        both = budgets[-1].total
        memory = f"{both - 1}B"
        samples = dtrain.open_samples(store, inputs=["f"], targets=["f"], split=NONE, isel={}, memory=memory, **data)
        run = dtrain.load_run(run.directory, model=build, settings=(f"data.memory={both - 1}",))
    told: list[Any] = []
    run.predict_to(tmp_path / "warm.zarr")
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        run.predict_to(tmp_path / "out.zarr", samples, report=told.append)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    budget = budgets[-1]
    assert budget.ahead is ahead
    assert isinstance(told[0], PredictionStarted)
    assert told[0].budget == budget.sentence()
    assert peak <= 1.1 * budget.total + 3_000_000, f"{peak:,} of {budget.sentence()}"
    assert peak >= 0.3 * budget.total


def test_too_little_memory_is_refused_with_the_arithmetic(blobs: Path, run_of: Callable[..., dtrain.Run]) -> None:
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"])
    run = run_of(models.linear, samples, loss="cross_entropy")
    for memory, error, said in (
        ("5kB", OutOfMemory, r"predicting needs 2 x inputs 1.9 kB \+ .* = .* kB; data.memory is 5.0 kB"),
        ("1kB", ChunkTooLarge, r"one chunk of x \(40, 6\) decodes to 1.9 kB; data.memory is 1.0 kB"),
    ):
        opened = dtrain.load_run(run.directory, model=models.linear, settings=(f"data.memory={memory}",))
        with pytest.raises(error, match=said):
            opened.predict()
