"""Cells a second out of a sparse matrix (CSR, as AnnData writes it): dtrain beside a loader written by hand.

    python benchmarks/sparse.py                              100,000 cells x 2,000 genes, 5 % of them: half a minute
    python benchmarks/sparse.py --cells 20000 --repeats 1    smaller

Both deliver shuffled batches of dense float32 as torch tensors, in one process. Each repeat runs them one after the
other for some passes, opening the store included; medians count. Core-seconds are processor time, of a million cells.

dtrain
    `dtrain.batches`: units of rows that hold four chunks, mixed over the window of its plan, every value checked.
by hand
    As many rows at a time: zarr reads the values and columns of a run of rows, scipy.sparse makes a matrix of them, and
    its rows are shuffled among themselves. No check, no mixing of runs, no reading ahead.
by hand, a thread ahead
    The same, while a thread reads the next runs.

The decoded share is what a pass decodes of what is stored, as `plan` says.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from scipy import sparse

import dtrain
from dtrain.data.plan.partition import plan_data
from dtrain.data.plan.summary import describe_plan
from dtrain.data.read.units import values_counted

SPLIT = {"val": 0.0, "test": 0.0}
BATCH = 128
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def write(path: Path, cells: int, genes: int, density: float, chunk: int) -> None:
    """Write counts whose number differs from cell to cell, and the number of each cell as obs/cell."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(density * genes), 0.5, cells).astype(int), 1, genes)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    root = zarr.open_group(path, mode="w")
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    x = root.create_group("X")
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [cells, genes]})
    total, stride = int(indptr[-1]), 7919  # a prime: the columns of a cell are spread, and sorted
    columns = np.empty(total, np.int32)
    for row in range(cells):
        length = lengths[row]
        columns[indptr[row] : indptr[row + 1]] = np.sort((row * stride + np.arange(length) * (genes // length)) % genes)
    values = rng.geometric(0.4, total).astype("float32")
    for name, array, length in (("data", values, chunk), ("indices", columns, chunk), ("indptr", indptr, cells + 1)):
        x.create_array(name, shape=array.shape, dtype=array.dtype, chunks=(length,))[...] = array
    obs = root.create_group("obs")
    obs.create_array("cell", shape=(cells,), dtype="int64", chunks=(cells,))[...] = np.arange(cells)


def ours(path: Path, rows: int, passes: int) -> Batches:
    """Yield batches of dtrain."""
    samples = opened(path)
    with dtrain.batches(samples, batch_size=BATCH, epochs=passes, cache="0") as batches:
        for (x,), y in batches:
            yield x, y


def by_hand(path: Path, rows: int, passes: int, ahead: bool = False) -> Batches:
    """Yield batches of runs of so many rows, each run shuffled."""
    root, rng = zarr.open_group(path, mode="r"), np.random.default_rng(0)
    x, y = root["X"], np.asarray(root["obs/cell"])
    indptr, genes = np.asarray(x["indptr"]), x.attrs["shape"][1]

    def read(start: int) -> tuple[sparse.csr_matrix, Any]:
        stop = min(start + rows, len(y))
        begin, end = indptr[start], indptr[stop]
        arrays = (x["data"][begin:end], x["indices"][begin:end], indptr[start : stop + 1] - begin)
        return sparse.csr_matrix(arrays, shape=(stop - start, genes)), y[start:stop]

    starts = np.concatenate([rng.permutation(np.arange(0, len(y), rows)) for _ in range(passes)])
    with ThreadPoolExecutor(1) as pool:
        runs = pool.map(read, starts) if ahead else map(read, starts)
        for matrix, cells in runs:
            order = rng.permutation(len(cells))
            for first in range(0, len(order), BATCH):
                some = order[first : first + BATCH]
                yield torch.from_numpy(matrix[some].toarray()), torch.from_numpy(cells[some])


def opened(path: Path) -> dtrain.Samples:
    return dtrain.open_samples(path, inputs=["X"], targets=["obs/cell"], split=SPLIT)


def measure(batches: Batches, cells: int, passes: int) -> tuple[float, float]:
    """Return cells a second, and core-seconds of a million cells; check that each pass has every cell once."""
    seen, began, used = np.zeros(cells, np.int64), time.perf_counter(), time.process_time()
    for _, y in batches:
        seen[y.numpy()] += 1  # batches hold no cell twice
    seconds, busy = time.perf_counter() - began, time.process_time() - used
    if not (seen == passes).all():
        raise AssertionError(f"{int((seen != passes).sum())} cells did not come {passes} times")
    return cells * passes / seconds, busy / (cells * passes) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--chunk", type=int, default=65_536, help="values of a chunk")
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    loaders: dict[str, Callable[[Path, int, int], Batches]] = {
        "dtrain": ours,
        "by hand": by_hand,
        "by hand, a thread ahead": partial(by_hand, ahead=True),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.zarr"
        write(path, options.cells, options.genes, options.density, options.chunk)
        samples = opened(path)
        plan = values_counted(samples, plan_data(samples, replicas=1, seed=0))
        share = describe_plan(samples, plan)["read_amplification"]
        matrix = samples.variable("X").sparse
        print(
            f"{options.cells:,} cells x {options.genes:,} genes, {matrix.count:,} values in chunks of "
            f"{options.chunk:,}; units of {plan.unit_rows:,} cells, {plan.window} mixed; decoded share {share:.2f}\n"
        )
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
        for _ in range(options.repeats):
            for name, loader in loaders.items():
                batches = loader(path, plan.unit_rows, options.passes)
                found[name].append(measure(batches, options.cells, options.passes))
    print("| loader | cells a second | core-seconds |\n|---|---:|---:|")
    for name, runs in found.items():
        speed, busy = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"| {name} | {speed:,.0f} | {busy:.1f} |")


if __name__ == "__main__":
    main()
