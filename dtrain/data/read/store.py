"""A Zarr store as dtrain reads it: opened by path or URL, asked again when it fails, and watched while it is read.

Zarr gives the fill value for an object that is not there, and decodes some truncated ones without a word.
`ReadStore` sees every object on its way, so that nothing has to be asked twice to know better.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import os
import random
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, cast

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.abc.store import ByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, WrapperStore

from dtrain.config.values import REDACTED
from dtrain.data.samples import Select
from dtrain.errors import (
    DataNotFound,
    DtrainError,
    InvalidConfig,
    NotZarr,
    StoreForbidden,
    StoreUnavailable,
    did_you_mean,
    one_line,
)

ArrayLike: TypeAlias = "zarr.Array[Any]"  # older versions of zarr cannot be subscripted
Result = TypeVar("Result")
Version: TypeAlias = tuple[int, int]
"""Of a file: its size, and when it was last written, in nanoseconds."""

CHECKSUM_CODECS = frozenset(
    {"crc32c", "crc32", "adler32", "fletcher32", "jenkins_lookup3", "gzip", "zlib", "bz2"}  # the last three hold one
)
LOG = logging.getLogger("dtrain")

ATTEMPTS = 8
STALL_SECONDS = 60.0
"""How long one request may take."""
BACKOFF_SECONDS = 0.25
"""Before the second attempt, on average; doubled each time: 32 s in all."""
TELL_SECONDS = 1.0
"""After which a request that is repeated is told of."""
LISTING_SECONDS = 600.0
"""How long listing an array may take: a request for each thousand objects."""
INDEX_CACHE_BYTES = 64 << 20

EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
"""By protocol, what to install of dtrain."""
PROTOCOLS = (*EXTRAS, "gs", "gcs", "abfs", "az", "file", "memory")
"""What a misspelt one is compared with; fsspec knows more."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL of fsspec rather than a local path."""
    return "://" in path


def is_http(path: str) -> bool:
    """Whether a store lies on an HTTP server: they list directories, if at all, each in its own way."""
    return path.startswith(("http://", "https://"))


def open_store(path: str, storage_options: Mapping[str, Any] = {}) -> ReadStore:
    """Open a local path or an fsspec URL for reading.

    Raises
    ------
    InvalidConfig
        The protocol is unknown, its package is not installed, or it does not take the options.
    """
    if not is_remote(path):
        return ReadStore(LocalStore(path, read_only=True), path)
    protocol = path.partition("://")[0]
    # a run does not keep secrets: evaluated from its directory, it takes them from the environment
    masked = tuple(key for key, value in storage_options.items() if value == REDACTED)
    storage_options = {key: value for key, value in storage_options.items() if value != REDACTED}
    options: dict[str, Any] = {"use_listings_cache": False}  # kept, they would hide what is repaired
    if protocol in ("s3", "s3a"):  # one request for an object, not one more for its size; `_patiently` alone repeats it
        options |= {"max_concurrency": 1, "config_kwargs": {"retries": {"max_attempts": 0}}}
    try:
        store = FsspecStore.from_url(path, storage_options={**options, **storage_options}, read_only=True)
        if hasattr(store.fs, "retries"):
            store.fs.retries = 1
    except ImportError as error:
        raise InvalidConfig(
            f"{path}: reading {protocol}:// needs a package that is not installed: {one_line(error)}",
            "Install it here and on the workers"
            + (f', for example pip install "dtrain[{extra}]".' if (extra := EXTRAS.get(protocol)) else "."),
        ) from None
    except Exception as error:
        known = did_you_mean(protocol, PROTOCOLS) if "not known" in str(error) else ""
        raise InvalidConfig(
            f"{path}: cannot be opened: {one_line(error)}{known}",
            "Look at data.path and data.storage_options.",
        ) from None
    return ReadStore(store, path, masked)


def open_group(path: str, group: str = "", storage_options: Mapping[str, Any] = {}) -> zarr.Group:
    """Open a group for reading."""
    return group_in(open_store(path, storage_options), group)


