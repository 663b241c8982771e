"""What a round costs beyond its local steps, beside an all-reduce of the same parameters.

Run: python benchmarks/rounds.py [--sizes 0.01 1 10 100] [--rounds 32]

For each size a model of that many megabytes of parameters is trained by two replicas on two local workers, as `dtrain
train` does it: pipelined rounds, parameters from worker to worker, the mean on a worker, the hash of every round. The
local steps are as small as they can be; their time (the longest replica's, measured in the task: load, step, flatten)
is taken off. In the same run two processes all-reduce a tensor of that size with gloo on the loopback interface: what
synchronous data parallelism pays at every step. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import xarray as xr
import zarr
from torch import nn

import dtrain

WARM_UP = 8


class Vector(nn.Module):
    """One parameter of many elements, of which the first decides the output."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(elements))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight[0]


def build(elements: int) -> nn.Module:
    return Vector(elements)


def overheads(megabytes: float, rounds: int, directory: Path) -> list[float]:
    """Return, for each round, its seconds beyond the local task of the slower replica."""
    path = directory / "data.zarr"
    if not path.exists():
        values = np.ones(1000, "float32")
        dataset = xr.Dataset({"x": (("n",), values), "y": (("n",), values)})
        with zarr.config.set({"array.write_empty_chunks": True}):
            dataset.to_zarr(path, encoding={name: {"chunks": (100,)} for name in ("x", "y")}, consolidated=False)
    samples = dtrain.open_samples(path, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    config = dtrain.TrainConfig(
        train={
            "loss": "mse",
            "rounds": rounds,
            "local_steps": 1,
            "batch_size": 1,
            "optimizer_args": {"lr": 1e-3},
        },
        average={"replicas": 2},
        cluster={"workers": 2},
        run={"commit_every": WARM_UP},
    )
    results = dtrain.train_rounds(
        build, samples, config=config, model_args={"elements": int(megabytes * 250_000)}, cluster="local"
    )
    # the first segment warms up; a segment's first round waits for no earlier one, and its last one is committed
    steady = [r for r in results if r.round > WARM_UP and r.round % WARM_UP not in (0, 1)]
    return [r.seconds - max(c.seconds for c in r.contributions) for r in steady]


def all_reduce(rank: int, megabytes: float, repeats: int, file: str, seconds: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    tensor = torch.zeros(int(megabytes * 250_000))
    for repeat in range(repeats + 3):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(tensor)
        if rank == 0 and repeat >= 3:
            seconds.append(time.perf_counter() - began)
    dist.destroy_process_group()


def gloo(megabytes: float, repeats: int, directory: Path) -> list[float]:
    """Return the seconds of each all-reduce between two processes."""
    with mp.Manager() as manager:
        seconds = manager.list()
        file = str(directory / f"gloo-{megabytes}")
        mp.spawn(all_reduce, args=(megabytes, repeats, file, seconds), nprocs=2)
        return list(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.01, 1, 10, 100, 400], help="megabytes")
    parser.add_argument("--rounds", type=int, default=32)
    arguments = parser.parse_args()
    print("| parameters | dtrain, a round beyond its local steps | gloo all-reduce | ratio |")
    print("|---:|---:|---:|---:|")
    for megabytes in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            reduced = statistics.median(gloo(megabytes, arguments.rounds, Path(folder)))
            ours = statistics.median(overheads(megabytes, arguments.rounds, Path(folder)))
        print(f"| {megabytes:g} MB | {ours * 1e3:.1f} ms | {reduced * 1e3:.1f} ms | {ours / reduced:.1f} |", flush=True)


if __name__ == "__main__":
    main()
