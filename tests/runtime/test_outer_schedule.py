"""The schedule of the outer learning rate: by name or a function, in every runner, and in a run that is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

import dtrain
from dtrain.algorithm.recipe import outer_factors
from dtrain.checkpoint import load_round
from dtrain.config.schema import TrainConfig
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig, RunConflict
from dtrain.runfiles import round_directory
from tests.runtime import models
from tests.training import shas

TRAIN = {"loss": "cross_entropy", "rounds": 4, "batch_size": 40}


def start(samples: Samples, where: Path, schedule: Any, cluster: Any = "serial", **train: Any) -> dtrain.Run:
    outer = {"optimizer": "sgd", "args": {"lr": 0.5}, "schedule": schedule}
    return dtrain.train(
        models.small,
        samples,
        config=TrainConfig(
            train={**TRAIN, **train}, average={"replicas": 2, "outer": outer}, run={"commit_every": 1, "keep": 9}
        ),
        cluster=cluster,
        run="run",
        run_dir=where,
        progress=False,
    )


def halving(number: int, rounds: int) -> float:
    return 0.5**number


def test_the_factors_by_hand() -> None:
    config = TrainConfig(train={"rounds": 4}, average={"outer": {"schedule": "linear"}})
    assert outer_factors(config, {}) == (1.0, 0.75, 0.5, 0.25)
    assert outer_factors(config, {"average.outer.schedule": halving}) == (1.0, 0.5, 0.25, 0.125)
    assert outer_factors(TrainConfig(average={"outer": {}}), {}) == ()
    assert outer_factors(TrainConfig(), {}) == ()


def test_a_factor_of_zero_leaves_the_parameters(samples: Samples, tmp_path: Path) -> None:
    run = start(samples, tmp_path, lambda number, rounds: 0.0)
    states = [load_round(round_directory(run.directory, number))[0].model for number in (3, 4)]
    end = states[0].layout.num_params
    np.testing.assert_array_equal(states[0].flat[:end], states[1].flat[:end])
    assert len(set(shas(run))) == 4  # of batch norm: buffers never reach the outer optimizer


def test_a_function_gives_the_same_bits_everywhere(samples: Samples, tmp_path: Path, client: Client) -> None:
    run = start(samples, tmp_path / "serial", halving)
    assert shas(start(samples, tmp_path / "cluster", halving, client)) == shas(run)
    assert shas(start(samples, tmp_path / "constant", "constant")) != shas(run)
    opened = dtrain.load_run(run.directory, model=models.small, outer_schedule=halving)
    assert opened.evaluate(split="val")["loss"] == run.rows[-1]["val_loss"]
    assert dtrain.load_run(run.directory, model=models.small).evaluate(split="val")["loss"] == run.rows[-1]["val_loss"]


def test_the_last_round_cannot_be_moved(samples: Samples, tmp_path: Path) -> None:
    start(samples, tmp_path, "cosine")
    with pytest.raises(RunConflict, match=r'average.outer.schedule = "cosine" depends on the last round.*train.init'):
        start(samples, tmp_path, "cosine", rounds=5)
    start(samples, tmp_path / "constant", "constant")
    assert len(start(samples, tmp_path / "constant", "constant", rounds=5).rows) == 5


@pytest.mark.parametrize(
    ("schedule", "said"),
    [("cosin", 'average.outer.schedule = "cosin"'), (lambda step: 1.0, "average.outer.schedule is")],
)
def test_what_is_no_schedule_is_refused(samples: Samples, tmp_path: Path, schedule: Any, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        start(samples, tmp_path, schedule)
