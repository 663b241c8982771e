"""Which stored objects there are: looked up before training, since Zarr reads an absent one as the fill value."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
from array import array as NumberArray
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from zarr.core.sync import sync

from dtrain.data.plan.grid import chunks_touched, shards_of, touched
from dtrain.data.plan.missing import AbsentChunks, absence_of
from dtrain.data.read.faults import chunk_missing
from dtrain.data.read.open import array_gone, open_arrays
from dtrain.data.read.shards import ArrayLike, missing_chunks, shard_layout
from dtrain.data.read.store import ReadStore, objects_of
from dtrain.data.read.tree import kind_at
from dtrain.data.samples import Samples, Variable
from dtrain.errors import StoreForbidden

CONCURRENT_REQUESTS = 32
MAX_INDICES = 4096
"""If a remote store has more shards, their indices are looked at while they are read, not before training."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A stored object that is not there, or a chunk that a shard does not have."""

    variable: Variable
    key: str
    """The key of the object, or of the shard that should hold the chunk."""
    inner: tuple[int, ...] | None
    """The place of the chunk in the grid of chunks, if it should be in a shard."""
    start: int
    """Its first row."""
    stop: int
    """The row after its last."""
    chunks: int = 1
    """How many chunks would be read of it."""


def check_presence(samples: Samples, *, full: bool = False) -> dict[str, AbsentChunks]:
    """Look for every chunk that will be read, and refuse one that is a fault (`absence_of`).

    Returns, by variable, the chunks that are not there and are no fault.

    Parameters
    ----------
    samples : Samples
    full : bool
        Look into every shard, also of a remote store with very many.

    Raises
    ------
    ChunkMissing, NonFiniteData
        Names the array and the first missing chunk.
    DataNotFound
        An array has gone of which consolidated metadata still speak.
    """
    store, arrays = open_arrays(samples)
    counts = {}
    for variable in samples.variables:
        chunks, objects, first = 0, 0, None
        for gone in absent_chunks(samples, store, arrays, variable, full=full):
            first, chunks, objects = first or gone, chunks + gone.chunks, objects + (gone.inner is None)
        if first is None:
            continue
        absence = absence_of(samples, variable)
        if absence == "error" or (absence == "nan" and samples.config.non_finite == "error"):
            raise chunk_missing(samples, variable, first.key, objects, first.inner)
        select = variable.selection(samples.first_row, samples.num_samples)
        counts[variable.name] = AbsentChunks(chunks, math.prod(map(len, touched(variable.chunks, select))))
        if chunks == counts[variable.name].of and kind_at(store, arrays[variable.name].path) is None:
            raise array_gone(samples.path, variable.name)
    return counts


def absent_rows(samples: Samples) -> tuple[tuple[int, int], ...]:
    """Return the runs of rows for which a variable has no chunk: ``data.missing = "skip"`` leaves them out.

    Raises
    ------
    ChunkMissing, NonFiniteData
        A variable without the sample dimension lacks a chunk that is not judged to be the fill value.
    """
    store, arrays = open_arrays(samples)
    runs = []
    for variable in samples.variables:
        absence = absence_of(samples, variable)
        for chunk in absent_chunks(samples, store, arrays, variable, full=True):
            if absence == "skip":
                runs.append((chunk.start, chunk.stop))
            elif absence == "error" or (absence == "nan" and samples.config.non_finite == "error"):
                raise chunk_missing(samples, variable, chunk.key, 1, chunk.inner)
    return _merged(runs)


def absent_chunks(
    samples: Samples, store: ReadStore, arrays: Mapping[str, ArrayLike], variable: Variable, *, full: bool
) -> Iterator[Absent]:
    """Yield the chunks of a variable that would be read and are not stored: objects, then inner chunks of shards.

    The store is listed once; where it cannot be listed, each object is looked for.

    Parameters
    ----------
    samples : Samples
    store, arrays
        Of the samples, opened by `open_arrays`.
    variable : Variable
    full : bool
        Look into every shard, also of a remote store with very many.
    """
    array = arrays[variable.name]
    select = variable.selection(samples.first_row, samples.num_samples)

    def keys() -> Iterator[str]:
        return (key for _, key in objects_of(array, variable, select))

    def absent(
        key: str, place: tuple[int, ...], rows: int, inner: tuple[int, ...] | None = None, chunks: int = 1
    ) -> Absent:
        first = 0 if variable.is_static else place[variable.sample_axis] * rows
        return Absent(variable, key, inner, first, min(first + rows, samples.num_samples), chunks)

    is_there = _which_exist(store, array, keys)
    for (place, key), there in zip(objects_of(array, variable, select), is_there, strict=True):
        if not there:
            rows = 0 if variable.is_static else variable.object_rows
            yield absent(key, place, rows, chunks=chunks_touched(variable, select, place))
    layout = shard_layout(array)
    if layout is None or (store.facts.read_ahead and len(is_there) > MAX_INDICES and not full):
        return
    for part, key, there in zip(shards_of(variable, select), keys(), is_there, strict=True):
        if there and (index := store.index(key, layout)) is not None:  # else it is damaged: the reader says so
            for inner in missing_chunks(part, index):
                yield absent(key, inner, variable.chunk_rows, inner)


def _merged(runs: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return runs of rows, ascending and without overlaps or neighbours."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(set(runs)):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def _which_exist(store: ReadStore, array: ArrayLike, keys: Callable[[], Iterator[str]]) -> npt.NDArray[np.bool_]:
    """Return, by key, True if it is stored. 8 bytes are kept of each key that is listed, since they may be millions."""
    if store.facts.can_list:
        try:
            listed = np.array(sync(_hashes(store.list_prefix(f"{array.path}/" if array.path else ""))), np.int64)
            return np.isin(np.fromiter(map(hash, keys()), np.int64), listed)
        except StoreForbidden:
            pass  # a bucket may be read and not listed

    async def look() -> list[bool]:
        limit = asyncio.Semaphore(CONCURRENT_REQUESTS)

        async def exists(key: str) -> bool:
            async with limit:
                return bool(await store.exists(key))

        answers: list[bool] = []
        todo = keys()
        while some := list(itertools.islice(todo, 100 * CONCURRENT_REQUESTS)):
            answers += await asyncio.gather(*map(exists, some))
        return answers

    return np.array(sync(look()), np.bool_)


async def _hashes(keys: AsyncIterator[str]) -> NumberArray[int]:
    hashes = NumberArray("q")
    async for key in keys:
        hashes.append(hash(key))
    return hashes


def content_digest(samples: Samples) -> dict[str, str]:
    """Return, by variable, a digest of the sizes of its stored objects; nothing for a store that is not local.

    It tells a store that has been modified from one that has been copied or moved.
    """
    if not samples.store.is_local:
        return {}
    store, arrays = open_arrays(samples)
    digests = {}
    for variable in samples.variables:
        select = variable.selection(samples.first_row, samples.num_samples)
        digest = hashlib.sha256()
        for _, key in objects_of(arrays[variable.name], variable, select):
            version = store.version(key)
            digest.update(f"{key} {-1 if version is None else version[0]}\n".encode())
        digests[variable.name] = digest.hexdigest()
    return digests
