"""Scan: shuffled batches of 256 rows delivered as torch tensors, one pass, no compute; beside the limit and the peers.

Needs: pip install -r benchmarks/requirements.txt
Run: python benchmarks/scan.py [--gb 2] [--dir DIR] [--repeats 3] [--json FILE] [--plot FILE] [--quick]

Two stores of the same rows, 256 float32 and one int64 each (stores.py): chunks of 4,096 rows, blosc-lz4, and shards of
16,384 rows made of chunks of 256, zstd. Each engine delivers every row once a pass, in batches of 256, shuffled anew
for each pass. Each repetition of each engine is a process of its own; repetitions are interleaved, and their order
rotates. A process makes one pass to warm up (workers are started, files in the page cache, pools warm), then up to
three that are timed, from asking for the first batch; their median counts. The loop that takes the batches copies the
label and the first feature of each row, in every engine, and afterwards it is checked that in every pass every row came
exactly once and with its own label. Before the repetitions the settings of each engine are swept, one after the other,
on a smaller store of the same layout.

The limit: (core-seconds to decode every chunk once + core-seconds to gather its rows into batches) / cores, both user +
system time of a process that does nothing else. Decoding is done by zarr's own codecs or by zarrs, whichever needs
less; gathering is one call a batch into an arena of 64 MB. An engine's share of the limit is limit / seconds. Nothing
that decodes these stores on these cores exceeds 1, and since cores share caches and memory bandwidth, nothing reaches
it; what reads a format of its own, or memory, may.

"Core-s" is what a pass costs: user + system time of the process and its workers. On busy cores it says more than the
time; the limit in core-seconds stands above each table.

Memory: the peak of the resident bytes of the process and its children beyond those of the process after its imports,
sampled every 50 ms; worker processes count with their imports, because that is what they cost. "Private" leaves out
what is shared or mapped from files. "Mixed": from how many different runs of 4,096 consecutive rows a batch comes, on
average; a full shuffle of R such runs takes R * (1 - (1 - 1 / R)^256).

The figures mean something only on idle cores, and as ratios within one run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import stores
import torch
import zarr
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    get_worker_info,
)

BATCH = 256
RUN = 4096
WINDOW = 65_536
TIMED_PASSES = 3
ENOUGH_SECONDS = 2.5
PACKAGES = ["dtrain", "torch", "numpy", "zarr", "zarrs", "numcodecs", "xarray", "dask", "xbatcher", "litdata"]

Facts = dict[str, Any]
Settings = dict[str, Any]
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
Passes = Callable[[int], Batches]
"""Given the number of a pass, its batches."""


@dataclass(frozen=True)
class Engine:
    """How one way to read is prepared, and which of its settings are swept.

    Parameters
    ----------
    title, shuffle : str
        What the table calls it, and how it shuffles.
    prepare : callable
        Given a store and the settings, returns the passes. Not timed.
    axes : list of list of dict
        Swept one after the other, the others at their best so far; the first of each holds without a sweep.
    modules : tuple of str
        Imported before memory is counted.
    role : str
        ``reader``; ``decode`` and ``gather`` make the limit; ``own`` reads no Zarr store, and runs once for both.
    convert : callable, optional
        Given a store and the settings, writes the engine's own format, and returns seconds and bytes.
    missing : callable
        Returns why the engine cannot run here, or nothing.
    layouts : tuple of str
        The stores that it reads.
    """

    title: str
    shuffle: str
    prepare: Callable[[Facts, Settings], Passes]
    axes: list[list[Settings]]
    modules: tuple[str, ...] = ()
    role: str = "reader"
    convert: Callable[[Facts, Settings], Facts] | None = None
    missing: Callable[[], str] = field(default=lambda: "")
    layouts: tuple[str, ...] = tuple(stores.LAYOUTS)


# What engines share --------------------------------------------------------------------------------------------------


def use_pipeline(name: str, threads: int | None = None) -> None:
    """Make Zarr decode with its own codecs or with zarrs, on so many threads."""
    path = "zarrs.ZarrsCodecPipeline" if name == "zarrs" else "zarr.core.codec_pipeline.BatchedCodecPipeline"
    if name == "zarrs":
        importlib.import_module("zarrs")
    zarr.config.set({"codec_pipeline.path": path, "threading.max_workers": threads})


def open_arrays(path: str) -> tuple[Any, Any]:
    group = zarr.open_group(path, mode="r")
    return group["x"], group["y"]


def fill(array: Any, start: int, stop: int, out: torch.Tensor) -> None:
    """Decode rows into memory that is there already."""
    buffer = zarr.core.buffer.default_buffer_prototype().nd_buffer.from_numpy_array(out.numpy())
    array.get_basic_selection((slice(start, stop), *(slice(None),) * (out.ndim - 1)), out=buffer)


def arena(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, stores.FEATURES), torch.zeros(rows, dtype=torch.int64)


def shuffled(x: torch.Tensor, y: torch.Tensor, rng: np.random.Generator, size: int = BATCH) -> Batches:
    """Yield the rows in random order, so many at a time."""
    order = torch.from_numpy(rng.permutation(len(y)))
    for start in range(0, len(y), size):
        chosen = order[start : start + size]
        yield x.index_select(0, chosen), y.index_select(0, chosen)


def split(messages: Batches) -> Batches:
    """Yield views of a batch each of what comes several batches at a time."""
    for x, y in messages:
        for start in range(0, len(y), BATCH):
            yield x[start : start + BATCH], y[start : start + BATCH]


def worker_options(settings: Settings) -> dict[str, Any]:
    """Return the options of a DataLoader; no fork, which zarrs does not survive."""
    if not settings["workers"]:
        return {"num_workers": 0}
    return {
        "num_workers": settings["workers"],
        "persistent_workers": True,
        "multiprocessing_context": "forkserver",
    }


def sampled(facts: Facts, settings: Settings) -> np.ndarray:
    """Return the rows that are delivered: all of them, or a random sample."""
    if settings.get("sample", facts["rows"]) >= facts["rows"]:
        return np.arange(facts["rows"])
    return np.sort(np.random.default_rng(0).choice(facts["rows"], settings["sample"], replace=False))


# The limit -----------------------------------------------------------------------------------------------------------


def decode(facts: Facts, settings: Settings) -> Passes:
    use_pipeline(settings["pipeline"], settings["threads"])
    arrays = open_arrays(facts["path"])
    out = arena(settings["block"])

    def batches(number: int) -> Batches:
        for start in range(0, facts["rows"], settings["block"]):
            stop = min(start + settings["block"], facts["rows"])
            for array, values in zip(arrays, out, strict=True):
                fill(array, start, stop, values[: stop - start])
            yield out[0][: stop - start], out[1][: stop - start]

    return batches


def gather(facts: Facts, settings: Settings) -> Passes:
    full = arena(WINDOW)
    ring = [arena(BATCH) for _ in range(4)]

    def batches(number: int) -> Batches:
        rng = np.random.default_rng(number)
        for start in range(0, facts["rows"], WINDOW):
            order = torch.from_numpy(rng.permutation(min(WINDOW, facts["rows"] - start)))
            for at in range(0, len(order), BATCH):
                chosen, out = order[at : at + BATCH], ring[at // BATCH % len(ring)]
                for values, batch in zip(full, out, strict=True):
                    if settings["by"] == "index_select":
                        torch.index_select(values, 0, chosen, out=batch)
                    else:
                        np.take(values.numpy(), chosen.numpy(), axis=0, out=batch.numpy(), mode="clip")
                yield out

    return batches


# xbatcher ------------------------------------------------------------------------------------------------------------


class Piped(Dataset):
    """A dataset that sets the codec pipeline in the process in which it is used."""

    def __init__(self, dataset: Any, pipeline: str) -> None:
        self.dataset, self.pipeline, self.process = dataset, pipeline, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if self.process != os.getpid():
            use_pipeline(self.pipeline)
            self.process = os.getpid()
        return self.dataset[index]


def as_tensor(values: Any) -> torch.Tensor:
    return torch.from_numpy(values.values)


def xbatcher(facts: Facts, settings: Settings) -> Passes:
    import xarray as xr
    from xbatcher import BatchGenerator
    from xbatcher.loaders.torch import MapDataset

    patch = settings["patch"]
    use_pipeline(settings["pipeline"])
    dataset = xr.open_zarr(facts["path"], chunks={} if settings["dask"] else None, consolidated=False)
    generators = [BatchGenerator(dataset[name], dict(dataset[name].sizes) | {"sample": patch}) for name in ("x", "y")]
    patches = MapDataset(*generators, transform=as_tensor, target_transform=as_tensor)
    loader = DataLoader(Piped(patches, settings["pipeline"]), batch_size=None, shuffle=True, **worker_options(settings))
    if patch == BATCH:
        return lambda number: loader
    x, y = arena(WINDOW)

    def batches(number: int) -> Batches:
        rng = np.random.default_rng(number)
        filled = 0
        for patch_x, patch_y in loader:
            x[filled : filled + patch] = patch_x
            y[filled : filled + patch] = patch_y
            filled += patch
            if filled == WINDOW:
                yield from shuffled(x, y, rng)
                filled = 0
        yield from shuffled(x[:filled], y[:filled], rng)

    return batches


# A DataLoader over blocks, as a careful person writes it -------------------------------------------------------------


class Blocks(IterableDataset):
    """Blocks in random order, decoded in place; the rows of a window of several are shuffled and yielded in batches.

    With ``readers`` that many threads decode the next window while this one is yielded. ``message`` rows at a time go
    from a worker to the loop, which splits them into batches, because it is messages that cost.
    """

    def __init__(self, facts: Facts, settings: Settings) -> None:
        self.path, self.rows, self.settings = facts["path"], facts["rows"], settings
        self.number = 0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.number += 1
        settings, block = self.settings, self.settings["block"]
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        use_pipeline(settings["pipeline"], settings["threads"])
        arrays = open_arrays(self.path)
        order = np.random.default_rng(self.number).permutation(self.rows // block)[worker::workers].tolist()
        windows = [order[start : start + WINDOW // block] for start in range(0, len(order), WINDOW // block)]
        arenas = [arena(WINDOW) for _ in range(2 if settings["readers"] else 1)]
        rng = np.random.default_rng((self.number, worker))

        def read(at: int, number: int, into: tuple[torch.Tensor, torch.Tensor]) -> None:
            for array, out in zip(arrays, into, strict=True):
                fill(array, number * block, (number + 1) * block, out[at * block : (at + 1) * block])

        def start(index: int) -> list[Future[None]]:
            if index == len(windows):
                return []
            return [pool.submit(read, *block, arenas[index % 2]) for block in enumerate(windows[index])]

        with ThreadPoolExecutor(max(1, settings["readers"])) as pool:
            ahead = start(0) if settings["readers"] else []
            for index, window in enumerate(windows):
                x, y = arenas[index % len(arenas)]
                if settings["readers"]:
                    for future in ahead:
                        future.result()
                    ahead = start(index + 1)
                else:
                    for at, number in enumerate(window):
                        read(at, number, (x, y))
                filled = len(window) * block
                yield from shuffled(x[:filled], y[:filled], rng, settings["message"])


def block_loader(facts: Facts, settings: Settings) -> Passes:
    loader = DataLoader(Blocks(facts, settings), batch_size=None, **worker_options(settings))
    return lambda number: loader if settings["message"] == BATCH else split(loader)


# One row at a time ---------------------------------------------------------------------------------------------------


class Rows(Dataset):
    def __init__(self, path: str, rows: int, pipeline: str) -> None:
        self.path, self.rows, self.pipeline = path, rows, pipeline
        self.arrays: tuple[Any, Any] | None = None

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self.arrays is None:
            use_pipeline(self.pipeline)
            self.arrays = open_arrays(self.path)
        return torch.from_numpy(self.arrays[0][index]), int(self.arrays[1][index])


def per_sample(facts: Facts, settings: Settings) -> Passes:
    rows = Rows(facts["path"], facts["rows"], settings["pipeline"])
    sampler = SubsetRandomSampler(sampled(facts, settings).tolist())
    loader = DataLoader(rows, batch_size=BATCH, sampler=sampler, **worker_options(settings))
    return lambda number: loader


# litdata -------------------------------------------------------------------------------------------------------------


def litdata_folder(facts: Facts, settings: Settings) -> Path:
    kind = f"{settings['chunk']}-{settings['compression']}-{settings['level']}"
    return Path(facts["path"]).with_name(f"litdata-{facts['rows']}-{kind}")


def litdata_rows(path: str, block: tuple[int, int]) -> Iterator[dict[str, Any]]:
    x, y = (array[slice(*block)] for array in open_arrays(path))
    for row, label in zip(torch.from_numpy(x), y, strict=True):
        yield {"x": row.clone(), "y": int(label)}


def litdata_convert(facts: Facts, settings: Settings) -> Facts:
    from litdata import optimize

    folder = litdata_folder(facts, settings)
    began = time.perf_counter()
    optimize(
        fn=partial(litdata_rows, facts["path"]),
        inputs=[(start, start + stores.SHARD) for start in range(0, facts["rows"], stores.SHARD)],
        output_dir=str(folder),
        chunk_size=settings["chunk"],
        compression=settings["compression"],
        compression_level=settings["level"],
        num_workers=os.cpu_count(),
        mode="overwrite",
        verbose=False,
    )
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "stored_bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())}


def litdata(facts: Facts, settings: Settings) -> Passes:
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(
        str(litdata_folder(facts, settings)),
        shuffle=True,
        item_shuffle_window=settings["window"],
        batch_decode=settings["batch_decode"],
    )
    workers = {"num_workers": settings["workers"], "persistent_workers": settings["workers"] > 0}
    loader = StreamingDataLoader(dataset, batch_size=settings["message"], **workers)
    return lambda number: split((message["x"], message["y"]) for message in loader)


# In memory, and dtrain -----------------------------------------------------------------------------------------------


def in_memory(facts: Facts, settings: Settings) -> Passes:
    use_pipeline("zarrs")
    x, y = open_arrays(facts["path"])
    dataset = TensorDataset(torch.from_numpy(x[:]), torch.from_numpy(y[:]))
    if settings["indexed"] == "rows":
        loader = DataLoader(dataset, batch_size=BATCH, shuffle=True)
    else:
        loader = DataLoader(dataset, batch_size=None, sampler=BatchSampler(RandomSampler(dataset), BATCH, False))
    return lambda number: loader


def without_batches() -> str:
    import dtrain

    return "" if hasattr(dtrain, "batches") else "this dtrain has no dtrain.batches"


def ours(facts: Facts, settings: Settings) -> Passes:
    import dtrain

    samples = dtrain.open_samples(facts["path"], inputs=["x"], targets=["y"], split={"val": 0.0, "test": 0.0})
    chosen = {"reader": settings["reader"], "memory": settings["memory"], "cache": "0"}

    def batches(number: int) -> Batches:
        for (x,), y in dtrain.batches(samples, batch_size=BATCH, epochs=1, seed=number, **chosen):
            yield x, y

    return batches


# The engines, and what is swept --------------------------------------------------------------------------------------

WORKERS: list[Settings] = [{"workers": n} for n in (0, 1, 2)]
PIPELINES: list[Settings] = [{"pipeline": "zarrs"}, {"pipeline": "zarr"}]
BLOCK: list[Settings] = [{"block": 16_384}, {"block": 4096}]
WINDOWS = "all rows within windows of 65,536"
MESSAGES: list[Settings] = [
    {"workers": 0, "message": BATCH},
    {"workers": 1, "message": 4096},
    {"workers": 2, "message": 4096},
    {"workers": 2, "message": BATCH},
]
LITDATA = {"prepare": litdata, "convert": litdata_convert, "modules": ("litdata",), "role": "own"}
CHUNKS: list[Settings] = [{"chunk": 16_384}, {"chunk": 4096}, {"chunk": 65_536}]
FRAMES = {"compression": "zstd", "level": None, "batch_decode": "auto"}
FILES = {"compression": "zstd", "level": "chunk", "batch_decode": "all"}
PLAIN = {"compression": None, "level": None, "batch_decode": "all"}

ENGINES = {
    **{
        f"decode-{name}": Engine(
            f"limit: decode with {name}",
            "none",
            decode,
            axes=[[{"pipeline": name}], [*BLOCK, {"block": 65_536}], [{"threads": 1}, {"threads": None}]],
            modules=("zarrs",),
            role="decode",
        )
        for name in ("zarr", "zarrs")
    },
    "gather": Engine(
        "limit: gather",
        WINDOWS,
        gather,
        axes=[[{"by": "index_select"}, {"by": "take"}]],
        role="gather",
    ),
    "dtrain": Engine(
        "dtrain",
        "units in random order, rows within a staggered window of units",
        ours,
        axes=[[{"reader": "auto"}, {"reader": "zarr"}, {"reader": "zarrs"}]],
        modules=("dtrain", "dtrain.data.source", "zarrs"),
        missing=without_batches,
    ),
    "blocks": Engine(
        "DataLoader over blocks, by hand",
        f"blocks in random order, {WINDOWS} (of each worker)",
        block_loader,
        axes=[
            MESSAGES,
            [{"readers": 2}, {"readers": 1}, {"readers": 0}],
            BLOCK,
            [{"threads": None}, {"threads": 1}],
            PIPELINES,
        ],
        modules=("zarrs",),
    ),
    "blocks-small": Engine(
        "DataLoader over small blocks, by hand",
        f"blocks of 1,024 rows in random order, {WINDOWS} (of each worker)",
        block_loader,
        axes=[
            [{"block": 1024}],
            [{"workers": 0, "message": BATCH}],
            [{"readers": 2}, {"readers": 1}, {"readers": 0}],
            [{"threads": None}, {"threads": 1}],
            PIPELINES,
        ],
        modules=("zarrs",),
        layouts=("sharded",),  # smaller than the chunks of the other
    ),
    "xbatcher": Engine(
        "xbatcher, its batches",
        "batches in random order, the 256 rows of each consecutive",
        xbatcher,
        axes=[[{"patch": BATCH}], WORKERS, PIPELINES, [{"dask": False}, {"dask": True}]],
        modules=("zarrs", "xarray", "xbatcher.loaders.torch"),
    ),
    "xbatcher-blocks": Engine(
        "xbatcher, large batches cut by hand",
        f"large batches in random order, {WINDOWS}",
        xbatcher,
        axes=[[{"patch": 16_384}, {"patch": 4096}], WORKERS, PIPELINES, [{"dask": False}, {"dask": True}]],
        modules=("zarrs", "xarray", "xbatcher.loaders.torch"),
    ),
    "per-sample": Engine(
        "DataLoader, row by row",
        "full",
        per_sample,
        axes=[[{"sample": 2048}], [{"workers": 2}, {"workers": 1}, {"workers": 0}], PIPELINES],
        modules=("zarrs",),
    ),
    "litdata": Engine(
        "litdata",
        "chunks of its format in random order, runs of 256 rows within a chunk, rows within a run (its default)",
        axes=[[{"window": None}], [FRAMES, FILES, PLAIN], MESSAGES, CHUNKS],
        **LITDATA,
    ),
    "litdata-full": Engine(
        "litdata, full shuffle of a chunk",
        "chunks of its format in random order, all rows within a chunk",
        axes=[[{"window": "full"}], [FILES, PLAIN], MESSAGES, CHUNKS],
        **LITDATA,
    ),
    "memory": Engine(
        "TensorDataset in memory",
        "full",
        in_memory,
        axes=[[{"indexed": "batches"}, {"indexed": "rows"}]],
        modules=("zarrs",),
        role="own",
    ),
}


# One process ---------------------------------------------------------------------------------------------------------


class Pass:
    """The label and the first feature of each row that a pass delivered, in order, and what it took."""

    def __init__(self, rows: int) -> None:
        # written to, so that the pages are there before memory is counted
        self.labels, self.firsts = np.full(rows, -1, np.int64), np.full(rows, -1, np.float32)
        self.rows = 0
        self.seconds = self.cpu = 0.0

    def take(self, batches: Batches, look: bool) -> None:
        before, began, at = core_seconds(), time.perf_counter(), 0
        for x, y in batches:
            stop = at + len(y)
            if look:
                self.labels[at:stop] = y.numpy()
                self.firsts[at:stop] = x[:, 0].numpy()
            at = stop
        self.seconds, self.rows = time.perf_counter() - began, at
        self.cpu = core_seconds() - before

    def check(self, expected: np.ndarray) -> None:
        """Raise unless each expected row came exactly once, with its own label."""
        if self.rows != len(expected):
            raise AssertionError(f"{self.rows} rows came of {len(expected)}.")
        if not np.array_equal(np.sort(self.labels), expected):
            raise AssertionError("Some rows came twice, others not at all.")
        if not np.array_equal(self.firsts, stores.first_column(self.labels)):
            raise AssertionError("Rows came with the labels of others.")

    def mixed(self) -> float:
        """Return from how many different runs of 4,096 rows a batch comes, on average."""
        runs = np.sort(self.labels[: self.rows // BATCH * BATCH].reshape(-1, BATCH) // RUN, axis=1)
        return float((1 + (np.diff(runs, axis=1) != 0).sum(axis=1)).mean())


def core_seconds() -> float:
    """Return user + system time of this process, and of those that it has started and that are running."""
    workers = family(psutil.Process())[1:]
    return time.process_time() + sum(sum(worker.cpu_times()[:2]) for worker in workers)


def say(event: str, **values: Any) -> None:
    print("\n@" + json.dumps({"event": event, **values}), flush=True)


def child(task: Facts) -> None:
    engine, facts, settings = ENGINES[task["engine"]], task["store"], task["settings"]
    torch.set_num_threads(1)  # tensors are only copied here; threads that spin while they wait take the cores
    if task["convert"]:
        assert engine.convert is not None
        say("done", **engine.convert(facts, settings))
        return
    for name in engine.modules:
        importlib.import_module(name)
    if reason := engine.missing():
        say("left out", reason=reason)
        return
    expected = sampled(facts, settings)
    made = [Pass(len(expected)) for _ in range(1 + TIMED_PASSES)]
    memory = psutil.Process().memory_info()
    say("ready", rss=memory.rss, private=memory.rss - getattr(memory, "shared", 0))
    began = time.perf_counter()
    passes = engine.prepare(facts, settings)
    prepared = time.perf_counter() - began
    made[0].take(passes(0), look=True)
    done = 1
    while done <= TIMED_PASSES and sum(one.seconds for one in made[1:done]) < ENOUGH_SECONDS:
        made[done].take(passes(done), look=engine.role != "decode")
        done += 1
    say("passed")
    for one in made[: 1 if engine.role == "decode" else done]:
        if engine.role != "gather":
            one.check(expected)
    say(
        "done",
        rows=len(expected),
        passes=[{"seconds": one.seconds, "cpu": one.cpu} for one in made[1:done]],
        seconds=statistics.median(one.seconds for one in made[1:done]),
        cpu=statistics.median(one.cpu for one in made[1:done]),
        first_seconds=prepared + made[0].seconds,
        mixed=made[0].mixed(),
        sum_y=int(made[0].labels.sum()),
        sum_x0=float(made[0].firsts.sum(dtype=np.float64)),
    )


class Peak(threading.Thread):
    """Samples the resident bytes of a process and its children."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process = psutil.Process(pid)
        self.rss = self.private = 0
        self.over = threading.Event()

    def run(self) -> None:
        members, count = [self.process], 0
        while not self.over.wait(0.05):
            if count % 5 == 0:
                members = family(self.process)
            count += 1
            rss = private = 0
            for member in members:
                try:
                    memory = member.memory_info()
                except psutil.Error:
                    continue
                rss += memory.rss
                private += memory.rss - getattr(memory, "shared", 0)
            self.rss, self.private = max(self.rss, rss), max(self.private, private)


