"""A directory: each object is written beside its place, synced and renamed, so that it is there as a whole or not.

Unfinished objects, the lock, and a file by which workers recognise the directory lie in `ASIDE`, which goes at the end.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.data.write.documents import ROOT, Objects, is_whole
from dtrain.errors import DiskFull, DtrainError, NotZarr, one_line
from dtrain.files import write_synced
from dtrain.lock import locked

ASIDE = ".dtrain"
CHECKED_AT_ONCE = 8
"""Threads that look at what is there."""


@dataclass(frozen=True, slots=True)
class LocalWriter:
    """Writes objects into a directory."""

    path: str
    run_id: str

    def fresh(self) -> LocalWriter:
        """Return a writer for one task."""
        return self

    def is_reached(self) -> bool:
        """Return True if the directory is the one that the driver has."""
        return os.path.isfile(os.path.join(self.path, ASIDE, self.run_id))

    def put(self, objects: Objects) -> None:
        """Write objects."""
        for key, data in objects.items():
            _put(Path(self.path), key, data)

    def receipt(self) -> None:
        """Return nothing."""


class LocalSink:
    """A directory, as the driver sees it.

    Parameters
    ----------
    path : str
        Absolute.
    """

    consolidated = True

    def __init__(self, path: str) -> None:
        self.path = path
        self._root = Path(path)
        self._run_id = ""

    def exists(self) -> bool:
        """Return True if there is a file, or a directory that holds something."""
        if not self._root.is_dir():
            return self._root.exists() or self._root.is_symlink()
        return any(name != ASIDE for name in os.listdir(self._root))

    def attributes(self) -> dict[str, Any] | None:
        """Return the attributes of the group; None if there is none."""
        try:
            document = json.loads((self._root / ROOT).read_bytes())
            return dict(document.get("attributes", {})) if document.get("node_type") == "group" else None
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, AttributeError) as error:
            raise NotZarr(f"{self._root / ROOT} cannot be read: {one_line(error)}", "Choose another --out.") from None

    def free_bytes(self) -> int | None:
        """Return the free bytes of the file system."""
        place = next(one for one in (self._root, *self._root.parents) if one.exists())
        with suppress(OSError):
            return shutil.disk_usage(place).free
        return None

    @contextmanager
    def writing(self, run_id: str) -> Iterator[None]:
        """Hold the directory while it is written to."""
        aside = self._root / ASIDE
        with disk_errors(ROOT, self.path):
            aside.mkdir(parents=True, exist_ok=True)
        with locked(aside, f"{self.path} is being written to by", "Wait for it, or choose another --out."):
            self._run_id, token = run_id, aside / run_id
            with disk_errors(ROOT, self.path):
                write_synced(token, run_id.encode())
            try:
                yield
                for left in aside.iterdir():  # of processes that were killed
                    if left.name != "LOCK":
                        left.unlink(missing_ok=True)
            finally:
                token.unlink(missing_ok=True)
        with suppress(OSError):  # it is not empty where work is left
            aside.rmdir()

    def create(self, documents: Objects) -> None:
        """Write the documents of the group; an array whose document is there keeps it."""
        for key, data in documents.items():
            if not (self._root / key).exists():
                _put(self._root, key, data)

    def lacking(self, keys: Iterable[str]) -> Iterator[bool]:
        """Yield, for each chunk, whether its file is not there, or damaged."""
        with ThreadPoolExecutor(CHECKED_AT_ONCE, "dtrain-check") as pool:
            yield from pool.map(self._lacks, keys)

    def _lacks(self, key: str) -> bool:
        try:
            return not is_whole((self._root / key).read_bytes())
        except FileNotFoundError:
            return True

    def writer(self) -> LocalWriter:
        """Return what tasks write with."""
        return LocalWriter(self.path, self._run_id)

    def settle(self, receipt: Any) -> None:
        """Do nothing: files are there."""

    def commit(self, message: str) -> None:
        """Do nothing: files are visible."""


def _put(root: Path, key: str, data: bytes) -> None:
    """Write a file as a whole."""
    final, aside = root / key, root / ASIDE / uuid.uuid4().hex
    with disk_errors(key, str(root)):
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            write_synced(aside, data)
            os.rename(aside, final)
        except BaseException:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise


@contextmanager
def disk_errors(label: str, path: str) -> Iterator[None]:
    """Turn an `OSError` into `DiskFull`."""
    try:
        yield
    except DtrainError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "Free some space, then run the same command" if full else "Choose another --out, or run the same command"
        raise DiskFull(
            f"{label} could not be written to {path}: {error.strerror or one_line(error)}.",
            f"{cure} with --continue: what is written stays.",
        ) from error
