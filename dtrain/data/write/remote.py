"""Objects behind a URL, through fsspec: a server stores each as a whole or not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

from dtrain.data.read.kind import METADATA_FILES
from dtrain.data.read.remote import RemoteStore, open_for_writing
from dtrain.data.write.documents import ROOT, Objects, buffer
from dtrain.errors import DtrainError, NotZarr, one_line

ASIDE = ".dtrain"


@cache
def _store(url: str) -> RemoteStore:
    return open_for_writing(url)


def _get(url: str, key: str) -> bytes | None:
    value = sync(_store(url).get(key, default_buffer_prototype()))
    return None if value is None else value.to_bytes()


@dataclass(frozen=True, slots=True)
class RemoteWriter:
    """Writes objects behind a URL."""

    path: str
    run_id: str

    def fresh(self) -> RemoteWriter:
        """Return a writer for one task."""
        return self

    def is_reached(self) -> bool:
        """Return True if the objects that this process sees there are those of the driver."""
        try:
            return _get(self.path, f"{ASIDE}/{self.run_id}") is not None
        except DtrainError:  # a worker may lack the credentials, or the package
            return False

    def put(self, objects: Objects) -> None:
        """Write objects."""
        for key, data in objects.items():
            sync(_store(self.path).set(key, buffer(data)))

    def receipt(self) -> None:
        """Return nothing."""


class RemoteSink:
    """Objects behind a URL, as the driver sees them.

    Parameters
    ----------
    url : str
    """

    consolidated = True

    def __init__(self, url: str) -> None:
        self.path = url
        self._run_id = ""

    def exists(self) -> bool:
        """Return True if there is a group or an array."""
        return any(_get(self.path, name) is not None for name in (*METADATA_FILES, ".zarray"))

    def attributes(self) -> dict[str, Any] | None:
        """Return the attributes of the group; None if there is none."""
        data = _get(self.path, ROOT)
        try:
            document = None if data is None else json.loads(data)
            return dict(document.get("attributes", {})) if document and document.get("node_type") == "group" else None
        except (ValueError, AttributeError) as error:
            raise NotZarr(f"{self.path}/{ROOT} cannot be read: {one_line(error)}", "Choose another --out.") from None

    def free_bytes(self) -> int | None:
        """Return None: a server does not say."""
        return None

    @contextmanager
    def writing(self, run_id: str) -> Iterator[None]:
        """Hold nothing; an object by which workers recognise the place is there meanwhile."""
        self._run_id, key = run_id, f"{ASIDE}/{run_id}"
        sync(_store(self.path).set(key, buffer(run_id.encode())))
        try:
            yield
        finally:
            with suppress(Exception):  # it does no harm
                sync(_store(self.path).delete(key))

    def create(self, documents: Objects) -> None:
        """Write the documents of the group, as far as they are not there."""
        for key, data in documents.items():
            if _get(self.path, key) is None:
                sync(_store(self.path).set(key, buffer(data)))

    def lacking(self, keys: Iterable[str]) -> Iterator[bool]:
        """Yield, for each chunk, whether its object is not there."""
        there = sync(_listed(_store(self.path)))
        return (key not in there for key in keys)

    def writer(self) -> RemoteWriter:
        """Return what tasks write with."""
        return RemoteWriter(self.path, self._run_id)

    def settle(self, receipt: Any) -> None:
        """Do nothing: objects are there."""

    def commit(self, message: str) -> None:
        """Do nothing: objects are visible."""


async def _listed(store: RemoteStore) -> set[str]:
    return {key async for key in store.list_prefix("")}
