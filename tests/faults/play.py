"""Play a fault schedule: a driver, a scheduler and workers by hand, which end, freeze and come as it says."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import zarr

from tests.faults.nursery import Nursery
from tests.faults.schedules import Fault, Schedule

ROWS, CHUNK, ROUNDS, REPLICAS = 240, 10, 6, 3
NAP = 0.03
"""Seconds that a call of the model takes."""
LIMIT_SECONDS = 240.0
MOST_STARTS = 40
MODEL = """\
import os
import time

import torch
from torch import nn


class Net(nn.Module):
    \"\"\"Counts how often it was trained on each sample: a buffer of integers; averaging takes the maximum.\"\"\"

    def __init__(self, rows):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.register_buffer("ledger", torch.zeros(rows, dtype=torch.int64))

    def forward(self, number, x):
        if self.training:
            self.ledger.index_add_(0, number, torch.ones_like(number))
            time.sleep(float(os.environ.get("NAP", "0")))
        return self.layers(x)


def build(rows):
    return Net(rows)
"""


@dataclass(slots=True)
class Played:
    """What came of a schedule."""

    codes: list[int] = field(default_factory=list)
    """Exit codes of the drivers."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    errors: str = ""
    """What the last driver wrote to stderr."""
    lost_rounds: list[int] = field(default_factory=list)
    """By start of a driver after the first: rounds of the history that were not committed."""
    tasks_left: int = 0
    """On the scheduler, after the run."""


def write_project(where: Path) -> None:
    """Write data and model."""
    rng = np.random.default_rng(7)
    group = zarr.create_group(where / "train.zarr")
    label = np.arange(ROWS) % 3
    values = {
        "number": np.arange(ROWS),
        "x": (rng.normal(size=(3, 4))[label] + rng.normal(size=(ROWS, 4))).astype("float32"),
        "y": label,
    }
    for name, own in values.items():
        dims = ("n", "f")[: own.ndim]
        array = group.create_array(
            name, shape=own.shape, dtype=own.dtype, chunks=(CHUNK, *own.shape[1:]), dimension_names=dims
        )
        array[...] = own
    (where / "model.py").write_text(MODEL)


def write_config(where: Path, schedule: Schedule) -> Path:
    """Write the configuration of a schedule."""
    tables: dict[str, Any] = {
        "model": "model:build",
        "model_args": {"rows": ROWS},
        "data": {"path": str(where.parent / "train.zarr"), "inputs": ["number", "x"], "targets": ["y"]},
        "train": {
            "loss": "cross_entropy",
            "rounds": ROUNDS,
            "batch_size": 16,
            "optimizer_args": {"lr": 0.05, "momentum": 0.9},
        },
        "average": {"replicas": REPLICAS},
        "run": {"commit_every": schedule.commit_every, "keep": 3},
    }
    for name, table in schedule.way.items():
        tables[name] = {**tables[name], **table}
    where.mkdir()
    (where / "model.py").write_text(MODEL)
    (where / "dtrain.toml").write_text(tomli_w.dumps(tables))
    return where / "dtrain.toml"


def calm(nursery: Nursery, where: Path) -> list[dict[str, Any]]:
    """Train the same in one process without a fault; return its history."""
    err = where / "calm.err"
    arguments = ("-q", "train", "dtrain.toml", "--run", "calm", "--scheduler", "serial")
    pid = nursery.start("dtrain", *arguments, where=where, err=err)
    while (code := nursery.poll(pid)) is None:
        time.sleep(0.05)
    assert code == 0, err.read_text()
    return history(where / "runs/calm")


