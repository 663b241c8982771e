"""Print progress to stderr: a line a round and, if stderr is a terminal, one live line below them."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dtrain.display import number, width_of, wrapped
from dtrain.events import (
    ChunksFilled,
    ClusterOpening,
    Event,
    ParametersLoaded,
    ReplicaRejected,
    Reporter,
    RoundDamaged,
    RoundFinished,
    RoundsMeasured,
    RunFinished,
    RunStarted,
    SamplesLeftOut,
    SegmentReplayed,
    StepsTaken,
)
from dtrain.report.lines import (
    continuing_line,
    fault_line,
    loaded_line,
    measured_line,
    opening_line,
    round_line,
    speed_of,
    started_line,
    steps_line,
)
from dtrain.types import RoundResult

MAX_LINES = 50
"""A run of more rounds prints only every n-th one, which is evaluated, so that about this many lines are the most."""
PLAIN_SECONDS = 20.0
"""Without a live line, a line is printed this often at least: the progress of a long round, or a round between."""


@contextmanager
def terminal_progress(*, color: bool = True, verbose: bool = False) -> Iterator[Reporter]:
    """Yield a reporter that prints to stderr; the live line is removed when the block ends.

    Parameters
    ----------
    color : bool
        Allow colours and the live line; they are used only if stderr is a terminal.
    verbose : bool
        Also print commits and other events of a sound run.
    """
    console = Console(file=sys.stderr, no_color=not color, highlight=False)
    live = color and console.is_terminal
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # results that are piped must not go to the terminal
        disable=not live,
    ) as progress:
        yield _Terminal(console, progress, verbose)


class _Terminal:
    """The reporter; it keeps the run's length, the live line and what it shows."""

    def __init__(self, console: Console, progress: Progress, verbose: bool) -> None:
        self._console = console
        self._progress = progress
        self._verbose = verbose
        self._task: TaskID | None = None
        self._rounds = 0
        self._every = 1
        """Rounds between lines."""
        self._val: float | None = None
        """``val_loss`` of the last evaluation."""
        self._steps: dict[int, StepsTaken] = {}
        self._recent: deque[RoundResult] = deque(maxlen=6)
        self._printed = time.monotonic()

    def __call__(self, event: Event) -> None:
        match event:
            case ClusterOpening(scheduler=scheduler):
                if scheduler != "serial":
                    self._print(opening_line(event))
            case RunStarted():
                self._start(event)
            case ParametersLoaded():
                self._print(f"starting from {loaded_line(event)}")
            case StepsTaken():
                self._step(event)
            case RoundsMeasured():
                self._print(measured_line(event))
            case RoundFinished(result):
                self._advance(result)
            case ChunksFilled() | SamplesLeftOut() | SegmentReplayed() | ReplicaRejected() | RoundDamaged():
                self._print(fault_line(event))
            case RunFinished(limited_by=limit):
                self._finish()
                if limit is not None:
                    self._print(f"limited by {limit}")
            case _ if self._verbose:
                self._print(str(event))

    def _start(self, event: RunStarted) -> None:
        self._rounds = event.rounds
        self._every = math.ceil(max(1.0, event.rounds / MAX_LINES) / event.eval_every) * event.eval_every
        self._print(started_line(event))
        if event.round:
            self._print(continuing_line(event))
        if event.dashboard:
            self._print(f"dashboard {event.dashboard}")
        if not self._progress.disable:
            self._print("Ctrl-C stops; committed rounds are kept")
        self._finish()
        self._task = self._progress.add_task("round", total=event.rounds, completed=event.round, note="")

    def _step(self, event: StepsTaken) -> None:
        """Show the progress of the replicas in a long round: on the live line, else in a line now and then."""
        self._steps = {k: e for k, e in self._steps.items() if e.round == event.round}
        self._steps[event.replica] = event
        latest = [self._steps[k] for k in sorted(self._steps)]
        text = steps_line(latest)
        if event.round < 1 and not self._progress.disable:  # rounds have not begun
            if self._task is None:
                self._task = self._progress.add_task("data", total=100, note="")
            self._progress.update(self._task, completed=100 * sum(e.step / e.steps for e in latest) / len(latest))
        if self._task is not None:
            self._progress.update(self._task, note=text)
        now = time.monotonic()
        if self._progress.disable and now - self._printed >= PLAIN_SECONDS:
            self._print(text)

    def _advance(self, result: RoundResult) -> None:
        self._steps = {}
        self._recent.append(result)
        self._val = result.metrics.get("val_loss", self._val)
        if self._task is not None:
            self._progress.update(self._task, completed=result.round, note=_note(result.train_loss, self._val))
        waited = self._progress.disable and time.monotonic() - self._printed >= PLAIN_SECONDS
        if result.round % self._every == 0 or result.round in (1, self._rounds) or waited:
            self._print(round_line(result, self._rounds, speed_of(self._recent), width_of(sys.stderr)))

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        lines = [text] if "\n" in text else wrapped(text, width_of(sys.stderr)).splitlines()
        self._console.print("\n".join(lines), markup=False, soft_wrap=True)


def _note(train_loss: float, val_loss: float | None) -> str:
    return f"train {number(train_loss)}" + (f" val {number(val_loss)}" if val_loss is not None else "")
