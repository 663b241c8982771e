"""The stores that the benchmarks read: written once, checked when they are used again.

Every store holds ``x``, float32 [sample, 256], and ``y``, int64 [sample], in one of two layouts:

chunked
    Chunks of 4,096 rows, 4 MB of ``x``, blosc-lz4 with byte shuffle.
sharded
    Shards of 16,384 rows made of chunks of 256 rows, zstd: the compressor that Zarr 3 takes if it is told nothing.

``x`` is a gradient along the features and a slow one along the samples plus normal noise, rounded to 10 bits of
mantissa as archives of measured and simulated fields do: blosc-lz4 makes it 1.7 times smaller, zstd 1.8 times. ``y`` is
the number of the row and ``x[:, 0]`` a hash of it, so that a benchmark can prove that every row was delivered exactly
once, and with its own label.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, ZstdCodec

FEATURES = 256
ROW_BYTES = 4 * FEATURES
SHARD = 16_384
LAYOUTS: dict[str, dict[str, Any]] = {
    "chunked": {"chunk": 4096, "shard": None, "codec": BloscCodec(cname="lz4", clevel=5, shuffle="shuffle")},
    "sharded": {"chunk": 256, "shard": SHARD, "codec": ZstdCodec()},
}
VERSION = 1
MANTISSA = 10
BLOCK = 4 * SHARD


def rows_of(gigabytes: float) -> int:
    """Return how many rows make up a store of about this size decoded: whole shards."""
    return max(1, int(gigabytes * 1e9 / ROW_BYTES) // SHARD) * SHARD


def first_column(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return ``x[:, 0]`` of the rows with these labels: 16 bits of a hash, exact in float32."""
    hashed = (labels.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(48)
    return hashed.astype(np.float32) / np.float32(65_536)


def blocks(rows: int, seed: int = 0) -> Iterator[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """Yield first row, ``x`` and ``y`` of each block of a store."""
    ramp = np.linspace(0, 40, FEATURES, dtype=np.float32)
    half = np.uint32(1 << (22 - MANTISSA))
    mask = np.uint32(0xFFFFFFFF << (23 - MANTISSA) & 0xFFFFFFFF)
    for start in range(0, rows, BLOCK):
        y = np.arange(start, min(start + BLOCK, rows), dtype=np.int64)
        x = np.random.default_rng((seed, start)).standard_normal((len(y), FEATURES), dtype=np.float32)
        x *= np.float32(5)
        x += ramp
        x += np.float32(5) * np.sin(y / 10_000).astype(np.float32)[:, None]
        bits = x.view(np.uint32)
        bits += half
        bits &= mask
        x[:, 0] = first_column(y)
        yield start, x, y


def store(directory: Path, layout: str, rows: int) -> dict[str, Any]:
    """Write the store, unless it is there, and return its facts: path, rows, bytes on disk, checksums."""
    path = directory / f"{layout}-{rows}.zarr"
    facts = path / "facts.json"
    if facts.exists():
        found: dict[str, Any] = json.loads(facts.read_text())
        if found["version"] == VERSION:
            return found | {"path": str(path)}
    shutil.rmtree(path, ignore_errors=True)
    began = time.perf_counter()
    chunk, shard, codec = LAYOUTS[layout]["chunk"], LAYOUTS[layout]["shard"], LAYOUTS[layout]["codec"]
    group = zarr.create_group(path)
    x, y = (
        group.create_array(
            name,
            shape=(rows, *rest),
            dtype=dtype,
            chunks=(chunk, *rest),
            shards=None if shard is None else (shard, *rest),
            compressors=codec,
            dimension_names=("sample", "feature")[: 1 + len(rest)],
        )
        for name, dtype, rest in (("x", "float32", (FEATURES,)), ("y", "int64", ()))
    )
    total = 0.0
    with zarr.config.set({"array.write_empty_chunks": True}):
        for start, values, labels in blocks(rows):
            x[start : start + len(labels)] = values
            y[start : start + len(labels)] = labels
            total += float(values[:, 0].sum(dtype=np.float64))
    found = {
        "version": VERSION,
        "layout": layout,
        "rows": rows,
        "bytes": rows * (ROW_BYTES + 8),
        "stored_bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "sum_y": rows * (rows - 1) // 2,
        "sum_x0": total,
        "write_seconds": time.perf_counter() - began,
    }
    facts.write_text(json.dumps(found, indent=1))
    return found | {"path": str(path)}
