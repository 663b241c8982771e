"""What looking at all of a stored object needs: the facts of an array, the pieces of a shard, a store of one object."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from dtrain.data.plan.grid import ShardPart
from dtrain.data.read.codecs import Undecodable, chunk_format, has_checksums
from dtrain.data.read.readonly import ReadOnlyStore, part_of
from dtrain.data.read.shards import NO_CHUNK, ArrayLike, Index
from dtrain.data.variable import Variable

Place: TypeAlias = tuple[int, ...]

BLOCK_BYTES = 8 << 20
"""Bytes of a shard without a chunk are read in blocks of this size."""
MOST_OBJECTS = 10**8
"""Arrays of more stored objects, or of more chunks in a shard, are not looked at."""


def entries_in(part: ShardPart, index: Index) -> tuple[list[tuple[int, int, Place]], tuple[Place, ...]]:
    """Return where each chunk of a part lies in its shard (first byte, length, place), and which are not stored."""
    inside = index[np.ix_(*part.inside)].reshape(-1, 2).tolist()
    found = list(zip(inside, part.chunks(), strict=True))
    stored = [(start, length, place) for (start, length), place in found if start != NO_CHUNK]
    return stored, tuple(place for (start, _), place in found if start == NO_CHUNK)


def pieces(size: int, entries: Sequence[tuple[int, int, Place]]) -> Iterator[tuple[int, int, bool, Place | None]]:
    """Yield the pieces in which a shard of so many bytes is read, from its first byte to its last.

    Each is first byte, the byte after the last, whether all of it is read for the first time, and the chunk that it is.
    A chunk that lies within another one's bytes, or ends after the shard, is a piece of its own that is not new.

    >>> list(pieces(10, [(6, 2, (1,)), (0, 4, (0,))]))
    [(0, 4, True, (0,)), (4, 6, True, None), (6, 8, True, (1,)), (8, 10, True, None)]
    """
    done = 0
    for start, length, place in sorted(entries):
        if start < done or start + length > size:
            yield start, start + length, False, place
            continue
        yield from _blocks(done, start)
        yield start, start + length, True, place
        done = start + length
    yield from _blocks(done, size)


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int, bool, None]]:
    for first in range(start, stop, BLOCK_BYTES):
        yield first, min(first + BLOCK_BYTES, stop), True, None


class OneObject(ReadOnlyStore):
    """A store of one object that is in memory.

    Parameters
    ----------
    key : str
    value : memoryview
    """

    def __init__(self, key: str, value: memoryview) -> None:
        super().__init__()
        self._key, self._value = key, value

    def documents(self) -> tuple[str, ...]:
        """Return the keys of all metadata documents: there are none."""
        return ()

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return the object or a part of it; None for another one."""
        if key != self._key:
            return None
        start, stop = part_of(byte_range, len(self._value))
        return prototype.buffer.from_bytes(bytes(self._value[start:stop]))

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the key, if it begins so."""
        if self._key.startswith(prefix):
            yield self._key


def variable_of(array: ArrayLike) -> Variable:
    """Return what the metadata of an array say, without names and attributes.

    Raises
    ------
    Undecodable
        Its chunks have no values, or there are more of them than can be looked at.
    """
    shape = tuple(int(n) for n in array.shape)
    chunks, objects = (tuple(int(n) for n in sizes) for sizes in (array.chunks, array.shards or array.chunks))
    if 0 in (*chunks, *objects):
        raise Undecodable(f"its chunks of shape {list(chunks)} hold no values")
    stored = math.prod(-(-n // size) for n, size in zip(shape, objects, strict=True))
    inner = math.prod(size // chunk for size, chunk in zip(objects, chunks, strict=True))
    for count, text in ((stored, "stored objects"), (inner, "chunks in each shard")):
        if count > MOST_OBJECTS:
            raise Undecodable(f"it has {count:,} {text}; at most {MOST_OBJECTS:,} are looked at")
    return Variable(
        name=array.path,
        dims=("",) * len(shape),
        shape=shape,
        dtype=str(array.dtype),
        chunks=chunks,
        objects=objects,
        sample_axis=-1,
        checksums=has_checksums(array),
        select=tuple((0, n, 1) for n in shape),
        chunk_format=chunk_format(array),
    )
