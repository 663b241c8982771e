"""LOCK: one process trains a run.

flock decides on one machine (the kernel lets go of it when the process dies, however it dies); the file's text
and age decide between machines that share a file system on which flock may not reach across.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.errors import DiskFull, RunLocked

BEAT_SECONDS = 10.0
STALE_SECONDS = 60.0


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the lock of a run's directory.

    Raises
    ------
    RunLocked
        Another process trains the run; its host, process id and start are named.
    DiskFull
        The lock cannot be written.
    """
    path = run / "LOCK"
    descriptor = _acquire(path)
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, done), name="dtrain-lock", daemon=True)
    try:
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        with _writing(path):
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
        beat.start()
        yield
    finally:
        done.set()
        path.unlink(missing_ok=True)
        os.close(descriptor)


def holder(run: Path) -> dict[str, Any] | None:
    """Return who is training a run (host, pid, since), or None; takes nothing and waits for nothing."""
    path = run / "LOCK"
    try:
        with path.open("rb") as file:
            text = file.read(4096)
            beaten = os.fstat(file.fileno()).st_mtime
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                found: dict[str, Any] = json.loads(text)
                return found
            return json.loads(text) if _held_elsewhere(text, beaten) else None
    except (OSError, ValueError):
        return None


def _acquire(path: Path) -> int:
    patience = 5  # tries: `holder` may look at the file for an instant
    while True:
        with _writing(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            text = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            patience -= 1
            if not patience:
                raise _conflict(path, text) from None
            time.sleep(0.05)
            continue
        text = os.pread(descriptor, 4096, 0)
        if not _is_still(path, descriptor):  # its holder has removed it in the meantime
            os.close(descriptor)
            continue
        if _held_elsewhere(text, os.fstat(descriptor).st_mtime):
            os.close(descriptor)
            raise _conflict(path, text)
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
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _held_elsewhere(text: bytes, beaten: float) -> bool:
    with contextlib.suppress(ValueError, AttributeError):
        host = json.loads(text).get("host")
        return host != socket.gethostname() and time.time() - beaten < STALE_SECONDS
    return False


def _conflict(path: Path, text: bytes) -> RunLocked:
    said = "another process"
    with contextlib.suppress(ValueError, KeyError, TypeError):
        holder = json.loads(text)
        said = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    return RunLocked(f"{path.parent} is being trained by {said}.", "Wait for it, or train under another --run NAME.")


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
