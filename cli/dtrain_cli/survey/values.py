"""What a bounded sample of an array's values says: a few chunks, spread over the array, never all of a large store."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import zarr

from dtrain.data.encoding import Array, Encoding, is_missing, unpack
from dtrain.data.read.bounded import bounded
from dtrain.data.read.extent import check_grid
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore, key_of
from dtrain.errors import ChunkUndecodable, DtrainError, one_line
from dtrain_cli.survey.roles import ArrayFacts, Contents

FEW_CHUNKS, MANY_CHUNKS = 3, 256
"""Chunks that are read of an array: three say enough of an input, classes are counted in more."""
SMALL_SAMPLE = 1 << 20
"""Of small chunks more are read, up to so many bytes and `SMALL_CHUNKS`."""
SMALL_CHUNKS = 256
SAMPLE_BYTES = 32 << 20
"""A sample has at most so many bytes, but for a single chunk."""
THREADS = 8
"""Of which each reads a chunk: a remote store answers several requests at once."""
LARGEST_CHUNK = 256 << 20
"""A larger chunk is not read."""
ALL_CHUNKS = 2048
"""After so many chunks of all arrays, one chunk of each further array is read."""
DISTINCT = 1 << 20
"""Distinct values are counted among so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """Decoded values of a sample of an array."""

    count: int = 0
    """Of the finite values; the numbers below are theirs."""
    is_whole: bool = False
    """True if the sample is the whole array."""
    minimum: float = math.nan
    maximum: float = math.nan
    mean: float = math.nan
    std: float = math.nan
    missing: int = 0
    """Values that are NaN or mark a missing value."""
    infinite: int = 0
    distinct: tuple[int, ...] = ()
    """The values of an array of integers, ascending."""
    are_integers: bool = False
    """True if the finite values are whole numbers, of whatever dtype."""


class Look(Protocol):
    """Return what a sample of an array's values says; `closely`: of more chunks."""

    def __call__(self, name: str, *, closely: bool = False) -> Values:
        """Return the values of the array of that name."""
        ...


