"""Which stored objects there are: looked up before training, since Zarr reads an absent one as the fill value."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import os
import stat
from array import array as NumberArray
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from zarr.core.sync import sync

from dtrain.data.plan.grid import shards_of, touched
from dtrain.data.read.faults import chunk_missing
from dtrain.data.read.local import facts_of
from dtrain.data.read.open import open_arrays
from dtrain.data.read.shards import ArrayLike, missing_chunks, shard_layout
from dtrain.data.read.store import ReadStore, key_of, names_of
from dtrain.data.samples import Samples, Select, Variable
from dtrain.errors import ChunkMissing, StoreForbidden

CONCURRENT_REQUESTS = 32
LINES_TOGETHER = 1024
"""Lines of a digest that are hashed at once."""
MAX_INDICES = 4096
"""If a remote store has more shards, their indices are looked at while they are read, not before training."""


@dataclass(frozen=True, slots=True)
class Absent:
    """A chunk that is not stored."""

    variable: Variable
    key: str
    """The key of the object, or of the shard that should hold the chunk."""
    inner: tuple[int, ...] | None
    """The place of the chunk in the grid of chunks, if it should be in a shard."""
    start: int
    """Its first row."""
    stop: int
    """The row after its last."""

    def error(self, path: str, count: int = 1) -> ChunkMissing:
        """Return the error that names it, and says how many objects are missing."""
        return chunk_missing(path, self.variable, self.key, count, self.inner)


def check_presence(samples: Samples, *, full: bool = False, objects: bool = True) -> None:
    """Check that every chunk that will be read is there.

    Parameters
    ----------
    samples : Samples
    full : bool
        Look into every shard, also of a remote store with very many.
    objects : bool
        False if stored objects have been looked up (`content_digest`): then only the chunks within shards are.

    Raises
    ------
    ChunkMissing
        Names the array and the first missing chunk.
    """
    store, arrays = open_arrays(samples)
    for variable in samples.variables:
        if missing := list(absent_chunks(samples, store, arrays, variable, full=full, objects=objects)):
            raise missing[0].error(samples.path, sum(chunk.inner is None for chunk in missing))


def absent_rows(samples: Samples) -> tuple[tuple[int, int], ...]:
    """Return the runs of rows for which a variable has no chunk: ``data.missing = "skip"`` leaves them out.

    Raises
    ------
    ChunkMissing
        A variable without the sample dimension lacks a chunk: no sample can do without it.
    """
    store, arrays = open_arrays(samples)
    runs = []
    for variable in samples.variables:
        for chunk in absent_chunks(samples, store, arrays, variable, full=True):
            if variable.is_static:
                raise chunk.error(samples.path)
            runs.append((chunk.start, chunk.stop))
    return _merged(runs)


def absent_chunks(
    samples: Samples,
    store: ReadStore,
    arrays: Mapping[str, ArrayLike],
    variable: Variable,
    *,
    full: bool,
    objects: bool = True,
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
    objects : bool
        False if all stored objects are known to be there.
    """
    array = arrays[variable.name]
    select = variable.selection(samples.first_row, samples.num_samples)

    along = touched(variable.objects, select)
    num_objects = math.prod(map(len, along))
    is_there = _which_exist(store, array, variable, select) if objects else np.ones(num_objects, bool)
    for number in np.flatnonzero(~is_there).tolist():
        yield _absent_object(samples, array, variable, place_of(along, number))
    layout = shard_layout(array)
    if layout is None or (store.facts.read_ahead and len(is_there) > MAX_INDICES and not full):
        return
    for part, there in zip(shards_of(variable, select), is_there, strict=True):
        key = key_of(array, part.place)
        if there and (index := store.index(key, layout)) is not None:  # else it is damaged: the reader says so
            for inner in missing_chunks(part, index):
                yield Absent(variable, key, inner, *_rows_of(samples, variable, inner, variable.chunk_rows))


def place_of(along: Sequence[Sequence[int]], number: int) -> tuple[int, ...]:
    """Return the place of an object by its number among those that a selection touches, in C order."""
    indices = np.unravel_index(number, [len(numbers) for numbers in along]) if along else ()
    return tuple(numbers[int(index)] for numbers, index in zip(along, indices, strict=True))


