"""A run as HTML and as text, for a notebook: while it trains, and afterwards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any

from dtrain.display import COLOURS, FAULT, TABLE, clock, html_beside, html_card, html_table, number, text_table
from dtrain.events import Event, StepsTaken
from dtrain.report.curve import curve_svg, curves_of
from dtrain.report.history import limit_of_rows
from dtrain.report.lines import pace_line, steps_line, waiting_line
from dtrain.report.pace import elapsed, speed
from dtrain.report.table import label, value_columns, value_of
from dtrain.report.view import SHOWN_ROUNDS, RunView

SHOWN_REPLICAS = 8
"""Replicas that have a line each; of more there is one line."""
LIMIT_ROUNDS = 2
"""From so many rounds of this start on, the stage that limits is shown."""


@dataclass(frozen=True, slots=True)
class RunPage:
    """What a notebook shows of a run at a time."""

    view: RunView = field(default_factory=RunView)
    now: float = 0.0

    def after(self, event: Event, now: float | None = None) -> RunPage:
        """Return what is shown after an event; `now` is the time of a monotonic clock."""
        now = time.monotonic() if now is None else now
        return RunPage(self.view.after(event, now), now)

    def at(self, now: float) -> RunPage:
        """Return what is shown later, if nothing has happened."""
        return replace(self, now=now)

    def ended(self) -> RunPage:
        """Return what stays in the notebook."""
        return replace(self, view=self.view.ended())

    @property
    def waiting(self) -> str:
        """What is waited for, if no step has come for long."""
        silent = self.view.stalled(self.now)
        return "" if silent is None else waiting_line(self.view.steps, self.view.finished, silent)

    @property
    def doing(self) -> str:
        """Return how the run ended, or how fast it is and how long it will take."""
        view = self.view
        if view.end:
            return view.end
        if view.started is None:
            return steps_line(view.steps) if view.steps else ""
        return pace_line(view.rows, view.rounds, view.fraction)

    @property
    def limit(self) -> str:
        """Return the stage that limits the rounds of this start, as far as they say it."""
        view = self.view
        if view.end or view.started is None:
            return ""
        own = [row for row in view.rows if row["round"] > view.started.round]
        limit = limit_of_rows(own) if len(own) >= LIMIT_ROUNDS else None
        if limit is None:
            return ""
        return f"limited by {' and '.join(f'{stage} ({limit.shares[stage]:.0%})' for stage in limit.stages)}"

    def _repr_html_(self) -> str:
        view = self.view
        link = (
            f"<a href='{escape(view.dashboard)}' target='_blank' rel='noopener'>dashboard</a>" if view.dashboard else ""
        )
        rows = html_rounds(view.listed, view.rounds, view.table.best_round)
        parts = [
            "" if view.end or not view.rounds else _progress_html(view, self.doing),
            html_beside([curve_svg(view.curves), rows]),
            _replicas_html(view.steps) if view.started else "",
            *(f"<span style='{FAULT}'>{escape(text)}</span>" for text in (*view.faults, self.waiting) if text),
            escape(self.limit),
            escape(self.doing) if view.end or not view.rounds else "",
        ]
        return html_card(view.title, parts, link)

    def __repr__(self) -> str:
        view = self.view
        table = [
            (f"{row['round']} of {view.rounds}", "  ".join(f"{name} {number(row[name])}" for name in _given(row)))
            for row in view.listed
        ]
        steps = steps_line(view.steps) if view.steps and view.started else ""
        lines = [view.title, text_table(table), *view.faults, self.waiting or steps, self.limit, self.doing]
        return "\n".join(line for line in lines if line)


def _given(row: Mapping[str, Any]) -> list[str]:
    return [name for name in value_columns([row]) if row.get(name) is not None]


def html_rounds(rows: Sequence[Mapping[str, Any]], rounds: int, best: int | None) -> str:
    """Return a table of rounds as HTML; the best one is marked."""
    if not rows:
        return ""
    names = value_columns(rows)
    header = ["round", *map(label, names), "samples/s", ""]
    cells = [
        [
            f"{row['round']} of {rounds}",
            *(value_of(row, name) for name in names),
            f"{row['samples'] / max(row['seconds'], 1e-9):,.0f}",
            "best" if row["round"] == best else "",
        ]
        for row in rows
    ]
    return html_table("", cells, header, numbers=True)


def run_html(title: str, rows: Sequence[Mapping[str, Any]], rounds: int, best: int | None) -> str:
    """Return a run that does not train as HTML: its curve, its last evaluated rounds, and how long it took."""
    evaluated = [row for row in rows[:-1] if "val_loss" in row] or list(rows[:-1])
    shown = [*evaluated, *rows[-1:]][-SHOWN_ROUNDS:]
    took = f"{clock(elapsed(rows))} of training, {speed(rows):,.0f} samples/s" if rows else "no round is finished"
    return html_card(title, [html_beside([curve_svg(curves_of(rows)), html_rounds(shown, rounds, best)]), escape(took)])


def bar(done: float, colour: str = COLOURS[0], width: int = 140) -> str:
    """Return a bar that is filled in part, as HTML."""
    return (
        f"<span style='display:inline-flex;width:{width}px;height:7px;border-radius:4px;"
        "background:color-mix(in srgb, currentColor 15%, transparent)'>"
        f"<span style='height:7px;border-radius:4px;width:{min(max(done, 0.0), 1.0):.0%};"
        f"background:{colour}'></span></span>"
    )


def _progress_html(view: RunView, doing: str) -> str:
    done = (view.finished + view.fraction) / max(1, view.rounds)
    return f"round {min(view.finished + 1, view.rounds)} of {view.rounds} &ensp;{bar(done)}&ensp; {escape(doing)}"


def _replicas_html(steps: Sequence[StepsTaken]) -> str:
    if not steps:
        return ""
    if len(steps) > SHOWN_REPLICAS:
        return escape(steps_line(steps))
    lines = "".join(
        f"<tr><td style='{CELL}'>replica {e.replica}</td><td style='{CELL}'>{bar(e.step / e.steps, COLOURS[2])}</td>"
        f"<td style='{CELL}'>{e.step} of {e.steps} steps, {e.samples / e.seconds:,.0f} samples/s</td>"
        f"<td style='{CELL};opacity:.7'>{escape(e.worker)}</td></tr>"
        for e in steps
    )
    return f"<table style='{TABLE}'>{lines}</table>"


CELL = "text-align:left;padding:1px 10px 1px 0;border:0;background:none"
