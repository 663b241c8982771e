"""The files of a run's directory: their names, how they are read, and their digests.

A run may come from elsewhere, and any of its files may hold anything. Only regular files are read: no links, pipes or
devices. The JSON files carry a digest of their own content, so that a modified one is named before it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from dtrain.errors import RunConflict, RunDamaged, one_line

CONFIG, PLAN, ENV = "config.toml", "plan.json", "env.json"
HISTORY, EVENTS, LOCK = "history.jsonl", "events.jsonl", "LOCK"
ROUNDS = "rounds"
ROUND = re.compile(r"round-([0-9]{6,18})")
"""The name of a round's directory."""
SEAL = "sha256"
"""The key of a JSON file's own digest."""
MOST_BYTES = 2**30
"""Files of text are smaller; a larger one is not read."""
RESTORE = "Restore it from a copy of the run, or train under another --run NAME."


def read_file(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return the content of a regular file.

    Raises
    ------
    RunDamaged
        It is missing, no regular file, larger than `most` bytes, or cannot be read.
    """
    data = read_if_there(path, most)
    if data is None:
        raise RunDamaged(f"{path} is missing.", RESTORE)
    return data


def read_if_there(path: Path, most: int = MOST_BYTES) -> bytes | None:
    """Return the content of a regular file; None if there is none.

    Raises
    ------
    RunDamaged
        It is no regular file, larger than `most` bytes, or cannot be read.
    """
    with _opened(path) as file:
        return None if file is None else file.read(_size_of(file, path, most))


def lines_of(path: Path, most: int = MOST_BYTES) -> Iterator[bytes]:
    """Yield the lines of a regular file with their ends; none if there is no file. Raises as `read_if_there` does."""
    with _opened(path) as file:
        if file is not None:
            _size_of(file, path, most)
            yield from file


def _size_of(file: io.BufferedReader, path: Path, most: int) -> int:
    size = os.fstat(file.fileno()).st_size
    if size > most:
        raise RunDamaged(f"{path} has {size:,} bytes; at most {most:,} are read.", RESTORE)
    return size


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader | None]:
    """Open a regular file; None if there is none."""
    try:
        check_regular(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        with open(descriptor, "rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> RunDamaged:
    return RunDamaged(f"{path} cannot be read: {error.strerror or error}.", RESTORE)


def read_known(path: Path, nbytes: int, digest: str) -> bytes:
    """Return the content of a regular file of which size and SHA-256 are known.

    Raises
    ------
    RunDamaged
        It is missing, or holds something else.
    """
    data = read_file(path, nbytes)
    if len(data) != nbytes or sha256(data) != digest:
        raise RunDamaged(f"{path} is not what was committed.")
    return data


def check_known(path: Path, nbytes: int, digest: str) -> None:
    """Read a file as `read_known` does, without holding it in memory.

    Raises
    ------
    RunDamaged
        It is missing, or holds something else.
    """
    with _opened(path) as file:
        if file is None:
            raise RunDamaged(f"{path} is missing.", RESTORE)
        size = os.fstat(file.fileno()).st_size
        if size != nbytes or hashlib.file_digest(file, "sha256").hexdigest() != digest:
            raise RunDamaged(f"{path} is not what was committed.")


def check_regular(path: Path, hint: str = RESTORE) -> None:
    """Refuse what lies at a path and is no regular file.

    Raises
    ------
    RunDamaged
        It is a link, directory, pipe, device or socket.
    FileNotFoundError
        There is nothing.
    """
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe"}
        kind = kinds.get(stat.S_IFMT(mode), "a device or socket")
        raise RunDamaged(f"{path} is {kind}, not a regular file.", hint)


def check_directory(path: Path) -> None:
    """Refuse what lies at a path and is no directory.

    Raises
    ------
    RunDamaged
        It is a link or a file, or cannot be looked at.
    FileNotFoundError
        There is nothing.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RunDamaged(f"{path} cannot be read: {error.strerror}.", RESTORE) from error
    if not stat.S_ISDIR(mode):
        raise RunDamaged(f"{path} is {'a link' if stat.S_ISLNK(mode) else 'a file'}, not a directory.", RESTORE)


def check_rounds(run: Path) -> None:
    """Refuse a run whose ``rounds`` is no directory of its own.

    Raises
    ------
    RunDamaged
        It is a link, a file or anything else.
    """
    with contextlib.suppress(FileNotFoundError):
        check_directory(run / ROUNDS)


def round_directory(run: Path, number: int) -> Path:
    """Return the directory of a round."""
    return run / ROUNDS / f"round-{number:06d}"


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises
    ------
    RunDamaged
        It is no JSON, or another value than an object.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RunDamaged(f"{path} cannot be read: {one_line(error)}.", RESTORE) from error
    if not isinstance(value, dict):
        raise RunDamaged(f"{path} holds no JSON object, but {value!r:.40}.", RESTORE)
    return value


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with the digest of its content."""
    return {**values, SEAL: _digest(values)}


def check_seal(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse the object of a file whose content is not that of its digest.

    Raises
    ------
    RunDamaged
        It has been modified.
    """
    if _digest({key: value for key, value in values.items() if key != SEAL}) != values.get(SEAL):
        raise RunDamaged(f"{path} has been modified: it is not what was written.", RESTORE)


def _digest(values: Mapping[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode())


def sha256(data: bytes) -> str:
    """Return the SHA-256 of data in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def history_sha256(lines: Iterable[bytes], rounds: int) -> str:
    r"""Return the SHA-256 of the lines of a history up to a round; empty if it has fewer.

    >>> history_sha256([b"{}\n", b"{}\n"], 1) == sha256(b"{}\n"), history_sha256([b"{}\n", b"{"], 2)
    (True, '')
    """
    digest, whole = hashlib.sha256(), 0
    for line in islice(lines, rounds):
        digest.update(line)
        whole += line.endswith(b"\n")
    return digest.hexdigest() if whole == rounds else ""


def other_version(run: Path, why: str) -> RunConflict:
    """Return the error for a run that another version of dtrain has trained."""
    return RunConflict(
        f"{run} was trained by another version of dtrain: {why}.",
        "Go on with that version, or train under another --run NAME.",
    )
