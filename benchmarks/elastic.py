"""A training whose workers are killed on a wall clock: dtrain, restart from a checkpoint, and dropping the round.

Run: python benchmarks/elastic.py [--every 10 30 60] [--seeds 0] [--json FILE]        (about 100 minutes a seed)

One job, the same for all: a transformer of 112,448 parameters, four replicas on two workers, rounds of 60 steps,
without an evaluation. A supervisor sends SIGKILL to one of the two worker processes every so many seconds, in turn; a
seed chooses who is first and when. It starts another process at once, with the same command, as Slurm, Kubernetes or
systemd would: ``dask worker --no-nanny`` and the imports that a task needs. (Dask's nanny does the same, but gives up a
worker that is killed while it starts.)

    dtrain      ``dtrain train`` on that cluster with the default commit_every = "auto"; one driver all the time
    restart     the same command, as torchrun or a requeued job has it: whatever is lost ends driver and workers, and
                fresh ones go on from the newest checkpoint. At its best: a checkpoint after every round, the loss is
                noticed by the supervisor at once, the scheduler stays, all processes start at the same time
    drop        torchft's LocalSGD (elastic_peers.py): the round in which a worker is lost is discarded, and its samples
                are never trained
    drop-lost   the same, but those who are left are averaged

All times count from the first training task to the end of the driver. Goodput is a calm run's time at the same speed
of the machine (elastic_report.py), divided by the time with kills. "Lost" are samples that were passed over and never
trained; "again" are samples of tasks that were begun more than once. The hash is that of the parameters after the last
round. The report has the bound and the other columns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tomli_w
from distributed import Client
from elastic_report import BATCH, SYSTEMS, WORKERS, Kill, Life, losses, report, shares
from markov import Source
from small_runs import write_store

HERE = Path(__file__).parent
REPLICAS, LENGTH = 4, 64
ROWS = 16_000
TICK = 0.01
LOOK_SECONDS = 5.0
"""How long it is looked whether other programs use the cores."""
TASK = re.compile(r"train-r(\d+)-k(\d+)")


@dataclass(frozen=True)
class Cell:
    system: str
    every: float
    """Seconds between kills; 0: none."""
    seed: int


# The job -------------------------------------------------------------------------------------------------------------


def write_job(folder: Path, rounds: int, steps: int, commit_every: int | str) -> None:
    """Write a project: configuration, model and data."""
    folder.mkdir(parents=True)
    shutil.copy(HERE / "models/small.py", folder / "small.py")
    x, y = Source().rows(ROWS, LENGTH, seed=0)
    write_store(folder / "train.zarr", x, y, chunk=250)
    tables: dict[str, Any] = {
        "model": "small:Transformer",
        "model_args": {"symbols": 64, "length": LENGTH, "width": 64, "layers": 2},
        "data": {"path": "train.zarr", "inputs": ["x"], "targets": ["y"], "split": {"val": 0.0, "test": 0.0}},
        "train": {
            "loss": "cross_entropy",
            "class_axis": -1,
            "rounds": rounds,
            "local_steps": steps,
            "batch_size": BATCH,
            "optimizer": "adamw",
            "optimizer_args": {"lr": 0.002},
        },
        "average": {"replicas": REPLICAS},
        "run": {"commit_every": commit_every},
    }
    (folder / "dtrain.toml").write_text(tomli_w.dumps(tables))


# The supervisor ------------------------------------------------------------------------------------------------------


class Stage:
    """A scheduler, two workers and a driver, all of them processes."""

    def __init__(self, folder: Path, system: str) -> None:
        self.folder, self.system = folder, system
        self.logs = folder / "logs"
        self.logs.mkdir()
        self.lives: dict[int, Life] = {}
        self.drivers = 0
        self.started: list[subprocess.Popen[bytes]] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self.file = folder / "scheduler.json"

    def open(self) -> None:
        """Start all processes; `close` ends them, however far they are."""
        where = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(self.file))
        self.scheduler = self._start("distributed.cli.dask_scheduler", *where, out="scheduler")
        while not self.file.exists() or not self.file.read_text().endswith("}"):
            time.sleep(TICK)
        self.client = Client(scheduler_file=str(self.file))
        self.workers = [self._start_worker(slot) for slot in range(WORKERS)]
        while not all(log.ready for log in self.read_logs().values()):
            time.sleep(0.1)
        self.driver = self._start_driver()

    def _start(self, module: str, *arguments: str, out: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join([str(HERE.parent), str(HERE.parent / "cli"), str(HERE)])
        own = {"PYTHONPATH": path, "ELASTIC_LOGS": str(self.logs), "OMP_NUM_THREADS": "1"}
        with (self.folder / f"{out}.out").open("ab") as stdout, (self.folder / f"{out}.err").open("ab") as stderr:
            started = subprocess.Popen(
                [sys.executable, "-c", f"from {module} import main; main()", *arguments],
                cwd=self.folder,
                env={**os.environ, **own},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
            )
        self.started.append(started)
        return started

    def _start_worker(self, slot: int) -> subprocess.Popen[bytes]:
        options = ("--scheduler-file", str(self.file), "--no-nanny", "--nthreads", "2", "--host", "127.0.0.1")
        more = ("--no-dashboard", "--memory-limit", "0", "--local-directory", str(self.folder / "local"))
        started = self._start(
            "distributed.cli.dask_worker", *options, *more, "--preload", "elastic_peers", out="workers"
        )
        self.lives[started.pid] = Life(slot, time.monotonic())
        return started

    def _start_driver(self) -> subprocess.Popen[bytes]:
        self.drivers += 1
        config, scheduler = str(self.folder / "dtrain.toml"), ("--scheduler", str(self.file))
        if self.system in ("dtrain", "restart"):
            return self._start("dtrain_cli.main", "--json", "train", config, "--run", "run", *scheduler, out="driver")
        rule = "round" if self.system == "drop" else "replicas"
        return self._start("elastic_peers", config, rule, *scheduler, "--workers", str(WORKERS), out="driver")

    def read_logs(self) -> Mapping[int, Life]:
        """Return the workers with what they have logged."""
        for pid, life in self.lives.items():
            life.tasks, open_tasks = [], {}
            with suppress(FileNotFoundError):
                for line in (self.logs / f"{pid}.log").read_text().split("\n")[:-1]:
                    at, word, *key = line.split(" ")
                    if word == "ready":
                        life.ready = float(at)
                    elif word == "begin":
                        open_tasks[key[0]] = float(at)
                    elif key[0] in open_tasks:
                        life.tasks.append((_task(key[0]), open_tasks.pop(key[0]), float(at)))
            life.tasks += [(_task(key), began, None) for key, began in open_tasks.items()]
        return self.lives

    def kill(self, slot: int) -> Kill:
        """Kill a worker, and start its successor, or all processes anew."""
        killed = self.workers[slot]
        at = self._end(killed)
        self._replace([slot] if self.system != "restart" else range(WORKERS))
        return Kill(at, killed.pid, self.workers[slot].pid)

    def _replace(self, slots: Sequence[int]) -> None:
        """Start workers anew; in "restart" the driver too, without what the old one has left at the scheduler."""
        if self.system == "restart":
            for process in (*self.workers, self.driver):
                self._end(process)
        for slot in slots:
            self.workers[slot] = self._start_worker(slot)
        if self.system == "restart":
            self.driver = self._start_driver()
            self.client.run_on_scheduler(_forget_plugins)

    def _end(self, process: subprocess.Popen[bytes]) -> float:
        process.send_signal(signal.SIGKILL)  # nothing, if it has been waited for
        at = time.monotonic()
        process.wait()
        life = self.lives.get(process.pid)
        if life is not None and life.died is None:
            life.died = at
        return at

    def check(self) -> bool:
        """Replace what has ended by itself; return whether the training is done."""
        for slot, worker in enumerate(self.workers):
            if worker.poll() is not None:
                print(f"{self.system}: a worker ended by itself, with code {worker.returncode}", file=sys.stderr)
                self._end(worker)
                self._replace([slot] if self.system != "restart" else range(WORKERS))
        code = self.driver.poll()
        if code == 75:  # as its text says: run it again
            self.driver = self._start_driver()
        elif code:
            print(
                f"{self.system}: exit code {code}\n{(self.folder / 'driver.err').read_text()[-1000:]}", file=sys.stderr
            )
        return code not in (None, 75)

    def result(self) -> dict[str, Any] | None:
        """Return the last line of the driver, if it says that the training is done."""
        lines = (self.folder / "driver.out").read_text().splitlines()
        result: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return result if result.get("event") == "done" else None

    def close(self) -> None:
        if hasattr(self, "client"):
            self.client.close()
        for process in self.started:
            if process.poll() is None:
                self._end(process)


def _task(key: str) -> tuple[int, int]:
    found = TASK.search(key)
    assert found is not None, key
    return int(found[1]), int(found[2])


def _forget_plugins(dask_scheduler: Any) -> None:
    """Remove the plugins of drivers that were killed, but for the newest."""
    ours = [name for name in dask_scheduler.worker_plugins if name.startswith("dtrain-")]
    for name in ours[:-1]:
        del dask_scheduler.worker_plugins[name]


def first_task(stage: Stage) -> float:
    """Wait for the first training task, and return when it began."""
    while True:
        begun = [began for life in stage.read_logs().values() for _, began, _ in life.tasks]
        if begun:
            return min(begun)
        if stage.check():
            raise RuntimeError(f"{stage.system}: ended before a task has begun")
        time.sleep(TICK)


def kill_times(cell: Cell, began: float) -> Iterator[tuple[float, int]]:
    """Yield when to kill, and the slot of the worker."""
    rng = np.random.default_rng(cell.seed)
    phase, first = rng.uniform(0.3, 1.0), int(rng.integers(WORKERS))
    for number in itertools.count():
        yield began + (number + phase) * cell.every, (first + number) % WORKERS


def run(
    cell: Cell, folder: Path, rounds: int, steps: int, limit: float, quiet: float = np.inf
) -> dict[str, Any] | None:
    """Train once, for `limit` seconds at most; return what came of it, or None if others use more than `quiet`."""
    write_job(folder, rounds, steps, 1 if cell.system == "restart" else "auto")
    others, kills = Others(), list[Kill]()
    stage = Stage(folder, cell.system)
    try:
        stage.open()
        began = first_task(stage)
        times = kill_times(cell, began)
        due, slot = next(times) if cell.every else (np.inf, 0)
        while not stage.check() and time.monotonic() - began < limit:
            if time.monotonic() >= due:
                kills.append(stage.kill(slot))
                due, slot = next(times)
            if others.exceed(quiet):
                return None
            time.sleep(TICK)
        ended, lives = time.monotonic(), stage.read_logs()
    finally:
        stage.close()
    history, events = folder / "runs/run/history.jsonl", folder / "runs/run/events.jsonl"
    return {
        **asdict(cell),
        "rounds": rounds,
        "steps": steps,
        "seconds": ended - began,
        "kills": len(kills),
        "drivers": stage.drivers,
        "others": others.cores(),
        "result": stage.result(),
        "code": stage.driver.returncode,
        "finished": len(history.read_text().splitlines()) if history.exists() else None,
        "losses": losses(kills, lives, began, ended),
        **shares(lives, began, ended),
        "events": [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else [],
    }


class Others:
    """Measures the cores that other programs use, from now on."""

    def __init__(self) -> None:
        self._began = self._looked = time.monotonic()
        self._busy, self._own = _busy(), _own()

    def cores(self) -> float:
        used = _busy() - self._busy - (_own() - self._own)
        return max(0.0, used / (time.monotonic() - self._began))

    def exceed(self, cores: float) -> bool:
        """Whether they have used more, looked at now and then."""
        now = time.monotonic()
        if now - self._looked < 2 * LOOK_SECONDS:
            return False
        self._looked = now
        return self.cores() > cores


def _own() -> float:
    """Return the CPU seconds of this process and of all that it has started."""
    spent = os.times()
    total = spent.user + spent.system + spent.children_user + spent.children_system
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            own = child.cpu_times()
            total += own.user + own.system
    return total


def _busy() -> float:
    """Return the CPU seconds that all processes of this machine have used."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def wait_until_quiet(cores: float) -> None:
    """Wait until other programs use no more than so many cores."""
    while True:
        others = Others()
        time.sleep(LOOK_SECONDS)
        if (used := others.cores()) <= cores:
            return
        print(f"waiting: other programs use {used:.1f} cores", file=sys.stderr, flush=True)
        time.sleep(LOOK_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, nargs="*", default=[10.0, 30.0, 60.0], help="seconds between kills")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--steps", type=int, default=60, help="of a task")
    parser.add_argument("--minutes", type=float, default=15.0, help="end a run after so many")
    parser.add_argument("--others", type=float, default=np.inf, help="repeat a run beside which others use more cores")
    parser.add_argument("--json", type=Path, help="runs that the file holds already stay, so that parts add up")
    parser.add_argument("--keep", type=Path, help="where to leave the files of the runs")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that all processes are ended
    found = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    if "dtrain" not in {*options.systems, *(one["system"] for one in found)}:
        parser.error("--systems needs dtrain, beside which the others are put; or --json with its runs")
    done = {(one["system"], one["every"], one["seed"]) for one in found}
    cells = itertools.product(options.seeds, [0.0, *options.every], options.systems)
    for cell in [Cell(system, every, seed) for seed, every, system in cells if (system, every, seed) not in done]:
        one = None
        while one is None or one["others"] > options.others:
            wait_until_quiet(options.others)
            with tempfile.TemporaryDirectory() as name:
                folder = (options.keep or Path(name)) / f"{cell.system}-{cell.every:g}-{cell.seed}"
                shutil.rmtree(folder, ignore_errors=True)
                one = run(cell, folder, options.rounds, options.steps, 60 * options.minutes, options.others)
            if one is not None:
                print(f"{cell}: {one['seconds']:.1f} s, others {one['others']:.2f} cores", file=sys.stderr, flush=True)
        found.append(one)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(report(found))


if __name__ == "__main__":
    main()
