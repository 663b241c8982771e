r"""A repository of icechunk: everything is one transaction, and nothing is visible before it is committed.

    branch main    o ---------------------------------------- o     moved at the end, if nobody else has moved it
                    \                                        /
    `UNFINISHED`     o arrays ---- forks, one a task ---- o merged

Sessions can be forked only where they hold no changes: the arrays are committed to a branch of their own first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import zarr
from zarr.core.sync import sync

from dtrain.data.read.icechunk import (
    PREFIX,
    icechunk_module,
    is_repository,
    server_fault,
    storage_of,
    text_of,
)
from dtrain.data.read.kind import is_local_path
from dtrain.data.write.documents import Objects, buffer
from dtrain.errors import DiskFull, DtrainError, OutputExists

MAIN = "main"
UNFINISHED = "dtrain-unfinished"
"""The branch of predictions that are not committed yet; one that is left over is used again."""


class IcechunkWriter:
    """Writes chunks into a fork of the session.

    Parameters
    ----------
    path : str
    fork : icechunk.session.ForkSession
    token : str
        A file by which a directory is recognised; empty for a repository on a server.
    """

    def __init__(self, path: str, fork: Any, token: str) -> None:
        self.path, self._fork, self._token = path, fork, token

    def fresh(self) -> IcechunkWriter:
        """Return a writer for one task, with a fork of its own."""
        return IcechunkWriter(self.path, copy.copy(self._fork), self._token)

    def is_reached(self) -> bool:
        """Return True if the repository is the one that the driver has."""
        return not self._token or Path(self._token).is_file()

    def put(self, objects: Objects) -> None:
        """Write objects into the fork."""
        with _faults(self.path):
            for key, data in objects.items():
                sync(self._fork.store.set(key, buffer(data)))

    def receipt(self) -> Any:
        """Return the fork, which knows what was written."""
        return self._fork


class IcechunkSink:
    """A repository, as the driver sees it; it is made if there is none.

    Parameters
    ----------
    path : str
        Absolute path, or a URL, which begins with ``icechunk+``.
    """

    consolidated = False

    def __init__(self, path: str) -> None:
        self.path = path
        self._place = path.removeprefix(PREFIX)
        self._icechunk = icechunk_module(path)
        self._opened: Any = None
        self._session: Any = None
        self._base = self._token = ""

    @property
    def _is_local(self) -> bool:
        return is_local_path(self._place)

    def exists(self) -> bool:
        """Return True if branch main holds a group, or something else than a repository lies in the directory."""
        if self._is_local and not is_repository(self._place):
            folder = Path(self._place)
            return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        return self._repository(make=False) is not None and self.attributes() is not None

    def attributes(self) -> dict[str, Any] | None:
        """Return the attributes of the root group of branch main; None if there is none."""
        if self._is_local and not is_repository(self._place):
            return None
        repository = self._repository(make=False)
        if repository is None:
            return None
        with _faults(self.path):
            store = repository.readonly_session(MAIN).store
            try:
                return dict(zarr.open_group(store, mode="r").attrs)
            except (FileNotFoundError, zarr.errors.GroupNotFoundError):
                return None

    def free_bytes(self) -> int | None:
        """Return None."""
        return None

    @contextmanager
    def writing(self, run_id: str) -> Iterator[None]:
        """Hold a branch; one that is left over is used again."""
        repository = self._repository(make=True)
        with _faults(self.path):
            self._base = repository.lookup_branch(MAIN)
            if UNFINISHED in repository.list_branches():
                repository.reset_branch(UNFINISHED, self._base)
            else:
                repository.create_branch(UNFINISHED, self._base)
        if self._is_local:
            self._token = str(Path(self._place, f".dtrain-{run_id}"))
            Path(self._token).write_text(run_id, encoding="utf-8")
        try:
            yield
        finally:
            if self._token:
                Path(self._token).unlink(missing_ok=True)
            with suppress(Exception):  # it does no harm
                repository.delete_branch(UNFINISHED)

    def create(self, documents: Objects) -> None:
        """Commit the documents to the branch, if the group is not there."""
        with _faults(self.path):
            if self.attributes() is None:
                session = self._opened.writable_session(UNFINISHED)
                for key, data in documents.items():
                    sync(session.store.set(key, buffer(data)))
                session.commit("Arrays of predictions")
            self._session = self._opened.writable_session(UNFINISHED)

    def lacking(self, keys: Iterable[str]) -> Iterator[bool]:
        """Yield False for each chunk: what is committed is whole, and an unfinished transaction has left nothing."""
        return (False for _ in keys)

    def writer(self) -> IcechunkWriter:
        """Return what tasks write with."""
        return IcechunkWriter(self.path, self._session.fork(), self._token)

    def settle(self, receipt: Any) -> None:
        """Merge what a task has written."""
        with _faults(self.path):
            self._session.merge(receipt)

    def commit(self, message: str) -> None:
        """Commit what is merged, and move branch main to it.

        Raises
        ------
        OutputExists
            Branch main has been moved meanwhile.
        """
        with _faults(self.path):
            if not self._session.has_uncommitted_changes:
                return
            snapshot = self._session.commit(message)
            try:
                self._opened.reset_branch(MAIN, snapshot, from_snapshot_id=self._base)
            except Exception:
                if self._opened.lookup_branch(MAIN) == self._base:
                    raise
                raise OutputExists(
                    f"{self.path}: branch main was moved while predictions were written: they are not committed.",
                    "Choose another --out, or predict again once nobody writes to the repository.",
                ) from None

    def _repository(self, *, make: bool) -> Any:
        """Return the opened repository; None if there is none, and none is to be made."""
        if self._opened is not None:
            return self._opened
        with _faults(self.path):
            storage = storage_of(self._icechunk, self._place, {})
            if self._icechunk.Repository.exists(storage):
                self._opened = self._icechunk.Repository.open(storage)
            elif make:
                self._opened = self._icechunk.Repository.create(storage)
        return self._opened


@contextmanager
def _faults(path: str) -> Iterator[None]:
    """Turn icechunk's errors about a repository into sentences."""
    try:
        yield
    except (DtrainError, MemoryError):
        raise
    except Exception as error:
        said = text_of(error)
        raise server_fault(said, path) or DiskFull(
            f"{path}: the repository cannot be written: {said}", "Choose another --out."
        ) from error
