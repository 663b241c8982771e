"""Stores in a zip archive of this machine, as ``data.zarr.zip``: read in place, nothing is unpacked."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote
from weakref import WeakValueDictionary

from zarr.abc.store import ByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from dtrain.data.read.archive import Archive, Member, entries_of
from dtrain.data.read.kind import METADATA_FILES, StorageOptions, StoreKind, is_local_path, local_path
from dtrain.data.read.local import Scratch, Version, new_buffer, version_of
from dtrain.data.read.readonly import ReadOnlyStore, part_of
from dtrain.data.samples import StoreFacts
from dtrain.errors import DtrainError, InvalidConfig, NotZarr, listed

SUFFIX = ".zip"

_OPEN: WeakValueDictionary[tuple[str, Version | None], Archive] = WeakValueDictionary()
"""The archives of the stores that are open in this process: loaders share what is known of one."""
_OPENING = threading.Lock()


class ZipStore(ReadOnlyStore):
    """The group in an archive.

    Parameters
    ----------
    archive : Archive
    root : str
        The folder in the archive that is the group; empty, or with a slash at the end.
    """

    def __init__(self, archive: Archive, root: str) -> None:
        super().__init__()
        self.archive = archive
        self._root = root

    def read_part(self, key: str, scratch: Scratch, start: int, stop: int | None) -> tuple[memoryview, Version] | None:
        """Return the bytes ``start:stop`` of an object, as far as it goes, and its version; None if it is not there."""
        member = self._member(key)
        if member is None:
            return None
        stop = member.size if stop is None else min(stop, member.size)
        return self.archive.read(self._root + key, member, scratch, min(start, stop), stop), _version(member)

    def version(self, key: str) -> Version | None:
        """Return size and CRC-32 of an object; None if it is not there."""
        member = self._member(key)
        return None if member is None else _version(member)

    def marks(self, keys: Iterable[str]) -> Iterator[str | None]:
        """Yield the same as text."""
        for version in map(self.version, keys):
            yield None if version is None else f"{version[0]} {version[1]:08x}"

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a part of it; None if it is not there."""
        member = self._member(key)
        if member is None:
            return None
        start, stop = part_of(byte_range, member.size)
        # the end alone is the index of a shard, which has a checksum of its own: not worth to read all of the shard
        verify = not isinstance(byte_range, SuffixByteRequest)
        name, read = self._root + key, self.archive.read
        value = await asyncio.to_thread(read, name, member, new_buffer, start, stop, verify=verify)
        return prototype.buffer.from_bytes(value)

    async def exists(self, key: str) -> bool:
        """Return True if an object is there."""
        return self._member(key) is not None

    def documents(self) -> list[str]:
        """Return the keys of all metadata documents."""
        return [name.removeprefix(self._root) for name in self.archive.documents if name.startswith(self._root)]

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys that begin so."""
        for entry in entries_of(self.archive.path):
            if entry.name.startswith(self._root + prefix):
                yield entry.name.removeprefix(self._root)

    def _member(self, key: str) -> Member | None:
        return self.archive.find(self._root + key)


def _version(member: Member) -> Version:
    return member.size, member.crc


def _roots(archive: Archive) -> list[str]:
    """Return the folders that may be the group: the topmost ones that hold a document of one."""
    folders = {name.rpartition("/")[0] for name in archive.documents if name.rpartition("/")[2] in METADATA_FILES}
    depths = {folder: folder.count("/") + bool(folder) for folder in folders}
    return sorted(folder for folder, depth in depths.items() if depth == min(depths.values()))


def _matches(path: str) -> bool:
    if not path.lower().endswith(SUFFIX):
        return False
    return not os.path.isdir(path) if is_local_path(path) else "::" not in path and not path.startswith("zip://")


def _locate(path: str, base: Path) -> str:
    if not is_local_path(path):
        raise InvalidConfig(
            f"{path}: a zip archive is read from a file system, not from a server.",
            "Copy it to a disk that all workers see, or unpack it where it lies: directories are read from servers.",
        )
    return local_path(unquote(path.removeprefix("file://")) if path.startswith("file://") else path, base)


def _open_archive(path: str) -> Archive:
    with _OPENING:
        key = path, version_of(path)
        archive = _OPEN.get(key)
        if archive is None:
            archive = _OPEN[key] = Archive(path)
        return archive


def _open(path: str, storage_options: StorageOptions) -> ZipStore:
    archive = _open_archive(path)
    roots = _roots(archive)
    return ZipStore(archive, f"{roots[0]}/" if len(roots) == 1 and roots[0] else "")


def _nothing_there(path: str) -> DtrainError:
    """Return the error for an archive without a group, or with several."""
    roots = _roots(_open_archive(path))
    if roots:
        return NotZarr(
            f"{path} holds several Zarr groups: {listed(roots)}.",
            f'Pack one of them alone, or read it by its URL: "zip://{roots[0]}::{path}".',
        )
    return NotZarr(
        f"{path} is a zip archive without a Zarr group: it has none of {', '.join(METADATA_FILES)}.",
        "Pack the directory of a Zarr group.",
    )


def _facts(store: ZipStore) -> StoreFacts:
    return StoreFacts(
        is_local=False,
        reads_parts=True,
        has_marks=True,
        checksum="CRC-32",
        compared="sizes and CRC-32 of stored chunks are compared",
        kept_bytes=store.archive.nbytes,
    )


ZIP = StoreKind(matches=_matches, open=_open, facts=_facts, locate=_locate, nothing_there=_nothing_there)
