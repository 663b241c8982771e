"""``dtrain eval`` broken down, with baselines and other metrics: tables for people, an object a group for programs."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.cli.helpers import last, objects

FORECAST = """\
import torch
from torch import nn


class Ahead(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([0.9, 0.8]))

    def forward(self, x):
        return self.factor[:, None] * x[:, None]


def build():
    return Ahead()


def worst(outputs, targets):
    return (outputs - targets).abs().max()
"""
TABLES = {
    "data": {"inputs": ["t"], "targets": ["t"], "target_offsets": [1, 2], "split": {"val": 0.2, "test": 0.2}},
    "train": {"loss": "mse", "metrics": ["mae", "model:worst"], "rounds": 1},
}


@pytest.fixture
def forecast(cli, project):
    """A run of forecasts of two leads, three places."""
    rng = np.random.default_rng(0)
    steps = np.arange(60) * 6
    arrays = {
        "t": {"dims": ("time", "place"), "values": rng.normal(size=(60, 3)).astype("float32"), "chunks": (10, 3)},
        "time": {
            "dims": ("time",),
            "values": steps,
            "chunks": (60,),
            "attributes": {"units": "hours since 2001-01-01"},
        },
        "place": {"dims": ("place",), "values": np.array([10, 20, 30]), "chunks": (3,)},
    }
    job = project(TABLES, model=FORECAST, arrays=arrays)
    assert cli("-q", "train", job.config).code == 0
    return job


def test_a_table_by_lead(cli, forecast):
    outcome = cli("eval", forecast.run, "--by", "lead")
    assert outcome.code == 0
    head, rows = outcome.out.split("\n\n")
    assert head.splitlines()[1] == "split  test, 10 samples"
    lines = rows.splitlines()
    assert lines[0].split() == [
        *("lead", "samples", "loss", "mae", "worst", "rmse"),
        *("rmse_persistence", "skill_persistence", "rmse_climatology", "skill_climatology"),
    ]
    assert [line.split()[:3] for line in lines[1:]] == [["6", "h", "9"], ["12", "h", "9"]]
    assert "Persistence: each lead is as the newest input." in outcome.err
    assert "Climatology: the mean of the training rows at each place, not by calendar month: " in outcome.err
    assert "Leads are scored at the 9 of 11 valid times that all 2 leads share." in outcome.err
    assert "all of its valid times" not in cli("eval", forecast.run, "--by", "lead", "--all-times").err


def test_an_object_for_each_group(cli, forecast):
    outcome = cli("--json", "eval", forecast.run, "--by", "lead", "--by", "place", "--split", "val")
    found = objects(outcome.out)
    assert [(row["lead"], row["place"]) for row in found] == [(h, p) for h in ("PT6H", "PT12H") for p in (10, 20, 30)]
    assert all(row["event"] == "eval" and row["split"] == "val" and row["round"] == 1 for row in found)
    first = found[0]
    assert first["skill_persistence"] == pytest.approx(1 - first["rmse"] / first["rmse_persistence"])
    whole = last(cli("--json", "eval", forecast.run, "--split", "val"))
    assert np.mean([row["mae"] for row in found]) == pytest.approx(whole["mae"], rel=0.2)
    assert "worst_climatology" in whole


def test_the_model_beside_the_baselines(cli, forecast):
    out = cli("eval", forecast.run).out
    assert out.splitlines()[2].split()[0] == "loss"
    lines = out.split("\n\n")[1].splitlines()
    assert lines[0].split() == ["mae", "worst", "rmse", "model's", "skill"]
    assert [line.split()[0] for line in lines[1:]] == ["model", "persistence", "climatology"]
    plain = cli("eval", forecast.run, "--no-baselines")
    assert [line.split()[0] for line in plain.out.splitlines()] == ["run", "split", "loss", "mae", "worst"]
    assert "ersistence" not in plain.err


def test_other_metrics(cli, forecast):
    found = last(cli("--json", "eval", forecast.run, "--metric", "r2", "--metric", "model:worst", "--no-baselines"))
    assert found.keys() >= {"loss", "r2", "worst"}
    assert "mae" not in found
    torchmetrics = cli("--json", "eval", forecast.run, "--metric", "torchmetrics:MeanSquaredError", "--no-baselines")
    assert last(torchmetrics)["MeanSquaredError"] == pytest.approx(found["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--by", "leed"], 3, ["by leed", 'did you mean "lead"?', "Allowed are lead, variable, time, place"]),
        (["--by", "place.month"], 3, ["by place.month: place holds no dates"]),
        (["--metric", "rsme"], 3, ['train.metrics = "rsme"', 'did you mean "rmse"?']),
        (["--metric", "f1"], 3, ["f1 is of labels", "mse, mae, rmse, r2"]),
        (["--metric", "model:other"], 3, ['metrics: "model:other" is no metric of the run']),
    ],
)
def test_what_cannot_be_computed_is_refused(cli, forecast, arguments, code, words):
    outcome = cli("--json", "eval", forecast.run, *arguments)
    assert outcome.code == code
    for word in words:
        assert word in outcome.err
    assert len(outcome.err.splitlines()) <= 4
    assert json.loads(outcome.out.splitlines()[-1])["code"] == code


@pytest.mark.parametrize("width", [80, 160])
def test_tables_fit_the_terminal(cli, forecast, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    out = cli("eval", forecast.run, "--by", "lead", "--by", "place").out
    assert max(map(len, out.splitlines())) <= width
    tables = out.split("\n\n")[1:]
    assert len(tables) == (2 if width == 80 else 1)
    assert all(table.startswith("lead  place") for table in tables)
