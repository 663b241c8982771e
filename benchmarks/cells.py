"""Shuffled cells a second out of a sparse matrix (CSR, as AnnData writes it): dtrain beside loaders written by hand.

    python benchmarks/cells.py                     200,000 cells x 2,000 genes, 5 % filled, chunks of 1,000,000 values
    python benchmarks/cells.py --cells 20000 --chunk 100000 --repeats 1       smaller

Both deliver batches of dense float32 as torch tensors, each cell once a pass, and keep nothing from one pass to the
next. Each measurement is a process of its own: one pass for each setting, then five with the best; medians count.

dtrain
    `dtrain.batches`, every value and column checked. Setting: the memory budget, by which units are mixed.
blocks by hand
    The way of annbatch: blocks of consecutive cells in random order; the values and columns of several blocks are read
    by zarr, put into one matrix by scipy, and its rows are shuffled, while a thread reads the next ones. Settings: the
    cells of a block and the blocks together (512 and 32 are annbatch's defaults), the pipeline of zarr or of zarrs.
    "Mixed as widely": as many cells together as dtrain mixes.

"Decodes" are the chunks that a pass decodes. "Mixed": from how many stored chunks the cells of a batch come. The peak
is resident memory less that before the loader opens the store.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from scipy import sparse

import dtrain
import dtrain.batching  # before the clock runs
from dtrain.data.read.decode import Decoder

BATCH = 256
PASSES = 5
BY_HAND = ((512, 32), (4096, 8), (10_000, 4), (40_000, 1))
WIDELY = ((4096, 64), (10_000, 32))
LOADERS: dict[str, list[dict[str, Any]]] = {
    "dtrain": [{"memory": "512MB"}, {"memory": "1GB"}],
    **{
        loader: [
            {"block": block, "together": together, "pipeline": pipeline}
            for block, together in pairs
            for pipeline in ("zarr", "zarrs")
        ]
        for loader, pairs in (("blocks by hand", BY_HAND), ("blocks by hand, mixed as widely", WIDELY))
    },
}
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class Decodes:
    """Counts the chunks of values and columns that are decoded."""

    count = 0


def write(path: Path, cells: int, genes: int, density: float, chunk: int) -> None:
    """Write counts whose number differs from cell to cell, and the number of each cell as obs/cell."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(density * genes) - 0.125, 0.5, cells).astype(int), 1, genes)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    row = np.repeat(np.arange(cells), lengths)
    within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
    columns = (row * 7919 + within * np.repeat(genes // lengths, lengths)) % genes  # spread, and each once
    columns = (np.sort(row * genes + columns) % genes).astype("int32")
    values = rng.geometric(0.4, len(columns)).astype("float32")
    root = zarr.open_group(path, mode="w")
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    x = root.create_group("X")
    x.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [cells, genes]})
    for name, array in (("data", values), ("indices", columns), ("indptr", indptr)):
        x.create_array(name, shape=array.shape, dtype=array.dtype, chunks=(min(chunk, len(array)),))[...] = array
    obs = root.create_group("obs")
    obs.create_array("cell", shape=(cells,), dtype="int64", chunks=(min(chunk, cells),))[...] = np.arange(cells)


def by_dtrain(path: str, passes: int, memory: str) -> Batches:
    """Yield batches of dtrain."""
    split = {"val": 0.0, "test": 0.0}
    samples = dtrain.open_samples(path, inputs=["X"], targets=["obs/cell"], split=split)
    decode = Decoder.decode

    def counted(decoder: Decoder, *arguments: Any) -> None:
        Decodes.count += decoder.dtype.itemsize == 4  # values and columns; indptr and obs/cell are int64
        decode(decoder, *arguments)

    Decoder.decode = counted  # type: ignore[method-assign]
    with dtrain.batches(samples, batch_size=BATCH, epochs=passes, cache="0", memory=memory) as batches:
        for (x,), y in batches:
            yield x, y


