"""What the benchmarks of averaging share: stores, unequal parts, many small runs in two processes, tables.

`mnist1d.py`, `heterogeneity.py` and `equal_tokens.py` compare losses, not times. Each run is one process with one torch
thread; dtrain trains with its serial runner, which gives the bits of a cluster without starting one.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import zarr
from torch import nn

import dtrain
from dtrain.errors import InvalidConfig

Ints = npt.NDArray[np.int64]
Table = Mapping[str, Any]
Job = TypeVar("Job")
Result = TypeVar("Result")

LEAST_ROWS = 10
"""Of a part: a draw that leaves a replica fewer rows is drawn again."""


# Data ----------------------------------------------------------------------------------------------------------------


def write_store(path: Path, x: npt.NDArray[Any], y: npt.NDArray[Any], chunk: int = 50) -> None:
    """Write ``x`` and ``y`` with their first dimension as samples."""
    group = zarr.create_group(path)
    with zarr.config.set({"array.write_empty_chunks": True}):  # labels of class 0
        for name, values in (("x", x), ("y", y)):
            names = ("sample", *(f"{name}{axis}" for axis in range(1, values.ndim)))
            shape = (chunk, *values.shape[1:])
            array = group.create_array(
                name, shape=values.shape, dtype=values.dtype, chunks=shape, dimension_names=names
            )
            array[...] = values


def dirichlet_parts(labels: Ints, replicas: int, alpha: float, seed: int) -> list[Ints]:
    """Return the rows of each replica: every class is dealt out by shares from a symmetric Dirichlet distribution.

    Small `alpha` gives replicas few classes each, and parts of unequal size (Wang et al. 2020, arXiv:2002.06440; the
    split of NVFlare's CIFAR-10 example).
    """
    rng = np.random.default_rng((seed, int(1000 * alpha), replicas))
    while True:
        owner = np.empty(len(labels), np.int64)
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            ends = (np.cumsum(rng.dirichlet([alpha] * replicas)) * len(rows)).astype(np.int64)
            owner[rows] = np.searchsorted(ends[:-1], np.arange(len(rows)), side="right")
        parts = [rng.permutation(np.flatnonzero(owner == replica)) for replica in range(replicas)]
        if min(map(len, parts)) >= LEAST_ROWS:
            return parts


def write_parts(folder: Path, x: npt.NDArray[Any], y: Ints, parts: Sequence[Ints]) -> None:
    """Write the rows of each replica as a store of its own: so it is certain who owns what."""
    folder.mkdir(parents=True)
    for replica, rows in enumerate(parts):
        write_store(folder / f"{replica}.zarr", x[rows], y[rows])


def stores_in(folder: Path) -> list[dict[str, Any]]:
    """Return ``data.path`` for the stores of `write_parts`: one replica each."""
    found = sorted(folder.glob("*.zarr"), key=lambda path: int(path.stem))
    return [{"path": str(path), "replicas": 1} for path in found]


def histogram(labels: Ints, parts: Sequence[Ints], title: str) -> str:
    """Return a table of how many rows of each class each replica owns."""
    classes = range(int(labels.max()) + 1)
    head = [title, *map(str, classes), "rows"]
    counts = [np.bincount(labels[rows], minlength=len(classes)).tolist() for rows in parts]
    return markdown(head, [[f"replica {k}", *count, sum(count)] for k, count in enumerate(counts)])


# Runs ----------------------------------------------------------------------------------------------------------------


def config_of(stores: Sequence[Table], train: Table, average: Table, model_args: Table | None = None) -> Any:
    """Return a configuration that trains on all rows of the stores, and evaluates and commits at the end only.

    Raises
    ------
    InvalidConfig
        This version of dtrain does not have what the tables ask for.
    """
    return dtrain.TrainConfig(
        model_args=dict(model_args or {}),
        data={"path": tuple(stores), "inputs": ["x"], "targets": ["y"], "split": {"val": 0.0, "test": 0.0}},
        train={"loss": "cross_entropy", **train},
        average=dict(average),
        run={"commit_every": 1_000_000},
    )


def refusal(train: Table, average: Table) -> str | None:
    """Return why this version of dtrain does not train so, or None if it does."""
    try:
        config_of([{"path": "unused.zarr"}], train, average)
    except InvalidConfig as error:
        return str(error).splitlines()[0]
    return None


def trained(build: Callable[..., nn.Module], config: Any) -> tuple[nn.Module, list[Any]]:
    """Train with the serial runner; return the model and the lines of the history."""
    with tempfile.TemporaryDirectory() as folder:
        run = dtrain.train(build, config=config, cluster="serial", run="run", run_dir=folder, progress=False)
        return run.model, run.rows


def score(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[float, float]:
    """Return the mean cross entropy in nats, and the accuracy in percent; classes are the last axis of the output."""
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(rows).flatten(0, -2) for rows in x.split(256)])
    labels = y.flatten()
    return float(F.cross_entropy(logits, labels)), 100 * float((logits.argmax(1) == labels).float().mean())


def run_all(function: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> dict[Job, Result]:
    """Call a function for each job in processes with one torch thread each; say on stderr how far it is."""
    context, began = multiprocessing.get_context("spawn"), time.monotonic()
    found: dict[Job, Result] = {}
    with ProcessPoolExecutor(processes, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pending = {pool.submit(function, job): job for job in jobs}
        try:
            for future in as_completed(pending):
                found[pending[future]] = future.result()
                print(f"{len(found)} of {len(jobs)} runs, {time.monotonic() - began:.0f} s", file=sys.stderr)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found


# Tables --------------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {deviation:.{digits}f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table with the first column left and the others right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def write_json(path: str | None, found: Any) -> None:
    """Write the figures of every run, where a file is asked for."""
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
