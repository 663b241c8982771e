"""Ways of averaging give the same bits everywhere: serial, on a cluster, resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import dtrain
from dtrain.checkpoint import committed_rounds, round_directory
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig
from tests.runtime import models

OUTER = {"optimizer": "sgd", "args": {"lr": 0.5, "momentum": 0.9}}
WAYS: dict[str, dict[str, Any]] = {
    "ring": {"mix": {"topology": "ring"}},
    "exponential": {"mix": {"topology": "exponential"}},
    "hierarchical": {"mix": {"topology": "hierarchical", "groups": 2, "period": 2}},
    "hierarchical with an outer optimizer": {
        "mix": {"topology": "hierarchical", "groups": 2, "period": 2},
        "outer": OUTER,
    },
    "median": {"reduce": "median"},
    "trimmed": {"reduce": "trimmed", "trim": 0.3},
    "prox": {"prox": 0.5},
    "averaged states": {"inner_state": "average"},
    "averaged states in a ring": {"inner_state": "average", "mix": {"topology": "ring"}},
    "averaged states with an outer optimizer": {"inner_state": "average", "outer": OUTER},
    "no states": {"inner_state": "reset"},
    "bf16": {"codec": {"name": "bf16"}},
    "int8 with an outer optimizer": {"codec": {"name": "int8"}, "outer": OUTER},
    "int4 in groups": {"codec": {"name": "int4"}, "mix": {"topology": "hierarchical", "groups": 2, "period": 2}},
    "int4 without error feedback": {"codec": {"name": "int4", "error_feedback": False}},
    "control variates": {"control": True},
    "control variates with an outer optimizer": {"control": True, "outer": OUTER},
    "outer schedule and clipping": {"outer": {**OUTER, "schedule": "cosine", "clip_norm": 0.05}},
}


def start(
    samples: Samples,
    where: Path,
    place: Any,
    rounds: int,
    average: dict[str, Any],
    model: Any = models.small,
    **more: Any,
) -> dtrain.Run:
    config = {
        "train": {"loss": "cross_entropy", "rounds": rounds, "batch_size": 40, "optimizer": "adamw"},
        "average": {"replicas": 4, **average},
        "run": {"commit_every": 1, "keep": 9},
        **more,
    }
    return dtrain.train(
        model,
        samples,
        config=dtrain.TrainConfig(**config),
        cluster=place,
        run="run",
        run_dir=where,
        progress=False,
    )


def lose_rounds(run: dtrain.Run, last: int) -> None:
    """Leave a run as if its driver had been killed after a round."""
    for number in committed_rounds(run.directory):
        if number > last:
            shutil.rmtree(round_directory(run.directory, number))


def shas(run: dtrain.Run) -> list[str]:
    return [row["params_sha256"] for row in run.rows]


def drift(run: dtrain.Run) -> list[Any]:
    return [
        (row["update_norm"], row["update_cosine"], row.get("val_loss"), row.get("val_ema_loss")) for row in run.rows
    ]


@pytest.mark.parametrize("way", WAYS)
def test_serial_equals_cluster_equals_resumed(samples: Samples, tmp_path: Path, client: Client, way: str) -> None:
    serial = start(samples, tmp_path / "serial", "serial", 4, WAYS[way])
    cluster = start(samples, tmp_path / "cluster", client, 4, WAYS[way])
    assert shas(cluster) == shas(serial)
    lose_rounds(cluster, 2)
    assert shas(start(samples, tmp_path / "cluster", client, 4, WAYS[way])) == shas(serial)
    assert shas(serial) != shas(start(samples, tmp_path / "full", "serial", 4, {}))


SLICED: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weights": "uniform"},
    "median": {"reduce": "median"},
    "outer optimizer": {"outer": OUTER},
    "outer adam, clipped": {"outer": {"optimizer": "adam", "args": {"lr": 0.01}, "clip_norm": 0.01}},
    "int4": {"codec": {"name": "int4"}},
    "bf16, clipped": {"codec": {"name": "bf16"}, "outer": {**OUTER, "clip_norm": 0.01}},
    "control variates": {"control": True, "outer": OUTER},
    "averaged states": {"inner_state": "average"},
    "moving average": {"ema": 0.5, "recalibrate_batchnorm": True},
    "ring": {"mix": {"topology": "ring"}},
    "groups": {"mix": {"topology": "hierarchical", "groups": 2, "period": 2}, "codec": {"name": "int8"}},
}


@pytest.mark.parametrize("way", SLICED)
def test_slices_change_no_bit(samples: Samples, tmp_path: Path, client: Client, way: str) -> None:
    serial = start(samples, tmp_path / "serial", "serial", 4, SLICED[way], models.wide)
    cluster = start(samples, tmp_path / "cluster", client, 4, SLICED[way], models.wide, cluster={"slices": 3})
    assert (shas(cluster), drift(cluster)) == (shas(serial), drift(serial))
    lose_rounds(cluster, 2)
    again = start(samples, tmp_path / "cluster", client, 4, SLICED[way], models.wide, cluster={"slices": 2})
    assert (shas(again), drift(again)) == (shas(serial), drift(serial))


@pytest.mark.parametrize(
    "average",
    [
        {"mix": {"topology": "hierarchical", "groups": 1, "period": 3}},
        {"mix": {"topology": "hierarchical", "groups": 4, "period": 1}},
    ],
)
def test_groups_that_change_nothing_are_full_averaging(
    samples: Samples, tmp_path: Path, average: dict[str, Any]
) -> None:
    full = start(samples, tmp_path / "full", "serial", 3, {})
    assert shas(start(samples, tmp_path / "groups", "serial", 3, average)) == shas(full)


@pytest.mark.parametrize(
    ("average", "said"),
    [
        ({"mix": {"topology": "hierarchical"}}, "average.mix.groups = 0"),
        ({"mix": {"topology": "hierarchical", "groups": 5}}, "4 replicas"),
        ({"mix": {"groups": 2}}, 'average.mix.groups is for average.mix.topology = "hierarchical"'),
        ({"mix": {"topology": "ring", "period": 2}}, "average.mix.period is for"),
        ({"mix": {"topology": "ring"}, "codec": {"name": "int8"}}, "average.codec cannot go with"),
        ({"reduce": "trimmed", "trim": 0.1}, "of 4 replicas leaves out 0"),
        ({"trim": 0.2}, 'average.trim is for average.reduce = "trimmed"'),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    samples: Samples, tmp_path: Path, average: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidConfig, match=said):
        start(samples, tmp_path / "runs", "serial", 2, average)
    assert not (tmp_path / "runs").exists()