def history(run: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a run's history."""
    with suppress(FileNotFoundError):
        return [json.loads(line) for line in (run / "history.jsonl").read_text().split("\n")[:-1]]
    return []


class Stage:
    """A scheduler, its workers and a driver."""

    def __init__(self, nursery: Nursery, where: Path, workers: int) -> None:
        self._nursery, self._where = nursery, where
        self.run = where / "runs/run"
        self.played = Played()
        self._workers: list[int] = []
        self._frozen: dict[int, float] = {}
        self._due: list[float] = []
        self._starts = 0
        self._unreachable: set[int] = set()
        """Exit codes of a driver whose scheduler is killed before it answers."""
        self._scheduler = 0
        self._start_scheduler(workers)
        self._driver = self._start_driver()

    # Processes ------------------------------------------------------------------------------------------------

    def _start_scheduler(self, workers: int) -> None:
        self._starts += 1
        self._file = self._where / f"scheduler-{self._starts}.json"
        options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(self._file))
        self._scheduler = self._nursery.start("scheduler", *options, where=self._where)
        deadline = time.monotonic() + 60
        while not (self._file.exists() and self._file.read_text().rstrip().endswith("}")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        for _ in range(workers):
            self._start_worker()

    def _start_worker(self) -> None:
        options = ("--scheduler-file", str(self._file), "--no-nanny", "--nthreads", "2", "--host", "127.0.0.1")
        limits = ("--no-dashboard", "--death-timeout", "60", "--memory-limit", "0")
        self._workers.append(self._nursery.start("worker", *options, *limits, where=self._where))

    def _start_driver(self) -> int:
        arguments = ("train", "dtrain.toml", "--run", "run", "--scheduler", str(self._file))
        self._err = self._where / f"driver-{len(self.played.codes)}.err"
        return self._nursery.start("dtrain", *arguments, where=self._where, err=self._err)

    def _kill(self, pid: int, how: int = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, how)
            os.kill(pid, signal.SIGCONT)

    # Faults ---------------------------------------------------------------------------------------------------

    def happen(self, fault: Fault) -> None:
        """Let a fault happen."""
        live = [pid for pid in self._workers if self._nursery.poll(pid) is None]
        match fault.action:
            case "join":
                self._start_worker()
            case "kill scheduler":
                self._kill(self._scheduler)
                for pid in live:
                    self._kill(pid)
                self._workers, self._frozen, self._unreachable = [], {}, {6}
                self._start_scheduler(max(1, len(live)))
            case "kill driver":
                self._kill(self._driver)
            case "stop driver":
                self._kill(self._driver, signal.SIGTERM)
            case _ if live:
                self._strike(live[fault.pick % len(live)], fault)

    def _strike(self, pid: int, fault: Fault) -> None:
        if fault.action == "freeze worker":
            os.kill(pid, signal.SIGSTOP)
            self._frozen[pid] = time.monotonic() + fault.seconds
        else:
            self._kill(pid, signal.SIGKILL if fault.action == "kill worker" else signal.SIGTERM)
            self._due.append(time.monotonic() + fault.seconds)

    def settle(self) -> bool:
        """Let due things happen; return whether the run is complete."""
        now = time.monotonic()
        for pid in [pid for pid, until in self._frozen.items() if until < now]:
            self._kill(pid, signal.SIGCONT)
            del self._frozen[pid]
        for _ in [due for due in self._due if due < now]:
            self._start_worker()
        self._due = [due for due in self._due if due >= now]
        if not self._due and all(self._nursery.poll(pid) is not None for pid in self._workers):
            self._start_worker()
        code = self._nursery.poll(self._driver)
        if code is None:
            return False
        self.played.codes.append(code)
        if code == 0:
            return True
        assert code in {75, -signal.SIGKILL} | self._unreachable, (code, self._err.read_text())
        self._unreachable = set()
        assert "Traceback" not in self._err.read_text(), self._err.read_text()
        assert len(self.played.codes) < MOST_STARTS, self.played.codes
        rounds = [int(path.name.removeprefix("round-")) for path in self.run.glob("rounds/round-*")]
        self.played.lost_rounds.append(len(history(self.run)) - max(rounds, default=0))
        self._driver = self._start_driver()
        return False

    def finish(self) -> Played:
        """Return what came of it, and end all processes."""
        from distributed import Client

        for pid in self._frozen:
            self._kill(pid, signal.SIGCONT)
        with Client(scheduler_file=str(self._file), timeout=30) as client:
            for _ in range(50):  # what a driver gave up is forgotten soon
                self.played.tasks_left = client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
                if not self.played.tasks_left:
                    break
                time.sleep(0.1)
        self.played.rows, self.played.errors = history(self.run), self._err.read_text()
        self.close()
        return self.played

    def close(self) -> None:
        """End all processes."""
        for pid in (self._driver, *self._workers, self._scheduler):
            if self._nursery.poll(pid) is None:
                self._kill(pid)
                while self._nursery.poll(pid) is None:
                    time.sleep(0.01)


def play(nursery: Nursery, where: Path, schedule: Schedule) -> Played:
    """Play a schedule in a directory with its configuration."""
    began = last = time.monotonic()
    stage, left = Stage(nursery, where, schedule.workers), list(schedule.faults)
    try:
        while True:
            if left and time.monotonic() - last > left[0].after:
                last = time.monotonic()
                stage.happen(left.pop(0))
            if stage.settle():
                return stage.finish()
            assert time.monotonic() - began < LIMIT_SECONDS, stage._err.read_text()
            time.sleep(0.05)
    finally:
        stage.close()


def ledger(run: Path) -> Mapping[str, Any]:
    """Return how often the parameters of a run's last round were trained on each sample."""
    import safetensors.numpy

    newest = max(run.glob("rounds/round-*"))
    return safetensors.numpy.load_file(newest / "params.safetensors")
