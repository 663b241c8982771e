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
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from dtrain.data.plan.grid import chunks_touched, shards_of, touched
from dtrain.data.plan.missing import AbsentChunks, absence_of
from dtrain.data.plan.splits import Runs
from dtrain.data.read.faults import chunk_missing, some_missing
from dtrain.data.read.local import facts_of
from dtrain.data.read.open import array_gone, open_arrays
from dtrain.data.read.shards import ArrayLike, missing_chunks, shard_layout
from dtrain.data.read.store import ReadStore, key_of, names_of
from dtrain.data.read.tree import kind_at
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import Samples
from dtrain.data.variable import Select, Variable
from dtrain.errors import ChunkMissing, StoreForbidden
from dtrain.urls import REDACTED, has_secret

MANY_OBJECTS, SOME_OBJECTS = 100_000, 256
"""Of so many objects, some are looked for first."""
CONCURRENT_REQUESTS = 32
COMPARED_BYTES = 1 << 16
"""Of an object behind a URL with a query: they tell other data from a renewed signature."""
LINES_TOGETHER = 1024
"""Lines of a digest that are hashed at once."""
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


def check_presence(
    samples: Samples, *, full: bool = False, missing: Mapping[str, Sequence[int]] | None = None
) -> dict[str, AbsentChunks]:
    """Look for every chunk that will be read, and refuse one that is a fault (`absence_of`).

    Returns, by variable, the chunks that are not there and are no fault.

    Parameters
    ----------
    samples : Samples
    full : bool
        Look into every shard, also of a remote store with very many.
    missing : mapping, optional
        By variable: the stored objects that are not there, where they have been looked up (`look_up`).

    Raises
    ------
    ChunkMissing, NonFiniteData
        Names the array and the first missing chunk.
    DataNotFound
        An array has gone of which consolidated metadata still speak.
    """
    store, arrays = open_arrays(samples)
    counts = {}
    for variable in samples.stored:
        chunks, objects, first = 0, 0, None
        known = (missing or {}).get(variable.name)
        for gone in absent_chunks(samples, store, arrays, variable, full=full, missing=known):
            first, chunks, objects = first or gone, chunks + gone.chunks, objects + (gone.inner is None)
        if first is None:
            continue
        if _is_fault(samples, variable):
            raise chunk_missing(samples, variable, first.key, objects, first.inner)
        counts[variable.name] = AbsentChunks(chunks, chunks_read(samples, variable))
        if chunks == counts[variable.name].of and kind_at(store, arrays[variable.name].path) is None:
            raise array_gone(samples.path, variable.name)
    return counts


def check_some(samples: Samples) -> None:
    """Refuse a local store of very many objects, if one of some of them is not there and that is a fault.

    To look for all of them takes minutes, also where metadata only claim that there are so many.

    Raises
    ------
    ChunkMissing
    """
    if not samples.store.is_local:
        return
    for variable in samples.stored:
        if variable.num_objects > MANY_OBJECTS and _is_fault(samples, variable):
            array = open_arrays(samples)[1][variable.name]
            if (gone := some_absent(samples, array, variable)) is not None:
                raise gone


