"""A stored object, all of it: read once, hashed, and each of its chunks decoded. Values are not kept.

What training reads of a store is checked as it is read. This is for who wants to know before (`dtrain verify`).
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import StorePath

from dtrain.data.plan.grid import ShardPart, shards_of
from dtrain.data.plan.readers import numcodecs_obstacle
from dtrain.data.read.codecs import TRUNCATED, Undecodable, ends_in_blosc, is_truncated_blosc
from dtrain.data.read.decode import Decoder
from dtrain.data.read.faults import DAMAGED_INDEX
from dtrain.data.read.local import Scratch, oddity
from dtrain.data.read.pieces import OneObject, Place, entries_in, pieces
from dtrain.data.read.shards import ArrayLike, shard_layout, view_of
from dtrain.data.read.store import ReadStore, key_of
from dtrain.data.samples import WHOLE_OBJECT_BYTES
from dtrain.data.variable import Variable
from dtrain.errors import ChunkMissing, ChunkUndecodable, DtrainError, one_line

NUMBERS = "biufc"
"""Kinds of dtypes that are decoded without zarr."""
SLACK_BYTES = 1 << 20
"""A chunk takes at most twice its decoded bytes and this many more: else it is not read."""
TEXT_BYTES = 1 << 20
"""The same for each of texts, whose length is not known."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a look at a stored object has found."""

    key: str
    nbytes: int | None
    """None if it is not there."""
    sha256: str
    """Of its bytes, where that is asked for and all could be read."""
    chunks: int
    """Chunks of the array that it should hold."""
    absent: tuple[Place, ...] = ()
    """Those of a shard that are not stored, by their place in the grid of chunks."""
    faults: tuple[str, ...] = ()
    """Why it cannot be read, or chunks of it not be decoded."""


