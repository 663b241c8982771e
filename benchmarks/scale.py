"""What a round costs at 1,000 workers, and what passes through the scheduler.

Run: python benchmarks/scale.py [--workers 64 256 1000] [--local-seconds 0 2]

The first table: the real driver, a real scheduler, and workers that compute nothing (`instant.py`), one replica each.
Local steps take no time, or so many seconds; those are taken off. All processes share this machine: the CPU time of
each stands beside the time of a round. A commit is what a segment costs beyond its rounds: its state is gathered, and
sent to the workers again.

The second table: bytes through the scheduler's connections, with two workers that compute, one local step a round.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xarray as xr
import zarr
from distributed import Client
from instant import InstantWorker, Usage, cluster, usage
from torch import nn

import dtrain
from dtrain.runtime import handles
from dtrain.types import RoundResult

WARM_UP = 3
"""Rounds of a segment before it is measured."""
BYTES_ROUNDS = 8
MB = 1_000_000


class Vector(nn.Module):
    """One parameter of many elements, of which the first decides the output."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(elements))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight[0]


def build(elements: int) -> nn.Module:
    return Vector(elements)


def rounds_of(client: Client, replicas: int, rounds: int, elements: int, folder: Path) -> Iterator[RoundResult]:
    """Train two segments of so many rounds."""
    path = folder / f"{replicas}.zarr"
    if not path.exists():
        values = np.ones(40 * replicas, "float32")
        dataset = xr.Dataset({"x": (("n",), values), "y": (("n",), values)})
        with zarr.config.set({"array.write_empty_chunks": True}):
            dataset.to_zarr(path, encoding={name: {"chunks": (replicas,)} for name in ("x", "y")}, consolidated=False)
    samples = dtrain.open_samples(path, inputs=["x"], targets=["y"], split={"val": 0.1, "test": 0.0})
    config = dtrain.TrainConfig(
        train={
            "loss": "mse",
            "rounds": 2 * rounds,
            "local_steps": 1,
            "batch_size": 1,
            "eval_every": 1,
            "optimizer_args": {"lr": 1e-3},
        },
        average={"replicas": replicas},
        run={"commit_every": rounds},
    )
    return dtrain.train_rounds(build, samples, config=config, model_args={"elements": elements}, cluster=client)


@dataclass(frozen=True)
class Cost:
    """What the rounds of a segment cost, each."""

    start: float
    """Seconds to the first round."""
    seconds: float
    """Of a round."""
    commit: float
    """Seconds of a segment beyond its rounds."""
    driver: float
    scheduler: float
    workers: float
    """CPU seconds of a round."""
    growth: float
    """Bytes of the driver's memory."""
    passed: float
    """Bytes through the scheduler's connections."""
    tasks: dict[str, float]
    """By kind."""


def of_workers() -> tuple[Usage, Counter[str]]:
    return usage(), InstantWorker.executed


def cost_of(client: Client, replicas: int, rounds: int, elements: int, folder: Path) -> Cost:
    """Train two segments, and measure the second one."""

    def look() -> tuple[Usage, Usage, Usage]:
        return usage(), client.run_on_scheduler(usage), client.run(of_workers, workers=[some])[some][0]

    some, began, commit = next(iter(client.nthreads())), time.monotonic(), 0.0
    last, seconds = began, []
    for result in rounds_of(client, replicas, rounds, elements, folder):
        now = time.monotonic()
        if result.round == 1:
            start = now - began
        if result.round in (rounds, rounds + 1):
            commit += now - last - result.seconds
        if result.round == rounds + WARM_UP:
            first = look()
        if rounds + WARM_UP < result.round < 2 * rounds:
            seconds.append(result.seconds)
        if result.round == 2 * rounds - 1:
            then = look()
        last = time.monotonic()
    count, tasks = len(seconds), client.run(of_workers, workers=[some])[some][1]
    cpu = [(b.cpu - a.cpu) / count for a, b in zip(first, then, strict=True)]
    return Cost(
        start,
        statistics.median(seconds),
        commit,
        *cpu,
        growth=(then[0].memory - first[0].memory) / count,
        passed=(then[1].passed - first[1].passed) / count,
        tasks={kind: total / (2 * rounds) for kind, total in tasks.items() if total >= 2 * rounds},
    )


COLUMNS = (
    "workers | local steps, s | tasks a round | ms a round beyond them | ms a worker | "
    "CPU ms a worker: driver | scheduler | workers | scheduler, CPU ms a task | bytes a worker | commit, s | "
    "first round, s | driver, MB | more a round, MB"
)


def show_workers(counts: list[int], local_seconds: list[float], rounds: int, folder: Path) -> None:
    """Print what rounds cost with workers that compute nothing."""
    print(f"| {COLUMNS} |\n|{'---:|' * (COLUMNS.count('|') + 1)}")
    for workers in counts:
        for steps in local_seconds:
            with cluster(workers, steps) as client:
                cost = cost_of(client, workers, rounds, 1, folder)
            total, beyond = sum(cost.tasks.values()), cost.seconds - steps
            each = [1e3 * seconds / workers for seconds in (beyond, cost.driver, cost.scheduler, cost.workers)]
            cells = [f"{workers:,}", f"{steps:g}", f"{total:,.0f}", f"{1e3 * beyond:,.0f}"]
            cells += [*(f"{one:.2f}" for one in each), f"{1e3 * cost.scheduler / total:.2f}"]
            cells += [f"{cost.passed / workers:,.0f}", f"{cost.commit:.1f}", f"{cost.start:.1f}"]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            cells += [f"{peak / MB:.0f}", f"{cost.growth / MB:.2f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
            print("tasks:", *(f"{kind} {count:.0f}" for kind, count in cost.tasks.items()), file=sys.stderr)


def show_bytes(replicas: list[int], megabytes: list[float], folder: Path) -> None:
    """Print what passes through the scheduler with workers that compute."""
    print("| parameters | replicas | ms a round | bytes through the scheduler, a round | a replica |")
    print("|" + "---:|" * 5)
    with cluster(2, local_seconds=None) as client:
        for size in megabytes:
            for count in replicas:
                cost = cost_of(client, count, BYTES_ROUNDS, int(size * 250_000), folder)
                cells = [f"{size:g} MB", f"{count}", f"{1e3 * cost.seconds:,.0f}", f"{cost.passed:,.0f}"]
                print("| " + " | ".join([*cells, f"{cost.passed / count:,.0f}"]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[64, 256, 1000])
    parser.add_argument("--rounds", type=int, default=12, help="of a segment")
    parser.add_argument("--local-seconds", type=float, nargs="*", default=[0, 2], help="that local steps take")
    parser.add_argument("--apart", action="store_true", help="take results apart, as those of large models are")
    parser.add_argument("--replicas", type=int, nargs="*", default=[4, 16, 64])
    parser.add_argument("--megabytes", type=float, nargs="*", default=[0.01, 1, 10])
    arguments = parser.parse_args()
    if arguments.apart:
        handles.SMALL_BYTES = -1
    with tempfile.TemporaryDirectory() as folder:
        if arguments.workers:
            show_workers(arguments.workers, arguments.local_seconds, arguments.rounds, Path(folder))
        if arguments.replicas and arguments.megabytes:
            print()
            show_bytes(arguments.replicas, arguments.megabytes, Path(folder))


if __name__ == "__main__":
    main()
