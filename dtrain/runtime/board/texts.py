"""The text of the page as HTML: how far a run is, and its faults. What others wrote is escaped."""

from __future__ import annotations

import time
from html import escape
from typing import Any

from dtrain.runtime.board.state import RunState

TRAIN, FAULT, GREY = "#1e88e5", "#e53935", "#757575"
RECENT = 6
"""Rounds whose speed is shown as one."""
SHOWN_FAULTS = 20
SHOWN_REPLICAS = 12


def speeds(rows: list[dict[str, Any]]) -> list[float]:
    """Return samples a second of each round and those before it: single rounds end in bursts."""
    around = [rows[max(0, end - RECENT) : end] for end in range(1, len(rows) + 1)]
    return [sum(r["samples"] for r in own) / max(sum(r["seconds"] for r in own), 1e-9) for own in around]


def summary_html(state: RunState) -> str:
    """Return how far a run is, and what its replicas do."""
    facts, last = state.facts, state.rounds.last
    texts = [
        f"round {state.round} of {facts.get('rounds', '?')}",
        f"{facts.get('replicas', '?')} replicas on {facts.get('workers', '?')} workers",
        f"{speeds(state.rounds.items()[-RECENT:])[-1]:,.0f} samples/s" if last else "",
        f"{state.bytes / 1e6:,.1f} MB sent",
        state.end,
    ]
    lines = [" &middot; ".join([f"<b>{escape(state.name)}</b>", *(escape(text) for text in texts if text)])]
    for steps in [state.steps[k] for k in sorted(state.steps)][:SHOWN_REPLICAS]:
        done = steps["step"] / max(1, steps["steps"])
        lines.append(
            f"<span style='display:inline-flex;width:160px;height:8px;background:#e0e0e0;border-radius:4px'>"
            f"<span style='width:{min(done, 1.0):.0%};background:{TRAIN};border-radius:4px'></span></span> "
            f"replica {int(steps['replica'])}: round {int(steps['round'])}, step {int(steps['step'])} of "
            f"{int(steps['steps'])} <span style='color:{GREY}'>{escape(str(steps.get('worker', '')))}</span>"
        )
    return "<br>".join(lines)


def faults_html(state: RunState) -> str:
    """Return the last faults of a run, the newest first."""
    if not state.faults:
        return f"<span style='color:{GREY}'>No faults.</span>"
    lines = [
        f"<span style='color:{GREY}'>{time.strftime('%H:%M:%S', time.localtime(at))}</span> "
        f"<span style='color:{FAULT}'>{escape(text)}</span>"
        for at, text in reversed(list(state.faults)[-SHOWN_FAULTS:])
    ]
    return "<br>".join(lines)
