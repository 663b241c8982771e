"""Progress of verifying a store on stderr: a live line on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dtrain.display import bytes_text

PLAIN_SECONDS = 20.0
"""Without a live line, a line is printed this often."""
LIVE_SECONDS = 0.1
"""A live line changes so often."""


@contextmanager
def verifying_progress(*, quiet: bool = False, color: bool = True) -> Iterator[Callable[[int, int, int], None]]:
    """Yield a function that is told how far it is: objects, of how many, and their bytes.

    The live line is removed when the block ends.
    """
    if quiet:
        yield lambda done, of, nbytes: None
        return
    console = Console(file=sys.stderr, no_color=not color, highlight=False)
    with Progress(
        TextColumn("[bold]verify"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} objects"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not (color and console.is_terminal),
    ) as progress:
        task = None if progress.disable else progress.add_task("verify", total=1, note="")
        began = told = time.monotonic()

        def tell(done: int, of: int, nbytes: int) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told < (PLAIN_SECONDS if task is None else LIVE_SECONDS):
                return
            told, speed = now, bytes_text(nbytes / max(now - began, 1e-9))
            if task is None:
                console.print(
                    f"{done:,} of {of:,} objects, {bytes_text(nbytes)}, {speed}/s", markup=False, soft_wrap=True
                )
            else:
                progress.update(task, completed=done, total=of, note=f"{speed}/s")

        yield tell