def group_in(store: ReadStore, name: str) -> zarr.Group:
    """Open a group that has been there before.

    Raises
    ------
    DataNotFound, NotZarr
        It is not there any more, or not on this machine; or its metadata cannot be read.
    """
    try:
        return any_group(store, name)
    except DtrainError:
        raise
    except FileNotFoundError:
        raise DataNotFound(
            f"{store.path}: no Zarr group there any more, or not on this machine.",
            "Every worker must see the same path.",
        ) from None
    except Exception as error:  # broken metadata makes zarr raise whatever its first wrong guess leads to
        raise NotZarr(
            f"{store.path}: its Zarr metadata cannot be read: {one_line(error)}",
            "Restore it from a copy of the store.",
        ) from None


def any_group(store: Store | str, name: str) -> zarr.Group:
    """Open a group, also if its consolidated metadata hold an array that zarr cannot open: each has its own as well."""
    try:
        return zarr.open_group(store, path=name or None, mode="r")
    except (DtrainError, FileNotFoundError):
        raise
    except Exception:
        return zarr.open_group(store, path=name or None, mode="r", use_consolidated=False)


def array_in(group: zarr.Group, store_path: str, name: str) -> Any:
    """Open an array that has been there before.

    Raises
    ------
    DataNotFound, NotZarr
        It is not there any more, or its metadata cannot be read.
    """
    try:
        return group[name]
    except DtrainError:
        raise
    except KeyError:
        raise DataNotFound(f"{store_path}: {name} is not there any more.", "Restore it from a copy.") from None
    except Exception as error:
        raise unreadable(store_path, name, error) from None


def unreadable(store_path: str, name: str, error: Exception) -> NotZarr:
    """Return the error for an array whose metadata are damaged."""
    return NotZarr(
        f"{store_path}: the metadata of {name} cannot be read: {one_line(error)}",
        "Restore it from a copy of the store.",
    )


# Reading ------------------------------------------------------------------------------------------------


