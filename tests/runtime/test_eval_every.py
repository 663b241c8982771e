"""How often a run is evaluated: by arithmetic, and never the clock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import dtrain
from dtrain.algorithm.plan import eval_cadence
from dtrain.config.schema import TrainTable
from dtrain.data.samples import Samples
from tests.runtime import models


def start(samples: Samples, where: Path, cluster: Any = "serial", run: str = "run", **tables: Any) -> dtrain.Run:
    train = {"loss": "cross_entropy", "metrics": ["accuracy"], "rounds": 7, "batch_size": 20, "local_steps": 1}
    return dtrain.train(
        models.small,
        samples,
        train={**train, **tables.pop("train", {})},
        average={"replicas": 2},
        cluster=cluster,
        run=run,
        run_dir=where,
        progress=False,
        **tables,
    )


def evaluated(run: dtrain.Run) -> list[int]:
    return [row["round"] for row in run.rows if "val_loss" in row]


def test_rounds_between_evaluations_have_no_values_and_the_last_one_has(
    samples: Samples, tmp_path: Path, client: Client
) -> None:
    serial = start(samples, tmp_path / "serial", train={"eval_every": 3})
    cluster = start(samples, tmp_path / "cluster", client, train={"eval_every": 3})
    each = start(samples, tmp_path / "each", train={"eval_every": 1})
    assert evaluated(serial) == evaluated(cluster) == [3, 6, 7]
    assert evaluated(each) == list(range(1, 8))
    assert [row["params_sha256"] for row in serial.rows] == [row["params_sha256"] for row in each.rows]
    for row in serial.rows:
        assert ("val_accuracy" in row) == ("val_loss" in row)
        assert "val_loss" not in row or row["val_loss"] == each.rows[row["round"] - 1]["val_loss"]
        assert cluster.rows[row["round"] - 1].get("val_loss") == row.get("val_loss")
    history = serial.history  # its first row has no value, and still it has the column
    assert history.val_loss.notnull().values.tolist() == [n in (3, 6, 7) for n in range(1, 8)]
    assert serial.best_round in (3, 6, 7)


def test_auto_is_arithmetic_and_kept(samples: Samples, tmp_path: Path) -> None:
    auto = start(samples, tmp_path)
    plan = json.loads((auto.directory / "plan.json").read_text())
    assert plan["eval_every"] == auto.resolved.eval_every == evaluated(auto)[0] > 1
    assert start(samples, tmp_path, run="epochs", train={"local_steps": None}).resolved.eval_every == 1


@pytest.mark.parametrize(
    ("validation", "samples", "every"), [(0, 100, 1), (30, 100, 1), (31, 100, 2), (300, 100, 10), (5, 0, 1)]
)
def test_the_cadence_by_hand(validation: int, samples: int, every: int) -> None:
    assert eval_cadence(validation, samples, TrainTable()) == every
    assert eval_cadence(validation, samples, TrainTable(eval_every=4)) == 4


def test_patience_counts_evaluations(samples: Samples, tmp_path: Path) -> None:
    stopped = start(
        samples,
        tmp_path,
        train={"eval_every": 2, "rounds": 40, "optimizer_args": {"lr": 0.0}},
        stop={"patience": 2},
    )
    assert evaluated(stopped) == [2, 4, 6]
    assert len(stopped.rows) == 6
    again = start(
        samples, tmp_path, train={"eval_every": 2, "rounds": 40, "optimizer_args": {"lr": 0.0}}, stop={"patience": 2}
    )
    assert len(again.rows) == 6


def test_a_target_is_met_where_it_is_evaluated(samples: Samples, tmp_path: Path) -> None:
    met = start(samples, tmp_path, train={"eval_every": 3, "rounds": 40}, stop={"target": 1e9})
    assert len(met.rows) == 3
