"""A live line of long work on stderr: a bar with counts, speed and the time that is left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 20.0
"""Without a live line, a line is printed this often."""


@contextmanager
def live_bar(what: str, *, color: bool) -> Iterator[tuple[Console, Progress]]:
    """Yield a console on stderr, and a bar whose tasks have a field ``note``; it is removed when the block ends.

    Parameters
    ----------
    what : str
        What is counted.
    color : bool
        Without it, and without a terminal, the bar is disabled.
    """
    console = Console(file=sys.stderr, no_color=not color, highlight=False)
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=30),
        TextColumn(f"{{task.completed:,.0f}}/{{task.total:,.0f}} {what}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not (color and console.is_terminal),
    ) as progress:
        yield console, progress
