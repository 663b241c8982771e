"""What is known of a run while it trains: a pure fold of its events, which terminal and notebook show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from dtrain.display import shown
from dtrain.events import (
    ClusterOpening,
    Event,
    Fault,
    ParametersLoaded,
    RoundFinished,
    RunFinished,
    RunStarted,
    StepsTaken,
)
from dtrain.report.curve import Series, curves_of, with_row
from dtrain.report.history import Row, row_of
from dtrain.report.lines import continuing_line, fault_line, loaded_line, opening_line, started_line
from dtrain.report.table import RoundTable

KEPT_ROWS = 20
"""Rows of the last rounds: what limits and the time left are computed from them."""
SHOWN_ROUNDS = 10
SHOWN_FAULTS = 5
STALL_SECONDS = 30.0
"""After so many seconds without a step it is said what is waited for: not before, and not within `USUAL` times the
longest silence that ended with a step."""
USUAL = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """What is known of a run."""

    title: str = ""
    dashboard: str = ""
    started: RunStarted | None = None
    table: RoundTable = field(default_factory=lambda: RoundTable(rounds=0, width=0))
    rows: tuple[Row, ...] = ()
    """Of the last rounds."""
    listed: tuple[Row, ...] = ()
    """Of the last evaluated rounds, and of the last round."""
    curves: Mapping[str, Series] = field(default_factory=lambda: curves_of([]))
    latest: Mapping[int, StepsTaken] = field(default_factory=dict)
    """By replica: its last report, of rounds that are not finished."""
    faults: tuple[str, ...] = ()
    end: str = ""
    heard: float | None = None
    """When the last step or round was reported, on the clock of `after`."""
    silence: float = 0.0
    """The longest time between two such reports, in seconds."""

    @property
    def steps(self) -> tuple[StepsTaken, ...]:
        """The last report of each replica, in their order; those that are more than a round behind are left out.

        Before the first round, a pass over the data has nothing to do with the one before it.
        """
        newest = max((event.round for event in self.latest.values()), default=0)
        oldest = newest - 1 if newest > 1 else newest
        return tuple(self.latest[k] for k in sorted(self.latest) if self.latest[k].round >= oldest)

    @property
    def rounds(self) -> int:
        """Rounds of the whole run; 0 before it has started."""
        return 0 if self.started is None else self.started.rounds

    @property
    def finished(self) -> int:
        """Finished rounds."""
        if self.rows:
            return int(self.rows[-1]["round"])
        return 0 if self.started is None else self.started.round

    @property
    def fraction(self) -> float:
        """The part of the next round's steps, or of a pass before the first round, that is done."""
        if not self.latest:
            return 0.0
        last = max(step.round for step in self.latest.values())
        of_last = [step for step in self.latest.values() if step.round == last]
        count = len(of_last) if self.started is None else max(self.started.replicas, len(of_last))
        return min(1.0, sum(step.step / step.steps for step in of_last) / count)

    def after(self, event: Event, now: float = 0.0) -> RunView:
        """Return what is known after an event that comes at a time (of a monotonic clock, in seconds)."""
        match event:
            case ClusterOpening():
                return replace(self, title=opening_line(event), heard=now)
            case RunStarted():
                return self._begun(event, now)
            case ParametersLoaded():
                return replace(self, title=f"{self.title}, starting from {loaded_line(event)}")
            case StepsTaken():
                return replace(self._news(now), latest={**self.latest, event.replica: event})
            case RoundFinished(result):
                return self._finished(row_of(result), now)
            case _ if isinstance(event, Fault):
                return replace(self, faults=(*self.faults, fault_line(event))[-SHOWN_FAULTS:])
            case RunFinished(limited_by=limit):
                title = self.title or f"{shown(event.run)}: complete"
                end = f"done ({event.reason}): {event.rounds} rounds" + (f", limited by {limit}" if limit else "")
                return replace(self, title=title, end=end, latest={})
            case _:
                return self

    def _begun(self, event: RunStarted, now: float) -> RunView:
        rows = tuple(dict(row) for row in event.rows)
        table = RoundTable(rounds=event.rounds, width=0, metric=event.metric, higher=event.higher)
        for row in rows:
            table = table.after(row)
        return replace(
            self,
            title=started_line(event) + (f", {continuing_line(event)}" if event.round else ""),
            dashboard=event.dashboard,
            started=event,
            table=table,
            rows=rows[-KEPT_ROWS:],
            listed=tuple(row for row in rows if _is_evaluated(row, event))[-SHOWN_ROUNDS:],
            curves=curves_of(rows),
            latest={},
            heard=now,
        )

    def _finished(self, row: Row, now: float) -> RunView:
        kept = (one for one in self.listed if self.started is None or _is_evaluated(one, self.started))
        return replace(
            self._news(now),
            table=self.table.after(row),
            rows=(*self.rows, row)[-KEPT_ROWS:],
            listed=(*kept, row)[-SHOWN_ROUNDS:],
            curves=with_row(self.curves, row),
            latest={k: step for k, step in self.latest.items() if step.round > row["round"]},
        )

    def _news(self, now: float) -> RunView:
        silence = 0.0 if self.heard is None else now - self.heard
        return replace(self, heard=now, silence=max(self.silence, silence))

    def stalled(self, now: float) -> float | None:
        """Return the seconds since the last report if they are unusually many; None otherwise."""
        if self.heard is None or self.end:
            return None
        silent = now - self.heard
        return silent if silent > max(STALL_SECONDS, USUAL * self.silence) else None

    def ended(self) -> RunView:
        """Return what stays shown after the run has ended, or was stopped."""
        return replace(self, latest={}, end=self.end or ("stopped" if self.title else ""))


def _is_evaluated(row: Row, event: RunStarted) -> bool:
    return int(row["round"]) % event.eval_every == 0
