"""Run first in each worker of a local cluster: ignore Ctrl-C, which the driver handles, and print to stderr.

A terminal sends SIGINT to every process of the command. The driver closes the cluster; workers that were interrupted
themselves would only print tracebacks. What their code prints would stand among the driver's results on stdout.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any, TextIO

MOST_CHARACTERS = 1_000_000
"""A worker prints at most so many; the rest is left out."""


class Bounded(io.TextIOBase):
    """Passes a text on to a stream, up to a number of characters.

    Parameters
    ----------
    stream : TextIO
    most : int
    """

    def __init__(self, stream: TextIO, most: int = MOST_CHARACTERS) -> None:
        self._stream = stream
        self._left = most

    def write(self, text: str) -> int:
        """Write a text, or as much of it as is left."""
        if self._left > 0:
            self._stream.write(text[: self._left])
            if len(text) >= self._left:
                self._stream.write(f"\n(worker {os.getpid()}: more output is left out)\n")
            self._left -= len(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()

    def fileno(self) -> int:
        """Return that of the stream."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """Return True."""
        return True


def dask_setup(worker: Any) -> None:
    """Prepare a worker; Dask calls this in the main thread of its process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout.flush()
    os.dup2(2, 1)  # also for what is printed by C
    sys.stdout = sys.stderr = Bounded(sys.stderr)