class ReadStore(WrapperStore[Store]):
    """Counts and retries what Zarr asks of a store, keeps indices of shards, and notes what is not there or cut short.

    Parameters
    ----------
    store : zarr.abc.store.Store
    path : str
        What a user calls it.
    masked : tuple of str
        Storage options that a run has not kept.
    """

    def __init__(self, store: Store, path: str = "", masked: tuple[str, ...] = ()) -> None:
        super().__init__(store)
        self.path = path
        self.root = str(store.root) if isinstance(store, LocalStore) else ""
        """The directory of a local store."""
        self._masked = masked
        self.requests = 0
        """Objects or parts of objects that were asked for."""
        self.index_requests = 0
        """Of them, indices of shards."""
        self.bytes_read = 0
        """As stored."""
        self.absent: set[str] = set()
        """Keys that were not there when they were last asked for."""
        self.short: set[str] = set()
        """Keys whose object is cut short in a way that Zarr does not notice."""
        self.members: dict[str, tuple[str, ...]] = {}
        """By group, names to look for although the store does not list them."""
        self.hidden: frozenset[str] = frozenset()
        """Names that are not listed."""
        self._watched: dict[str, tuple[ShardLayout | None, bool]] = {}
        self._indices: OrderedDict[str, Buffer] = OrderedDict()
        self._held: dict[str, list[tuple[int, Buffer]]] = {}
        self._told = -math.inf
        self._lock, self._asking = threading.Lock(), threading.Lock()

    def _with_store(self, store: Store) -> ReadStore:
        return ReadStore(store, self.path, self._masked)

    def watch(self, array: ArrayLike) -> None:
        """Look at the objects of an array as they pass: there are two ways to be cut short that Zarr decodes.

        An empty file of a sharded array reads as the fill value, and blosc reads beyond its input.
        """
        prefix = f"{array.path}/" if array.path else ""
        self._watched[prefix] = (shard_layout(array), ends_in_blosc(array))

    async def get(self, key: str, prototype: Any, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a part of it."""
        if (held := self._find(key, byte_range)) is not None:
            return held
        value = await self._patiently(key, lambda: self._ask(key, prototype, byte_range))
        return self._noted(key, byte_range, value)

    def get_sync(self, key: str, *, prototype: Any = None, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a part of it without the event loop: zarr 3.3 and later ask a local store so."""
        if (held := self._find(key, byte_range)) is not None:
            return held
        local: Any = self._store
        return self._noted(key, byte_range, local.get_sync(key, prototype=prototype, byte_range=byte_range))

    def read_file(
        self, key: str, room: Callable[[int], memoryview], start: int = 0, stop: int | None = None
    ) -> tuple[memoryview, Version] | None:
        """Return an object of a local store, or a part of it, and which version of the file it is; None: not there.

        Parameters
        ----------
        key : str
        room : callable
            Gives so many bytes of memory to read into.
        start, stop : int, optional
            The part; less of it if the object ends before.
        """
        try:
            with open(os.path.join(self.root, key), "rb", buffering=0) as file:
                facts = os.fstat(file.fileno())
                end = facts.st_size if stop is None else min(stop, facts.st_size)
                value = room(max(0, end - start))
                if start:
                    file.seek(start)
                done = 0
                while done < len(value) and (count := file.readinto(value[done:])):
                    done += count
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            with self._lock:
                self.requests += 1
            return None
        with self._lock:
            self.requests += 1
            self.bytes_read += done
        return value[:done], (facts.st_size, facts.st_mtime_ns)

    def version(self, key: str) -> Version | None:
        """Return which version of a file there is; None if it is not there."""
        try:
            facts = os.stat(os.path.join(self.root, key))
        except OSError:
            return None
        return facts.st_size, facts.st_mtime_ns

    def _watching(self, key: str) -> tuple[ShardLayout | None, bool]:
        return next((found for prefix, found in self._watched.items() if key.startswith(prefix)), (None, False))

    def _noted(self, key: str, byte_range: ByteRequest | None, value: Buffer | None) -> Buffer | None:
        """Count an answer, and note what it says of the object."""
        layout, blosc = self._watching(key)
        is_index = layout is not None and layout.is_index(byte_range)
        with self._lock:
            self.requests += 1
            self.index_requests += is_index
            self.bytes_read += 0 if value is None else len(value)
        if value is None:
            self.absent.add(key)
            return None
        self.absent.discard(key)
        if _is_cut_short(value, byte_range, layout, blosc):
            self.short.add(key)
        elif key in self.short and byte_range is None:
            self.short.discard(key)
        if layout is not None and (index := layout.index_of(value, byte_range)) is not None:
            if byte_range is None and layout.end(index) > len(value):
                self.short.add(key)
            self._keep_index(key, layout, index)
        return value

    async def get_ranges(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], *, prototype: Any, **limits: Any
    ) -> AsyncIterator[Sequence[tuple[int, Buffer | None]]]:
        """Yield the parts of an object, numbered: zarr 3.3 and later ask for those of a shard so."""
        parts = await asyncio.gather(*(self.get(key, prototype, byte_range) for byte_range in byte_ranges))
        yield list(enumerate(parts))

    def get_ranges_sync(
        self, key: str, byte_ranges: Sequence[ByteRequest | None], *, prototype: Any, **limits: Any
    ) -> Sequence[tuple[int, Buffer | None]]:
        """Return the same without the event loop: zarr 3.4 asks a local store so.

        Its own would read what lies between two parts too, up to 1 MiB; `holding` has read together what is dense.
        """
        return [(i, self.get_sync(key, prototype=prototype, byte_range=part)) for i, part in enumerate(byte_ranges)]

    async def exists(self, key: str) -> bool:
        """Whether an object is there: a byte of it is asked for, since fsspec takes a failing HTTP server for a no."""
        if isinstance(self._store, LocalStore):
            return await self._store.exists(key)
        prototype = default_buffer_prototype()
        return await self._patiently(key, lambda: self._ask(key, prototype, RangeByteRequest(0, 1))) is not None

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys that begin so."""
        if self.root:  # pathlib, with which zarr lists, remembers every file and directory
            for folder, _, names in os.walk(os.path.join(self.root, prefix), followlinks=True):
                inside = os.path.relpath(folder, self.root).replace(os.sep, "/")
                for name in names:
                    yield name if inside == "." else f"{inside}/{name}"
            return
        listed = self._store.list_prefix
        for key in await self._patiently(f"{prefix}*", lambda: _collected(listed(prefix)), LISTING_SECONDS):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names in a group, also those that the store does not list: few HTTP servers do, nor all buckets."""
        found: list[str] = []
        try:
            listed = self._store.list_dir
            found = await self._patiently(f"{prefix}/*", lambda: _collected(listed(prefix)), LISTING_SECONDS)
        except DtrainError as error:
            if not is_http(self.path) and not isinstance(error, StoreForbidden):
                raise
        if is_http(self.path):  # of the links of a page, those to a folder or a file beside it
            found = [name.rstrip("/") for name in found if not set(name.rstrip("/")) & set("/?#:")]
        for name in dict.fromkeys([*found, *self.members.get(prefix.strip("/"), ())]):
            if name not in self.hidden:
                yield name

    def names(self, group: str) -> list[str]:
        """Return the names in a group, from outside of the event loop."""
        return sync(_collected(self.list_dir(group)))

    async def getsize(self, key: str) -> int:
        """Return the bytes of an object."""
        return await self._patiently(key, lambda: self._store.getsize(key))

    def index(self, key: str, layout: ShardLayout) -> npt.NDArray[np.uint64] | None:
        """Return offset and length of each inner chunk of a shard; None if it is not there, cut short or damaged.

        Kept from the last time that it or its whole shard was read.
        """
        with self._asking:  # several threads read units of one shard
            buffer = self._indices.get(key)
            if buffer is None:
                request: ByteRequest = (
                    SuffixByteRequest(layout.index_bytes) if layout.at_end else RangeByteRequest(0, layout.index_bytes)
                )
                buffer = sync(self.get(key, default_buffer_prototype(), request))
        return None if buffer is None else layout.checked(_view(buffer))

    def index_in(self, key: str, layout: ShardLayout, shard: memoryview) -> npt.NDArray[np.uint64] | None:
        """Return the same out of a shard that has been read."""
        part = shard[layout.index_slice(len(shard))]
        self._keep_index(key, layout, default_buffer_prototype().buffer.from_bytes(bytes(part)))
        return layout.checked(part)

    def _keep_index(self, key: str, layout: ShardLayout, index: Buffer) -> None:
        if layout.checked(_view(index)) is None:
            return
        with self._lock:
            self._indices[key] = index
            while len(self._indices) * layout.index_bytes > INDEX_CACHE_BYTES:
                self._indices.popitem(last=False)

    @contextmanager
    def holding(self, ranges: Mapping[str, tuple[int, int | None]]) -> Iterator[None]:
        """Read a part of each of some objects in one request, and answer from it what is asked meanwhile."""
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

    def _find(self, key: str, byte_range: ByteRequest | None) -> Buffer | None:
        """Return what is held of an answer."""
        layout, _ = self._watching(key)
        if layout is not None and layout.is_index(byte_range):
            return self._indices.get(key)
        if isinstance(byte_range, RangeByteRequest):
            for start, buffer in self._held.get(key, ()):
                if start <= byte_range.start and byte_range.end <= start + len(buffer):
                    return buffer[byte_range.start - start : byte_range.end - start]
        return None

    async def _ask(self, key: str, prototype: Any, byte_range: ByteRequest | None) -> Buffer | None:
        try:
            value = await self._store.get(key, prototype, byte_range)
        except Exception as error:
            if getattr(error, "status", None) == 416:  # the object ends before the range begins
                return cast("Buffer", prototype.buffer.from_bytes(b""))
            raise
        # a server that does not know ranges answers with the whole object
        if isinstance(byte_range, RangeByteRequest) and value and len(value) > byte_range.end - byte_range.start:
            return value[byte_range.start : byte_range.end]
        if isinstance(byte_range, SuffixByteRequest) and value and len(value) > byte_range.suffix:
            return value[len(value) - byte_range.suffix :]
        return value

    async def _patiently(self, key: str, ask: Callable[[], Awaitable[Result]], seconds: float | None = None) -> Result:
        """Ask a remote store again when it fails or stalls, after a time that grows and is drawn at random."""
        if isinstance(self._store, LocalStore):
            return await ask()
        began = time.monotonic()
        limit = STALL_SECONDS if seconds is None else seconds
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return await asyncio.wait_for(ask(), limit)
            except DtrainError:
                raise
            except FileNotFoundError:
                raise
            except Exception as error:
                if _lacks_credentials(error) and attempt == 1:  # they may have been given since it looked for them
                    await self._store.fs.set_session(refresh=True)  # type: ignore[attr-defined]
                    continue
                if _is_forbidden(error):
                    raise StoreForbidden(
                        f"{self.path}: access to {key} was refused: {one_line(error)}",
                        f"A run does not keep {', '.join(self._masked)}: give it again, --set data.storage_options=..."
                        if self._masked
                        else "Give credentials in the environment or in data.storage_options, or anon = true for open "
                        "data.",
                    ) from None
                if isinstance(error, (TypeError, ValueError)) or type(error).__name__ == "ParamValidationError":
                    raise InvalidConfig(
                        f"{self.path}: {key} cannot be asked for: {one_line(error)}",
                        "Look at data.path and data.storage_options.",
                    ) from None
                if attempt == ATTEMPTS:
                    elapsed = time.monotonic() - began
                    raise StoreUnavailable(
                        f"{self.path}: {key} could not be read in {attempt} attempts over {elapsed:.0f} s: "
                        f"{_reason(error, limit)}",
                        "Look at data.path and the network. Run the same command again to continue; committed rounds "
                        "are safe.",
                    ) from None
                pause = BACKOFF_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
                self._tell(began, f"{self.path}: {key} could not be read: {_reason(error, limit)}", pause, attempt)
                await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    def _tell(self, began: float, fault: str, pause: float, attempt: int) -> None:
        """Say that a store makes wait, if that is not over at once; of many requests one speaks."""
        now = time.monotonic()
        with self._lock:
            if now - began < TELL_SECONDS or now - self._told < 5 * TELL_SECONDS:
                return
            self._told = now
        LOG.warning("%s; trying again in %.0f s (attempt %d of %d)", fault, pause, attempt + 1, ATTEMPTS)


