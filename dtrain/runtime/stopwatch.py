"""The time of local steps: of the clock, and of the thread that takes them."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from time import perf_counter, thread_time

from dtrain.data.load.counted import Counted, DataSeconds, data_seconds


def process_name() -> str:
    """Return a name of this process; not kept, since workers are forked."""
    return f"{socket.gethostname()}:{os.getpid()}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What the local steps of a task took."""

    seconds: float
    counted: Counted
    data: DataSeconds


class Stopwatch:
    """Runs from its making on; it is read by the thread that made it."""

    def __init__(self) -> None:
        self._began, self._began_thread = perf_counter(), thread_time()

    def measured(self, counted: Counted, *, shares_cores: bool) -> Measured:
        """Return what has passed, and what of it the data took.

        Parameters
        ----------
        counted : Counted
            Of the loader, since the watch began.
        shares_cores : bool
            The steps are computed where data are read. If their thread neither waits for a batch nor runs, others use
            its core. On a GPU it waits for the GPU.
        """
        seconds, ran = perf_counter() - self._began, thread_time() - self._began_thread
        stolen = seconds - counted.waited - ran if shares_cores else 0.0
        return Measured(seconds, counted, data_seconds(counted, stolen))
