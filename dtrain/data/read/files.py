"""Read chunks from local files or an archive, and decode them by numcodecs in the thread that reads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtrain.data.encoding import Array
from dtrain.data.plan.grid import Chunk, ShardPart, chunks_of, shards_of
from dtrain.data.plan.readers import MIN_DENSITY
from dtrain.data.read.bounded import object_most
from dtrain.data.read.codecs import TRUNCATED, Undecodable, check_stored
from dtrain.data.read.decode import Decoder
from dtrain.data.read.faults import DAMAGED_INDEX, Faults
from dtrain.data.read.local import Scratch, Version
from dtrain.data.read.rows import as_stored
from dtrain.data.read.shards import NO_CHUNK, ArrayLike, Index, ShardLayout, Stored, entries_of, runs_of, shard_layout
from dtrain.data.read.store import ReadStore, key_of
from dtrain.data.variable import Select, Variable
from dtrain.errors import ChunkUndecodable


@dataclass(frozen=True, slots=True)
class _Shard:
    """A shard that is read: the selected part of it, and the memory of the whole selection."""

    variable: Variable
    key: str
    part: ShardPart
    target: Array


class FilesReader:
    """Reads variables without zarr. Several threads may share it.

    Parameters
    ----------
    store : ReadStore
        A local store, or one that reads parts (`StoreFacts`).
    arrays : mapping of str to zarr.Array
        By variable, without an obstacle (`dtrain.data.plan.readers.numcodecs_obstacle`).
    faults : Faults
    """

    def __init__(self, store: ReadStore, arrays: Mapping[str, ArrayLike], faults: Faults) -> None:
        self._store = store
        self._arrays = arrays
        self._faults = faults
        self._layouts = {name: shard_layout(array) for name, array in arrays.items()}
        self._decoders = {name: Decoder(array) for name, array in arrays.items()}
        self._most = {name: object_most(array) for name, array in arrays.items()}
        self._buffers = threading.local()

    def read(self, variable: Variable, select: Select, out: Array) -> None:
        """Fill `out` with a selection (`ChunkReader.read`)."""
        target = as_stored(variable, select, out)
        layout = self._layouts[variable.name]
        if layout is not None:
            self._read_shards(variable, layout, select, target)
            return
        for chunk in chunks_of(variable.chunks, select):
            key = self._key(variable, chunk.place)
            stored, version = self._read_file(variable, key)
            if stored is None:
                self._fill(variable, key, chunk.place, [chunk], target)
            else:
                self._decode(variable, key, stored, chunk, target)
            self._faults.check_version(variable, key, chunk.place, version)

    def _read_shards(self, variable: Variable, layout: ShardLayout, select: Select, target: Array) -> None:
        by_place = {chunk.place: chunk for chunk in chunks_of(variable.chunks, select)}
        for part in shards_of(variable, select):
            chunks = [by_place[place] for place in part.chunks() if place in by_place]
            if chunks:
                shard = _Shard(variable, self._key(variable, part.place), part, target)
                version = self._read_shard(shard, layout, chunks)
                self._faults.check_version(variable, shard.key, part.place, version)

    def _read_shard(self, shard: _Shard, layout: ShardLayout, chunks: Sequence[Chunk]) -> Version | None:
        """Read some chunks of a shard, and return the version of its file."""
        variable, key, part = shard.variable, shard.key, shard.part
        whole, version = self._read_file(variable, key) if part.is_whole else (None, self._store.version(key))
        index = self._index(variable, key, layout) if whole is None else self._store.index_in(key, layout, whole)
        if index is None:
            if self._store.version(key) is not None:
                raise self._faults.undecodable(variable, key, DAMAGED_INDEX)
            self._fill(variable, key, part.place, chunks, shard.target)
            return None
        stored = []
        for entry, chunk in zip(entries_of(index, chunks, part.origin), chunks, strict=True):
            if entry[0] != NO_CHUNK:
                stored.append((*entry, chunk))
            else:
                self._fill(variable, key, chunk.place, [chunk], shard.target, inner=True)
        if whole is not None:
            self._decode_run(shard, 0, whole, stored)
            return version
        for begin, end, together in runs_of(stored, MIN_DENSITY):
            run, version = self._read_file(variable, key, begin, end)
            if run is None:
                raise self._faults.vanished(variable, key)
            self._decode_run(shard, begin, run, together)
        return version

    def _decode_run(self, shard: _Shard, begin: int, run: memoryview, chunks: Sequence[Stored]) -> None:
        """Decode chunks from the bytes of a shard from `begin` on."""
        for start, length, chunk in chunks:
            if start + length - begin > len(run):
                raise self._faults.undecodable(shard.variable, shard.key, TRUNCATED)
            first = start - begin
            self._decode(shard.variable, shard.key, run[first : first + length], chunk, shard.target)

    def _decode(self, variable: Variable, key: str, stored: memoryview, chunk: Chunk, target: Array) -> None:
        try:
            self._decoders[variable.name].decode(stored, chunk, target, self._scratch("decoded"))
        except Undecodable as error:
            raise self._faults.undecodable(variable, key, str(error)) from error

    def _fill(
        self,
        variable: Variable,
        key: str,
        place: tuple[int, ...],
        chunks: Sequence[Chunk],
        target: Array,
        *,
        inner: bool = False,
    ) -> None:
        """Fill in chunks that are not there, if that is no fault."""
        self._faults.check_missing(variable, key, place, inner=inner)
        for chunk in chunks:
            self._decoders[variable.name].fill_in(chunk, target)

    def _read_file(
        self, variable: Variable, key: str, start: int = 0, stop: int | None = None
    ) -> tuple[memoryview | None, Version | None]:
        try:
            return self._store.read_file(key, self._scratch("stored", self._most[variable.name]), start, stop) or (
                None,
                None,
            )
        except OverflowError as error:  # a place in a shard that no file reaches
            raise self._faults.undecodable(variable, key, TRUNCATED) from error
        except OSError as error:
            raise self._unreadable(variable, key, error) from error
        except Undecodable as error:
            raise self._faults.undecodable(variable, key, str(error)) from error

    def _index(self, variable: Variable, key: str, layout: ShardLayout) -> Index | None:
        try:
            return self._store.index(key, layout)
        except OSError as error:
            raise self._unreadable(variable, key, error) from error

    def _unreadable(self, variable: Variable, key: str, error: OSError) -> ChunkUndecodable:
        return self._faults.undecodable(variable, key, f"it cannot be read: {error.strerror}")

    def _key(self, variable: Variable, place: tuple[int, ...]) -> str:
        return key_of(self._arrays[variable.name], place)

    def _scratch(self, name: str, most: int = sys.maxsize) -> Scratch:
        """Return a function that gives the calling thread's scratch buffer of that name: the same memory each time.

        It raises Undecodable if it is asked for more than `most` bytes.
        """

        def give(size: int) -> memoryview:
            check_stored(size, most)
            memory: bytearray = getattr(self._buffers, name, bytearray())
            if len(memory) < size:
                memory = bytearray(size)
                setattr(self._buffers, name, memory)
            return memoryview(memory)[:size]

        return give
