"""Write files so that a crash or a full disk leaves the old content or the new one, never a part of it.

Data is synced before the rename that makes it visible, and the directory after it. The umask is honoured.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from dtrain.errors import DiskFull, DtrainError
from dtrain.runfiles import check_regular

HINTS = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Your disk quota is used up: free some space",
    errno.EROFS: "The file system is read-only: set run.dir to another place",
    errno.EACCES: "Permission is denied: set run.dir to a place that you may write to",
}


def write_text(path: Path, text: str) -> None:
    """Replace a file as a whole.

    Raises
    ------
    DiskFull
        It could not be written.
    """
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file as a whole.

    Raises
    ------
    DiskFull
        It could not be written.
    """
    temporary = hidden(path)
    with disk_errors(path.name, path.parent):
        try:
            write_synced(temporary, data)
            os.replace(temporary, path)
            sync_directory(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def append_line(path: Path, text: str) -> None:
    """Append a line to a file and sync it.

    Raises
    ------
    DiskFull
        It could not be written.
    RunDamaged
        There is something else than a regular file, such as a link.
    """
    with disk_errors(path.name, path.parent):
        with contextlib.suppress(FileNotFoundError):
            check_regular(path)
        write_synced(path, f"{text}\n".encode(), os.O_APPEND)


def write_directory(path: Path, files: Iterable[tuple[str, bytes | Path]], label: str) -> None:
    """Write a directory as a whole; one that is there is replaced.

    Parameters
    ----------
    path : path
        The directory. Its parent is made if it is absent.
    files : iterable of (name, content or path)
        They are written and synced in this order. A path is a file that is synced already: it is moved.
    label : str
        Names the content in errors.

    Raises
    ------
    DiskFull
        It could not be written; a directory that was there is as it was.

    Notes
    -----
    Replacing takes two renames. A process killed between them leaves the old directory under a hidden name.
    """
    temporary = hidden(path)
    with disk_errors(label, path.parent):
        try:
            path.parent.mkdir(exist_ok=True)
            temporary.mkdir()
            for name, data in files:
                if isinstance(data, Path):
                    os.rename(data, temporary / name)
                else:
                    write_synced(temporary / name, data)
            sync_directory(temporary)
            _move_into_place(temporary, path)
            sync_directory(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def remove_directory(path: Path) -> None:
    """Remove a directory; it is renamed first, so that a half-removed one is never taken for a whole one.

    Raises
    ------
    OSError
        It could not be renamed.
    """
    aside = hidden(path)
    path.rename(aside)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a directory with all that is in it, a file, or a link; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        path.unlink()
        return
    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def disk_errors(label: str, directory: Path) -> Iterator[None]:
    """Turn an `OSError` into `DiskFull`, with a hint for what often goes wrong; `label` names what is written."""
    try:
        yield
    except DtrainError:
        raise
    except OSError as error:
        hint = HINTS.get(error.errno or 0, "Look at the disk")
        raise DiskFull(
            f"{label} could not be written to {directory}: {error.strerror or error}.",
            f"{hint}, then run the same command again; committed rounds are safe.",
        ) from error


def hidden(path: Path) -> Path:
    """Return a new hidden name beside a path."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")


def write_synced(path: Path, data: bytes, flag: int = os.O_EXCL) -> None:
    """Write a new file, or append to one with `os.O_APPEND`, and sync it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flag, 0o666)
    try:
        view = memoryview(data)
        while view:  # a write may be short
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Sync the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, final: Path) -> None:
    if not os.path.lexists(final):
        temporary.rename(final)
        return
    aside = hidden(final)
    final.rename(aside)
    try:
        temporary.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    remove(aside)
