"""Stores in a directory of this machine: the objects are files, and can be read by their path without zarr."""

from __future__ import annotations

import itertools
import os
import stat
import time
import zipfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

from zarr.storage import LocalStore

from dtrain.data.read.kind import METADATA_FILES, StorageOptions, StoreKind, is_local_path, local_path, not_a_group
from dtrain.data.samples import StoreFacts
from dtrain.errors import DtrainError, NotZarr

Version: TypeAlias = tuple[int, int]
"""Size of a file, and the time when it was last written, in nanoseconds."""
Scratch: TypeAlias = Callable[[int], memoryview]
"""Gives a scratch buffer of so many bytes."""


class DirectoryStore(LocalStore):
    """A directory, listed without pathlib, which remembers every file that it has seen."""

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the keys that begin so."""
        for folder, _, names in os.walk(os.path.join(self.root, prefix), followlinks=True):
            inside = os.path.relpath(folder, self.root).replace(os.sep, "/")
            for name in names:
                yield name if inside == "." else f"{inside}/{name}"


def read_part(path: str, scratch: Scratch, start: int, stop: int | None) -> tuple[memoryview, Version] | None:
    """Return the bytes ``start:stop`` of a file, as far as it goes, and its version; None if there is no file.

    A pipe or a device is no file.
    """
    try:
        with open(path, "rb", buffering=0, opener=_at_once) as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                return None
            end = facts.st_size if stop is None else min(stop, facts.st_size)
            value = scratch(max(0, end - start))
            if start:
                file.seek(start)
            done = 0
            while done < len(value) and (count := file.readinto(value[done:])):
                done += count
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    return value[:done], (facts.st_size, facts.st_mtime_ns)


def _at_once(path: str, flags: int) -> int:
    """Open a file; a named pipe too, which nobody writes to: it ends at once."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def is_no_file(path: str) -> bool:
    """Return True for what is there and is neither a file nor a directory: to read a named pipe would wait for ever."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def new_buffer(size: int) -> memoryview:
    """Return new memory (`Scratch`)."""
    return memoryview(bytearray(size))


def version_of(path: str) -> Version | None:
    """Return the version of a file; None if there is none."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_size, facts.st_mtime_ns


def oddity(path: str, most: int) -> str:
    """Say why a file should not be opened: it is no regular file, or larger than `most` bytes; empty if it may be.

    Links are followed, and a file that is not there is no oddity.
    """
    try:
        facts = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as error:  # such as a link to itself
        return f"it cannot be read: {error.strerror}"
    if not stat.S_ISREG(facts.st_mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe"}
        return f"it is {kinds.get(stat.S_IFMT(facts.st_mode), 'a device or socket')}, not a regular file"
    return f"it has {facts.st_size:,} bytes; at most {most:,} are read" if facts.st_size > most else ""


# Facts of many files --------------------------------------------------------------------------------------

SLOW_LOOKUP = 1e-4
"""Seconds. If looking up a file takes longer, as on a network, several files are looked up at once."""
LOOKUPS = 16
"""So many."""
TOGETHER = 4096
"""Names that are looked up before the next ones are made."""


def facts_of(folder: str, names: Iterable[str]) -> Iterator[os.stat_result | None]:
    """Yield size, time and kind of files by their path below a directory, in order; None where there is none."""
    todo = iter(names)
    with _looking_into(folder) as look, ThreadPoolExecutor(LOOKUPS, "dtrain-look") as pool:
        began = time.monotonic()
        first = [look(name) for name in itertools.islice(todo, LOOKUPS)]
        is_slow = time.monotonic() - began > SLOW_LOOKUP * len(first)
        yield from first
        while some := list(itertools.islice(todo, TOGETHER)):
            yield from pool.map(look, some) if is_slow else map(look, some)


@contextmanager
def _looking_into(folder: str) -> Iterator[Callable[[str], os.stat_result | None]]:
    """Give a function that looks up a file below a directory: the system need not follow the directory's own path."""
    try:
        place = os.open(folder, os.O_RDONLY) if os.stat in os.supports_dir_fd else None
    except OSError:
        place = None

    def look(name: str) -> os.stat_result | None:
        try:
            return os.stat(os.path.join(folder, name)) if place is None else os.stat(name, dir_fd=place)
        except OSError:
            return None

    try:
        yield look
    finally:
        if place is not None:
            os.close(place)


def _open(path: str, storage_options: StorageOptions) -> DirectoryStore:
    return DirectoryStore(path, read_only=True)


def _locate(path: str, base: Path) -> str:
    return local_path(unquote(path.removeprefix("file://")) if path.startswith("file://") else path, base)


def _nothing_there(path: str) -> DtrainError:
    """Return the error for a path that is no Zarr group, with the way to one."""
    if not os.path.isdir(path):
        if zipfile.is_zipfile(path):
            return _archive(path)
        return NotZarr(
            f"{path} is a file; a Zarr store is a directory, or a zip archive of one.",
            "Convert it, for example xarray.open_dataset(...).to_zarr(...); unpack archives other than zip.",
        )
    inside = [name for name in sorted(os.listdir(path)) if _is_group(os.path.join(path, name))]
    if inside:
        return NotZarr(
            f"{path} is not a Zarr group; it holds {', '.join(inside[:5])}{' and more' if len(inside) > 5 else ''}.",
            f'Give the path of one: "{os.path.join(path, inside[0])}".',
        )
    return not_a_group(path)


def _is_group(path: str) -> bool:
    return any(os.path.exists(os.path.join(path, name)) for name in METADATA_FILES)


def _archive(path: str) -> DtrainError:
    """Return the error for a zip archive, with the URL under which it is read."""
    with zipfile.ZipFile(path) as archive:
        folders = {name.rpartition("/")[0] for name in archive.namelist() if name.rpartition("/")[2] in METADATA_FILES}
    if not folders:
        return NotZarr(
            f"{path} is a zip archive without a Zarr group: it has none of {', '.join(METADATA_FILES)}.",
            "Pack the directory of a Zarr group.",
        )
    root = min(folders, key=lambda folder: (folder.count("/") + bool(folder), folder))
    return NotZarr(f"{path} is a zip archive.", f'Read it by its URL: "zip://{root}::{path}".')


DIRECTORY = StoreKind(
    matches=is_local_path, open=_open, facts=StoreFacts(), locate=_locate, nothing_there=_nothing_there
)
