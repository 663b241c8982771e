"""Every preset gives the same bits everywhere: serial, on a cluster, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import dtrain
from dtrain.config.presets import PRESETS
from dtrain.data.samples import Samples
from tests.runtime import models
from tests.runtime.test_averaging import lose_rounds
from tests.training import shas

MOST = {"rounds": 3, "local_steps": 3, "local_epochs": 2, "sync_rounds": 1, "warmup_steps": 2}
"""Small numbers in place of the presets' own."""


def config_of(name: str) -> dtrain.TrainConfig:
    tables: Any = PRESETS[name].tables
    small = {key: min(value, MOST[key]) for key, value in tables["train"].items() if key in MOST}
    train = {"loss": "cross_entropy", "batch_size": 40, "eval_every": 1, "rounds": 3}
    return dtrain.TrainConfig(
        train={**train, **tables["train"], **small},
        average={**tables.get("average", {}), "replicas": 4},
        run={"commit_every": 1, "keep": 9},
    )


def start(samples: Samples, where: Path, place: Any, name: str) -> dtrain.Run:
    return dtrain.train(
        models.small, samples, config=config_of(name), cluster=place, run="r", run_dir=where, progress=False
    )


SHORT = ("data_parallel", "post_local_sgd", "fednova", "fedadam", "diloco", "hierarchical", "scaffold")


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "name", [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS]
)
def test_serial_equals_cluster_equals_resumed(samples: Samples, tmp_path: Path, client: Client, name: str) -> None:
    serial = start(samples, tmp_path / "serial", "serial", name)
    cluster = start(samples, tmp_path / "cluster", client, name)
    assert len(set(shas(serial))) == 3
    assert shas(cluster) == shas(serial)
    lose_rounds(cluster, 1)
    assert shas(start(samples, tmp_path / "cluster", client, name)) == shas(serial)
