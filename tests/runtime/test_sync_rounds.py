"""Post-local SGD in whole runs: the first rounds have one local step each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distributed import Client

import dtrain
from dtrain.data.samples import Samples
from dtrain.trainer import train_rounds
from tests.runtime import models
from tests.training import shas, trained

TABLE = {"loss": "cross_entropy", "rounds": 5, "batch_size": 16, "local_steps": 4, "eval_every": 1}


def start(samples: Samples, where: Path, cluster: Any = "serial", **train: Any) -> dtrain.Run:
    return trained(models.small, samples, where, {**TABLE, **train}, cluster, run="r")


def test_short_rounds_are_the_same_on_a_cluster_and_after_a_resume(
    samples: Samples, tmp_path: Path, client: Client
) -> None:
    serial = start(samples, tmp_path / "serial", sync_rounds=2)
    assert [row["steps"] for row in serial.rows] == [2, 2, 8, 8, 8]
    assert [row["samples"] for row in serial.rows] == [32, 32, 128, 128, 128]
    assert shas(start(samples, tmp_path / "cluster", client, sync_rounds=2)) == shas(serial)
    for rounds in (1, 3, 5):
        resumed = start(samples, tmp_path / "resumed", sync_rounds=2, rounds=rounds)
    assert shas(resumed) == shas(serial)


def test_short_rounds_alone_are_local_steps_of_one(samples: Samples, tmp_path: Path) -> None:
    schedule = {"schedule": "cosine", "warmup_steps": 2}  # the learning rate counts the short rounds
    short = start(samples, tmp_path / "short", sync_rounds=5, **schedule)
    assert shas(short) == shas(start(samples, tmp_path / "one", local_steps=1, **schedule))
    assert shas(short) == shas(start(samples, tmp_path / "more", sync_rounds=50, **schedule))


def test_the_short_rounds_of_a_longer_run_are_those_of_one_step(samples: Samples) -> None:
    train = {**TABLE, "rounds": 4}
    mixed, one = (
        [result.params_sha256 for result in train_rounds(models.small, samples, train=table, cluster="serial")]
        for table in ({**train, "sync_rounds": 2}, {**train, "local_steps": 1})
    )
    assert mixed[:2] == one[:2]
    assert mixed[2] != one[2]
