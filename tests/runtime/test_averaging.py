"""Ways of averaging give the same bits everywhere: serial, on a cluster, resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import dtrain
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
}


def start(samples: Samples, where: Path, cluster: Any, rounds: int, average: dict[str, Any]) -> dtrain.Run:
    return dtrain.train(
        models.small,
        samples,
        train={"loss": "cross_entropy", "rounds": rounds, "batch_size": 40, "optimizer": "adamw"},
        average={"replicas": 4, **average},
        cluster=cluster,
        run="run",
        run_dir=where,
        progress=False,
    )


def shas(run: dtrain.Run) -> list[str]:
    return [row["params_sha256"] for row in run.rows]


@pytest.mark.parametrize("way", WAYS)
def test_serial_equals_cluster_equals_resumed(samples: Samples, tmp_path: Path, client: Client, way: str) -> None:
    serial = start(samples, tmp_path / "serial", "serial", 4, WAYS[way])
    start(samples, tmp_path / "cut", client, 3, WAYS[way])
    assert shas(start(samples, tmp_path / "cut", client, 4, WAYS[way])) == shas(serial)
    assert shas(serial) != shas(start(samples, tmp_path / "full", "serial", 4, {}))


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