class ObjectReader:
    """Looks at the stored objects of an array. Several threads may share it.

    Parameters
    ----------
    store : ReadStore
    array : zarr.Array
        Opened in `store`.
    variable : Variable
        Of the array, as `variable_of` gives it.
    hashes : bool
        Whether SHA-256 of the stored bytes is computed.
    """

    def __init__(self, store: ReadStore, array: ArrayLike, variable: Variable, *, hashes: bool) -> None:
        self._store, self._array, self._variable, self._hashes = store, array, variable, hashes
        self._layout = shard_layout(array)
        self._decoder = None if self._obstacle() else Decoder(array)
        self._blosc = ends_in_blosc(array)
        self._is_file = store.facts.is_local or store.facts.reads_parts
        self._most_bytes = self._bytes_at_most()
        self._buffers = threading.local()

    def _obstacle(self) -> str:
        if np.dtype(self._array.dtype).kind not in NUMBERS:
            return "its values are no numbers"
        return numcodecs_obstacle(self._variable)

    @property
    def object_bytes(self) -> int:
        """Bytes in memory while one object is looked at, about: of texts it cannot be known."""
        itemsize = np.dtype(self._array.dtype).itemsize
        chunk, whole = (math.prod(shape) * itemsize for shape in (self._variable.chunks, self._variable.objects))
        return chunk + (whole if self._is_file else 2 * whole)

    def look(self, place: Place) -> Look:
        """Read the object at a place in the grid of stored objects.

        Raises
        ------
        StoreForbidden, StoreUnavailable, DataChanged
            A server refuses or fails; an archive has been modified since it was opened.
        """
        key, part = key_of(self._array, place), self._part(place)
        chunks = math.prod(map(len, part.inside))
        try:
            return self._look(key, part, chunks)
        except Undecodable as error:
            why = str(error)
        except (ChunkMissing, ChunkUndecodable) as error:
            why = error.message
        except DtrainError:
            raise
        except OSError as error:
            why = f"it cannot be read: {error.strerror or one_line(error)}"
        except (MemoryError, OverflowError):
            why = "there is no memory for it"
        return Look(key, 0, "", chunks, faults=(why,))

    def absent(self, place: Place) -> Look:
        """Return the look at an object of which is known that it is not there."""
        return Look(key_of(self._array, place), None, "", math.prod(map(len, self._part(place).inside)))

    def _part(self, place: Place) -> ShardPart:
        """Return the chunks of an object that the array has."""
        if not self._variable.has_inner_chunks:
            return ShardPart(place, place, tuple([number] for number in place), True)
        sizes, shape = self._variable.objects, self._variable.shape
        select = tuple((i * n, min((i + 1) * n, end), 1) for i, n, end in zip(place, sizes, shape, strict=True))
        return next(iter(shards_of(self._variable, select)))

    def _look(self, key: str, part: ShardPart, chunks: int) -> Look:
        if self._store.facts.is_local and (odd := oddity(os.path.join(self._store.path, key), self._most_bytes)):
            raise Undecodable(odd)
        if self._is_file and self._layout is not None:
            size, _ = self._store.version(key) or (0, 0)
            if size > WHOLE_OBJECT_BYTES:
                return self._look_at_parts(key, part, chunks, size)
        stored = self._read(key) if self._is_file else self._get(key)
        if stored is None:
            return Look(key, None, "", chunks)
        digest = hashlib.sha256(stored).hexdigest() if self._hashes else ""
        try:
            absent, faults = self._check(key, part, stored)
        except (Undecodable, MemoryError) as error:
            return Look(key, len(stored), digest, chunks, faults=(str(error) or "there is no memory for it",))
        return Look(key, len(stored), digest, chunks, absent, faults)

    def _bytes_at_most(self) -> int:
        """Return the bytes that an object of a directory may have; texts may have any number."""
        dtype, index = np.dtype(self._array.dtype), 0 if self._layout is None else self._layout.index_bytes
        itemsize = TEXT_BYTES if dtype.kind in "OT" else dtype.itemsize
        return 2 * math.prod(self._variable.objects) * itemsize + SLACK_BYTES + index

    def _read(self, key: str, start: int = 0, stop: int | None = None) -> memoryview | None:
        found = self._store.read_file(key, self._scratch("stored"), start, stop)
        return None if found is None else found[0]

    def _get(self, key: str) -> memoryview | None:
        found = sync(self._store.get(key, default_buffer_prototype()))
        return None if found is None else memoryview(view_of(found)).cast("B")

    # Chunks in memory ---------------------------------------------------------------------------------------

    def _check(self, key: str, part: ShardPart, stored: memoryview) -> tuple[tuple[Place, ...], tuple[str, ...]]:
        """Decode an object that has been read; return which chunks a shard lacks, and what cannot be decoded."""
        if self._blosc and is_truncated_blosc(bytes(stored[:16]), len(stored)):
            raise Undecodable(TRUNCATED)
        if self._layout is None:
            if not stored and self._variable.has_inner_chunks:
                raise Undecodable(TRUNCATED)  # zarr takes it for a shard without chunks
            self._decode(key, part, stored)
            return (), ()
        index = self._layout.checked(stored[self._layout.index_slice(len(stored))])
        if index is None:
            raise Undecodable(DAMAGED_INDEX)
        entries, absent = entries_in(part, index)
        if self._decoder is None:
            self._decode(key, part, stored)
            return absent, ()
        return absent, self._decode_each([(place, stored[start : start + n], n) for start, n, place in entries])

    def _decode(self, key: str, part: ShardPart, stored: memoryview) -> None:
        if self._decoder is not None:
            self._decoder.check(stored, self._scratch("decoded"))
            return
        place: Any = StorePath(OneObject(key, stored), self._array.path)
        of_zarr: Any = zarr.AsyncArray(metadata=self._array.metadata, store_path=place)
        array: ArrayLike = zarr.Array(of_zarr)
        self._decode_by_zarr(array, self._region(part.place, self._variable.objects))

    def _decode_each(self, chunks: Sequence[tuple[Place, memoryview, int]]) -> tuple[str, ...]:
        """Decode chunks of a shard, given with the bytes that each should have; return what cannot be decoded."""
        assert self._decoder is not None
        faults = []
        for place, stored, length in chunks:
            try:
                if len(stored) < length:
                    raise Undecodable(TRUNCATED)
                self._decoder.check(stored, self._scratch("decoded"))
            except Undecodable as error:
                faults.append(f"chunk {place} in it: {error}")
        return tuple(faults)

    def _decode_by_zarr(self, array: ArrayLike, region: tuple[slice, ...]) -> None:
        try:
            array[region]
        except (DtrainError, MemoryError):
            raise
        except Exception as error:  # whatever a codec raises
            raise Undecodable(one_line(error)) from error

    def _region(self, place: Place, sizes: tuple[int, ...]) -> tuple[slice, ...]:
        return tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, sizes, strict=True))

    # Shards that are larger -----------------------------------------------------------------------------------

    def _look_at_parts(self, key: str, part: ShardPart, chunks: int, size: int) -> Look:
        """Read a shard from its beginning to its end, chunk by chunk."""
        assert self._layout is not None
        place = self._layout.index_slice(size)
        stored = self._read(key, place.start, place.stop)
        index = None if stored is None else self._layout.checked(stored)
        digest, faults = hashlib.sha256(), []
        entries, absent = entries_in(part, index) if index is not None else ([], ())
        if index is None:
            faults.append(DAMAGED_INDEX)
        for start, stop, is_new, chunk in pieces(size, entries):
            bytes_there = self._read(key, start, min(stop, size)) if start < size else memoryview(b"")
            if bytes_there is None:
                return Look(key, None, "", chunks)
            if is_new and self._hashes:
                digest.update(bytes_there)
            if chunk is not None and self._decoder is not None:
                faults += self._decode_each([(chunk, bytes_there, stop - start)])
            elif chunk is not None:
                faults += self._chunk_by_zarr(chunk)
        return Look(key, size, digest.hexdigest() if self._hashes else "", chunks, absent, tuple(faults))

    def _chunk_by_zarr(self, chunk: Place) -> list[str]:
        try:
            self._decode_by_zarr(self._array, self._region(chunk, self._variable.chunks))
        except Undecodable as error:
            return [f"chunk {chunk} in it: {error}"]
        return []

    def _scratch(self, name: str) -> Scratch:
        """Return a function that gives the calling thread's scratch buffer of that name: the same memory each time."""

        def give(size: int) -> memoryview:
            memory: bytearray = getattr(self._buffers, name, bytearray())
            if len(memory) < size:
                setattr(self._buffers, name, bytearray())  # the old memory goes before the new one is made
                del memory
                memory = bytearray(size)
                setattr(self._buffers, name, memory)
            return memoryview(memory)[:size]

        return give
