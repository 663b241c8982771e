"""Stores that are references to bytes of other files, as kerchunk and VirtualiZarr write them: by their suffix alone.

Whoever writes a reference file decides which files are read: `dtrain plan` prints the hosts and folders. Only files of
this machine may refer to files of this machine, and templates that would have to be computed are refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import posixpath
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import unquote
from weakref import WeakValueDictionary

from zarr.abc.store import ByteRequest, RangeByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.core.sync import sync

from dtrain.data.read.kind import StorageOptions, StoreKind, is_local_path, local_path
from dtrain.data.read.readonly import ReadOnlyStore, part_of
from dtrain.data.read.references import Found, JsonReferences, ParquetReferences, Reference, References, mark_of
from dtrain.data.read.remote import locate_url
from dtrain.data.read.targets import CONCURRENT_REQUESTS, Targets, folders_of, read_files, without_query
from dtrain.data.samples import StoreFacts
from dtrain.errors import (
    ChunkMissing,
    ChunkUndecodable,
    DataNotFound,
    DtrainError,
    InvalidConfig,
    NotZarr,
    StoreForbidden,
    StoreUnavailable,
)

JSON, PARQUET = ".json", (".parq", ".parquet")
CHECKED_TOGETHER = 4096
"""References whose files are looked for at once."""
GONE = "Restore the file, or write the references again for the files as they are now."

_OPEN: WeakValueDictionary[tuple[str, str], References] = WeakValueDictionary()
"""By path and digest: the references of the stores that are open in this process."""
_OPENING = threading.Lock()


class ReferenceStore(ReadOnlyStore):
    """The group that references make up.

    Parameters
    ----------
    path : str
        Path or URL of the reference file.
    references : References
    targets : Targets
    """

    def __init__(self, path: str, references: References, targets: Targets) -> None:
        super().__init__()
        self._path = path
        self.references = references
        self.targets = targets
        self._sizes: dict[str, int | None] = {}

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a part of it; None if there is no reference to it.

        Raises
        ------
        ChunkMissing, ChunkUndecodable
            The file is not there, or ends too soon.
        StoreForbidden, StoreUnavailable, InvalidConfig
            A server refuses or fails, or cannot be used.
        """
        found = await self._find(key)
        if found is None:
            return None
        if isinstance(found, bytes):
            return prototype.buffer.from_bytes(found[slice(*part_of(byte_range, len(found)))])
        try:
            return await self._read(key, found, byte_range)
        except (StoreForbidden, StoreUnavailable, InvalidConfig) as error:
            raise type(error)(f"{self._path}: chunk {key}: {error.message}", error.hint) from None

    async def _find(self, key: str) -> Found:
        if key.rpartition("/")[2] == ".zmetadata":  # each document is here anyway
            return None
        await self.references.prepare([key])
        return self.references.find(key)

    async def _read(self, key: str, found: Reference, byte_range: ByteRequest | None) -> Buffer:
        start, stop = found.start, found.stop
        if stop is None and isinstance(byte_range, RangeByteRequest):
            start, stop = byte_range.start, byte_range.end
        elif byte_range is not None:
            end = await self.targets.size(found.url) if stop is None else stop
            first, last = part_of(byte_range, (end or 0) - start)
            start, stop = start + first, start + last
        value = await self.targets.read(found.url, start, stop)
        if value is None:
            raise self._gone(key, found)
        if found.stop is not None and stop is not None and len(value) < stop - start:
            raise self._truncated(key, found)
        return value

    async def exists(self, key: str) -> bool:
        """Return True if there is a reference."""
        return await self._find(key) is not None

    def documents(self) -> Sequence[str]:
        """Return the keys of all metadata documents."""
        return self.references.documents()

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys that begin so."""
        await self.references.prepare()
        for key in self.references.all_keys():
            if key.startswith(prefix):
                yield key

    # Files that are not as the references say -----------------------------------------------------------------

    def marks(self, keys: Iterable[str]) -> Iterator[str | None]:
        """Yield what tells one reference from another; raise for the first one whose file is absent or too short."""
        todo = iter(keys)
        while some := list(itertools.islice(todo, CHECKED_TOGETHER)):
            sync(self.references.prepare(some))
            found = [self.references.find(key) for key in some]
            urls = {one.url for one in found if isinstance(one, Reference)}
            sync(self._look_for([url for url in urls if url not in self._sizes]))
            for key, one in zip(some, found, strict=True):
                if isinstance(one, Reference):
                    self._check(key, one)
                yield mark_of(one)

    async def _look_for(self, urls: Sequence[str]) -> None:
        limit = asyncio.Semaphore(CONCURRENT_REQUESTS)

        async def look(url: str) -> None:
            async with limit:
                self._sizes[url] = await self.targets.size(url)

        await asyncio.gather(*map(look, urls))

    def _check(self, key: str, reference: Reference) -> None:
        size = self._sizes[reference.url]
        if size is None:
            raise self._gone(key, reference)
        if size < (reference.stop or 0):
            raise self._truncated(key, reference)

    def _gone(self, key: str, reference: Reference) -> ChunkMissing:
        return ChunkMissing(
            f"{self._path}: chunk {key} lies in {without_query(reference.url)}, which is not there.", GONE
        )

    def _truncated(self, key: str, reference: Reference) -> ChunkUndecodable:
        return ChunkUndecodable(
            f"{self._path}: chunk {key} is the bytes {reference.start} to {reference.stop} of "
            f"{without_query(reference.url)}, which is truncated: it ends before.",
            GONE,
        )


# The kind -------------------------------------------------------------------------------------------------


def _matches(path: str) -> bool:
    return path.startswith("reference://") or ("::" not in path and path.rstrip("/").lower().endswith((JSON, *PARQUET)))


def _locate(path: str, base: Path) -> str:
    if path.startswith("reference://"):
        raise InvalidConfig(
            f"{path}: references are read by the path of their file.", 'Write data.path = "refs.json", or a URL of it.'
        )
    if is_local_path(path):
        return local_path(unquote(path.removeprefix("file://")) if path.startswith("file://") else path, base)
    return locate_url(path, base)


def _open(path: str, storage_options: StorageOptions) -> ReferenceStore:
    targets = Targets(path, storage_options)
    if not path.lower().endswith(JSON):
        below = partial(read_files, targets, path)
        (document,) = sync(below([".zmetadata"]))
        return ReferenceStore(path, ParquetReferences(path, document, below), targets)
    (text,) = sync(read_files(targets, posixpath.dirname(path), [posixpath.basename(path)]))
    if text is None:
        raise DataNotFound(f"{path}: no such file.", "data.path is the path or URL of a reference file.")
    with _OPENING:
        name = path, hashlib.sha256(text).hexdigest()
        references = _OPEN.get(name)
        if references is None:
            references = _OPEN[name] = JsonReferences(path, text)
    return ReferenceStore(path, references, targets)


def _nothing_there(path: str) -> DtrainError:
    return NotZarr(
        f"{path} holds references, but none to a Zarr group: .zgroup or zarr.json is missing.",
        "Write the references of a whole group, as kerchunk or VirtualiZarr does.",
    )


def _facts(store: ReferenceStore) -> StoreFacts:
    sync(store.references.prepare())
    places = [store.targets.place(url) for url in store.references.urls()]
    roots = {root for root, _ in places if root}
    for root in roots:
        store.targets.server(root)  # refuses what is not installed
    return StoreFacts(
        is_local=False,
        read_ahead=bool(roots),
        has_marks=True,
        compared="the references are compared, not the files that they lead to",
        kept_bytes=store.references.nbytes,
        notes=(("refers to", folders_of(places)),),
    )


KERCHUNK = StoreKind(matches=_matches, open=_open, facts=_facts, locate=_locate, nothing_there=_nothing_there)
