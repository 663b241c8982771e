"""The model and the data of wire.py, and its peer: DistributedDataParallel over gloo."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
import xarray as xr
import zarr
from namespace import bytes_sent, narrow, widen
from peers.ddp import PROCESSES
from torch import nn
from torch.nn.parallel import DistributedDataParallel

FEATURES, WIDTH, BATCH = 256, 1280, 32
ROWS, HELD_OUT = 16_384, 512
LR, MOMENTUM = 0.01, 0.9
WARM_UP = 2
"""Rounds: one at full speed, and the one that is under way when the wire becomes slow."""
EVALUATED_EVERY = 32
"""Steps."""


def build() -> nn.Module:
    layers = (nn.Linear(FEATURES, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))
    return nn.Sequential(*layers, nn.Flatten(0))


def sine_data(seed: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    mixing = torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(0)) / 6**0.5
    hidden = torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(hidden @ mixing), torch.sin(2 * hidden).sum(1) / 3**0.5


def write(data: Path) -> None:
    for name, seed, rows in (("train", 1, ROWS), ("val", 2, HELD_OUT)):
        x, y = sine_data(seed, rows)
        dataset = xr.Dataset({"x": (("n", "k"), x.numpy()), "y": (("n",), y.numpy())})
        with zarr.config.set({"array.write_empty_chunks": True}):
            encoding = {"x": {"chunks": (256, FEATURES)}, "y": {"chunks": (256,)}}
            dataset.to_zarr(data / f"{name}.zarr", encoding=encoding, consolidated=False)


def peer_steps(module: nn.Module, rank: int, seed: int = 0) -> Iterator[int]:
    """Take steps without end on this rank's share of the rows; yield the number of the step."""
    x, y = (values[rank::PROCESSES] for values in sine_data(1, ROWS))
    optimizer = torch.optim.SGD(module.parameters(), lr=LR, momentum=MOMENTUM)
    torch.manual_seed(PROCESSES * seed + rank)
    step = 0
    while True:
        for rows in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            nn.functional.mse_loss(module(x[rows]), y[rows]).backward()
            optimizer.step()
            step += 1
            yield step


def step_alone(rank: int, steps: int) -> float:
    """Return the median seconds of a step while nothing is exchanged."""
    dist.barrier()
    began, times = perf_counter(), []
    for step in peer_steps(build(), rank):
        times.append(perf_counter() - began)
        began = perf_counter()
        if step == steps:
            return statistics.median(times[steps // 4 :])
    raise AssertionError


def ddp_cell(rank: int, steps: int, rate: float) -> tuple[float, float]:
    """Return seconds and bytes of a step, as the mean over `steps` of them."""
    torch.manual_seed(0)
    began, sent = 0.0, 0
    for step in peer_steps(DistributedDataParallel(build(), gradient_as_bucket_view=True), rank):
        if rank == 0 and step == WARM_UP - 1:
            narrow(rate)
        if step == WARM_UP:
            began, sent = perf_counter(), bytes_sent()
        if step == WARM_UP + steps:
            result = (perf_counter() - began) / steps, (bytes_sent() - sent) / steps
            widen()
            return result
    raise AssertionError


def ddp_target(rank: int, seed: int, target: float, limit: float) -> tuple[float, float, int]:
    """Return the seconds until the held-out loss is at most `target`, or `limit`; that loss, and the steps."""
    torch.manual_seed(seed)
    module = DistributedDataParallel(build(), gradient_as_bucket_view=True)
    x, y = (values[rank::PROCESSES] for values in sine_data(2, HELD_OUT))
    dist.barrier()
    began = perf_counter()
    for step in peer_steps(module, rank, seed):
        if step % EVALUATED_EVERY:
            continue
        with torch.no_grad():
            both = torch.stack([nn.functional.mse_loss(module.module(x), y), torch.tensor(perf_counter() - began)])
        dist.all_reduce(both)
        loss, seconds = (both / PROCESSES).tolist()
        if loss <= target or seconds > limit:
            return seconds, loss, step
    raise AssertionError
