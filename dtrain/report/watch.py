"""Follow a run by its files alone: rows of its history and faults as lines, and what it does now."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from dtrain.events import Event, ReplicaRejected, RoundDamaged, SegmentReplayed, WorkerEvicted
from dtrain.report.lines import fault_line, pace_line
from dtrain.report.table import RoundTable

POLL_SECONDS = 1.0
SILENT_SECONDS = 60.0
"""After so many seconds without a round, and `USUAL` times the longest round, it is said that there is no progress."""
USUAL = 3.0
FIRST_ROUNDS = 20
"""Rounds that are printed of those that are finished before."""


@dataclass(frozen=True, slots=True)
class Look:
    """What the files of a run say at a time."""

    rows: Sequence[Mapping[str, Any]]
    events: Sequence[Event]
    running: bool
    silent: float
    """Seconds since the last round, or since the start."""


@dataclass(frozen=True, slots=True)
class Watch:
    """What has been shown of a run."""

    table: RoundTable
    rows: tuple[Mapping[str, Any], ...] = ()
    faults: int = 0
    told: float = 0.0
    """The longest silence that was told of since the last round."""

    def after(self, look: Look) -> tuple[Watch, list[str]]:
        """Return what has been shown after another look, and the lines that are new.

        A run that was continued has lost the rounds after its newest commit: they come again.
        """
        kinds = SegmentReplayed | ReplicaRejected | RoundDamaged | WorkerEvicted
        faults = [event for event in look.events if isinstance(event, kinds)]
        lines = [fault_line(event) for event in faults[self.faults :]]
        table, same = self.table, _common(self.rows, look.rows)
        if same < len(self.rows):
            lines.append(f"continued after round {same}")
            table = _empty(table)
            for row in look.rows[:same]:
                table = table.after(row)
        for number, row in enumerate(look.rows[same:], start=same):
            table, more = table.after(row).printed(row)
            lines += more if self.rows or len(look.rows) - number <= FIRST_ROUNDS else []
        told = self.told if same == len(look.rows) else 0.0
        return Watch(table, tuple(look.rows), len(faults), told), lines

    def silence(self, silent: float) -> tuple[Watch, str]:
        """Return a sentence if no round has come for long: once, then each time that it took twice as long."""
        longest = max((row["seconds"] for row in self.rows), default=0.0)
        if silent <= max(SILENT_SECONDS, USUAL * longest, 2 * self.told):
            return self, ""
        return replace(self, told=silent), f"no progress for {silent / 60:.0f} min"

    def doing(self, silent: float) -> str:
        """Return how fast a run is, or for how long there has been no progress."""
        if quiet := replace(self, told=0.0).silence(silent)[1]:
            return quiet
        if not self.rows:
            return "no round is finished yet"
        finished = f"round {self.rows[-1]['round']} of {self.table.rounds} is finished"
        return f"{finished}; {pace_line(self.rows, self.table.rounds)}"


def follow(watch: Watch, look: Callable[[], Look], *, color: bool) -> None:
    """Print the rounds of a run until it ends: on a terminal with a live line below them, elsewhere lines alone.

    Parameters
    ----------
    watch : Watch
        With an empty table.
    look : callable
        Reads the files.
    color : bool
        Allow the live line.
    """
    console = Console(no_color=not color, highlight=False)
    is_live = color and console.is_terminal
    with Live(console=console, transient=True, auto_refresh=False) if is_live else nullcontext() as live:
        while True:
            seen = look()
            watch, lines = watch.after(seen)
            if live is None and seen.running:
                watch, quiet = watch.silence(seen.silent)
                lines += [quiet] if quiet else []
            if lines:
                console.print("\n".join(lines), markup=False, soft_wrap=True)
            if not seen.running:
                return
            if live is not None:
                live.update(Text(watch.doing(seen.silent), no_wrap=True, overflow="ellipsis"), refresh=True)
            time.sleep(POLL_SECONDS)


def _common(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> int:
    """Return how many rows two histories have in common at their beginning."""
    pairs = zip(before, now, strict=False)
    return next((n for n, (old, new) in enumerate(pairs) if old != new), min(len(before), len(now)))


def _empty(table: RoundTable) -> RoundTable:
    return RoundTable(
        rounds=table.rounds, width=table.width, metric=table.metric, higher=table.higher, columns=table.columns
    )
