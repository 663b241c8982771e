"""docs/trackers.md: its table names every tracker, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import dtrain
from dtrain.report.tracking import named_tracker, tracker_names
from tests.runtime import models
from tests.training import trained

PAGE = (Path(__file__).parents[1] / "docs/trackers.md").read_text(encoding="utf-8")


def test_the_table_names_every_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.report.tracking.is_installed", lambda package: True)
    rows = re.findall(r'^\| `(\w+)` \| `pip install "dtrain\[(\w+)\]"` \|.*\| `(.+)` \|$', PAGE, re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == tracker_names()
    for name, extra, look in rows:
        assert named_tracker(name).look.format(runs="runs") == look
        assert extra in (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_the_example(samples: dtrain.Samples, tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(block, scope)
    table = {"loss": "cross_entropy", "rounds": 2, "batch_size": 40}
    run = trained(models.plain, samples, tmp_path, table, trackers=[scope["Track"]])
    lines = [line.split(",") for line in (run.directory / "losses.csv").read_text().splitlines()]
    assert [float(line[1]) for line in lines] == [row["train_loss"] for row in run.rows]
