"""Which stored objects there are: looked up before training, since Zarr reads an absent one as the fill value."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
from array import array as NumberArray
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from zarr.core.sync import sync

from dtrain.data.read.store import (
    ArrayLike,
    ReadStore,
    array_in,
    is_http,
    is_remote,
    open_group,
    selected_keys,
    shard_layout,
    shards_of,
    touched,
)
from dtrain.data.samples import Samples, Variable
from dtrain.errors import ChunkMissing, StoreForbidden

CONCURRENT_REQUESTS = 32
MAX_INDICES = 4096
"""Shards of a remote store that are asked for their index before training; of more, while they are read."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A chunk that is not stored."""

    variable: Variable
    key: str
    """Of the object, or of the shard that it should be in."""
    inner: tuple[int, ...] | None
    """Which chunk of the array it is, if it should be in a shard."""
    start: int
    """Its first row."""
    stop: int

    def error(self, path: str, count: int = 1) -> ChunkMissing:
        """Return what to say of it."""
        return chunk_missing(path, self.variable, self.key, count, self.inner)


def chunk_missing(
    path: str, variable: Variable, key: str, count: int = 1, inner: tuple[int, ...] | None = None
) -> ChunkMissing:
    """Return the error for a chunk that is not stored."""
    what = f"chunk {key} of {variable.name}" if inner is None else f"chunk {inner} of {variable.name}, in shard {key},"
    others = f" ({count:,} of {variable.num_objects:,} are)" if count > 1 else f" (1 of {variable.num_objects:,})"
    return ChunkMissing(
        f"{path}: {what} is missing{others if inner is None else ''}; Zarr would read it as the fill value.",
        'Repair the store. If it leaves out chunks that hold only the fill value: data.missing = "fill"; to leave '
        'out their samples: "skip".',
    )


def check_presence(samples: Samples, *, full: bool = False) -> None:
    """Check that every chunk that is to be read is there.

    Parameters
    ----------
    samples : Samples
    full : bool
        Look into every shard, also of a remote store with very many.

    Raises
    ------
    ChunkMissing
        Names the array and the first missing chunk.
    """
    for variable in samples.variables:
        if missing := list(absent_chunks(samples, variable, full=full)):
            raise missing[0].error(samples.path, sum(chunk.inner is None for chunk in missing))


def absent_rows(samples: Samples) -> tuple[tuple[int, int], ...]:
    """Return the runs of rows of which a variable has no chunk: what ``data.missing = "skip"`` leaves out.

    Raises
    ------
    ChunkMissing
        A variable without the sample dimension lacks a chunk: no sample can do without it.
    """
    runs = []
    for variable in samples.variables:
        for chunk in absent_chunks(samples, variable, full=True):
            if variable.is_static:
                raise chunk.error(samples.path)
            runs.append((chunk.start, chunk.stop))
    found: list[tuple[int, int]] = []
    for start, stop in sorted(set(runs)):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return tuple(found)


def absent_chunks(samples: Samples, variable: Variable, *, full: bool) -> Iterator[Absent]:
    """Yield the chunks of a variable that would be read and are not stored: objects, then inner chunks of shards.

    The store is listed once; where it cannot be listed, it is asked for each object.
    """
    group = open_group(samples.path, samples.config.group, samples.config.storage_options)
    array: Any = array_in(group, samples.path, variable.name)
    select = variable.selection(samples.first_row, samples.num_samples)

    def keys() -> Iterator[str]:
        return selected_keys(array, variable.objects, select)

    there = _which_exist(array, keys, samples.path)
    rows = variable.objects[variable.sample_axis] if not variable.is_static else 0
    for place, key, found in zip(itertools.product(*touched(variable.objects, select)), keys(), there, strict=True):
        if not found:
            first = 0 if variable.is_static else place[variable.sample_axis] * rows
            yield Absent(variable, key, None, first, min(first + rows, samples.num_samples))
    layout = shard_layout(array)
    if layout is None or (is_remote(samples.path) and len(there) > MAX_INDICES and not full):
        return
    store: ReadStore = array.store
    for shard, key, found in zip(shards_of(array, layout, select), keys(), there, strict=True):
        if not found:
            continue
        index = store.index(key, layout)
        if index is None:
            continue  # cut short: the reader says so
        for inner in shard.missing(index):
            first = 0 if variable.is_static else inner[variable.sample_axis] * variable.chunk_rows
            yield Absent(variable, key, inner, first, min(first + variable.chunk_rows, samples.num_samples))


def _which_exist(array: ArrayLike, keys: Callable[[], Iterator[str]], path: str) -> npt.NDArray[np.bool_]:
    """Return, by key, whether it is stored. Of keys that are listed 8 bytes are kept, as they may be millions."""
    if not is_http(path):
        try:
            listed = np.array(sync(_hashes(array.store.list_prefix(f"{array.path}/" if array.path else ""))), np.int64)
            return np.isin(np.fromiter(map(hash, keys()), np.int64), listed)
        except StoreForbidden:
            pass  # a bucket may be read and not listed

    async def look() -> list[bool]:
        limit = asyncio.Semaphore(CONCURRENT_REQUESTS)

        async def exists(key: str) -> bool:
            async with limit:
                return bool(await array.store.exists(key))

        found: list[bool] = []
        todo = keys()
        while some := list(itertools.islice(todo, 100 * CONCURRENT_REQUESTS)):
            found += await asyncio.gather(*map(exists, some))
        return found

    return np.array(sync(look()), np.bool_)


async def _hashes(keys: AsyncIterator[str]) -> NumberArray[int]:
    found = NumberArray("q")
    async for key in keys:
        found.append(hash(key))
    return found


def content_digest(samples: Samples) -> dict[str, str]:
    """Return, by variable, a digest of the sizes of its stored objects; nothing for a remote store.

    It tells a store that has been written again from one that has been copied or moved.
    """
    if is_remote(samples.path):
        return {}
    group = open_group(samples.path, samples.config.group)
    found = {}
    for variable in samples.variables:
        array: Any = array_in(group, samples.path, variable.name)
        select = variable.selection(samples.first_row, samples.num_samples)
        digest = hashlib.sha256()
        for key in selected_keys(array, variable.objects, select):
            try:
                size = os.stat(os.path.join(samples.path, key)).st_size
            except OSError:
                size = -1
            digest.update(f"{key} {size}\n".encode())
        found[variable.name] = digest.hexdigest()
    return found
