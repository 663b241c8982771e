"""An engine is one way to deliver batches; here is its description, and functions that several engines use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import stores
import torch
import zarr

BATCH = 256
WINDOW = 65_536

Facts = dict[str, Any]
Settings = dict[str, Any]
Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]
Passes = Callable[[int], Batches]
"""Given the number of a pass, its batches."""

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


@dataclass(frozen=True)
class Conversion:
    """How the store is written again in an engine's own format, before it is read.

    Parameters
    ----------
    title : str
        The format's name.
    folder : callable
        Given a store and the settings, returns where the conversion lies.
    write : callable
        Given a store and the settings, writes it, and returns seconds and bytes.
    settings : tuple of str
        The settings that it depends on.
    """

    title: str
    folder: Callable[[Facts, Settings], Path]
    write: Callable[[Facts, Settings], Facts]
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """How one way to read is prepared, and which of its settings are swept.

    Parameters
    ----------
    title, shuffle : str
        Its name in the table, and how it shuffles.
    prepare : callable
        Given a store and the settings, returns the passes. Not timed.
    axes : list of list of dict
        Swept one after the other, the others at their best so far; the first of each holds without a sweep.
    modules : tuple of str
        Imported before memory is counted.
    role : str
        ``reader``; ``decode`` and ``gather`` make the limit; ``own`` reads no Zarr store, and runs once for both.
    conversion : Conversion, optional
        To the engine's own format.
    missing : callable
        Returns why the engine cannot run here, or nothing.
    layouts : tuple of str
        The stores that it reads.
    newest : bool
        Runs in the environment of requirements-newest.txt, which has no dtrain.
    """

    title: str
    shuffle: str
    prepare: Callable[[Facts, Settings], Passes]
    axes: list[list[Settings]]
    modules: tuple[str, ...] = ()
    role: str = "reader"
    conversion: Conversion | None = None
    missing: Callable[[], str] = field(default=lambda: "")
    layouts: tuple[str, ...] = tuple(stores.LAYOUTS)
    newest: bool = False


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
    """Cut messages of several batches into views of one batch each."""
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