def by_hand(path: str, passes: int, block: int, together: int, pipeline: str) -> Batches:
    """Yield batches out of several blocks at a time, whose cells are shuffled."""
    if pipeline == "zarrs":
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    root, rng = zarr.open_group(path, mode="r"), np.random.default_rng(0)
    x, cells = root["X"], np.asarray(root["obs/cell"])
    data, indices, indptr = x["data"], x["indices"], np.asarray(x["indptr"])
    genes, chunk = x.attrs["shape"][1], data.chunks[0]

    def read(start: int) -> sparse.csr_matrix:
        stop = min(start + block, len(cells))
        begin, end = int(indptr[start]), int(indptr[stop])
        Decodes.count += 2 * ((end - 1) // chunk - begin // chunk + 1)
        arrays = (data[begin:end], indices[begin:end], indptr[start : stop + 1] - begin)
        return sparse.csr_matrix(arrays, shape=(stop - start, genes))

    def buffer(starts: np.ndarray) -> tuple[sparse.csr_matrix, np.ndarray]:
        numbers = np.concatenate([cells[start : start + block] for start in starts])
        order = rng.permutation(len(numbers))
        return sparse.vstack([read(int(start)) for start in starts], "csr")[order], numbers[order]

    with ThreadPoolExecutor(1) as ahead:
        for _ in range(passes):
            starts = rng.permutation(np.arange(0, len(cells), block))
            groups = [starts[first : first + together] for first in range(0, len(starts), together)]
            coming = ahead.submit(buffer, groups[0])
            for after in (*groups[1:], None):
                matrix, numbers = coming.result()
                coming = ahead.submit(buffer, after) if after is not None else coming
                for first in range(0, len(numbers), BATCH):
                    some = slice(first, first + BATCH)
                    yield torch.from_numpy(matrix[some].toarray()), torch.from_numpy(numbers[some])


def status(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def measure(loader: str, path: str, cells: int, chunk_cells: int, passes: int, settings: dict[str, Any]) -> None:
    """Print what some passes take; check that each has every cell once."""
    engine = by_dtrain if loader == "dtrain" else by_hand
    seen, mixed, base = np.zeros(cells, np.int64), [], status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    began, used = time.perf_counter(), time.process_time()
    for _, y in engine(path, passes, **settings):
        seen[y.numpy()] += 1  # a batch holds no cell twice, except where two passes meet
        mixed.append(len(np.unique(y.numpy() // chunk_cells)))
    seconds, busy = time.perf_counter() - began, time.process_time() - used
    if not (seen == passes).all():
        raise AssertionError(f"{int((seen != passes).sum())} cells did not come {passes} times")
    found = {
        "speed": cells * passes / seconds,
        "busy": busy / (cells * passes) * 1e6,
        "decodes": Decodes.count / passes,
        "mixed": statistics.mean(mixed),
        "peak": status("VmHWM") - base,
    }
    print(json.dumps(found))


def in_a_process(loader: str, passes: int, settings: dict[str, Any], *store: Any) -> dict[str, float]:
    """Return what `measure` prints in a process of its own."""
    given = json.dumps([loader, *store, passes, settings])
    command = [sys.executable, "-W", "ignore", __file__, "--measure", given]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=200_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--chunk", type=int, default=1_000_000, help="values of a chunk")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*json.loads(options.measure))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cells.zarr"
        write(path, options.cells, options.genes, options.density, options.chunk)
        values = zarr.open_array(path / "X" / "data", mode="r")
        store = (str(path), options.cells, options.cells * options.chunk // values.size)
        print(
            f"{options.cells:,} cells x {options.genes:,} genes, {values.size:,} values, {2 * values.nchunks} chunks\n"
        )
        best = {}
        for loader, every in LOADERS.items():
            swept = [(in_a_process(loader, 1, settings, *store), settings) for settings in every]
            for found, settings in swept:
                print(f"  {loader} {settings}: {text(found)}")
            best[loader] = max(swept, key=lambda one: one[0]["speed"])[1]
        runs: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
        for _ in range(options.repeats):
            for loader, settings in best.items():
                runs[loader].append(in_a_process(loader, PASSES, settings, *store))
    print(
        "\n| loader | cells a second | core-s of a million | decodes | mixed | peak |\n|---|---:|---:|---:|---:|---:|"
    )
    for loader, every in runs.items():
        print(
            f"| {loader} {best[loader]} | {text({k: statistics.median(one[k] for one in every) for k in every[0]})} |"
        )


def text(found: dict[str, float]) -> str:
    return (
        f"{found['speed']:,.0f} | {found['busy']:.1f} | {found['decodes']:.0f} | {found['mixed']:.1f} | "
        f"{found['peak'] / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
