"""Show progress in a notebook: one output that is updated, as plain HTML."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape

from dtrain.display import html_table, number, shown, text_table
from dtrain.events import (
    ChunksFilled,
    ClusterOpening,
    Event,
    ParametersLoaded,
    ReplicaRejected,
    Reporter,
    RoundDamaged,
    RoundFinished,
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
    opening_line,
    speed_of,
    started_line,
    steps_line,
)
from dtrain.types import RoundResult

UPDATE_SECONDS = 0.25
"""The output is updated this often at most: each update goes to the browser."""
SHOWN_ROUNDS = 10
SHOWN_FAULTS = 5
SPEED_ROUNDS = 6


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
    try:
        yield reporter
    finally:
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

    def __call__(self, event: Event) -> None:
        self.page = self.page.after(event)
        if self._now() - self._sent >= UPDATE_SECONDS:
            self._update(self.page)
            self._sent = self._now()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPage:
    """What is shown of a run."""

    title: str = ""
    dashboard: str = ""
    rounds: int = 0
    eval_every: int = 1
    results: tuple[RoundResult, ...] = ()
    """Of the last evaluated rounds, and of the last round."""
    recent: tuple[RoundResult, ...] = ()
    """Of the last rounds."""
    steps: tuple[StepsTaken, ...] = ()
    """The last one of each replica in the round that is being trained."""
    faults: tuple[str, ...] = ()
    end: str = ""

    def after(self, event: Event) -> RunPage:
        """Return what is shown after an event."""
        match event:
            case ClusterOpening():
                return replace(self, title=opening_line(event))
            case RunStarted():
                title = started_line(event) + (f", {continuing_line(event)}" if event.round else "")
                run = replace(self, rounds=event.rounds, eval_every=event.eval_every)
                return replace(run, title=title, dashboard=event.dashboard, steps=())
            case ParametersLoaded():
                return replace(self, title=f"{self.title}, starting from {loaded_line(event)}")
            case StepsTaken():
                others = {e.replica: e for e in self.steps if e.round == event.round}
                latest = {**others, event.replica: event}
                return replace(self, steps=tuple(latest[k] for k in sorted(latest)))
            case RoundFinished(result):
                kept = (one for one in self.results if one.round % self.eval_every == 0)
                results, recent = (*kept, result)[-SHOWN_ROUNDS:], (*self.recent, result)[-SPEED_ROUNDS:]
                return replace(self, results=results, recent=recent, steps=())
            case ChunksFilled() | SamplesLeftOut() | SegmentReplayed() | ReplicaRejected() | RoundDamaged():
                return replace(self, faults=(*self.faults, fault_line(event))[-SHOWN_FAULTS:])
            case RunFinished(limited_by=limit):
                title = self.title or f"{shown(event.run)}: complete"
                end = f"done ({event.reason}): {event.rounds} rounds" + (f", limited by {limit}" if limit else "")
                return replace(self, title=title, end=end)
            case _:
                return self

    def ended(self) -> RunPage:
        """Return what stays in the notebook."""
        return replace(self, steps=(), end=self.end or ("stopped" if self.title else ""))

    @property
    def _doing(self) -> str:
        if self.end:
            return self.end
        if self.steps:
            return steps_line(self.steps)
        return f"{speed_of(self.recent):,.0f} samples/s" if self.recent else ""

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the names of the columns, and the cells of the rounds that are shown."""
        names = list(dict.fromkeys(name for result in self.results for name in result.metrics))
        rows = [
            [
                f"{result.round} of {self.rounds}",
                number(result.train_loss),
                *(number(result.metrics[name]) if name in result.metrics else "" for name in names),
            ]
            for result in self.results
        ]
        return ["round", "train_loss", *names], rows

    def _repr_html_(self) -> str:
        header, rows = self._rows()
        link = f"<a href='{escape(self.dashboard)}' target='_blank'>dashboard</a>" if self.dashboard else ""
        lines = [link, *(escape(text) for text in (*self.faults, self._doing))]
        table = html_table(self.title, rows, header if rows else ())
        return table + "".join(f"<div>{line}</div>" for line in lines if line)

    def __repr__(self) -> str:
        header, rows = self._rows()
        table = [
            (row[0], "  ".join(f"{name} {cell}" for name, cell in zip(header[1:], row[1:], strict=True) if cell))
            for row in rows
        ]
        lines = [self.title, text_table(table), *self.faults, self._doing]
        return "\n".join(line for line in lines if line)