def family(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return [process]


def stop(pid: int) -> None:
    """End a process and its children."""
    try:
        members = family(psutil.Process(pid))
    except psutil.Error:
        return
    for member in reversed(members):
        try:
            member.kill()
        except psutil.Error:
            continue


def run(name: str, facts: Facts, settings: Settings, timeout: float, convert: bool = False) -> Facts:
    """Run one engine in a process of its own and return what it measured, or why it failed or was left out."""
    task = json.dumps({"engine": name, "store": facts, "settings": settings, "convert": convert})
    events: dict[str, Facts] = {}
    peak: Peak | None = None
    expired = threading.Event()
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, __file__, "--child", task],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {"TMPDIR": folder},
        )
        timer = threading.Timer(timeout, lambda: (expired.set(), stop(process.pid)))
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith('@{"event"'):
                    continue
                event = json.loads(line[1:])
                events[event.pop("event")] = event
                if "ready" in events and peak is None:
                    peak = Peak(process.pid)
                    peak.start()
                if "passed" in events and peak is not None:
                    peak.over.set()
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                stop(process.pid)
                process.wait()
            if peak is not None:
                peak.over.set()
                peak.join()
        errors.seek(0)
        tail = errors.read()[-4000:]
    found = {"engine": name, "store": facts["layout"], "rows_of_store": facts["rows"], "settings": settings}
    if "left out" in events:
        return found | {"left out": events["left out"]["reason"]}
    if "done" not in events:
        return found | {"failed": f"no end after {timeout:g} s" if expired.is_set() else tail}
    if peak is not None:
        found["peak_rss"] = peak.rss - events["ready"]["rss"]
        found["peak_private"] = peak.private - events["ready"]["private"]
    return found | events["done"]


