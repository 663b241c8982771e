"""Print progress to stderr: a line a round and, if stderr is a terminal, one live line below them."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dtrain.display import joined, number, shown, width_of, wrapped
from dtrain.events import (
    ClusterOpening,
    Event,
    ReplicaRejected,
    Reporter,
    RoundDamaged,
    RoundFinished,
    RunFinished,
    RunStarted,
    SegmentReplayed,
    StepsTaken,
)
from dtrain.types import RoundResult

MAX_LINES = 50
"""A run of more rounds prints only every n-th one, so that there are at most about this many lines."""
PLAIN_SECONDS = 20.0
"""Without a live line, a long round prints its progress this often."""


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
    """The reporter; it keeps the run's length and the live line."""

    def __init__(self, console: Console, progress: Progress, verbose: bool) -> None:
        self._console = console
        self._progress = progress
        self._verbose = verbose
        self._task: TaskID | None = None
        self._rounds = 0
        self._steps: dict[int, StepsTaken] = {}
        self._recent: deque[RoundResult] = deque(maxlen=6)
        self._printed = time.monotonic()

    def __call__(self, event: Event) -> None:
        match event:
            case ClusterOpening(run=run, scheduler=scheduler) if scheduler != "serial":
                self._print(
                    f"{shown(run)}: "
                    + ("starting local workers" if scheduler == "local" else f"connecting to {scheduler}")
                )
            case RunStarted():
                self._start(event)
            case StepsTaken():
                self._step(event)
            case RoundFinished(result):
                self._advance(result)
            case SegmentReplayed(round=number, reason=reason):
                self._print(f"lost work with a worker; going on from round {number} ({_short(reason)})")
            case ReplicaRejected(round=number, replica=replica):
                self._print(f"round {number}: replica {replica} is not finite and was left out of the average")
            case RoundDamaged(round=number, reason=reason):
                self._print(f"round {number} is damaged and was skipped: {reason}")
            case RunFinished():
                self._finish()
            case _ if self._verbose:
                self._print(str(event))

    def _start(self, event: RunStarted) -> None:
        self._rounds = event.rounds
        self._print(started_line(event))
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
        if not event.round and not self._progress.disable:  # rounds have not begun
            if self._task is None:
                self._task = self._progress.add_task("data", total=100, note="")
            self._progress.update(self._task, completed=100 * sum(e.step / e.steps for e in latest) / len(latest))
        if self._task is not None:
            self._progress.update(self._task, note=text)
        now = time.monotonic()
        if self._progress.disable and now - self._printed >= PLAIN_SECONDS:
            self._print(text)

    def _speed(self) -> float:
        """Return samples a second over the last rounds; single rounds end in bursts, as they are submitted ahead."""
        seconds = sum(result.seconds for result in self._recent)
        return sum(result.samples for result in self._recent) / max(seconds, 1e-9)

    def _advance(self, result: RoundResult) -> None:
        self._steps = {}
        self._recent.append(result)
        if self._task is not None:
            self._progress.update(self._task, completed=result.round, note=_note(result))
        every = -(-self._rounds // MAX_LINES)
        if result.round % max(1, every) == 0 or result.round in (1, self._rounds):
            self._print(round_line(result, self._rounds, self._speed(), width_of(sys.stderr)))

    def _finish(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None

    def _print(self, text: str) -> None:
        self._printed = time.monotonic()
        lines = [text] if "\n" in text else wrapped(text, width_of(sys.stderr)).splitlines()
        self._console.print("\n".join(lines), markup=False, soft_wrap=True)


def started_line(event: RunStarted) -> str:
    """Return what is trained, and where."""
    continuing = f", continuing after round {event.round} of {event.rounds}" if event.round else ""
    size = f"{event.samples:,} training samples, {event.replicas} replicas on {event.workers} workers"
    return f"{shown(event.run)}: {size}{continuing}"


def round_line(result: RoundResult, rounds: int, speed: float, width: int) -> str:
    """Return the losses and metrics of a round; in several lines if they are wider than `width`."""
    head = f"round {result.round:>{len(str(rounds))}}"
    values = {"train_loss": result.train_loss, **result.metrics}
    parts = [f"{name} {number(value)}" for name, value in values.items()]
    indent = " " * (len(head) + 2)
    texts = [joined([head, *parts, f"{speed:,.0f}{unit}"], width, indent=indent) for unit in (" samples/s", "/s")]
    return next((text for text in texts if "\n" not in text), texts[0])


def steps_line(events: list[StepsTaken]) -> str:
    """Return how far the replicas are in a round, or in the pass for ``data.normalize``."""
    number_of_round = events[0].round
    label = f"round {number_of_round}" if number_of_round else "mean and standard deviation, units"
    speed = sum(e.samples / e.seconds for e in events)
    return f"{label}: {_replicas(events)}, {speed:,.0f} samples/s"


def _replicas(events: list[StepsTaken]) -> str:
    """Return ``replica 0 7/10, replica 1 6/10`` for few replicas, the slowest and the fastest of many."""
    if len(events) <= 4:
        return ", ".join(f"replica {e.replica} {e.step}/{e.steps}" for e in events)
    done = sorted(e.step / e.steps for e in events)
    return f"{len(events)} replicas at {done[0]:.0%} to {done[-1]:.0%}"


def _note(result: RoundResult) -> str:
    val = result.metrics.get("val_loss")
    return f"train {number(result.train_loss)}" + (f" val {number(val)}" if val is not None else "")


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."
