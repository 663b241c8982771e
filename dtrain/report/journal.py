"""Write events to history.jsonl and events.jsonl of a run directory."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from pydantic import TypeAdapter, ValidationError

from dtrain.events import ClusterOpening, Event, RoundFinished, RunFinished, RunStarted, StepsTaken
from dtrain.files import append_line, write_bytes
from dtrain.report.history import Row, read_lines, row_of
from dtrain.runfiles import EVENTS, HISTORY, read_if_there
from dtrain.urls import redacted_in

KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in get_args(Event)}
NOT_WRITTEN = (ClusterOpening, RoundFinished, RunFinished, RunStarted, StepsTaken)
"""Kinds that events.jsonl does not have."""


def journal(run: Path, event: Event) -> None:
    """Append an event to its file.

    Raises
    ------
    DiskFull
        It could not be written.
    """
    if isinstance(event, RoundFinished):
        append_line(run / HISTORY, json.dumps(row_of(event.result), allow_nan=False))
    elif not isinstance(event, NOT_WRITTEN):
        row = {"event": type(event).__name__, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **asdict(event)}
        append_line(run / EVENTS, json.dumps(redacted_in(row)))


def read_events(run: Path) -> list[Event]:
    """Return the events of events.jsonl; those of a later version, which are unknown, are left out."""
    return [event for row in read_lines(run / EVENTS) if (event := _event_of(row)) is not None]


def _event_of(row: Row) -> Event | None:
    kind = KINDS.get(str(row.get("event")))
    if kind is None or kind in NOT_WRITTEN:
        return None
    given = json.dumps({name: value for name, value in row.items() if name not in ("event", "time")})
    try:
        event: Event = TypeAdapter(kind).validate_json(given, strict=True)
    except ValidationError:  # of a later version
        return None
    return event


def cut_history(run: Path, last: int) -> None:
    """Remove the lines after round `last`, the newest committed one: those rounds are trained again."""
    history = read_if_there(run / HISTORY) or b""
    kept = b"".join(line + b"\n" for line in history.split(b"\n")[:-1][:last])
    if kept != history:
        write_bytes(run / HISTORY, kept)