# All of them ---------------------------------------------------------------------------------------------------------


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def brief(settings: Settings) -> str:
    return " ".join(f"{name}={value}" for name, value in settings.items())


def cost(found: Facts) -> float:
    """Return what a sweep makes as small as it can be: seconds, or core-seconds for the limit, of the best pass."""
    key = "cpu" if ENGINES[found["engine"]].role in ("decode", "gather") else "seconds"
    return min((one[key] for one in found.get("passes", ())), default=float("inf"))


class Bench:
    """One invocation: the stores, the settings, and every run."""

    def __init__(self, arguments: argparse.Namespace, directory: Path) -> None:
        self.arguments, self.directory = arguments, directory
        self.cores = arguments.cores or available_cores()
        self.stores: dict[tuple[str, int], Facts] = {}
        self.runs: list[Facts] = []
        self.sweeps: list[Facts] = []
        self.conversions: list[Facts] = []
        self.settings: dict[str, Settings] = {}
        self.out: set[str] = set()

    def store(self, layout: str, gigabytes: float) -> Facts:
        rows = stores.rows_of(gigabytes)
        if (layout, rows) not in self.stores:
            log(f"store: {layout}, {rows:,} rows")
            self.stores[layout, rows] = stores.store(self.directory, layout, rows)
        return self.stores[layout, rows]

    def defaults(self, name: str) -> Settings:
        chosen: Settings = {key: value for axis in ENGINES[name].axes for key, value in axis[0].items()}
        if name == "dtrain":
            chosen["memory"] = self.arguments.memory
        if name == "per-sample" and self.arguments.quick:
            chosen["sample"] = BATCH
        return chosen

    def once(self, name: str, facts: Facts, settings: Settings) -> Facts:
        """Convert if that is needed, run, and tell."""
        if ENGINES[name].convert is not None:
            marker = litdata_folder(facts, settings).with_suffix(".json")
            if not marker.exists():
                made = run(name, facts, settings, self.arguments.timeout, convert=True)
                if "seconds" not in made:
                    return self.tell(made)
                kept = {key: settings[key] for key in ("chunk", "compression", "level")}
                marker.write_text(json.dumps(made | {"settings": kept}))
                log(f"  {name}: {facts['rows']:,} rows converted in {made['seconds']:.1f} s, {brief(kept)}")
            if (made := json.loads(marker.read_text())) not in self.conversions:
                self.conversions.append(made)
        return self.tell(run(name, facts, settings, self.arguments.timeout))

    def tell(self, found: Facts) -> Facts:
        where = f"  {found['engine']} [{found['store']}] {brief(found['settings'])}: "
        if "left out" in found:
            log(where + f"left out, {found['left out']}")
            self.out.add(found["engine"])
        elif "failed" in found:
            log(where + f"FAILED\n{found['failed']}")
        else:
            log(
                where + f"{found['rows'] / found['seconds']:,.0f} samples/s, {found['seconds']:.2f} s, "
                f"{found['cpu']:.2f} core-seconds, {found['peak_rss'] / 1e6:.0f} MB"
            )
        return found

    def sweep(self, name: str, facts: Facts) -> Settings:
        """Return the best settings, found one axis after the other."""
        best, least = self.defaults(name), float("inf")
        for axis in ENGINES[name].axes:
            start = best
            for values in axis if len(axis) > 1 else ():
                tried = start | values
                if tried == start and least < float("inf"):
                    continue  # it has been measured on an axis before
                found = self.once(name, facts, tried)
                if "left out" in found:
                    return best
                self.sweeps.append(found)
                if cost(found) < least:
                    best, least = tried, cost(found)
        return best

    def measure(self) -> None:
        arguments = self.arguments
        names = [name for name in ENGINES if name in arguments.engines]
        places = [
            (name, layout)
            for layout in arguments.stores
            for name in names
            if ENGINES[name].role != "own" and layout in ENGINES[name].layouts
        ]
        places += [(name, arguments.stores[0]) for name in names if ENGINES[name].role == "own"]
        earlier = json.loads(Path(arguments.settings).read_text())["settings"] if arguments.settings else {}
        for name, layout in places:
            key = f"{name} {layout}"
            if key in earlier:
                self.settings[key] = earlier[key]
            elif arguments.quick or arguments.no_sweep:
                self.settings[key] = self.defaults(name)
            elif name not in self.out:
                self.settings[key] = self.sweep(name, self.store(layout, min(arguments.sweep_gb, arguments.gb)))
        self.write()
        full = {layout: self.store(layout, arguments.gb) for layout in arguments.stores}
        for repeat in range(arguments.repeats):
            log(f"repetition {repeat + 1} of {arguments.repeats}")
            first = repeat * len(places) // arguments.repeats
            for name, layout in places[first:] + places[:first]:
                if name not in self.out:
                    found = self.once(name, full[layout], self.settings[f"{name} {layout}"])
                    self.runs.append(found | {"repeat": repeat})
            self.write()

    def medians(self, name: str, layout: str) -> Facts:
        """Return the medians of an engine, or nothing if it has not run."""
        own = ENGINES[name].role == "own"
        runs = [r for r in self.runs if r["engine"] == name and (own or r["store"] == layout) and "seconds" in r]
        if not runs:
            return {}
        rates = [r["rows"] / r["seconds"] for r in runs]
        found = {
            "engine": name,
            "store": layout,
            "samples_per_second": statistics.median(rates),
            "least": min(rates),
            "most": max(rates),
            "settings": runs[0]["settings"],
            "rows": runs[0]["rows"],
        }
        for key in ("cpu", "mixed", "peak_rss", "peak_private"):
            found[key] = statistics.median(r[key] for r in runs)
        return found

    def limits(self) -> dict[str, float]:
        """Return the limit in seconds by layout."""
        found = {}
        for layout in self.arguments.stores:
            decoded = [m["cpu"] for name in ("decode-zarr", "decode-zarrs") if (m := self.medians(name, layout))]
            gathered = self.medians("gather", layout)
            if decoded and gathered:
                found[layout] = (min(decoded) + gathered["cpu"]) / self.cores
        return found

    def summary(self) -> list[Facts]:
        limits, rows = self.limits(), stores.rows_of(self.arguments.gb)
        found = []
        for layout in self.arguments.stores:
            for name in ENGINES:
                if ENGINES[name].role in ("reader", "own") and (medians := self.medians(name, layout)):
                    if layout in limits:
                        medians["share_of_limit"] = medians["samples_per_second"] * limits[layout] / rows
                    found.append(medians)
        return found

    def failures(self) -> list[str]:
        return sorted({f"{r['engine']} on the {r['store']} store" for r in self.runs if "failed" in r})

    def report(self) -> None:
        limits, rows, summary = self.limits(), stores.rows_of(self.arguments.gb), self.summary()
        for layout in self.arguments.stores:
            facts = self.store(layout, self.arguments.gb)
            size, stored = facts["bytes"] / 1e9, facts["stored_bytes"] / 1e9
            print(f"\n## {layout}: {rows:,} rows, {size:.2f} GB, {stored:.2f} GB stored\n")
            if layout in limits:
                roles = [name for name in ENGINES if ENGINES[name].role in ("decode", "gather")]
                parts = [f"{name} {m['cpu']:.2f}" for name in roles if (m := self.medians(name, layout))]
                print(
                    f"Limit on {self.cores} cores: {limits[layout]:.2f} s, {rows / limits[layout]:,.0f} samples/s "
                    f"(core-seconds: {', '.join(parts)}).\n"
                )
            columns = ("samples/s (least to most)", "share of the limit", "core-s", "peak MB (private)", "mixed")
            print(f"| engine | {' | '.join(columns)} | settings |")
            print(f"|---|{'---:|' * len(columns)}---|")
            for m in (m for m in summary if m["store"] == layout):
                cells = [
                    ENGINES[m["engine"]].title,
                    f"{m['samples_per_second']:,.0f} ({m['least']:,.0f} to {m['most']:,.0f})",
                    f"{m['share_of_limit']:.2g}" if "share_of_limit" in m else "",
                    f"{m['cpu'] * rows / m['rows']:,.3g}",
                    f"{m['peak_rss'] / 1e6:,.0f} ({m['peak_private'] / 1e6:,.0f})",
                    f"{m['mixed']:.1f}",
                    brief(m["settings"]),
                ]
                print(f"| {' | '.join(cells)} |")
        print("\nHow each shuffles:\n")
        for name in [name for name in ENGINES if any(m["engine"] == name for m in summary)]:
            print(f"- {ENGINES[name].title}: {ENGINES[name].shuffle}.")
        notes = [
            f"Before, in {made['seconds']:.0f} s: {made['stored_bytes'] / 1e9:.2f} GB in litdata's format, "
            f"{brief(made['settings'])}."
            for made in self.conversions
            if made["rows_of_store"] == rows
        ]
        if any(m["engine"] == "per-sample" for m in summary):
            notes.append(f"{ENGINES['per-sample'].title}: measured on a random sample of the rows.")
        notes += [f"FAILED: {failure}." for failure in self.failures()]
        notes += [f"Left out: {name}." for name in sorted(self.out)]
        print("\n" + "\n".join(notes))

    def write(self) -> None:
        """Write all that has been measured so far."""
        if self.arguments.json:
            private = ("dir", "json", "plot", "settings", "child")
            found = {
                "arguments": {key: value for key, value in vars(self.arguments).items() if key not in private},
                "machine": {"cores": self.cores, "system": platform.system(), "architecture": platform.machine()},
                "versions": {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES},
                "settings": self.settings,
                "limit_seconds": self.limits(),
                "summary": self.summary(),
                "conversions": self.conversions,
                "sweeps": self.sweeps,
                "runs": self.runs,
            }
            Path(self.arguments.json).write_text(json.dumps(found, indent=1) + "\n")


