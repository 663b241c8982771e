"""DistributedDataParallel over gloo: two processes of one thread each, gradients all-reduced at every step."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from racing import Snapshot, Trial, read_tokens, train_steps
from torch.nn.parallel import DistributedDataParallel

from dtrain_cli.templates.demo_model import build

PROCESSES = 2


def on_two(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``work(rank, *arguments)`` in two processes that gloo joins over loopback; return what rank 0 returns."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_joined, args=(work, arguments, Path(folder)), nprocs=PROCESSES)
        return pickle.loads((Path(folder) / "result").read_bytes())


def _joined(rank: int, work: Callable[..., Any], arguments: tuple[Any, ...], folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=PROCESSES)
    result = work(rank, *arguments)
    if rank == 0:
        (folder / "result").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def train(trial: Trial, data: Path) -> list[Snapshot]:
    """Train in two new processes; their start and the reading of the tokens are not timed."""
    snapshots: list[Snapshot] = on_two(_train, trial, data)
    return snapshots


def _train(rank: int, trial: Trial, data: Path) -> list[Snapshot]:
    torch.manual_seed(trial.seed)
    module = DistributedDataParallel(build(), gradient_as_bucket_view=True)
    tokens = read_tokens(data / "train.zarr")
    dist.barrier()
    return train_steps(module, trial, tokens, rank, PROCESSES)
