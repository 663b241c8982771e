"""Progress of predictions on stderr: a live line on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

from dtrain.display import bytes_text, duration, shown, width_of, wrapped
from dtrain.events import Event, PredictionStarted, Reporter, SamplesPredicted
from dtrain.report.bar import PLAIN_SECONDS, live_bar


@contextmanager
def prediction_progress(*, quiet: bool = False, color: bool = True) -> Iterator[Reporter]:
    """Yield a reporter that prints to stderr; the live line is removed when the block ends."""
    if quiet:
        yield lambda event: None
        return
    with live_bar("samples", color=color) as (console, progress):
        yield _Reporter(console, progress)


class _Reporter:
    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress
        self._task = None if progress.disable else progress.add_task("predict", total=1, note="", visible=False)
        self._printed = time.monotonic()

    def __call__(self, event: Event) -> None:
        if isinstance(event, PredictionStarted):
            self._start(event)
        elif isinstance(event, SamplesPredicted):
            self._advance(event)

    def _start(self, event: PredictionStarted) -> None:
        workers = f"{event.workers} worker{'s' if event.workers > 1 else ''}"
        self._print(
            f"{shown(event.out)}: {event.samples:,} samples on {workers}, {bytes_text(event.nbytes)} before compression"
        )
        if event.done:
            self._print(f"{event.done:,} samples are there and whole; {event.samples - event.done:,} are left")
        if event.dashboard:
            self._print(f"dashboard {event.dashboard}")
        if self._task is not None:
            self._print("Ctrl-C stops; what is written stays, and --continue goes on")
            self._progress.update(self._task, total=event.samples, completed=event.done, visible=True)

    def _advance(self, event: SamplesPredicted) -> None:
        speed = event.new / max(event.seconds, 1e-9)
        if self._task is not None:
            self._progress.update(self._task, completed=event.done, note=f"{speed:,.0f} samples/s")
        elif time.monotonic() - self._printed >= PLAIN_SECONDS:
            left = duration((event.samples - event.done) / speed) if speed else "unknown"
            self._print(f"{event.done:,} of {event.samples:,} samples, {speed:,.0f} samples/s, {left} left")

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        self._console.print(wrapped(text, width_of(sys.stderr)), markup=False, soft_wrap=True)
