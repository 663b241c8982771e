"""Progress of verifying a store on stderr: a live line on a terminal, else a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dtrain.display import bytes_text
from dtrain.report.bar import PLAIN_SECONDS, live_bar

LIVE_SECONDS = 0.1
"""A live line changes so often."""


@contextmanager
def verifying_progress(*, quiet: bool = False, color: bool = True) -> Iterator[Callable[[int, int, int], None]]:
    """Yield a function to report progress: objects done, objects in all, and the bytes done.

    The live line is removed when the block ends.
    """
    if quiet:
        yield lambda done, of, nbytes: None
        return
    with live_bar("objects", color=color) as (console, progress):
        task = None if progress.disable else progress.add_task("verify", total=0, note="", visible=False)
        began, told = time.monotonic(), time.monotonic() if task is None else 0.0  # the line appears with the count

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
                progress.update(task, completed=done, total=of, note=f"{speed}/s", visible=True)

        yield tell
