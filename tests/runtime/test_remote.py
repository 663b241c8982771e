"""A scheduler and workers started by hand, elsewhere, without the user's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from distributed import Client

BIN = Path(sys.executable).parent
MODEL = """
import helper
import torch
import time

def build():
    return helper.net()

def loss(outputs, targets):
    time.sleep(0.02)
    return torch.nn.functional.cross_entropy(outputs, targets)
"""
HELPER = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))

    def forward(self, x):
        return self.inner(x)

def net():
    return Net()
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[tuple[Any, str]]:
    """A function that starts a worker, and the address of a scheduler; all in a directory of their own."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    started: list[subprocess.Popen[bytes]] = []
    environment = {**os.environ, "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}

    def start(*words: str) -> None:
        with (folder / f"log{len(started)}").open("wb") as log:
            command = [str(BIN / "dask"), *words]
            started.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment))

    file = folder / "scheduler.json"
    start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
    deadline = time.monotonic() + 60
    while not file.exists() or not file.read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    address = json.loads(file.read_text())["address"]

    def worker() -> None:
        start("worker", address, "--host", "127.0.0.1", "--nthreads", "2", "--no-dashboard")

    yield worker, address
    for process in reversed(started):
        process.terminate()
    for process in started:
        process.wait(timeout=30)


@pytest.fixture
def project(tmp_path: Path, blobs: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "model.py").write_text(MODEL)
    (folder / "helper.py").write_text(HELPER)
    (folder / "dtrain.toml").write_text(
        f"""model = "model:build"
        data = {{ path = "{blobs}", inputs = ["x"], targets = ["y"] }}
        train = {{ loss = "model:loss", rounds = 12, batch_size = 16 }}
        average = {{ replicas = 3 }}
        """
    )
    return folder


def train(project: Path, name: str, scheduler: str) -> subprocess.Popen[str]:
    words = [str(BIN / "dtrain"), "train", "dtrain.toml", "--run", name, "--scheduler", scheduler, "--json", "-q"]
    return subprocess.Popen(words, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def done(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.slow
def test_the_same_bits_from_a_scheduler_started_by_hand_and_late_joiners_are_used(
    elsewhere: tuple[Any, str], project: Path
) -> None:
    start_worker, address = elsewhere
    start_worker()
    process = train(project, "remote", address)
    history = project / "runs" / "remote" / "history.jsonl"
    deadline = time.monotonic() + 120
    while not (history.exists() and history.read_text().count("\n") >= 1):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    start_worker()
    remote = done(process)
    with Client(address) as client:
        assert len(client.nthreads()) == 2
        used = {address for address, counts in client.run(executed).items() if counts}
        assert len(used) == 2
    assert remote["params_sha256"] == done(train(project, "serial", "serial"))["params_sha256"]


def executed(dask_worker: Any) -> int:
    """Tasks that a worker has run."""
    count: int = dask_worker.state.executed_count
    return count


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not have this file either


@pytest.mark.slow
def test_no_scheduler_answers(project: Path) -> None:
    process = train(project, "r", "tcp://127.0.0.1:1")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 6
    assert "No Dask scheduler answers at tcp://127.0.0.1:1" in err
    assert len(err.splitlines()) <= 4
