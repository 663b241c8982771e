"""Write events to history.jsonl and events.jsonl of a run directory."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from dtrain.events import ClusterOpening, Event, RoundFinished, RunFinished, RunStarted, StepsTaken
from dtrain.files import append_line, write_text
from dtrain.report.history import Row, read_rows, row_of
from dtrain.urls import redacted_in

HISTORY, EVENTS = "history.jsonl", "events.jsonl"
KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}


def journal(run: Path, event: Event) -> None:
    """Append an event to its file.

    Raises
    ------
    DiskFull
        It could not be written.
    """
    if isinstance(event, RoundFinished):
        append_line(run / HISTORY, json.dumps(row_of(event.result), allow_nan=False))
    elif not isinstance(event, ClusterOpening | RunStarted | RunFinished | StepsTaken):
        row = {"event": type(event).__name__, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **asdict(event)}
        append_line(run / EVENTS, json.dumps(redacted_in(row)))


def read_events(run: Path) -> list[Event]:
    """Return the events of events.jsonl; those of a later version, which are unknown, are left out."""
    return [event for row in read_rows(run / EVENTS) if (event := _event_of(row)) is not None]


def _event_of(row: Row) -> Event | None:
    kind = KINDS.get(str(row.get("event")))
    given = {name: value for name, value in row.items() if name not in ("event", "time")}
    try:
        event: Event | None = kind(**given) if kind is not None else None
    except TypeError:  # of a later version
        return None
    return event


def cut_history(run: Path, last: int) -> None:
    """Remove the rows after round `last`, the newest committed one: those rounds are trained again."""
    rows = read_rows(run / HISTORY)
    kept = [row for row in rows if row["round"] <= last]
    text = "".join(json.dumps(row) + "\n" for row in kept)
    path = run / HISTORY
    if path.exists() and path.read_bytes() != text.encode():
        write_text(path, text)
