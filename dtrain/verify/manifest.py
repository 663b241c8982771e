"""The contents of a store in a file: size and SHA-256 of each stored object, and what differs from it later.

Its keys are those of Zarr, and its bytes those that Zarr is given: of a shard the whole object, of a zip archive the
member, of references the bytes that they lead to, of an icechunk repository those of a snapshot. So a manifest of a
directory is also one of its copy, of the archive that it is packed into, and of references to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dtrain.data.read.documents import NAMES
from dtrain.errors import (
    DiskFull,
    ManifestConflict,
    ManifestDamaged,
    OutputExists,
    RunDamaged,
    UsageError,
    one_line,
)
from dtrain.files import write_text
from dtrain.runfiles import check_seal, parse_json, read_file, sealed, sha256
from dtrain.verify.fault import Fault

KIND, FORMAT = "contents of a Zarr store", 1
MOST_BYTES = 2**33
"""A larger file is not read: so many bytes list 70 million objects."""
ANEW = "Restore it from a copy; or, if the store is known to be intact, write a new one under another name."


class Entry(NamedTuple):
    """A stored object or a metadata document."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ArrayContents:
    """The stored objects of an array."""

    shape: tuple[int, ...]
    objects: dict[str, Entry] = field(default_factory=dict)
    """By key in the store."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a store."""

    path: str
    """Its one spelling (`dtrain.data.paths.identity`), without what may be a secret."""
    snapshot: str = ""
    """That was read of a repository."""
    written: str = ""
    """When, as text."""
    documents: dict[str, Entry] = field(default_factory=dict)
    """Metadata documents by key in the store."""
    arrays: dict[str, ArrayContents] = field(default_factory=dict)
    """By path in the store."""


def entry_of(data: bytes) -> Entry:
    """Return the entry of a metadata document."""
    return Entry(len(data), sha256(data))


# The file ---------------------------------------------------------------------------------------------------


def check_place(file: Path) -> None:
    """Refuse a place where no manifest can be written, before a store is read for it.

    Raises
    ------
    UsageError
        Its folder is not there, or Zarr would take the file for a metadata document.
    """
    if file.name in NAMES:
        raise UsageError(f"--manifest {file}: Zarr takes a file of that name for metadata.", "Choose another name.")
    if not file.parent.is_dir():
        raise UsageError(f"--manifest {file}: there is no directory {file.parent}.", "Make it, or name another place.")
    if not os.access(file.parent, os.W_OK):
        raise DiskFull(f"--manifest {file}: you may not write to {file.parent}.", "Name another place.")


def write_manifest(file: Path, manifest: Manifest) -> None:
    """Write the file as a whole; one that is there stays.

    Raises
    ------
    OutputExists
        There is one by now.
    DiskFull
        It could not be written.
    """
    text = json.dumps(sealed(to_json(manifest)), indent=0, sort_keys=True) + "\n"
    if os.path.lexists(file):
        raise OutputExists(f"{file} has been written meanwhile.", "Run the same command again: it is compared with it.")
    write_text(file, text)


def to_json(manifest: Manifest) -> dict[str, Any]:
    """Return what the file holds, but for its own digest."""
    arrays = {
        name: {"shape": list(own.shape), "objects": {key: list(entry) for key, entry in own.objects.items()}}
        for name, own in manifest.arrays.items()
    }
    return {
        "kind": KIND,
        "format": FORMAT,
        "store": {"path": manifest.path, "snapshot": manifest.snapshot},
        "written": manifest.written,
        "documents": {key: list(entry) for key, entry in manifest.documents.items()},
        "arrays": arrays,
    }


def read_manifest(file: Path) -> Manifest | None:
    """Return the content of the file; None if there is none.

    Raises
    ------
    ManifestDamaged
        It is no manifest, or cannot be read, or has been modified.
    ManifestConflict
        Another version of dtrain has written it.
    """
    real = Path(os.path.realpath(file))
    if not os.path.lexists(real):
        return None
    try:
        content = parse_json(real, read_file(real, MOST_BYTES))
        if content.get("kind") != KIND:
            raise ManifestDamaged(
                f"{file} is no manifest of a store.", "Give another --manifest FILE, one that is new."
            )
        check_seal(real, content)
    except RunDamaged as error:
        raise ManifestDamaged(error.message, ANEW) from None
    if content.get("format") != FORMAT:
        raise ManifestConflict(
            f"{file} was written by another version of dtrain: it has format {content.get('format')!r:.20}, this one "
            f"reads {FORMAT}.",
            "Use that version, or write a new one under another name.",
        )
    try:
        return _parsed(content)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ManifestDamaged(f"{file} cannot be read: {one_line(error)}.", ANEW) from None


def _parsed(content: Mapping[str, Any]) -> Manifest:
    return Manifest(
        path=str(content["store"]["path"]),
        snapshot=str(content["store"]["snapshot"]),
        written=str(content["written"]),
        documents=_entries(content["documents"]),
        arrays={
            name: ArrayContents(tuple(map(int, own["shape"])), _entries(own["objects"]))
            for name, own in content["arrays"].items()
        },
    )


def _entries(given: Mapping[str, Any]) -> dict[str, Entry]:
    return {key: Entry(int(nbytes), str(digest)) for key, (nbytes, digest) in given.items()}


# What differs -----------------------------------------------------------------------------------------------


class Comparison:
    """What of a store differs from a manifest, of which each entry is used up: a document or object is given once.

    Parameters
    ----------
    manifest : Manifest
    """

    def __init__(self, manifest: Manifest) -> None:
        self._documents = dict(manifest.documents)
        self._arrays = {name: own.objects for name, own in manifest.arrays.items()}

    def document(self, key: str, found: Entry) -> Fault | None:
        """Return what is wrong with a metadata document."""
        return _difference(key, "", self._documents.pop(key, None), found)

    def object(self, array: str, key: str, found: Entry | None) -> Fault | None:
        """Return what is wrong with a stored object; None stands for one that is there and cannot be read."""
        listed = self._arrays.get(array, {}).pop(key, None)
        return None if found is None else _difference(key, array, listed, found)

    def missing(self) -> Iterator[Fault]:
        """Yield what has not been given: documents, then objects."""
        for key in self._documents:
            yield Fault("missing", key, "the manifest lists it, and it is not there")
        for array, objects in self._arrays.items():
            for key in objects:
                yield Fault("missing", key, "the manifest lists it, and it is not there", array)


def _difference(key: str, array: str, listed: Entry | None, found: Entry) -> Fault | None:
    if listed is None:
        return Fault("new", key, "the manifest does not list it", array)
    if listed == found:
        return None
    if listed.nbytes != found.nbytes:
        why = f"it has {found.nbytes:,} bytes, in the manifest {listed.nbytes:,}"
    else:
        why = "its bytes are not those of the manifest"
    return Fault("modified", key, why, array)


def grown(before: tuple[int, ...], now: tuple[int, ...]) -> bool:
    """Return True if an array has become longer along some dimensions, and shorter along none.

    >>> grown((18, 4), (24, 4)), grown((18, 4), (18, 4)), grown((18, 4), (24, 2))
    (True, False, False)
    """
    return len(before) == len(now) and before != now and all(a <= b for a, b in zip(before, now, strict=True))
