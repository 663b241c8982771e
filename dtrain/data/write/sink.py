"""Where predictions are written: what a sink can do. `dtrain.data.write.open` says which one a path means.

The driver holds a sink. Tasks hold a writer of it, which travels to workers; what a task has written is settled when
its receipt has come back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

from dtrain.data.write.documents import Objects


class Writer(Protocol):
    """Writes objects, in a task. It can be pickled."""

    def fresh(self) -> Writer:
        """Return a writer for one task."""
        ...

    def is_reached(self) -> bool:
        """Return True if what this process writes is what the driver sees."""
        ...

    def put(self, objects: Objects) -> None:
        """Write objects, each as a whole or not at all.

        Raises
        ------
        DiskFull, StoreForbidden, StoreUnavailable
        """
        ...

    def receipt(self) -> Any:
        """Return what the driver needs to settle what was written; None if nothing."""
        ...


class Sink(Protocol):
    """A Zarr group that predictions are written to, as the driver sees it."""

    path: str
    """Absolute path or URL."""
    consolidated: bool
    """Whether the root's document holds those of the arrays."""

    def exists(self) -> bool:
        """Return True if something lies at the path."""
        ...

    def attributes(self) -> dict[str, Any] | None:
        """Return the attributes of the group; None if there is none."""
        ...

    def free_bytes(self) -> int | None:
        """Return the bytes that can be written; None if that is not known."""
        ...

    def writing(self, run_id: str) -> AbstractContextManager[None]:
        """Hold the sink while it is written to; what is left over of unfinished objects goes at the end.

        Raises
        ------
        RunLocked
            Another process writes to it.
        DiskFull, StoreForbidden, StoreUnavailable, OutputExists
        """
        ...

    def create(self, documents: Objects) -> None:
        """Write the documents of a group, the root's first; those that are there are left."""
        ...

    def lacking(self, keys: Iterable[str]) -> Iterator[bool]:
        """Yield, for each chunk, whether it is not there, or damaged."""
        ...

    def writer(self) -> Writer:
        """Return what tasks write with, after `create`."""
        ...

    def settle(self, receipt: Any) -> None:
        """Take note of what a task has written."""
        ...

    def commit(self, message: str) -> None:
        """Make what has been written visible, where it is not yet."""
        ...
