"""Show progress in a notebook: one output that is updated, as plain HTML."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dtrain.events import Event, Reporter
from dtrain.report.page import RunPage

UPDATE_SECONDS = 0.25
"""The output is updated this often at most: each update goes to the browser."""
TICK_SECONDS = 5.0
"""It is updated this often without an event, so that a run that waits says what it waits for."""


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook; a prompt of IPython in a terminal is none."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


@contextmanager
def notebook_progress() -> Iterator[Reporter]:
    """Yield a reporter that shows the run in one output of the cell, which stays when the block ends."""
    from IPython.display import display

    page = RunPage()
    handle = display(page, display_id=True)

    def update(page: RunPage) -> None:
        if handle is not None:  # a front end without outputs
            handle.update(page)

    reporter = _Notebook(page, update)
    done = threading.Event()
    ticking = threading.Thread(target=reporter.tick_until, args=(done,), name="dtrain-progress", daemon=True)
    ticking.start()
    try:
        yield reporter
    finally:
        done.set()
        ticking.join()
        update(reporter.page.ended())


class _Notebook:
    """The reporter; it keeps what is shown, and when it was sent."""

    def __init__(
        self, page: RunPage, update: Callable[[RunPage], None], now: Callable[[], float] = time.monotonic
    ) -> None:
        self.page = page
        self._update = update
        self._now = now
        self._sent = -UPDATE_SECONDS
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            now = self._now()
            self.page = self.page.after(event, now)
            if now - self._sent >= UPDATE_SECONDS:
                self._send(self.page, now)

    def tick(self) -> None:
        """Show what is waited for, if nothing has been shown for long."""
        with self._lock:
            now = self._now()
            if self.page.view.title and now - self._sent >= TICK_SECONDS:
                self._send(self.page.at(now), now)

    def tick_until(self, done: threading.Event) -> None:
        """Call `tick` until something is done."""
        while not done.wait(TICK_SECONDS):
            self.tick()

    def _send(self, page: RunPage, now: float) -> None:
        self._update(page)
        self._sent = now
