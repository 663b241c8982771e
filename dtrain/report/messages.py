"""Events as messages to the page of a run in Dask's dashboard: plain values, in few bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.events import (
    Event,
    Fault,
    RoundFinished,
    RunFinished,
    RunStarted,
    SegmentReplayed,
)
from dtrain.report.history import row_of
from dtrain.report.lines import fault_line

MOST_ROUNDS = 500
"""Rounds before this start that are sent."""
FACTS = ("round", "rounds", "replicas", "samples", "workers")


def messages_of(event: Event) -> list[dict[str, Any]]:
    """Return the messages that an event means: none, one, or those of all rounds that a run has already."""
    match event:
        case RunStarted():
            start = {"event": "start", "name": Path(event.run).name or "train_rounds"}
            start |= {name: getattr(event, name) for name in FACTS}
            return [start, *map(_round, event.rows[-MOST_ROUNDS:])]
        case RoundFinished(result):
            end = [] if result.stop is None else [{"event": "end", "text": f"done ({result.stop})"}]
            return [_round(row_of(result)), *end]
        case SegmentReplayed():
            return [{"event": "fault", "text": fault_line(event), "back_to": event.round}]
        case _ if isinstance(event, Fault):
            return [{"event": "fault", "text": fault_line(event)}]
        case RunFinished():
            return [{"event": "end", "text": f"ended ({event.reason})"}]
        case _:
            return []


def _round(row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("round", "train_loss", "val_loss", "samples", "seconds", "retried", "rejected")
    return {"event": "round", **{name: row.get(name) for name in names}, "bytes": row.get("bytes_reduced", 0)}
