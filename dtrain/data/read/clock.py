"""The time that a read spends at the store: the rest of it is decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter


class FetchClock:
    """Counts the seconds in which at least one request of a read is under way.

    zarr makes the requests of one read at the same time, in its event loop: those that overlap count once.
    """

    __slots__ = ("_began", "_under_way", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0
        self._under_way = 0

    def __enter__(self) -> None:
        if not self._under_way:
            self._began = perf_counter()
        self._under_way += 1

    def __exit__(self, *_: object) -> None:
        self._under_way -= 1
        if not self._under_way:
            self.seconds += perf_counter() - self._began


_CLOCK: ContextVar[FetchClock | None] = ContextVar("fetch clock", default=None)
"""Of the read of this thread; the tasks that it starts in zarr's event loop inherit it."""


@contextmanager
def fetches_counted() -> Iterator[FetchClock]:
    """Count the requests that are made in this context."""
    clock = FetchClock()
    token = _CLOCK.set(clock)
    try:
        yield clock
    finally:
        _CLOCK.reset(token)


def fetching() -> FetchClock:
    """Return the context in which a request is made."""
    return _CLOCK.get() or FetchClock()
