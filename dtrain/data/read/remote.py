"""Stores behind URLs, through fsspec: every request is retried, and answered in one way by all servers."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

from zarr.abc.store import ByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import FsspecStore, WrapperStore
from zarr.storage._fsspec import ALLOWED_EXCEPTIONS

from dtrain.config.values import without_redacted
from dtrain.data.read.kind import METADATA_FILES, StorageOptions, StoreKind
from dtrain.data.read.retry import Retries
from dtrain.data.samples import StoreFacts
from dtrain.errors import DataNotFound, DtrainError, InvalidConfig, StoreForbidden, did_you_mean, one_line
from dtrain.urls import has_password, redacted_url

LISTING_SECONDS = 600.0
"""How long listing an array may take: a request for each thousand objects."""
EXTRAS = {"s3": "s3", "s3a": "s3", "http": "http", "https": "http"}
"""The extra of dtrain to install, by protocol."""
HTTP_URLS = ("http://", "https://")
NOT_COMPARED = "chunks of remote stores are not compared"
PROTOCOLS = (*EXTRAS, "gs", "gcs", "abfs", "az", "file", "memory")
"""A misspelt protocol is compared with these; fsspec knows more."""


class RemoteStore(WrapperStore[FsspecStore]):
    """A store of fsspec whose requests are retried.

    Parameters
    ----------
    store : zarr.storage.FsspecStore
    path : str
        Names the store in errors.
    masked : tuple of str
        Storage options that a run has not kept.
    """

    def __init__(self, store: FsspecStore, path: str, masked: tuple[str, ...] = ()) -> None:
        super().__init__(store)
        self._path, self._masked = redacted_url(path), masked
        self._retries = Retries(self._path, self._refresh, masked)
        self._writes = Retries(self._path, self._refresh, masked, "written")

    def _with_store(self, store: FsspecStore) -> RemoteStore:
        return type(self)(store, self._path, self._masked)

    async def _refresh(self) -> None:
        fs: Any = self._store.fs
        await fs.set_session(refresh=True)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a part of it; None if there is none."""
        return await self._retries.call(key, lambda: self._request(key, prototype, byte_range))

    async def _request(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        try:
            value = await self._store.get(key, prototype, byte_range)
        except Exception as error:
            if getattr(error, "status", None) == 416:  # the object ends before the range begins
                return prototype.buffer.from_bytes(b"")
            raise
        # a server that does not know ranges answers with the whole object
        if isinstance(byte_range, RangeByteRequest) and value and len(value) > byte_range.end - byte_range.start:
            return value[byte_range.start : byte_range.end]
        if isinstance(byte_range, SuffixByteRequest) and value and len(value) > byte_range.suffix:
            return value[len(value) - byte_range.suffix :]
        return value

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object, of a store that was opened for it."""
        await self._writes.call(key, lambda: self._store.set(key, value))

    async def exists(self, key: str) -> bool:
        """Return True if an object is there, by reading a byte: fsspec takes a failing HTTP server for a no."""
        return await self.get(key, default_buffer_prototype(), RangeByteRequest(0, 1)) is not None

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys that begin so."""
        for key in await self._listed(f"{prefix}*", partial(self._store.list_prefix, prefix)):
            yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names in a group; none if the server refuses to list them."""
        try:
            names = await self._listed(f"{prefix}/*", partial(self._store.list_dir, prefix))
        except StoreForbidden:  # a bucket may be read and not listed
            return
        for name in names:
            yield name

    async def _listed(self, key: str, keys: Callable[[], AsyncIterator[str]]) -> list[str]:
        async def collect() -> list[str]:
            return [key async for key in keys()]

        return await self._retries.call(key, collect, LISTING_SECONDS)

    async def getsize(self, key: str) -> int:
        """Return the bytes of an object."""
        return await self._retries.call(key, lambda: self._store.getsize(key))


class HttpStore(RemoteStore):
    """A store on an HTTP server: servers list directories, if at all, each in its own way."""

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names that the page of a directory links to, as far as they lie in it."""
        try:
            names = await self._listed(f"{prefix}/*", partial(self._store.list_dir, prefix))
        except DtrainError:
            return
        for name in names:
            if not set(name.rstrip("/")) & set("/?#:"):
                yield name.rstrip("/")


def _open(
    store_class: type[RemoteStore], path: str, storage_options: StorageOptions, *, read_only: bool = True
) -> RemoteStore:
    """Open a URL through fsspec.

    Raises
    ------
    InvalidConfig
        The protocol is unknown, its package is not installed, or it does not take the options.
    """
    protocol = path.partition("://")[0]
    # a run does not keep secrets: evaluated from its directory, it takes them from the environment
    given, storage_options = storage_options, without_redacted(storage_options)
    masked = tuple(key for key in given if key not in storage_options)
    options: dict[str, Any] = {"use_listings_cache": False}  # a cache would hide a repair
    if protocol in ("s3", "s3a"):  # one request an object, not one more for its size; `Retries` alone retries it
        options |= {"max_concurrency": 1, "config_kwargs": {"retries": {"max_attempts": 0}}}
    try:
        is_missing = (*ALLOWED_EXCEPTIONS, KeyError) if protocol == "zip" else ALLOWED_EXCEPTIONS  # as of older fsspec
        options = {**options, **storage_options}
        store = (
            _opening_thread(os.getpid())
            .submit(FsspecStore.from_url, path, options, read_only=read_only, allowed_exceptions=is_missing)
            .result()
        )
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
            f'The URL of a zip archive is "zip://::{path.removeprefix("zip://")}".'
            if protocol == "zip" and "::" not in path
            else "Look at data.path and data.storage_options.",
        ) from None
    return store_class(store, path, masked)


@cache
def _opening_thread(process: int) -> ThreadPoolExecutor:
    """Return the thread of a process that opens all URLs.

    fsspec has a file system, with connections of its own, for each thread that asks for one.
    """
    return ThreadPoolExecutor(1, f"open-urls-{process}")


def locate_url(path: str, base: Path) -> str:
    """Return a URL without a slash at its end.

    Raises
    ------
    InvalidConfig
        It holds a password.
    """
    if has_password(path):
        raise InvalidConfig(
            "data.path holds a password.", "Give credentials in the environment or in data.storage_options."
        )
    return path if path.endswith("://") else path.rstrip("/")


def _nothing_there(path: str) -> DtrainError:
    return DataNotFound(
        f"{path}: no Zarr group there: it has none of {', '.join(METADATA_FILES)}.",
        "data.path is the URL of a store; data.group names a group in it.",
    )


def open_url(url: str, storage_options: StorageOptions) -> RemoteStore:
    """Open a URL; raise InvalidConfig if its protocol or the options cannot be used."""
    return _open(HttpStore if url.startswith(HTTP_URLS) else RemoteStore, url, storage_options)


def open_for_writing(url: str) -> RemoteStore:
    """Open a URL to write objects; credentials come from the environment.

    Raises
    ------
    InvalidConfig
        Its protocol cannot be used.
    """
    return _open(RemoteStore, url, {}, read_only=False)


FSSPEC = StoreKind(
    matches=lambda path: "://" in path,
    open=open_url,
    facts=StoreFacts(is_local=False, read_ahead=True, compared=NOT_COMPARED),
    locate=locate_url,
    nothing_there=_nothing_there,
)
HTTP = StoreKind(
    matches=lambda path: path.startswith(HTTP_URLS),
    open=open_url,
    facts=StoreFacts(is_local=False, can_list=False, read_ahead=True, compared=NOT_COMPARED),
    locate=locate_url,
    nothing_there=_nothing_there,
)
