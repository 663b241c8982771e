"""A store while it is read: it counts requests, remembers metadata and indices of shards, and notes absent objects.

Zarr gives the fill value for an object that is not there, and decodes some truncated objects without an error.
`ReadStore` sees every object pass and notes both, so that no object has to be requested a second time.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import WrapperStore

from dtrain.data.plan.grid import touched
from dtrain.data.read.bounded import object_most
from dtrain.data.read.clock import fetching
from dtrain.data.read.codecs import Undecodable, check_stored, ends_in_blosc, is_truncated_blosc
from dtrain.data.read.documents import Documents, check_document, unreadable_document
from dtrain.data.read.local import Scratch, Version, is_no_file, new_buffer, read_part, version_of
from dtrain.data.read.shards import ArrayLike, Index, IndexCache, ShardLayout, shard_layout, view_of
from dtrain.data.samples import StoreFacts
from dtrain.data.variable import Select, Variable


class ReadStore(WrapperStore[Store]):
    """Wraps the store of any kind. Several threads may share it.

    Parameters
    ----------
    store : zarr.abc.store.Store
    path : str
        Names the store in errors; the directory of a local store.
    facts : StoreFacts
    """

    def __init__(self, store: Store, path: str, facts: StoreFacts) -> None:
        super().__init__(store)
        self.path = path
        self.facts = facts
        self.documents = Documents()
        """The metadata documents that have been requested."""
        self.requests = 0
        """Objects and parts of objects that were requested."""
        self.index_requests = 0
        """How many of them were indices of shards."""
        self.bytes_read = 0
        """Stored bytes."""
        self._absent: set[str] = set()
        self._truncated: set[str] = set()
        self._watched: dict[str, tuple[ShardLayout | None, bool]] = {}
        self._most: dict[str, int] = {}
        self._indices = IndexCache()
        self._held: dict[str, list[tuple[int, Buffer]]] = {}
        self._lock, self._reading_index = threading.Lock(), threading.Lock()

    def _with_store(self, store: Store) -> ReadStore:
        return ReadStore(store, self.path, self.facts)

    # Requests of zarr ---------------------------------------------------------------------------------------

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a part of it; None if it is not there."""
        if byte_range is None and Documents.holds(key):
            if key not in self.documents:
                await self._read_document(key, prototype)
            return self.documents[key]
        if (held := self._held_part(key, byte_range)) is not None:
            return held
        self._check_stored(key, byte_range)
        with fetching():
            value = await self._store.get(key, prototype, byte_range)
        return self._noted(key, byte_range, value)

    async def _read_document(self, key: str, prototype: BufferPrototype) -> None:
        version = self.version(key)
        check_document(self.path, key, 0 if version is None else version[0], is_file=not self._is_no_file(key))
        try:
            with fetching():
                value = await self._store.get(key, prototype)
        except Undecodable as error:
            raise unreadable_document(self.path, key, error) from error
        check_document(self.path, key, 0 if value is None else len(value))
        self.documents.put(key, self._noted(key, None, value), version)

    def get_sync(
        self, key: str, *, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the same without the event loop: zarr 3.3 and later ask a local store so."""
        if (held := self._held_part(key, byte_range)) is not None:
            return held
        self._check_stored(key, byte_range)
        local: Any = self._store
        with fetching():
            value = local.get_sync(key, prototype=prototype, byte_range=byte_range)
        return self._noted(key, byte_range, value)

    async def get_ranges(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], *, prototype: BufferPrototype, **limits: int | None
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        """Yield the parts of an object, numbered: zarr 3.3 and later ask for the parts of a shard so."""
        parts = await asyncio.gather(*(self.get(key, prototype, byte_range) for byte_range in byte_ranges))
        yield list(enumerate(parts))

    def get_ranges_sync(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], *, prototype: BufferPrototype, **limits: int | None
    ) -> Sequence[tuple[int, Buffer | None]]:
        """Return the same without the event loop: zarr 3.4 asks a local store so.

        zarr's own would also read up to 1 MiB between two parts; `holding` has read dense parts together.
        """
        return [(i, self.get_sync(key, prototype=prototype, byte_range=part)) for i, part in enumerate(byte_ranges)]

    def names(self, group: str) -> list[str]:
        """Return the names in a group, from outside of the event loop."""

        async def collect() -> list[str]:
            return [name async for name in self.list_dir(group)]

        return sync(collect())

    def has_document(self, key: str) -> bool:
        """Return True if a metadata document is there, from outside of the event loop."""
        return sync(self.get(key, default_buffer_prototype())) is not None

    # Objects without zarr -----------------------------------------------------------------------------------

    def read_file(
        self, key: str, scratch: Scratch, start: int = 0, stop: int | None = None
    ) -> tuple[memoryview, Version] | None:
        """Return an object or the bytes ``start:stop`` of it, and its version; None if it is not there.

        The store is local, or reads parts (`StoreFacts`).

        Parameters
        ----------
        key : str
        scratch : callable
            Gives a scratch buffer of so many bytes to read into.
        start, stop : int, optional
            The part; less of it if the object ends before.
        """
        inner: Any = self._store
        with fetching():
            if self.facts.is_local:
                part = read_part(os.path.join(self.path, key), scratch, start, stop)
            else:
                part = inner.read_part(key, scratch, start, stop)
        with self._lock:
            self.requests += 1
            self.bytes_read += 0 if part is None else len(part[0])
        return part

    def version(self, key: str) -> Version | None:
        """Return the version of an object; None if it is not there, or the store has to be asked for it."""
        if self.facts.is_local:
            return version_of(os.path.join(self.path, key))
        inner: Any = self._store
        version: Version | None = inner.version(key) if self.facts.reads_parts else None
        return version

    def marks(self, keys: Iterable[str]) -> Iterator[str | None]:
        """Yield, for each key, a text that tells a version of the object from another; None if it is not there.

        The store has marks (`StoreFacts`). It may refuse an object that cannot be read.
        """
        inner: Any = self._store
        marks: Iterator[str | None] = inner.marks(keys)
        return marks

    # Observations -------------------------------------------------------------------------------------------

    def watch(self, array: ArrayLike) -> None:
        """Look at the objects of an array as they pass: there are two truncations that zarr does not notice.

        An empty file of a sharded array reads as the fill value, and blosc reads beyond its input. An object that is
        larger than its chunks can be is refused before it is read, where its size is known.
        """
        prefix = f"{array.path}/" if array.path else ""
        self._watched[prefix] = (shard_layout(array), ends_in_blosc(array))
        self._most[prefix] = object_most(array)

    def is_absent(self, key: str) -> bool:
        """Return True if an object was not there when it was last requested."""
        return key in self._absent

    def is_truncated(self, key: str) -> bool:
        """Return True if an object is truncated in a way that zarr does not notice."""
        return key in self._truncated

    def _check_stored(self, key: str, byte_range: ByteRequest | None) -> None:
        """Raise Undecodable for an object that is larger than its chunks can be, where its size is known."""
        most = next((most for prefix, most in self._most.items() if key.startswith(prefix)), None)
        if most is None:
            return
        if isinstance(byte_range, RangeByteRequest):
            check_stored(byte_range.end - byte_range.start, most)  # Python reserves memory for what it asks for
        if byte_range is not None:
            return
        if self._is_no_file(key):
            raise Undecodable("it is no file")
        if (version := self.version(key)) is not None:
            check_stored(version[0], most)

    def _is_no_file(self, key: str) -> bool:
        return self.facts.is_local and is_no_file(os.path.join(self.path, key))

    def _watching(self, key: str) -> tuple[ShardLayout | None, bool]:
        return next((watched for prefix, watched in self._watched.items() if key.startswith(prefix)), (None, False))

    def _noted(self, key: str, byte_range: ByteRequest | None, value: Buffer | None) -> Buffer | None:
        """Count an answer, and note what it says about the object."""
        layout, blosc = self._watching(key)
        is_index = layout is not None and layout.is_index(byte_range)
        with self._lock:
            self.requests += 1
            self.index_requests += is_index
            self.bytes_read += 0 if value is None else len(value)
        if value is None:
            self._absent.add(key)
            return None
        self._absent.discard(key)
        if _is_truncated(value, byte_range, layout, blosc):
            self._truncated.add(key)
        elif key in self._truncated and byte_range is None:
            self._truncated.discard(key)
        if layout is not None and (index := layout.index_of(value, byte_range)) is not None:
            if byte_range is None and layout.end(index) > len(value):
                self._truncated.add(key)
            self._indices.put(key, layout, index)
        return value

    # Indices and parts of shards ----------------------------------------------------------------------------

    def index(self, key: str, layout: ShardLayout) -> Index | None:
        """Return the index of a shard; None if it is not there, truncated or damaged.

        It is kept from the last time that it or its whole shard was read.
        """
        with self._reading_index:  # several threads read units of one shard
            buffer = self._indices.get(key)
            if buffer is None:
                try:
                    buffer = self._file_index(key, layout) if self.facts.is_local else self._request_index(key, layout)
                except Undecodable:
                    return None
        return None if buffer is None else layout.checked(view_of(buffer))

    def _request_index(self, key: str, layout: ShardLayout) -> Buffer | None:
        return sync(self.get(key, default_buffer_prototype(), layout.request))

    def _file_index(self, key: str, layout: ShardLayout) -> Buffer | None:
        """Read the index from its file, in this thread: zarr would ask another one."""
        with fetching():
            size, _ = self.version(key) or (0, 0)
            place = layout.index_slice(size)
            part = read_part(os.path.join(self.path, key), new_buffer, place.start, place.stop)
        found = None if part is None else default_buffer_prototype().buffer.from_bytes(bytes(part[0]))
        return self._noted(key, layout.request, found)

    def index_in(self, key: str, layout: ShardLayout, shard: memoryview) -> Index | None:
        """Return the same out of a shard that has been read."""
        part = shard[layout.index_slice(len(shard))]
        self._indices.put(key, layout, default_buffer_prototype().buffer.from_bytes(bytes(part)))
        return layout.checked(part)

    @contextmanager
    def holding(self, ranges: Mapping[str, tuple[int, int | None]]) -> Iterator[None]:
        """Read one part of each of some objects, and answer from it the requests that are made meanwhile."""
        prototype = default_buffer_prototype()
        parts: dict[str, tuple[int, Buffer]] = {}
        for key, (start, stop) in ranges.items():
            request = None if stop is None else RangeByteRequest(start, stop)
            buffer = sync(self.get(key, prototype, request))
            if buffer is not None:
                parts[key] = (start, buffer)
        with self._lock:
            for key, part in parts.items():
                self._held[key] = [*self._held.get(key, ()), part]
        try:
            yield
        finally:
            with self._lock:
                for key, part in parts.items():
                    self._held[key] = [other for other in self._held[key] if other is not part]
                    if not self._held[key]:
                        del self._held[key]

    def _held_part(self, key: str, byte_range: ByteRequest | None) -> Buffer | None:
        """Return the answer to a request, if it is in memory."""
        layout, _ = self._watching(key)
        if layout is not None and layout.is_index(byte_range):
            return self._indices.get(key)
        if isinstance(byte_range, RangeByteRequest):
            for start, buffer in self._held.get(key, ()):
                if start <= byte_range.start and byte_range.end <= start + len(buffer):
                    return buffer[byte_range.start - start : byte_range.end - start]
        return None


def _is_truncated(value: Buffer, byte_range: ByteRequest | None, layout: ShardLayout | None, blosc: bool) -> bool:
    if layout is not None:
        if isinstance(byte_range, RangeByteRequest):
            return len(value) < byte_range.end - byte_range.start
        return len(value) < (byte_range.suffix if isinstance(byte_range, SuffixByteRequest) else 1)
    return blosc and byte_range is None and is_truncated_blosc(value[:16].to_bytes(), len(value))


# Keys ---------------------------------------------------------------------------------------------------


def key_of(array: ArrayLike, place: tuple[int, ...]) -> str:
    """Return the key of the stored object at a place in the grid of an array's objects."""
    return (f"{array.path}/" if array.path else "") + str(array.metadata.encode_chunk_key(place))


def objects_of(array: ArrayLike, variable: Variable, select: Select) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield place and key of each stored object that a selection touches, in C order."""
    for place in itertools.product(*touched(variable.objects, select)):
        yield place, key_of(array, place)


def names_of(array: ArrayLike, variable: Variable, select: Select) -> Iterator[str]:
    """Yield the key of each stored object that a selection touches below the array's own path, in C order.

    There may be millions: where keys are numbers with a separator between, as usual, they are put together here.
    """
    along = touched(variable.objects, select)
    usual = _prefix_and_separator(array)
    if usual is None or not along:
        yield from (str(array.metadata.encode_chunk_key(place)) for place in itertools.product(*along))
        return
    prefix, separator = usual
    first, *others = along
    inner = [separator + separator.join(map(str, place)) for place in itertools.product(*others)] if others else [""]
    for number in first:
        head = f"{prefix}{number}"
        for rest in inner:
            yield head + rest


def _prefix_and_separator(array: ArrayLike) -> tuple[str, str] | None:
    """Return how an array writes the numbers of a key; None if it is in no usual way."""
    for prefix, separator in (("c/", "/"), ("", "."), ("", "/"), ("c.", ".")):
        if all(
            array.metadata.encode_chunk_key(place) == prefix + separator.join(map(str, place))
            for place in ((0,) * array.ndim, tuple(range(9, 9 + array.ndim)))
        ):
            return prefix, separator
    return None
