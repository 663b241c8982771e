"""The files that references lead to: where they may lie, their bytes and sizes, and their folders for people."""

from __future__ import annotations

import asyncio
import os
import posixpath
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from zarr.abc.store import RangeByteRequest
from zarr.core.buffer import Buffer, default_buffer_prototype

from dtrain.data.read.kind import StorageOptions, is_local_path
from dtrain.data.read.local import new_buffer, read_part
from dtrain.data.read.remote import RemoteStore, open_url
from dtrain.errors import InvalidConfig, listed
from dtrain.urls import bare_url, has_user

HTTP = ("http", "https")
PROTOCOLS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", *HTTP)
"""Servers that references may lead to."""
CONCURRENT_REQUESTS = 32
MOST_FOLDERS = 5
"""Folders of a host that are listed; of more, the folder that holds them all."""


class Targets:
    """The files that references lead to.

    Parameters
    ----------
    path : str
        Path or URL of the reference file: relative references begin at its folder.
    storage_options : mapping
        Options of servers, by protocol or for all of them.
    """

    def __init__(self, path: str, storage_options: StorageOptions) -> None:
        self._path, self._options = path, storage_options
        self._folder = posixpath.dirname(path.rstrip("/"))
        self._servers: dict[str, RemoteStore] = {}
        self._opening = threading.Lock()

    def place(self, url: str) -> tuple[str, str]:
        """Return the server of a file, and its key there; of a file of this machine, an empty text and its path.

        Raises
        ------
        InvalidConfig
            References may not lead there.
        """
        if "://" not in url and not os.path.isabs(url):
            url = f"{self._folder}/{url}"
        if is_local_path(url):
            if not is_local_path(self._path):
                raise self._refused(url, "a reference file on a server may not refer to files of this machine")
            return "", os.path.normpath(unquote(url.removeprefix("file://")) if url.startswith("file://") else url)
        protocol, _, rest = url.partition("://")
        host, _, key = rest.partition("/")
        if protocol not in PROTOCOLS or "::" in url or not host or has_user(url):
            raise self._refused(
                bare_url(url), f"references may lead to files and, without a password, to {listed(PROTOCOLS, 9)}"
            )
        path, mark, query = key.partition("?")
        return f"{protocol}://{host}", posixpath.normpath(path) + mark + query

    def _refused(self, url: str, why: str) -> InvalidConfig:
        return InvalidConfig(
            f"{self._path} refers to {url}: {why}.",
            "Use references that you trust, or copy the files and refer to them.",
        )

    def server(self, root: str) -> RemoteStore:
        """Return the store of a server; raise InvalidConfig if it cannot be used."""
        with self._opening:
            if root not in self._servers:
                self._servers[root] = open_url(root, options_of(root, self._options))
            return self._servers[root]

    async def read(self, url: str, start: int, stop: int | None) -> Buffer | None:
        """Return the bytes ``start:stop`` of a file, as far as it goes; None if it is not there."""
        root, key = self.place(url)
        prototype = default_buffer_prototype()
        if root:
            request = None if stop is None else RangeByteRequest(start, stop)
            return await self.server(root).get(key, prototype, request)
        part = await asyncio.to_thread(read_part, key, new_buffer, start, stop)
        return None if part is None else prototype.buffer.from_bytes(part[0])

    async def size(self, url: str) -> int | None:
        """Return the bytes of a file; None if it is not there."""
        root, key = self.place(url)
        try:
            return await self.server(root).getsize(key) if root else os.stat(key).st_size
        except (FileNotFoundError, NotADirectoryError):
            return None


def options_of(url: str, storage_options: StorageOptions) -> dict[str, Any]:
    """Return the options of a server: those of its protocol, ``{ s3 = { anon = true } }``, else those without one."""
    protocol = url.partition("://")[0]
    own = storage_options.get(protocol)
    if isinstance(own, Mapping):
        return dict(own)
    return {key: value for key, value in storage_options.items() if key not in PROTOCOLS}


async def read_files(targets: Targets, folder: str, names: Sequence[str]) -> list[bytes | None]:
    """Return the contents of files in a folder; None for one that is not there."""
    limit = asyncio.Semaphore(CONCURRENT_REQUESTS)

    async def read(name: str) -> bytes | None:
        async with limit:
            value = await targets.read(f"{folder}/{name}", 0, None)
            return None if value is None else value.to_bytes()

    return await asyncio.gather(*map(read, names))


def folders_of(places: Sequence[tuple[str, str]]) -> str:
    """Return the folders that hold the files, with the number of files; of many on a host, the one that holds all."""
    by_root: dict[str, Counter[str]] = {}
    for root, key in places:
        by_root.setdefault(root, Counter())[posixpath.dirname(without_query(key))] += 1
    texts = []
    for root, folders in sorted(by_root.items()):
        if len(folders) > MOST_FOLDERS:
            folders = Counter({posixpath.commonpath(folders): folders.total()})
        for folder, count in sorted(folders.items()):
            where = f"{root}/{folder}".rstrip("/") if root else folder
            texts.append(f"{where} ({count:,} file{'s' if count > 1 else ''})")
    return "; ".join(texts) or "no other file"


def without_query(url: str) -> str:
    """Return a URL, or the end of one, that may be shown: a query may hold a signature."""
    return bare_url(url).partition("?")[0]