def _reason(error: Exception, limit: float) -> str:
    stalled = isinstance(error, TimeoutError) and not str(error)
    return f"no answer within {limit:g} s" if stalled else one_line(error)


def _view(buffer: Buffer) -> memoryview:
    values: Any = buffer.as_numpy_array()
    return memoryview(values)


async def _collected(keys: AsyncIterator[str]) -> list[str]:
    return [key async for key in keys]


def settle() -> None:
    """Let requests end that a failed one has left behind: Python would speak of them when it exits."""
    sync(_settle())


async def _settle() -> None:
    pending = asyncio.all_tasks() - {asyncio.current_task()}
    if pending:
        done, _ = await asyncio.wait(pending, timeout=STALL_SECONDS)
        for task in done:
            if not task.cancelled():
                task.exception()


def _is_forbidden(error: BaseException) -> bool:
    refused = isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)
    return refused or _lacks_credentials(error)


def _lacks_credentials(error: BaseException) -> bool:
    return type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError")


# Shards -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where the inner chunks of a shard are said to lie.

    References
    ----------
    Zarr v3, ``sharding_indexed``: (offset, length) of each inner chunk as uint64, C order.
    """

    counts: tuple[int, ...]
    """Inner chunks of a shard along each dimension."""
    dtype: str
    """Of the numbers, with their byte order."""
    has_checksum: bool
    """Whether a CRC32C follows them."""
    at_end: bool

    @property
    def index_bytes(self) -> int:
        """Bytes of the index."""
        return 16 * math.prod(self.counts) + 4 * self.has_checksum

    def index_slice(self, size: int) -> slice:
        """Return where the index lies in a shard of so many bytes."""
        return slice(max(0, size - self.index_bytes), size) if self.at_end else slice(0, self.index_bytes)

    def is_index(self, byte_range: ByteRequest | None) -> bool:
        """Whether a request is for the index of a shard."""
        if self.at_end:
            return isinstance(byte_range, SuffixByteRequest) and byte_range.suffix == self.index_bytes
        return isinstance(byte_range, RangeByteRequest) and (byte_range.start, byte_range.end) == (0, self.index_bytes)

    def index_of(self, value: Buffer, byte_range: ByteRequest | None) -> Buffer | None:
        """Return the index, as a copy, from the answer to a request for the index or for the whole shard."""
        if self.is_index(byte_range):
            return value
        if byte_range is None and len(value) >= self.index_bytes:
            part = value[self.index_slice(len(value))]
            return type(value).from_bytes(part.to_bytes())
        return None

    def end(self, index: Buffer) -> int:
        """Return where the last inner chunk ends."""
        entries = self.parse(_view(index)).reshape(-1, 2)
        there = entries[entries[:, 0] != NO_CHUNK]
        return int(there.sum(axis=1, dtype=np.uint64).max()) if len(there) else 0

    def checked(self, index: memoryview) -> npt.NDArray[np.uint64] | None:
        """Return the same as `parse`; None if it is cut short, or not what its checksum says."""
        if len(index) < self.index_bytes:
            return None
        if self.has_checksum and int.from_bytes(index[-4:], "little") != crc32c(index[:-4]):
            return None
        return self.parse(index)

    def parse(self, index: memoryview) -> npt.NDArray[np.uint64]:
        """Return uint64[*counts, 2]: offset and length; both are the largest number where there is no chunk."""
        numbers = np.frombuffer(index, self.dtype, count=2 * math.prod(self.counts))
        return numbers.astype(np.uint64, copy=False).reshape(*self.counts, 2)


NO_CHUNK = np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True)
class ShardPart:
    """What a selection touches of a shard."""

    place: tuple[int, ...]
    """In the grid of the array's shards."""
    corner: tuple[int, ...]
    """The place of its first chunk in the grid of the array's chunks."""
    inside: tuple[list[int], ...]
    """Along each dimension, the chunks that are touched, counted in the shard."""
    everything: bool
    """Whether it has no other chunks of the array."""

    def chunks(self) -> Iterator[tuple[int, ...]]:
        """Yield the places of its touched chunks in the grid of the array's chunks, in C order."""
        return itertools.product(
            *([first + i for i in along] for first, along in zip(self.corner, self.inside, strict=True))
        )

    def missing(self, index: npt.NDArray[np.uint64]) -> Iterator[tuple[int, ...]]:
        """Yield the places of those of them that its index does not have."""
        for gone in np.argwhere(index[np.ix_(*self.inside)][..., 0] == NO_CHUNK).tolist():
            parts = zip(self.corner, self.inside, gone, strict=True)
            yield tuple(first + along[i] for first, along, i in parts)


