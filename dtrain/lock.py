"""LOCK: only one process trains a run at a time.

On one machine flock decides; the kernel releases it when the process dies, however it dies. On a shared file system
flock may not reach other machines: there the host in the file and the file's age decide, and the holder touches the
file every few seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypedDict

from dtrain.errors import DiskFull, RunLocked
from dtrain.runfiles import LOCK, check_regular

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
REMOVE = "Remove it: only a process that trains writes it."
TRIES = 5
"""`holder` locks the file for an instant to look at it, so one refusal proves nothing."""


class Holder(TypedDict):
    """The process that trains a run."""

    host: str
    pid: int
    since: str


@contextlib.contextmanager
def locked(
    directory: Path,
    doing: str = "",
    cure: str = "Wait for it, or train under another --run NAME.",
) -> Iterator[None]:
    """Hold the lock of a run's directory, or of another one that one process at a time may write to.

    Parameters
    ----------
    directory : Path
    doing : str
        Begins the message if another process holds it; by default it says that the run is being trained.
    cure : str
        What can be done about that.

    Raises
    ------
    RunLocked
        Another process holds it; the message names its host, process id and start.
    DiskFull
        The lock cannot be written.
    RunDamaged
        LOCK is no regular file.
    """
    path = directory / LOCK
    descriptor = _acquire(path, lambda text: _conflict(doing or f"{directory} is being trained by", text, cure))
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, done), name="dtrain-lock", daemon=True)
    try:
        holder: Holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        with _writing(path):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
        beat.start()
        yield
    finally:
        done.set()
        path.unlink(missing_ok=True)
        os.close(descriptor)


def holder(run: Path) -> Holder | None:
    """Return the process that trains a run, or None. The lock is not taken, and nothing is waited for.

    Raises
    ------
    RunDamaged
        LOCK is no regular file.
    """
    path = run / LOCK
    try:
        check_regular(path, REMOVE)
    except FileNotFoundError:
        return None
    try:
        with path.open("rb") as file:
            text = file.read(4096)
            beaten = os.fstat(file.fileno()).st_mtime
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return _parsed(text)
            return _parsed(text) if _held_elsewhere(text, beaten) else None
    except (OSError, ValueError):
        return None


def _parsed(text: bytes) -> Holder | None:
    """Return what a LOCK says; None if it says nothing that `locked` writes."""
    try:
        found = json.loads(text)
        parsed = Holder(host=str(found["host"]), pid=int(found["pid"]), since=str(found["since"]))
        return parsed if f"{parsed['host']}{parsed['since']}".isprintable() else None
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
        return None


def _acquire(path: Path, conflict: Callable[[bytes], RunLocked]) -> int:
    tries = TRIES
    while True:
        with contextlib.suppress(FileNotFoundError):
            check_regular(path, REMOVE)
        with _writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            text = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            tries -= 1
            if not tries:
                raise conflict(text) from None
            time.sleep(0.05)
            continue
        text = os.pread(descriptor, 4096, 0)
        if not _is_still(path, descriptor):  # its holder has removed it since
            os.close(descriptor)
            continue
        beaten = os.fstat(descriptor).st_mtime
        if _held_elsewhere(text, beaten) and (not _is_ahead(beaten) or _is_beaten(path, beaten)):
            os.close(descriptor)
            raise conflict(text)
        return descriptor


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskFull(
            f"{path} cannot be written: {error.strerror}.", "Set run.dir to a place that you may write to."
        ) from error


def _is_still(path: Path, descriptor: int) -> bool:
    """Return True if the path still names the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _held_elsewhere(text: bytes, beaten: float) -> bool:
    """Return True if another machine holds the lock and has touched it recently."""
    found = _parsed(text)
    return found is not None and found["host"] != socket.gethostname() and time.time() - beaten < STALE_SECONDS


def _is_ahead(beaten: float) -> bool:
    """Return True if a file was touched in the future: another clock is wrong, or the file is a copy."""
    return beaten - time.time() > STALE_SECONDS


def _is_beaten(path: Path, before: float) -> bool:
    """Return True if the file is touched within two beats, or goes."""
    deadline = time.monotonic() + 2 * BEAT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
        try:  # opened anew each time: a shared file system caches the dates of an open file
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_mtime != before:
                    return True
        except FileNotFoundError:
            return True
    return False


def _conflict(doing: str, text: bytes, cure: str) -> RunLocked:
    found = _parsed(text)
    process = f"process {found['pid']} on {found['host']} since {found['since']}" if found else "another process"
    return RunLocked(f"{doing} {process}.", cure)


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
