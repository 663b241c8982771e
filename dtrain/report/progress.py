"""Print progress to stderr: lines and, if stderr is a terminal, a table of rounds with live lines below it."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dtrain.display import clock, columns_of, width_of, wrapped
from dtrain.events import (
    ClusterOpening,
    Event,
    Fault,
    ParametersLoaded,
    Reporter,
    RoundFinished,
    RoundsMeasured,
    RunFinished,
    RunStarted,
    StepsTaken,
)
from dtrain.report.bar import PLAIN_SECONDS
from dtrain.report.lines import (
    continuing_line,
    fault_line,
    loaded_line,
    measured_line,
    opening_line,
    pace_line,
    round_line,
    started_line,
    steps_line,
    waiting_line,
)
from dtrain.report.pace import speed
from dtrain.report.view import RunView

MAX_LINES = 50
"""A run of more rounds prints only every n-th one, which is evaluated, so that about this many lines are the most."""
TICK_SECONDS = 1.0
"""Without a live line, it is looked this often whether a run has stalled."""
BAR = 24
"""Columns of the bar."""


@contextmanager
def terminal_progress(*, color: bool = True, verbose: bool = False) -> Iterator[Reporter]:
    """Yield a reporter that prints to stderr; the live lines are removed when the block ends.

    Parameters
    ----------
    color : bool
        Allow colours, the table and live lines; they are used only if stderr is a terminal.
    verbose : bool
        Also print commits and other events of a sound run.
    """
    console = Console(file=sys.stderr, no_color=not color, highlight=False)
    reporter = _Terminal(console, live=color and console.is_terminal, verbose=verbose)
    if reporter.live:
        with Live(
            get_renderable=reporter.live_lines,
            console=console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),  # results that are piped must not go to the terminal
        ):
            yield reporter
    else:
        with _ticking(reporter.tick):
            yield reporter


@contextmanager
def _ticking(tick: Callable[[], None]) -> Iterator[None]:
    """Call a function now and then, in a thread of its own."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(TICK_SECONDS):
            tick()

    thread = threading.Thread(target=run, name="dtrain-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class _Terminal:
    """The reporter; it keeps what is known of the run, and when something was printed."""

    def __init__(self, console: Console, *, live: bool, verbose: bool) -> None:
        self.live = live
        self.view = RunView()
        self._console = console
        self._verbose = verbose
        self._every = 1
        """Rounds between lines."""
        self._printed = self._began = time.monotonic()
        self._told = 0.0
        """The longest silence that was told of since the last step."""
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        with self._lock:
            self.view = self.view.after(event, time.monotonic())
            self._tell(event)

    def _tell(self, event: Event) -> None:
        match event:
            case ClusterOpening(scheduler=scheduler):
                self._began = time.monotonic()
                if scheduler != "serial" and not self.live:
                    self._print(opening_line(event))
            case RunStarted():
                self._start(event)
            case ParametersLoaded():
                self._print(f"starting from {loaded_line(event)}")
            case StepsTaken():
                self._step()
            case RoundsMeasured():
                self._print(measured_line(event))
            case RoundFinished():
                self._advance(event)
            case _ if isinstance(event, Fault):
                self._print(fault_line(event))
            case RunFinished(limited_by=limit):
                if limit is not None:
                    self._print(f"limited by {limit}")
            case _ if self._verbose:
                self._print(str(event))

    def _start(self, event: RunStarted) -> None:
        self._every = math.ceil(max(1.0, event.rounds / MAX_LINES) / event.eval_every) * event.eval_every
        self._print(started_line(event))
        if event.round:
            self._print(continuing_line(event))
        if event.dashboard:
            self._print(f"dashboard {event.dashboard}")
        if self.live:
            self._print("Ctrl-C stops; committed rounds are kept")

    def _step(self) -> None:
        """Print the progress of the replicas in a long round now and then, where no live line shows it."""
        self._told = 0.0
        if not self.live and time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._print(steps_line(self.view.steps))

    def _advance(self, event: RoundFinished) -> None:
        self._told = 0.0
        result, row = event.result, self.view.rows[-1]
        waited = not self.live and time.monotonic() - self._printed >= PLAIN_SECONDS
        is_last = result.round in (1, self.view.rounds) or result.stop is not None
        if not (result.round % self._every == 0 or is_last or waited or (self.live and result.retried)):
            return
        if not self.live:
            self._print(round_line(result, self.view.rounds, speed(self.view.rows), width_of(sys.stderr)))
            return
        width = columns_of(sys.stderr) or self._console.width
        table, lines = replace(self.view.table, width=width).printed(row)
        self.view = replace(self.view, table=table)
        self._write(lines)

    def tick(self) -> None:
        """Print what is waited for, if no step has come for long: once, then each time that it took twice as long."""
        with self._lock:
            silent = self.view.stalled(time.monotonic())
            if silent is not None and silent >= 2 * self._told:
                self._told = silent
                self._print(waiting_line(self.view.steps, self.view.finished, silent))

    def live_lines(self) -> Group:
        """Return the lines below the table: how far the run is, and what its replicas do."""
        view, now = self.view, time.monotonic()
        if view.end or not (view.title or view.steps):
            return Group()
        lines = [_head(view, now - self._began)]
        if silent := view.stalled(now):
            lines.append(Text(waiting_line(view.steps, view.finished, silent), style="yellow"))
        elif view.steps:
            lines.append(Text(steps_line(view.steps), style="dim"))
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
        return Group(*lines)

    def _print(self, text: str) -> None:
        self._write([text] if "\n" in text else wrapped(text, width_of(sys.stderr)).splitlines())

    def _write(self, lines: list[str]) -> None:
        self._printed = time.monotonic()
        self._console.print("\n".join(lines), markup=False, soft_wrap=True)


def _head(view: RunView, seconds: float) -> Text:
    """Return the live line of a run: before it starts, what is done; then its progress."""
    if view.started is None and not view.steps:
        return Text(f"{view.title}  {clock(seconds)}")
    if view.started is None:
        return _bar("preparing", view.fraction, clock(seconds))
    done = (view.finished + view.fraction) / max(1, view.rounds)
    label = f"round {min(view.finished + 1, view.rounds)} of {view.rounds}"
    pace = pace_line(view.rows, view.rounds, view.fraction)
    return _bar(label, done, pace or clock(seconds))


def _bar(label: str, done: float, note: str) -> Text:
    filled = round(BAR * min(done, 1.0))
    return Text.assemble((label, "bold"), "  ", ("━" * filled, "cyan"), ("━" * (BAR - filled), "dim"), "  ", note)