def some_absent(samples: Samples, array: ArrayLike, variable: Variable) -> ChunkMissing | None:
    """Return the error for very many objects of a local store, if one of some of them is not there."""
    select = variable.select if variable.part_of else variable.selection(samples.first_row, samples.num_samples)
    along = touched(variable.objects, select)
    count = math.prod(map(len, along))
    if count <= MANY_OBJECTS:
        return None
    places = [place_of(along, i * (count - 1) // (SOME_OBJECTS - 1)) for i in range(SOME_OBJECTS)]
    names = (str(array.metadata.encode_chunk_key(place)) for place in places)
    found = list(facts_of(os.path.join(samples.path, array.path), names))
    gone = [place for place, seen in zip(places, found, strict=True) if seen is None]
    return some_missing(samples, variable, key_of(array, gone[0]), len(gone), len(found), count) if gone else None


def chunks_read(samples: Samples, variable: Variable) -> int:
    """Return the number of chunks of a variable that are read."""
    return math.prod(map(len, touched(variable.chunks, read_selection(samples, variable))))


def _is_fault(samples: Samples, variable: Variable) -> bool:
    """Return True if a chunk of a variable must not be missing."""
    absence = absence_of(samples, variable)
    return absence == "error" or (absence == "nan" and samples.config.non_finite == "error")


def absent_rows(samples: Samples) -> Runs:
    """Return the runs of rows for which a variable has no chunk: ``data.missing = "skip"`` leaves them out.

    Raises
    ------
    ChunkMissing, NonFiniteData
        A variable without the sample dimension lacks a chunk that is not judged to be the fill value.
    """
    store, arrays = open_arrays(samples)
    runs = []
    for variable in samples.stored:
        absence = absence_of(samples, variable)
        for chunk in absent_chunks(samples, store, arrays, variable, full=True):
            if absence == "skip":
                runs.append((chunk.start, chunk.stop))
            elif _is_fault(samples, variable):
                raise chunk_missing(samples, variable, chunk.key, 1, chunk.inner)
    return _merged(runs)


def absent_chunks(
    samples: Samples,
    store: ReadStore,
    arrays: Mapping[str, ArrayLike],
    variable: Variable,
    *,
    full: bool,
    missing: Sequence[int] | None = None,
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
    missing : sequence of int, optional
        The objects that are not there, by their number among those that are touched, where that is known.
    """
    array = arrays[variable.name]
    select = read_selection(samples, variable)
    along = touched(variable.objects, select)
    if missing is None:
        is_there = which_exist(store, array, variable, select)
    else:
        is_there = np.ones(math.prod(map(len, along)), bool)
        is_there[list(missing)] = False
    for number in np.flatnonzero(~is_there).tolist():
        place = place_of(along, number)
        yield replace(_absent_object(samples, array, variable, place), chunks=chunks_touched(variable, select, place))
    layout = shard_layout(array)
    if layout is None or (store.facts.read_ahead and len(is_there) > MAX_INDICES and not full):
        return
    for part, there in zip(shards_of(variable, select), is_there, strict=True):
        key = key_of(array, part.place)
        if there and (index := store.index(key, layout)) is not None:  # else it is damaged: the reader says so
            for inner in missing_chunks(part, index):
                yield Absent(variable, key, inner, *_rows_of(samples, variable, inner, variable.chunk_rows))


def read_selection(samples: Samples, variable: Variable) -> Select:
    """Return which part of a stored array is read; of the values of a sparse matrix, those of the selected rows."""
    if not variable.part_of:
        return variable.selection(samples.first_row, samples.num_samples)
    matrix = samples.variable(variable.part_of)
    if matrix.sparse is None or (samples.first_row, samples.num_samples) == (0, matrix.sparse.rows):
        return variable.select
    if variable == matrix.sparse.indptr:
        return ((samples.first_row, samples.num_samples + 1, 1),)
    starts = UnitReader(samples).sparse[matrix.name].starts
    return ((int(starts[0]), int(starts[-1]), 1),)


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


def _merged(runs: list[tuple[int, int]]) -> Runs:
    """Return runs of rows, ascending and without overlaps or neighbours."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(set(runs)):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def which_exist(store: ReadStore, array: ArrayLike, variable: Variable, select: Select) -> npt.NDArray[np.bool_]:
    """Return, for each stored object that a selection touches, True if it is there."""
    names = names_of(array, variable, select)
    prefix = f"{array.path}/" if array.path else ""
    if store.facts.has_marks:
        marks = store.marks(prefix + name for name in names)
        return np.fromiter((mark is not None for mark in marks), np.bool_)
    if store.facts.is_local:
        facts = facts_of(os.path.join(store.path, array.path), names)
        return np.fromiter((seen is not None and stat.S_ISREG(seen.st_mode) for seen in facts), np.bool_)
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


def content_digest(samples: Samples) -> dict[str, str]:
    """Return, by variable, a digest of the sizes or marks of its stored objects; nothing where there are neither.

    It tells a store that has been modified from one that has been copied or moved. A file that was overwritten by
    another one of exactly the same size is not noticed: the times of files say nothing, since a copy has its own.

    A run does not keep the query of a URL, which may be a signature or may name the data. There the digest is of what
    stands first in the first and the last object that are read: a renewed signature leads to the same, another data
    set to other bytes.
    """
    return look_up(samples)[0]


def look_up(samples: Samples) -> tuple[dict[str, str], dict[str, Sequence[int]]]:
    """Return, by variable, the digest of its stored objects, and which are missing; nothing if there are none."""
    has_facts, is_hidden = samples.store.is_local or samples.store.has_marks, has_secret(samples.path)
    if not (has_facts or is_hidden):
        return {}, {}
    store, arrays = open_arrays(samples)
    digests: dict[str, str] = {}
    missing: dict[str, Sequence[int]] = {}
    for variable in samples.stored:
        array, select = arrays[variable.name], read_selection(samples, variable)
        own, is_hidden_target = "", False
        if has_facts:
            own, missing[variable.name], is_hidden_target = _digest(store, array, names_of(array, variable, select))
        if is_hidden or is_hidden_target:
            own += _digest_of_bytes(store, array, variable, select)
        digests[variable.name] = own
    return digests, missing


def _digest_of_bytes(store: ReadStore, array: ArrayLike, variable: Variable, select: Select) -> str:
    """Return a digest of what stands first in the first and in the last of the objects that a selection touches."""
    along, digest = touched(variable.objects, select), hashlib.sha256()
    for number in sorted({0, math.prod(map(len, along)) - 1}) if all(along) else ():
        request = RangeByteRequest(0, COMPARED_BYTES)
        found = sync(store.get(key_of(array, place_of(along, number)), default_buffer_prototype(), request))
        digest.update(b"absent" if found is None else found[:COMPARED_BYTES].to_bytes())
    return digest.hexdigest()


def _digest(store: ReadStore, array: ArrayLike, names: Iterator[str]) -> tuple[str, NumberArray[int], bool]:
    """Return the digest of the sizes or marks of some objects, and which of them are missing, by their number.

    Last comes True where a mark is of a URL whose query it does not have.
    """
    prefix = f"{array.path}/" if array.path else ""
    own, again = itertools.tee(names)
    missing, hidden = NumberArray("q"), set[bool]()

    def line(number: int, name: str, known: tuple[bool, int | str]) -> str:
        is_there, mark = known
        hidden.add(isinstance(mark, str) and mark.endswith(REDACTED))
        if not is_there:
            missing.append(number)
        return f"{prefix}{name} {mark}\n"

    facts: Iterator[tuple[bool, int | str]]
    if store.facts.is_local:
        facts = map(_size_of, facts_of(os.path.join(store.path, array.path), again))
    else:
        facts = ((mark is not None, mark or -1) for mark in store.marks(prefix + name for name in again))
    lines = map(line, itertools.count(), own, facts)
    digest = hashlib.sha256()
    while some := "".join(itertools.islice(lines, LINES_TOGETHER)):
        digest.update(some.encode())
    return digest.hexdigest(), missing, True in hidden


def _size_of(seen: os.stat_result | None) -> tuple[bool, int]:
    """Return True if there is a file, and its size."""
    return seen is not None and stat.S_ISREG(seen.st_mode), -1 if seen is None else seen.st_size
