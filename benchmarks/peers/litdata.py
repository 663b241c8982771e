"""litdata, which reads a format of its own."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import stores
import torch

from peers.engine import MESSAGES, Conversion, Engine, Facts, Passes, Settings, open_arrays, split


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


CONVERSION = Conversion("litdata's format", litdata_folder, litdata_convert, ("chunk", "compression", "level"))
LITDATA = {"prepare": litdata, "conversion": CONVERSION, "modules": ("litdata",), "role": "own"}
CHUNKS: list[Settings] = [{"chunk": 16_384}, {"chunk": 4096}, {"chunk": 65_536}]
FRAMES = {"compression": "zstd", "level": None, "batch_decode": "auto"}
FILES = {"compression": "zstd", "level": "chunk", "batch_decode": "all"}
PLAIN = {"compression": None, "level": None, "batch_decode": "all"}


ENGINES = {
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
}
