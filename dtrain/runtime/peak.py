"""The peak of a process's memory while something runs."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

INTERVAL = 0.005
"""Seconds between two looks."""


class PeakMemory:
    """Looks at the resident memory of this process until its `with` statement ends; `bytes` is the most it has seen."""

    def __init__(self) -> None:
        self.bytes = 0
        self._process = psutil.Process()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dtrain peak memory", daemon=True)

    def _look(self) -> None:
        self.bytes = max(self.bytes, self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._look()

    def __enter__(self) -> PeakMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
