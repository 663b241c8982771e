"""Frozen parameters and buffers in whole runs: what travels, what is averaged, and what moves all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client
from torch import nn

import dtrain
from dtrain.algorithm.params import tensors_of
from dtrain.types import InnerState, RoundResult
from tests.runtime import models
from tests.training import shas

FREEZE = ["0.*", "1.*"]
TRAINED = 12 * 3 + 3
FLOAT_BUFFERS, COUNTER = 2 * 12, 8
"""Running mean and variance; num_batches_tracked in bytes."""
BUFFERS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}

AVERAGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "outer": {"outer": {"optimizer": "adamw", "args": {"lr": 0.1, "weight_decay": 0.1}, "clip_norm": 0.01}},
    "int8": {"codec": {"name": "int8"}},
    "int4": {"codec": {"name": "int4"}},
    "bf16": {"codec": {"name": "bf16"}},
    "control": {"control": True},
    "averaged states": {"inner_state": "average"},
    "median": {"reduce": "median"},
    "fednova": {"weights": "fednova"},
    "prox": {"prox": 0.1},
    "ema": {"ema": 0.9},
    "gossip": {"mix": {"topology": "ring"}},
}


def rounds(samples: dtrain.Samples, model: Any = models.plain, replicas: int = 2, **given: Any) -> list[RoundResult]:
    average = {"replicas": replicas, **given.pop("average", {})}
    table = {"loss": "cross_entropy", "rounds": 2, "batch_size": 40, "freeze": FREEZE, **given}
    config = dtrain.TrainConfig(train=table, average=average, run={"commit_every": 1})
    return list(dtrain.train_rounds(model, samples, config=config, cluster="serial"))


def built(model: Any = models.plain) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(model().state_dict())


def moved(result: RoundResult, before: dict[str, torch.Tensor]) -> set[str]:
    assert result.state is not None
    after = tensors_of(result.state.model)
    return {name for name in after if not torch.equal(after[name], before[name])}


def sizes(state: InnerState) -> set[int]:
    """The elements of the tensors of an optimizer's state; counters of steps aside."""
    return {int(np.prod(slot.shape)) for slot in state.slots if slot.dtype and slot.shape}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_no_method_moves_or_keeps_what_is_frozen(samples: dtrain.Samples, average: dict[str, Any]) -> None:
    result = rounds(samples, average=average, optimizer="adam", optimizer_args={"lr": 0.01}, replicas=4)[-1]
    assert moved(result, built()) == {"3.weight", "3.bias", *BUFFERS}
    assert result.state is not None
    for own in result.state.replicas:
        assert sizes(own.inner) == {36, 3}
        assert {len(array) for array in (own.residual, own.control) if array is not None} <= {TRAINED}
    assert all(sizes(piece) <= {TRAINED} for pieces in result.state.outer for piece in pieces)
    for start in result.state.broadcast:
        assert start.control is None or len(start.control) == TRAINED
    if result.state.ema is not None:
        before = built()
        assert all(torch.equal(tensors_of(result.state.ema)[name], before[name]) for name in ("0.weight", "1.bias"))


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("average", "update"),
    [
        ({}, 4 * TRAINED),
        ({"outer": {"optimizer": "adamw"}}, 4 * TRAINED),
        ({"codec": {"name": "bf16"}}, 2 * TRAINED),
        ({"codec": {"name": "int8"}}, TRAINED + 4),  # with the scale of one run of 128 values
        ({"codec": {"name": "int4"}}, (TRAINED + 1) // 2 + 4),
        ({"control": True}, 2 * 4 * TRAINED),
    ],
    ids=["plain", "outer", "bf16", "int8", "int4", "control"],
)
def test_bytes_reduced_are_those_of_trained_parameters_and_buffers(
    samples: dtrain.Samples, average: dict[str, Any], update: int
) -> None:
    expected = 2 * (update + 4 * FLOAT_BUFFERS + COUNTER)
    assert [result.bytes_reduced for result in rounds(samples, average=average)] == [expected] * 2


def test_the_norm_of_an_update_is_that_of_trained_parameters(samples: dtrain.Samples) -> None:
    (result,) = rounds(samples, replicas=1, rounds=1)
    before = built()
    assert moved(result, before) >= BUFFERS
    assert result.state is not None
    after = tensors_of(result.state.model)
    squares = sum(float(((after[n] - before[n]).double() ** 2).sum()) for n in ("3.weight", "3.bias"))
    assert result.contributions[0].update_norm == pytest.approx(squares**0.5, rel=1e-5)


@pytest.mark.parametrize("slices", [1, 3])
def test_slices_on_a_cluster_give_the_same_bits(
    samples: dtrain.Samples, tmp_path: Path, client: Client, slices: int
) -> None:
    table = {"loss": "cross_entropy", "rounds": 3, "batch_size": 40, "freeze": ["0.*", "*.bias"]}
    average = {"codec": {"name": "int8"}, "outer": {"clip_norm": 0.1}, "replicas": 2, "ema": 0.5}
    runs = []
    for cluster in ("serial", client):
        config = dtrain.TrainConfig(train=table, average=average, cluster={"slices": slices}, run={"commit_every": 2})
        given = {"config": config, "cluster": cluster, "run_dir": tmp_path / "runs", "progress": False}
        runs.append(dtrain.train(models.wide, samples, **given))
    assert shas(runs[0]) == shas(runs[1])


# Buffers of frozen layers -------------------------------------------------------------------------------------------


class Still(nn.BatchNorm1d):
    """Uses and keeps its running statistics, also while the model is trained."""

    def train(self, mode: bool = True) -> Still:
        return super().train(False)


def still() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), Still(12), nn.ReLU(), nn.Linear(12, 3))


def test_a_frozen_batch_norm_follows_the_data_as_in_torch(samples: dtrain.Samples) -> None:
    (result,) = rounds(samples, replicas=1, rounds=1, batch_size="full", micro_batch=1000)
    assert result.state is not None
    (((x,), _),) = list(dtrain.batches(samples, batch_size=1000, replicas=1, epochs=1))
    before, after = built(), tensors_of(result.state.model)
    mean = (x @ before["0.weight"].T + before["0.bias"]).mean(0)
    torch.testing.assert_close(after["1.running_mean"], 0.1 * mean)
    assert after["1.num_batches_tracked"].item() == 1


def test_a_batch_norm_that_stays_in_evaluation_mode_keeps_its_statistics(samples: dtrain.Samples) -> None:
    assert moved(rounds(samples, still)[-1], built(still)) == {"3.weight", "3.bias"}


# Tied weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["3.*", "5.*", "5.weight"])
def test_one_name_of_a_tied_parameter_freezes_it(samples: dtrain.Samples, pattern: str) -> None:
    result = rounds(samples, models.small, freeze=[pattern])[-1]
    still = {"3.weight", "5.weight"} if pattern == "5.weight" else {"3.weight", "3.bias", "5.weight", "5.bias"}
    before = built(models.small)
    followed = {"0.bias"}  # by a batch norm: it has no gradient
    assert set(before) - moved(result, before) - followed == still
