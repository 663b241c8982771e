"""Does the data path keep to its memory budget? Peak memory of a pass, against what `plan` says, for data of any size.

    python benchmarks/memory.py                     1, 4 and 16 times a budget of 128 MB: a few minutes
    python benchmarks/memory.py --budget 512MB --times 64 --dir DIR      16 GB on disk
    python benchmarks/memory.py --layouts narrow "narrow, long chunks"   rows of 8 bytes
    python benchmarks/memory.py --stores zip deflated kerchunk icechunk s3 --readers auto     other kinds of stores
    python benchmarks/memory.py --layouts volume sparse --readers auto    one image; cells x genes as CSR

"several" are three stores as one, of different lengths. "s3" is a server of moto in another process, on loopback.
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
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from dtrain.config.values import parse_bytes

ROW = 256
NARROW, SPARSE = ("narrow", "narrow, long chunks"), ("sparse", "several sparse")
LAYOUTS = ("chunks", "shards", "large shard", "windows", *NARROW, "volume", "several", *SPARSE)
STORES = ("directory", "zip", "deflated", "kerchunk", "icechunk", "s3")
GENES, VALUES, CELLS = 2000, 100, 1000
"""Of a sparse matrix: genes, values of a cell, and cells of a chunk."""
CHUNK = (1, 32, 128, 128)
"""Of a volume."""
SPLIT = {"val": 0.0, "test": 0.0}
KEYS: dict[str, dict[str, Any]] = {
    "windows": {"input_offsets": [-2, -1, 0], "target_offsets": 1},
    "volume": {"patch": {"z": 32, "y": 64, "x": 64}},
    "sparse": {"inputs": ["X"], "targets": ["obs/y"]},
}
BATCH = {"volume": 4}


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


def write_volume(path: Path, layout: str, size: int, budget: int) -> None:
    """Write float32[1, 64, 1024, x] and uint8 of the same shape: one chunk of each, copied to all places."""
    shape = (1, 64, 1024, max(1, size // (64 * 1024 * 4 * 128)) * 128)
    group, rng = zarr.open_group(path, mode="w"), np.random.default_rng(0)
    for name, dtype, most in (("x", "float32", 4096), ("y", "uint8", 2)):
        array = group.create_array(name, shape=shape, chunks=CHUNK, dtype=dtype, dimension_names=("t", "z", "y", "x"))
        array[:1, :32, :128, :128] = rng.integers(0, most, CHUNK)
        copy_chunk(path / name, [n // chunk for n, chunk in zip(shape, CHUNK, strict=True)])


def write_sparse(path: Path, layout: str, size: int, budget: int) -> None:
    """Write `size` bytes of values and columns of a CSR matrix as AnnData does: one chunk of each, copied."""
    cells = max(2, size // (8 * VALUES * CELLS)) * CELLS
    root, rng = zarr.open_group(path, mode="w"), np.random.default_rng(0)
    root.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    matrix = root.create_group("X", attributes={"encoding-type": "csr_matrix", "shape": [cells, GENES]})
    matrix.attrs["encoding-version"] = "0.1.0"
    columns = np.concatenate([np.sort(rng.choice(GENES, VALUES, replace=False)) for _ in range(CELLS)])
    values = {"data": rng.integers(1, 9, len(columns)).astype("float32"), "indices": columns.astype("int32")}
    for name, some in values.items():
        array = matrix.create_array(name, shape=(cells * VALUES,), chunks=(len(some),), dtype=some.dtype)
        array[: len(some)] = some
        copy_chunk(path / "X" / name, [cells // CELLS])
    for name, all_of in (("indptr", np.arange(cells + 1) * VALUES), ("y", np.arange(cells) % 5)):
        group = matrix if name == "indptr" else root.create_group("obs", attributes={"encoding-type": "dataframe"})
        array = group.create_array(name, shape=all_of.shape, chunks=(100_000,), dtype="int64")
        array.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        array[:] = all_of
    root["obs"].attrs.update({"_index": "y", "column-order": ["y"], "encoding-version": "0.2.0"})


def copy_chunk(array: Path, counts: list[int]) -> None:
    """Copy the first chunk of an array to all places of its grid."""
    first = array.joinpath("c", *("0" for _ in counts))
    for place in itertools.product(*map(range, counts)):
        if any(place):
            there = array.joinpath("c", *map(str, place))
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(first, there)


def upload(path: Path) -> str:
    """Copy a directory to a bucket of the server that the environment names, and return its URL."""
    import s3fs

    bucket = s3fs.S3FileSystem()
    bucket.mkdirs("bench", exist_ok=True)
    url = f"s3://bench/{path.parent.name}/{path.name}"
    bucket.put(str(path), url, recursive=True)
    return url


@contextmanager
def s3_server() -> Iterator[None]:
    """Start a server of S3 in another process, and name it in the environment."""
    code = (
        "import time; from moto.server import ThreadedMotoServer as S; s = S('127.0.0.1', 0, verbose=False); s.start()"
    )
    code += "; print(*s.get_host_and_port(), flush=True); time.sleep(1e6)"
    server = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert server.stdout is not None
    host, port = server.stdout.readline().split()
    os.environ |= {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    try:
        yield
    finally:
        server.kill()
        server.wait()


def convert(path: Path, store: str) -> Path | str:
    """Return the path of a store of another kind that holds what a directory holds."""
    if store == "directory":
        return path
    if store == "s3":
        return upload(path)
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


def write_all(folder: Path, layout: str, size: int, budget: int) -> list[Path]:
    """Write one store, or three of different lengths."""
    several, kind = layout.startswith("several"), layout.removeprefix("several").strip() or "chunks"
    make = {"volume": write_volume, "sparse": write_sparse}.get(kind, write_narrow if kind in NARROW else write)
    paths = [folder / f"data{number}.zarr" for number in range(3 if several else 1)]
    for number, path in enumerate(paths):
        make(path, kind, size * (number + 1) // 6 if several else size, budget)
    return paths


def measure(paths: str, layout: str, budget: str, reader: str) -> dict[str, Any]:
    """Run two passes in this process over a store, or several with a space between."""
    import torch  # noqa: F401

    import dtrain
    import dtrain.batching  # modules are no data
    import dtrain.data.read.files

    layout = layout.removeprefix("several ")
    keys = {"inputs": ["x"], "targets": ["y"], "split": SPLIT, **KEYS.get(layout, {})}
    path = paths.split(" ")
    samples = dtrain.open_samples(path if len(path) > 1 else paths, **keys)
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
        batches = dtrain.batches(samples, batch_size=BATCH.get(layout, 256), epochs=2, memory=budget, reader=reader)
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
    with s3_server() if "s3" in options.stores else nullcontext():
        measure_all(options)


def measure_all(options: argparse.Namespace) -> None:
    """Write, measure and print one after the other."""
    budget, rows = parse_bytes(options.budget, "--budget"), []
    print(
        f"{'layout':<14} {'store':<9} {'reader':<9} {'data':>9} {'budget':>9} {'peak':>9} {'peak/budget':>11} samples/s"
    )
    for layout in options.layouts:
        for times in options.times:
            with tempfile.TemporaryDirectory(dir=options.dir) as folder:
                paths = write_all(Path(folder), layout, times * budget, budget)
                for store, reader in itertools.product(options.stores, options.readers):
                    limit = str(2 * budget if layout in (*NARROW, *SPARSE) else budget)  # their order counts too
                    made = " ".join(str(convert(path, store)) for path in paths)
                    child = [sys.executable, __file__, "--child", made, layout, limit, reader]
                    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                    done = subprocess.run(child, check=True, stdout=subprocess.PIPE, text=True, env=environment)
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
                        f"{layout:<14} {store:<9} {reader:<9} {row['data'] / 1e6:>6.0f} MB "
                        f"{row['budgeted'] / 1e6:>6.1f} MB "
                        f"{used / 1e6:>6.1f} MB {used / row['budgeted']:>11.2f} {rate:>9,.0f}",
                        flush=True,
                    )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
