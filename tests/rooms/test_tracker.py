"""A new tracker is one module: nothing else changes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dtrain.report import trackers
from dtrain_cli import main

LEDGER = '''
"""Ledger: a line of JSON for each round, in the run's directory."""

import json
from pathlib import Path

from dtrain.events import Event, RoundFinished, RunStarted
from dtrain.report.history import row_of
from dtrain.report.points import points

PACKAGE = "json"
EXTRA = "ledger"
LOOK = "less {runs}/*/ledger.jsonl"


class Tracker:
    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.file = Path(event.run) / "ledger.jsonl"
            case RoundFinished(result):
                with self.file.open("a") as lines:
                    lines.write(json.dumps(points(row_of(result))) + "\\n")
'''
MODEL = "from torch import nn\ndef build(): return nn.Linear(6, 3)\n"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    tmp_path: Path, blobs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Call]:
    """Run the command line in a project, with a tracker more."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more/ledger.py").write_text(LEDGER)
    (tmp_path / "model.py").write_text(MODEL)
    tables = {
        "model": "model:build",
        "data": {"path": str(blobs), "inputs": ["x"], "targets": ["y"]},
        "train": {"loss": "cross_entropy", "rounds": 2},
        "cluster": {"scheduler": "serial"},
        "run": {"trackers": ["ledger"]},
    }
    (tmp_path / "dtrain.json").write_text(json.dumps(tables))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trackers, "__path__", [*trackers.__path__, str(tmp_path / "more")])
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "")

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main.run(list(arguments))
        return code, *capsys.readouterr()

    yield run
    for name in ("dtrain.report.trackers.ledger", "model"):
        sys.modules.pop(name, None)


def test_it_gets_the_points_of_each_round(call: Call) -> None:
    code, _, err = call("train", "dtrain.json", "--run", "r")
    assert code == 0, err
    assert "ledger: less runs/*/ledger.jsonl" in err
    lines = [json.loads(line) for line in Path("runs/r/ledger.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in Path("runs/r/history.jsonl").read_text().splitlines()]
    assert [line["val_loss"] for line in lines] == [row["val_loss"] for row in rows]


def test_a_misspelt_name_offers_it(call: Call) -> None:
    code, _, err = call("plan", "dtrain.json", "--set", 'run.trackers=["ledgr"]')
    assert code == 3
    assert 'did you mean "ledger"?' in err
    assert "ledger, mlflow, tensorboard" in err


@pytest.mark.parametrize("command", ["plan", "train"])
def test_its_package_is_looked_for_before_anything_starts(call: Call, command: str) -> None:
    Path("more/ledger.py").write_text(LEDGER.replace('"json"', '"no_such_package"'))
    code, out, err = call(command, "dtrain.json", "--json")
    assert code == 3
    assert json.loads(out.splitlines()[-1])["code"] == 3
    assert 'run.trackers: "ledger" needs the package no_such_package, which is not installed.' in err
    assert 'pip install "dtrain[ledger]", or leave "ledger" out.' in err
    assert not Path("runs").exists()
