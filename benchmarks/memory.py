"""Does the data path keep to its memory budget? Peak memory of a pass, against what `plan` says, for data of any size.

    python benchmarks/memory.py                     1, 4 and 16 times a budget of 128 MB: a few minutes
    python benchmarks/memory.py --budget 512MB --times 64 --dir DIR      16 GB on disk
    python benchmarks/memory.py --layouts narrow "narrow, long chunks"   rows of 8 bytes
    python benchmarks/memory.py --stores zip deflated kerchunk icechunk --readers auto     other kinds of stores

Each measurement is a process of its own: its resident memory just before the first batch, and the most that it had
in two shuffled passes over the data. The difference must stay below 1.10 x the budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from dtrain.config.values import parse_bytes

ROW = 256
LAYOUTS = ("chunks", "shards", "large shard", "windows", "narrow", "narrow, long chunks")
STORES = ("directory", "zip", "deflated", "kerchunk", "icechunk")


def write(path: Path, layout: str, size: int, budget: int) -> None:
    """Write `size` bytes of float32[n, 256] and int64[n]: a few different objects, copied to all places."""
    chunk = 256 if layout == "windows" else 1024
    shard = {
        "chunks": None,
        "windows": None,
        "shards": 16 * chunk,
        "large shard": budget * 6 // 10 // (ROW * 4) // chunk * chunk,
    }
    rows = shard[layout]
    step = rows or chunk
    count = max(2 * step, size // (ROW * 4) // step * step)
    group = zarr.open_group(path, mode="w")
    x = group.create_array(
        "x",
        shape=(count, ROW),
        chunks=(chunk, ROW),
        shards=(rows, ROW) if rows else None,
        dtype="float32",
        dimension_names=("n", "k"),
    )
    y = group.create_array("y", shape=(count,), chunks=(step,), dtype="int64", dimension_names=("n",))
    y[:] = np.arange(count)
    rng = np.random.default_rng(0)
    x[:step] = rng.integers(0, 4096, (step, ROW)).astype("float32")
    first = path / "x" / "c" / "0" / "0"
    for number in range(1, count // step):
        place = path / "x" / "c" / str(number) / "0"
        place.parent.mkdir()
        shutil.copyfile(first, place)


def write_narrow(path: Path, layout: str, size: int, budget: int) -> None:
    """Write `size` bytes of float32[n] and float32[n]: one chunk, copied to all places."""
    chunk = (1 << 17) if layout == "narrow" else budget // 8 // 24
    count = size // 8 // chunk * chunk
    group = zarr.open_group(path, mode="w")
    for name in ("x", "y"):
        array = group.create_array(name, shape=(count,), chunks=(chunk,), dtype="float32", dimension_names=("n",))
        array[:chunk] = np.random.default_rng(0).integers(0, 4096, chunk).astype("float32")
        for number in range(1, count // chunk):
            shutil.copyfile(path / name / "c" / "0", path / name / "c" / str(number))


def convert(path: Path, store: str) -> Path:
    """Return the path of a store of another kind that holds what a directory holds."""
    files = {file.relative_to(path).as_posix(): file for file in sorted(path.rglob("*")) if file.is_file()}
    if store in ("zip", "deflated"):
        method = zipfile.ZIP_DEFLATED if store == "deflated" else zipfile.ZIP_STORED
        with zipfile.ZipFile(made := path.with_suffix(".zip"), "w", method, compresslevel=1) as archive:
            for name, file in files.items():
                archive.write(file, name)
    elif store == "kerchunk":
        refs = {
            name: file.read_text() if file.name == "zarr.json" else [str(file), 0, file.stat().st_size]
            for name, file in files.items()
        }
        (made := path.with_suffix(".json")).write_text(json.dumps({"version": 1, "refs": refs}))
    elif store == "icechunk":
        import icechunk

        icechunk.set_logs_filter("off")  # it writes to standard output
        made = path.with_suffix(".icechunk")
        session = icechunk.Repository.create(icechunk.local_filesystem_storage(str(made))).writable_session("main")
        for name, file in sorted(files.items(), key=lambda pair: not pair[0].endswith("zarr.json")):
            sync(session.store.set(name, default_buffer_prototype().buffer.from_bytes(file.read_bytes())))
        session.commit("copied")
    return made


def measure(path: str, layout: str, budget: str, reader: str) -> dict[str, Any]:
    """Run two passes in this process."""
    import torch  # noqa: F401

    import dtrain
    import dtrain.batching  # modules are no data
    import dtrain.data.read.files

    windows = {"input_offsets": [-2, -1, 0], "target_offsets": 1} if layout == "windows" else {}
    samples = dtrain.open_samples(path, inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0}, **windows)
    process, peak, done = psutil.Process(), 0, threading.Event()
    base = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, count = time.monotonic(), 0
    try:
        batches = dtrain.batches(samples, batch_size=256, epochs=2, memory=budget, reader=reader)
        for batch in batches:
            count += batch.size
        seconds = time.monotonic() - began
    finally:
        done.set()  # else a budget that is refused would leave the thread behind
        watcher.join()
    return {"base": base, "peak": peak, "budgeted": batches.memory.total, "samples": count, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="128MB")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--readers", nargs="+", default=["numcodecs", "zarrs", "zarr"])
    parser.add_argument("--stores", nargs="+", choices=STORES, default=["directory"])
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*options.child)))
        return
    budget, rows = parse_bytes(options.budget, "--budget"), []
    print(
        f"{'layout':<12} {'store':<9} {'reader':<9} {'data':>9} {'budget':>9} {'peak':>9} {'peak/budget':>11} samples/s"
    )
    for layout in options.layouts:
        for times in options.times:
            with tempfile.TemporaryDirectory(dir=options.dir) as folder:
                path = Path(folder) / "data.zarr"
                make = write_narrow if layout.startswith("narrow") else write
                make(path, layout, times * budget, budget)
                for store, reader in itertools.product(options.stores, options.readers):
                    limit = str(2 * budget if layout.startswith("narrow") else budget)  # their order counts too
                    made = path if store == "directory" else convert(path, store)
                    child = [sys.executable, __file__, "--child", str(made), layout, limit, reader]
                    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                    done = subprocess.run(child, check=True, capture_output=True, text=True, env=environment)
                    row = {
                        "layout": layout,
                        "store": store,
                        "reader": reader,
                        "data": times * budget,
                        **json.loads(done.stdout),
                    }
                    rows.append(row)
                    used, rate = row["peak"] - row["base"], row["samples"] / row["seconds"]
                    print(
                        f"{layout:<12} {store:<9} {reader:<9} {row['data'] / 1e6:>6.0f} MB "
                        f"{row['budgeted'] / 1e6:>6.1f} MB "
                        f"{used / 1e6:>6.1f} MB {used / row['budgeted']:>11.2f} {rate:>9,.0f}",
                        flush=True,
                    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
