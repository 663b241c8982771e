"""What tests of the command line share besides fixtures."""

from __future__ import annotations

import json
import sys
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

SCRIPT = Path(sys.executable).parent / "dtrain"

MODEL = """\
import os
import time

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 4))

    def forward(self, x):
        time.sleep(float(os.environ.get("NAP", "0")))
        return self.layers(x)


def build(hidden=5):
    return Net(hidden)
"""

TABLES: dict[str, Any] = {
    "model": "model:build",
    "data": {"path": "train.zarr", "inputs": ["x"], "targets": ["label"]},
    "train": {
        "loss": "cross_entropy",
        "metrics": ["accuracy"],
        "rounds": 2,
        "batch_size": 8,
        "optimizer_args": {"lr": 0.1, "momentum": 0.9},
    },
    "cluster": {"scheduler": "serial"},
    "run": {"commit_every": 1},
}

Outcome = namedtuple("Outcome", "code out err")
Project = namedtuple("Project", "dir config run")


def blobs(count: int = 60, chunk: int = 20) -> dict[str, Any]:
    """Four clouds of points in space, and which of them a point is of."""
    rng = np.random.default_rng(3)
    label = np.arange(count) % 4
    x = rng.normal(size=(4, 3))[label] * 2 + rng.normal(size=(count, 3)) / 2
    return {
        "x": {"dims": ("sample", "k"), "values": x.astype("float32"), "chunks": (chunk, 3)},
        "label": {"dims": ("sample",), "values": label.astype("int64"), "chunks": (chunk,)},
    }


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested tables with others on top."""
    merged = {**base}
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return merged


def objects(text: str) -> list[dict[str, Any]]:
    """Return the JSON objects of an output, one a line."""
    return [json.loads(line) for line in text.splitlines()]


def last(outcome: Outcome) -> dict[str, Any]:
    """Return the last JSON object that a command printed."""
    return objects(outcome.out)[-1]


def history(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's history."""
    return objects((run / "history.jsonl").read_text())


def tree(directory: Path) -> dict[str, tuple[int, int]]:
    """Return all files and directories below one, with size and time of change; compiled modules do not count."""
    return {
        str(path.relative_to(directory)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in directory.rglob("*")
        if "__pycache__" not in path.parts and not (path / "__pycache__").exists()
    }


def kept(run: Path) -> list[int]:
    """Return the numbers of the rounds that lie in a run's directory."""
    return sorted(int(path.name.removeprefix("round-")) for path in (run / "rounds").glob("round-*"))
