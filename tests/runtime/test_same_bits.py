"""One sequence of parameters for every preset and codec, over 1 to 5 workers, and with a worker killed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import dtrain
from dtrain.config.presets import PRESETS
from dtrain.data.samples import Samples
from tests.clusters import new_cluster
from tests.runtime import models
from tests.runtime.test_presets import config_of
from tests.training import shas

pytestmark = pytest.mark.slow

CODECS: dict[str, dict[str, Any]] = {
    "bf16": {"codec": {"name": "bf16"}},
    "int8": {"codec": {"name": "int8"}, "outer": {"clip_norm": 0.1}},
    "int4": {"codec": {"name": "int4"}},
    "int4 without error feedback": {"codec": {"name": "int4", "error_feedback": False}},
}
WAYS = (*PRESETS, *CODECS)


def start(samples: Samples, where: Path, place: Any, way: str, model: Any = models.small, **more: Any) -> list[str]:
    if way in PRESETS:
        config = config_of(way)
    else:
        train = {"loss": "cross_entropy", "batch_size": 40, "eval_every": 1, "rounds": 3, "optimizer": "adamw"}
        config = dtrain.TrainConfig(train=train, average={**CODECS[way], "replicas": 4})
    return shas(dtrain.train(model, samples, config=config, cluster=place, run_dir=where, progress=False, **more))


@pytest.fixture(scope="module")
def serial(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    return cache(lambda way: start(samples, tmp_path_factory.mktemp("serial"), "serial", way))


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
def test_over_some_workers(samples: Samples, tmp_path: Path, serial: Callable[[str], list[str]], workers: int) -> None:
    with new_cluster(workers) as cluster, Client(cluster) as client:
        for way in WAYS:
            assert start(samples, tmp_path, client, way) == serial(way), way


def slow_steps() -> Any:
    return models.slow(0.02)


@pytest.mark.parametrize("way", WAYS)
def test_with_a_worker_killed(
    samples: Samples,
    tmp_path: Path,
    own_client: Client,
    kill_worker_in: Callable[[Client, str], Any],
    way: str,
) -> None:
    calm = start(samples, tmp_path / "calm", "serial", way, models.slow, model_args={"seconds": 0.0})
    kill_worker_in(own_client, "train-r00002")
    assert start(samples, tmp_path / "killed", own_client, way, slow_steps) == calm
