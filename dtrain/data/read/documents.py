"""Metadata documents of stores: each is requested once, and remembered for the next reader in this process.

A group is opened by `describe`, by the checks of its chunks and by every reader. They all open it anew, from the
same documents. It is a cache of speed, never of truth: documents are used again only if they have not changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from zarr.core.buffer import Buffer

from dtrain.data.read.local import Version
from dtrain.errors import NotZarr, one_line

NAMES = frozenset({"zarr.json", ".zgroup", ".zarray", ".zattrs", ".zmetadata"})
ROOT_DOCUMENTS = (".zmetadata", "zarr.json", ".zgroup")
REMEMBERED_STORES = 16
MOST_BYTES = 64 << 20
"""Of a document: text of that length becomes up to 25 times as many bytes in memory. Real ones have some kilobytes, and
consolidated metadata of 10,000 arrays 20 MB."""


def check_document(path: str, key: str, size: int, *, is_file: bool = True) -> None:
    """Refuse a metadata document that is too large to be one, or that is no file.

    Raises
    ------
    NotZarr
    """
    if not is_file:
        raise NotZarr(f"{path}: {key} is no file.", "Restore it from a copy of the store.")
    if size > MOST_BYTES:
        raise NotZarr(
            f"{path}: {key} has {size:,} bytes; a metadata document of at most {MOST_BYTES:,} is read.",
            "Restore it from a copy of the store; keep what is no metadata in arrays, not in attributes.",
        )


def unreadable_document(path: str, key: str, error: Exception) -> NotZarr:
    """Return the error for a metadata document that is there and cannot be read."""
    return NotZarr(f"{path}: {key} cannot be read: {one_line(error)}", "Restore it from a copy of the store.")


class Documents:
    """The answers of a store to requests for metadata documents, also that there is no such document."""

    def __init__(self) -> None:
        self._answers: dict[str, tuple[Buffer | None, Version | None]] = {}

    @staticmethod
    def holds(key: str) -> bool:
        """Return True if a key names a metadata document."""
        return key.rpartition("/")[2] in NAMES

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Buffer | None:
        return self._answers[key][0]

    def put(self, key: str, document: Buffer | None, version: Version | None) -> None:
        """Remember an answer, and the version of the file before it was read, if it is one."""
        self._answers[key] = (document, version)

    def copy(self) -> Documents:
        """Return documents to which answers can be added."""
        copied = Documents()
        copied._answers = dict(self._answers)
        return copied

    def of_nodes(self, paths: Iterable[str]) -> Documents:
        """Return the documents of some groups and arrays alone."""
        wanted, chosen = set(paths), Documents()
        for key, (document, version) in self._answers.items():
            if key.rpartition("/")[0] in wanted:
                chosen.put(key, document, version)
        return chosen

    def unchanged_files(self, version_of: Callable[[str], Version | None]) -> bool:
        """Return True if every document is the version that it was, and those that were not there still are not."""
        return all(version_of(key) == version for key, (_, version) in self._answers.items())

    def root(self) -> tuple[str, Buffer] | None:
        """Return key and text of the document at the root that says most."""
        present = ((key, self._answers[key][0]) for key in ROOT_DOCUMENTS if key in self._answers)
        return next(((key, document) for key, document in present if document is not None), None)
