"""The moving average of models: evaluated and saved beside the model, and never in its way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dtrain
from dtrain.algorithm.params import flatten, layout_of
from dtrain.checkpoint import load_round
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig
from dtrain.runfiles import round_directory
from tests.runtime import models
from tests.training import shas, trained

TABLE = {"loss": "cross_entropy", "metrics": ["accuracy"], "rounds": 4, "batch_size": 40, "eval_every": 1}


def start(samples: Samples, where: Path, average: dict[str, Any], **train: Any) -> dtrain.Run:
    tables = {"train": {**TABLE, **train}, "average": {"replicas": 2, **average}, "run": {"commit_every": 1, "keep": 9}}
    config = dtrain.TrainConfig(**tables)
    return dtrain.train(models.small, samples, config=config, cluster="serial", run_dir=where, progress=False)


def test_it_is_the_weighted_mean_of_the_models_of_all_rounds(samples: Samples, tmp_path: Path) -> None:
    run = start(samples, tmp_path / "ema", {"ema": 0.75})
    assert shas(run) == shas(start(samples, tmp_path / "plain", {}))  # it does not come back into training
    states = [load_round(round_directory(run.directory, number))[0] for number in (1, 2, 3, 4)]
    end = states[0].model.layout.num_params
    expected = states[0].model.flat[:end].astype(np.float64)
    for state in states[1:]:
        expected = 0.75 * expected + 0.25 * state.model.flat[:end]
    averaged = states[-1].ema
    assert averaged is not None
    np.testing.assert_allclose(averaged.flat[:end], expected, rtol=1e-6)
    np.testing.assert_array_equal(averaged.flat[end:], states[-1].model.flat[end:])  # buffers are the newest


def test_it_is_evaluated_beside_the_model(samples: Samples, tmp_path: Path) -> None:
    run = start(samples, tmp_path / "ema", {"ema": 0.75})
    first, last = run.rows[0], run.rows[-1]
    assert (first["val_ema_loss"], first["val_ema_accuracy"]) == (first["val_loss"], first["val_accuracy"])
    assert last["val_ema_loss"] != last["val_loss"]
    averaged, model = run.ema_model, run.model
    params = flatten(averaged, layout_of(averaged))
    saved = load_round(round_directory(run.directory, 4))[0].ema
    assert saved is not None
    assert params.flat.tobytes() == saved.flat.tobytes()
    assert not averaged.training
    assert not torch.equal(next(averaged.parameters()), next(model.parameters()))
    assert run.evaluate(split="val")["loss"] == last["val_loss"]


def test_a_rule_may_look_at_it(samples: Samples, tmp_path: Path) -> None:
    config = dtrain.TrainConfig(
        train={**TABLE, "rounds": 20},
        average={"replicas": 2, "ema": 0.9},
        stop={"metric": "val_ema_accuracy", "patience": 1},
    )
    run = dtrain.train(models.small, samples, config=config, cluster="serial", run_dir=tmp_path, progress=False)
    values = [row["val_ema_accuracy"] for row in run.rows]
    assert len(values) < 20
    assert values[-1] <= values[-2]
    assert values[:-1] == sorted(set(values[:-1]))


def test_without_it_there_is_none(samples: Samples, tmp_path: Path) -> None:
    run = trained(models.small, samples, tmp_path, TABLE)
    assert not [name for name in run.rows[-1] if "ema" in name]
    with pytest.raises(InvalidConfig, match=r"has no moving average of models: its average.ema is 0"):
        _ = run.ema_model
    with pytest.raises(InvalidConfig, match="val_ema_loss"):
        trained(models.small, samples, tmp_path, TABLE, stop={"metric": "val_ema_loss", "patience": 1})