def _absent_object(samples: Samples, array: ArrayLike, variable: Variable, place: tuple[int, ...]) -> Absent:
    rows = 0 if variable.is_static else variable.object_rows
    return Absent(variable, key_of(array, place), None, *_rows_of(samples, variable, place, rows))


def _rows_of(samples: Samples, variable: Variable, place: tuple[int, ...], rows: int) -> tuple[int, int]:
    """Return the first row of an object or chunk of so many rows at a place, and the row after its last."""
    first = 0 if variable.is_static else place[variable.sample_axis] * rows
    return first, min(first + rows, samples.num_samples)


def _merged(runs: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return runs of rows, ascending and without overlaps or neighbours."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(set(runs)):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def _which_exist(store: ReadStore, array: ArrayLike, variable: Variable, select: Select) -> npt.NDArray[np.bool_]:
    """Return, for each stored object that a selection touches, True if it is there."""
    names = names_of(array, variable, select)
    if store.facts.is_local:
        facts = facts_of(os.path.join(store.path, array.path), names)
        return np.fromiter((seen is not None and stat.S_ISREG(seen.st_mode) for seen in facts), np.bool_)
    prefix = f"{array.path}/" if array.path else ""
    if store.facts.can_list:
        try:  # 8 bytes are kept of each key that is listed, since they may be millions
            listed = np.array(sync(_hashes(store.list_prefix(prefix))), np.int64)
            return np.isin(np.fromiter((hash(prefix + name) for name in names), np.int64), listed)
        except StoreForbidden:
            pass  # a bucket may be read and not listed

    async def look() -> list[bool]:
        limit = asyncio.Semaphore(CONCURRENT_REQUESTS)

        async def exists(name: str) -> bool:
            async with limit:
                return bool(await store.exists(prefix + name))

        answers: list[bool] = []
        while some := list(itertools.islice(names, 100 * CONCURRENT_REQUESTS)):
            answers += await asyncio.gather(*map(exists, some))
        return answers

    return np.array(sync(look()), np.bool_)


async def _hashes(keys: AsyncIterator[str]) -> NumberArray[int]:
    hashes = NumberArray("q")
    async for key in keys:
        hashes.append(hash(key))
    return hashes


def content_digest(samples: Samples, *, complete: bool = False) -> dict[str, str]:
    """Return, by variable, a digest of the sizes of its stored objects; nothing for a store that is not local.

    It tells a store that has been modified from one that has been copied or moved. A chunk that was overwritten by
    another one of exactly the same size is not told: the times of files say nothing, since a copy has its own.

    Parameters
    ----------
    samples : Samples
    complete : bool
        Check that every object is there, as `check_presence` does.

    Raises
    ------
    ChunkMissing
        An object of a local store is not there, and it should be `complete`.
    """
    if not samples.store.is_local:
        return {}
    store, arrays = open_arrays(samples)
    digests = {}
    for variable in samples.variables:
        array, select = arrays[variable.name], variable.selection(samples.first_row, samples.num_samples)
        digests[variable.name], missing = _digest(store, array, names_of(array, variable, select))
        if complete and missing:
            place = place_of(touched(variable.objects, select), missing[0])
            raise _absent_object(samples, array, variable, place).error(samples.path, len(missing))
    return digests


def _digest(store: ReadStore, array: ArrayLike, names: Iterator[str]) -> tuple[str, NumberArray[int]]:
    """Return the digest of the sizes of some objects, and which of them are missing, by their number."""
    prefix, folder = f"{array.path}/" if array.path else "", os.path.join(store.path, array.path)
    own, again = itertools.tee(names)
    missing = NumberArray("q")

    def line(number: int, name: str, seen: os.stat_result | None) -> str:
        if seen is None or not stat.S_ISREG(seen.st_mode):
            missing.append(number)
        return f"{prefix}{name} {-1 if seen is None else seen.st_size}\n"

    lines = map(line, itertools.count(), own, facts_of(folder, again))
    digest = hashlib.sha256()
    while some := "".join(itertools.islice(lines, LINES_TOGETHER)):
        digest.update(some.encode())
    return digest.hexdigest(), missing
