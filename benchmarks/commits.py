"""What does a commit cost the driver? Its peak memory and a round's time, by who writes the states of the replicas.

    python benchmarks/commits.py                    5 million parameters, 4 and 16 replicas: some minutes
    python benchmarks/commits.py --replicas 32 --mb 40

Two workers train replicas with Adam, whose state is twice the parameters, and commit every round. The states go to disk
in three ways:

    workers      workers write what they hold, and read it again for the next segment
    driver       workers do not see the run's directory: the driver asks for one replica after the other
    all at once  the driver holds the whole state, as `train_rounds` returns it, and nothing is written

Each measurement is a process of its own: the most memory that the driver had, less what it had before the run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
import zarr
from distributed import Client, LocalCluster
from torch import nn

import dtrain
from dtrain.events import Event, RoundCommitted
from dtrain.runtime import storing
from dtrain.runtime.peak import PeakMemory

WAYS = ("workers", "driver", "all at once")
ROWS, WIDTH = 4096, 64
ROUNDS = 4
MB = 1 << 20


def write_samples(path: Path) -> None:
    """Write float32[4096, 64] and float32[4096, 1]."""
    rng = np.random.default_rng(0)
    group = zarr.create_group(path)
    for name, width in (("x", WIDTH), ("y", 1)):
        values = rng.normal(size=(ROWS, width)).astype("float32")
        array = group.create_array(name, shape=values.shape, chunks=(128, width), dtype="float32")
        array.attrs["_ARRAY_DIMENSIONS"] = ["row", f"{name}_feature"]
        array[...] = values


def build(hidden: int) -> nn.Module:
    """Return a model of 65 * `hidden` + `hidden` + 1 parameters."""
    return nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def measure(way: str, replicas: int, hidden: int, directory: Path) -> dict[str, float]:
    """Train some rounds in this process; return what the driver needs more, and the seconds of a round."""
    torch.set_num_threads(1)
    if way == "driver":
        storing.write_file = _not_shared
    samples = dtrain.open_samples(directory / "samples.zarr", inputs=["x"], targets=["y"])
    config = dtrain.TrainConfig(
        model_args={"hidden": hidden},
        train={"loss": "mse", "rounds": ROUNDS, "local_steps": 2, "batch_size": 64, "optimizer": "adam"},
        average={"replicas": replicas},
        run={"commit_every": 1, "keep": 1, "dir": str(directory)},
    )
    times: list[float] = []
    with LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=None) as cluster, Client(cluster) as client:
        base = psutil.Process().memory_info().rss
        with PeakMemory() as peak:
            if way == "all at once":
                for _ in dtrain.train_rounds(build, samples, config=config, cluster=client):
                    times.append(time.monotonic())
            else:

                def watch(event: Event) -> None:
                    if isinstance(event, RoundCommitted):
                        assert event.by == way
                        times.append(time.monotonic())

                dtrain.train(build, samples, config=config, cluster=client, run="r", progress=False, report=watch)
    return {"more": peak.bytes - base, "seconds": (times[-1] - times[0]) / (ROUNDS - 1)}


def _not_shared(*given: object) -> None:
    """Stand for a worker that does not see the run's directory."""


def main(arguments: Sequence[str]) -> None:
    """Measure all ways in turn, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--mb", type=float, default=20.0, help="of the parameters")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    hidden = round(given.mb * MB / 4 / (WIDTH + 2))
    if given.one:
        print(json.dumps(measure(given.one[0], int(given.one[1]), hidden, given.dir)))
        return
    print(f"{'replicas':>8} {'states, MB':>11} {'way':<12} {'driver, MB more':>16} {'s a round':>10}")
    for replicas in given.replicas:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as temporary:
                write_samples(Path(temporary) / "samples.zarr")
                command = [sys.executable, __file__, "--mb", str(given.mb), "--one", way, str(replicas)]
                done = subprocess.run([*command, "--dir", temporary], check=True, stdout=subprocess.PIPE, text=True)
                found = json.loads(done.stdout.splitlines()[-1])
            states, more = 2 * given.mb * replicas, found["more"] / MB
            print(f"{replicas:>8} {states:>11.0f} {way:<12} {more:>16.0f} {found['seconds']:>10.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