class Sampler:
    """Reads samples, each once. It is a `Look`.

    Parameters
    ----------
    contents : Contents
    group : zarr.Group
        It holds the arrays.
    """

    def __init__(self, contents: Contents, group: zarr.Group) -> None:
        self._contents = contents
        self._group = group
        self._seen: dict[tuple[str, bool], Values] = {}
        self._chunks = 0

    def __call__(self, name: str, *, closely: bool = False) -> Values:
        """Return what a sample of an array's values says.

        Raises
        ------
        ChunkUndecodable
            One of its chunks cannot be decoded.
        UnsuitableVariable, ChunkTooLarge
            It claims what cannot be.
        """
        if (name, closely) not in self._seen:
            facts = self._contents.arrays[name]
            array = self._group[facts.at or name]
            assert isinstance(array, zarr.Array)
            array = bounded(array)
            sizes = array.shape, array.chunks, array.shards or array.chunks
            check_grid(self._contents.path, name, *sizes, facts.itemsize)
            most = MANY_CHUNKS if closely else few_chunks(math.prod(array.chunks) * facts.itemsize)
            most = most if self._chunks < ALL_CHUNKS else 1
            places = sample_places(array.shape, array.chunks, facts.itemsize, most)
            self._chunks += len(places)
            with ThreadPoolExecutor(THREADS) as pool:
                read = list(pool.map(partial(_read, self._contents.path, array), places))
            pairs = zip(places, read, strict=True)
            parts = [values for place, values in pairs if _says_something(facts, array, place, values)]
            total = math.prod(-(-n // size) for n, size in zip(array.shape, array.chunks, strict=True))
            self._seen[name, closely] = describe(facts, parts, is_whole=len(places) == total)
        return self._seen[name, closely]


def few_chunks(chunk_bytes: int) -> int:
    """Return how many chunks of an input are read.

    >>> few_chunks(100), few_chunks(100_000), few_chunks(10_000_000)
    (256, 10, 3)
    """
    return max(FEW_CHUNKS, min(SMALL_CHUNKS, SMALL_SAMPLE // max(1, chunk_bytes)))


def sample_places(shape: tuple[int, ...], chunks: tuple[int, ...], itemsize: int, most: int) -> list[tuple[slice, ...]]:
    """Return the selections of at most so many chunks, evenly spread over an array.

    >>> sample_places((10,), (4,), 8, 2)
    [(slice(0, 4, None),), (slice(8, 10, None),)]
    """
    grid = [-(-n // size) for n, size in zip(shape, chunks, strict=True)]
    chunk_bytes = math.prod(chunks) * itemsize
    if chunk_bytes > LARGEST_CHUNK:
        return []
    total = math.prod(grid)
    count = max(1, min(total, most, SAMPLE_BYTES // max(1, chunk_bytes)))
    numbers = [round(i * (total - 1) / max(1, count - 1)) for i in range(count)] if count > 1 else [total // 2]
    places = (np.unravel_index(number, grid) for number in numbers)
    return [
        tuple(
            slice(int(i) * size, min((int(i) + 1) * size, n)) for i, size, n in zip(place, chunks, shape, strict=True)
        )
        for place in places
    ]


def _read(path: str, array: ArrayLike, place: tuple[slice, ...]) -> Array:
    try:
        return np.asarray(array[place])
    except DtrainError:
        raise
    except Exception as error:
        rows = ", ".join(f"{part.start}:{part.stop}" for part in place)
        raise ChunkUndecodable(
            f"{path}: {array.basename}[{rows}] cannot be decoded: {one_line(error)}",
            "Restore it from a copy of the store.",
        ) from error


def _says_something(facts: ArrayFacts, array: ArrayLike, place: tuple[slice, ...], values: Array) -> bool:
    """Return False for a chunk of floats that is not stored, and was read as the fill value: that may be no value.

    Of shards, chunks of NaN alone are taken for such chunks.
    """
    if facts.kind != "f":
        return True
    if array.shards is not None:
        return values.dtype.kind != "f" or not bool(np.isnan(values).all())
    store = array.store
    key = key_of(array, tuple(part.start // size for part, size in zip(place, array.chunks, strict=True)))
    return not (isinstance(store, ReadStore) and store.is_absent(key))


def describe(facts: ArrayFacts, parts: list[Array], *, is_whole: bool) -> Values:
    """Return what the stored values of some chunks say, decoded."""
    if not parts:
        return Values()
    stored = np.concatenate([part.ravel() for part in parts])
    stored = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    values, missing = _decoded(stored, facts.encoding)
    is_finite = np.isfinite(values)
    finite = values[is_finite & ~missing]
    if not len(finite):
        return Values(is_whole=is_whole, missing=int(missing.sum()), infinite=int(np.isinf(values).sum()))
    some = finite[:: max(1, len(finite) // DISTINCT)]
    return Values(
        count=len(finite),
        is_whole=is_whole,
        minimum=float(finite.min()),
        maximum=float(finite.max()),
        mean=float(finite.mean(dtype=np.float64)),
        std=float(finite.std(dtype=np.float64)),
        missing=int(missing.sum()),
        infinite=int(np.isinf(values).sum()),
        distinct=tuple(np.unique(some).tolist()) if facts.is_integer else (),
        are_integers=bool((some == np.trunc(some)).all()) if some.dtype.kind == "f" else True,
    )


def _decoded(stored: Array, encoding: Encoding | None) -> tuple[Array, Array]:
    """Return decoded values, and where they are missing; an integer that marks a missing value stays what it is."""
    if encoding is None:
        return stored, np.isnan(stored) if stored.dtype.kind == "f" else np.zeros(stored.shape, bool)
    meant = stored.view(encoding.unsigned) if encoding.unsigned else stored
    missing = is_missing(meant, encoding)
    values = unpack(stored, encoding) if encoding.is_packed or stored.dtype.kind == "f" else meant
    return values, missing | (np.isnan(values) if values.dtype.kind == "f" else False)