def shards_of(array: ArrayLike, layout: ShardLayout, select: Select) -> Iterator[ShardPart]:
    """Yield what a selection touches of each shard, in C order."""
    assert array.shards is not None
    chunks = touched(array.chunks, select)
    total = [-(-n // size) for n, size in zip(array.shape, array.chunks, strict=True)]
    for place in itertools.product(*touched(array.shards, select)):
        corner = tuple(p * count for p, count in zip(place, layout.counts, strict=True))
        inside = tuple(
            [c - first for c in along if first <= c < first + count]
            for along, first, count in zip(chunks, corner, layout.counts, strict=True)
        )
        there = [min(count, n - first) for count, n, first in zip(layout.counts, total, corner, strict=True)]
        yield ShardPart(place, corner, inside, [len(along) for along in inside] == there)


def crc32c(values: memoryview) -> int:
    """Return the checksum of RFC 3720."""
    return int(google_crc32c.value(np.frombuffer(values, np.uint8)))


def shard_layout(array: ArrayLike) -> ShardLayout | None:
    """Return how a sharded array says where its chunks lie; None if it is not sharded, or says it in a rare way."""
    if array.shards is None:
        return None
    metadata: Any = array.metadata
    codec = metadata.codecs[0]
    names = [type(inner).__name__ for inner in codec.index_codecs]
    if names not in (["BytesCodec"], ["BytesCodec", "Crc32cCodec"]):
        return None
    endian = codec.index_codecs[0].endian
    order = ">" if str(getattr(endian, "value", endian)) == "big" else "<"
    counts = tuple(shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True))
    at_end = str(getattr(codec.index_location, "value", codec.index_location)) == "end"
    return ShardLayout(counts, f"{order}u8", len(names) > 1, at_end)


def ends_in_blosc(array: ArrayLike) -> bool:
    """Whether a stored object is what blosc wrote."""
    return array.shards is None and [name for name, _ in codecs_of(array)][-1:] == ["blosc"]


def _is_cut_short(value: Buffer, byte_range: ByteRequest | None, layout: ShardLayout | None, blosc: bool) -> bool:
    if layout is not None:
        if isinstance(byte_range, RangeByteRequest):
            return len(value) < byte_range.end - byte_range.start
        return len(value) < (byte_range.suffix if isinstance(byte_range, SuffixByteRequest) else 1)
    return blosc and byte_range is None and is_short_blosc(value[:16].to_bytes(), len(value))


def is_short_blosc(head: bytes, size: int) -> bool:
    """Whether an object of `size` bytes is shorter than blosc's header (its first 16 bytes) says."""
    return len(head) < 16 or int.from_bytes(head[12:16], "little") > size


# Stored objects -----------------------------------------------------------------------------------------


def object_keys(array: ArrayLike, objects: tuple[int, ...], axis: int, start: int, stop: int) -> Iterator[str]:
    """Yield the store keys of the objects that rows ``start:stop`` of the sample axis touch."""
    select = tuple((start, stop, 1) if dim == axis else (0, n, 1) for dim, n in enumerate(array.shape))
    return selected_keys(array, objects, select)


def selected_keys(array: ArrayLike, objects: tuple[int, ...], select: Select) -> Iterator[str]:
    """Yield the store keys of the objects that a selection touches, in C order."""
    prefix = f"{array.path}/" if array.path else ""
    for index in itertools.product(*touched(objects, select)):
        yield prefix + array.metadata.encode_chunk_key(index)


def touched(sizes: tuple[int, ...], select: Select) -> list[list[int]]:
    """Return, along each dimension, the numbers of the chunks that a selection touches."""
    found = []
    for size, (start, stop, step) in zip(sizes, select, strict=True):
        if step <= size:
            found.append(list(range(start // size, -(-stop // size))))
        else:
            found.append(sorted({place // size for place in range(start, stop, step)}))
    return found


def has_checksums(array: ArrayLike) -> bool:
    """Whether a codec of the array detects flipped bits."""
    return any(name in CHECKSUM_CODECS or options.get("checksum") for name, _, options in _codecs(array))


ZARRS_CODECS = frozenset({"bytes", "blosc", "zstd", "gzip", "crc32c", "transpose"})
"""What zarrs is tested to decode to the same bits."""


def not_zarrs(array: ArrayLike) -> str:
    """Return why zarrs does not read an array, or an empty string if it does."""
    if order := unusual_order(array):
        return order
    if array.fill_value is None:
        return "it has no fill value"
    odd = [name for name, _ in codecs_of(array) if name not in ZARRS_CODECS]
    return f"codec {odd[0]}" if odd else ""


def unusual_order(array: ArrayLike) -> str:
    """Return how values lie in a chunk in another order than in memory, or an empty string."""
    dtype = np.dtype(array.dtype)
    if not dtype.isnative:
        return f"its byte order is {dtype.byteorder}"
    return "its order is F" if array.metadata.zarr_format == 2 and array.metadata.order == "F" else ""


def codecs_of(array: ArrayLike) -> list[tuple[str, Any]]:
    """Return name and codec of the codecs that a chunk goes through when it is written, in order."""
    return [(name, codec) for name, codec, _ in _codecs(array)]


def _codecs(array: ArrayLike) -> list[tuple[str, Any, dict[str, Any]]]:
    found = []
    todo: list[Any] = [*(array.filters or ()), *array.compressors]
    if array.metadata.zarr_format == 3:
        todo = list(array.metadata.codecs)
    while todo:
        codec = todo.pop(0)
        if hasattr(codec, "codecs"):  # a shard's own checksum covers its index alone: the inner codecs count
            todo = [*codec.codecs, *todo]
            continue
        described = codec.to_dict() if hasattr(codec, "to_dict") else codec.get_config()
        name = str(described.get("name") or described.get("id"))
        found.append((name.removeprefix("numcodecs."), codec, described.get("configuration", described)))
    return found