def plot(summary: list[Facts], file: str) -> None:
    """Draw the shares of the limit, one panel a store."""
    try:
        import matplotlib
    except ImportError:
        log("matplotlib is not installed: no plot")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    summary = [m for m in summary if "share_of_limit" in m]
    layouts = list(dict.fromkeys(m["store"] for m in summary))
    if not layouts:
        log("no limit was measured: no plot")
        return
    names = [name for name in ENGINES if any(m["engine"] == name for m in summary)][::-1]
    size = (3 + 4 * len(layouts), 1 + 0.4 * len(names))
    figure, panels = pyplot.subplots(1, len(layouts), figsize=size, sharey=True, squeeze=False)
    for panel, layout in zip(panels[0], layouts, strict=True):
        shown = [m for m in summary if m["store"] == layout]
        shares = [m["share_of_limit"] for m in shown]
        colours = ["#c44e52" if m["engine"] == "dtrain" else "#8c9bb0" for m in shown]
        bars = panel.barh([names.index(m["engine"]) for m in shown], shares, color=colours)
        panel.bar_label(bars, [f"{share:.2g}" for share in shares], padding=3)
        panel.axvline(1, color="black", linestyle="--", linewidth=1)
        panel.set_yticks(range(len(names)), [ENGINES[name].title for name in names])
        panel.set_title(f"{layout} store")
        panel.set_xlabel("share of the limit of the cores")
        panel.set_xlim(0, max(1.05, *(1.2 * share for share in shares)))
    figure.tight_layout()
    figure.savefig(file)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.0, help="decoded size of each store")
    parser.add_argument("--dir", help="where the stores are, or are written; default: temporary, removed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--stores", nargs="+", choices=stores.LAYOUTS, default=list(stores.LAYOUTS))
    parser.add_argument("--sweep-gb", type=float, default=0.5, help="decoded size of the stores for the sweeps")
    parser.add_argument("--no-sweep", action="store_true", help="take the first value of every setting")
    parser.add_argument("--settings", help="take the settings that an earlier run wrote with --json")
    parser.add_argument("--memory", default="512MB", help="dtrain's memory budget")
    parser.add_argument("--cores", type=int, help="for the limit; default: those this process may use")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for one process")
    parser.add_argument("--json", help="write every run here")
    parser.add_argument("--plot", help="draw the shares of the limit here (.svg, .png)")
    parser.add_argument("--quick", action="store_true", help="0.25 GB, one repetition, no sweeps: a minute or two")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(json.loads(arguments.child))
        return
    if arguments.quick:
        arguments.gb, arguments.repeats = min(arguments.gb, 0.25), 1
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(arguments.dir or temporary)
        directory.mkdir(parents=True, exist_ok=True)
        bench = Bench(arguments, directory)
        bench.measure()
        bench.report()
        if arguments.plot:
            plot(bench.summary(), arguments.plot)
    sys.exit(1 if bench.failures() else 0)


if __name__ == "__main__":
    main()
