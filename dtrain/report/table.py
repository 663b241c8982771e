"""The rounds of a run as a table that grows, for a terminal: aligned columns that fit its width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dtrain.display import clock, number
from dtrain.report.pace import RECENT, speed

WIDE = 9
"""Columns of a number."""
LONGEST = 14
"""Letters of a metric's name, at most."""
NOTES = 11
"""Columns that are left for notes: retries and rejected replicas."""
LOSSES = {"train_loss": "train", "val_loss": "val"}
"""What the columns of losses are called."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTable:
    """What is known when a row of the table is printed. A new row makes a new one.

    Attributes
    ----------
    rounds : int
        Of the whole run.
    width : int
        Columns of the terminal.
    metric : str
        By which the best round is marked.
    higher : bool
        Whether larger values of it are better.
    """

    rounds: int
    width: int
    metric: str = "val_loss"
    higher: bool = False
    columns: tuple[str, ...] = ()
    """Of the header that was printed last."""
    best: float | None = None
    best_round: int | None = None
    recent: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0

    def after(self, row: Mapping[str, Any]) -> RoundTable:
        """Return the table after a round."""
        value, best, best_round = row.get(self.metric), self.best, self.best_round
        if value is not None and (best is None or (value > best if self.higher else value < best)):
            best, best_round = value, row["round"]
        return replace(
            self,
            best=best,
            best_round=best_round,
            recent=(*self.recent, row)[-RECENT:],
            seconds=self.seconds + row["seconds"],
        )

    def printed(self, row: Mapping[str, Any]) -> tuple[RoundTable, list[str]]:
        """Return the lines of a round that the table already knows, below a header where columns are new."""
        columns = tuple(dict.fromkeys([*self.columns, *value_columns([row])]))
        if columns == self.columns:
            return self, [self._line(row)]
        table = replace(self, columns=columns)
        return table, [*table.header(), table._line(row)]

    @property
    def _label(self) -> int:
        return max(len("round"), len(str(self.rounds)))

    def shown_columns(self) -> tuple[str, ...]:
        """Return the columns that fit; the losses always do."""
        left = self.width - self._label - (2 + WIDE) - (2 + 7) - NOTES
        fit: list[str] = []
        for name in self.columns:
            if left >= 2 + _wide(name) or name in LOSSES:
                left -= 2 + _wide(name)
                fit.append(name)
        return tuple(fit)

    def header(self) -> list[str]:
        """Return the lines above the columns."""
        fit = self.shown_columns()
        cells = [f"{label(name):>{_wide(name)}} " for name in fit]
        lines = [" ".join([f"{'round':>{self._label}} ", *cells, f"{'samples/s':>{WIDE}} ", f"{'time':>7}"])]
        if left_out := [label(name) for name in self.columns if name not in fit]:
            lines.insert(0, f"also in history.jsonl: {', '.join(left_out)}")
        return lines

    def _line(self, row: Mapping[str, Any]) -> str:
        is_best = row["round"] == self.best_round
        cells = [
            f"{value_of(row, name):>{_wide(name)}}{'*' if is_best and name == self.metric else ' '}"
            for name in self.shown_columns()
        ]
        pace = [f"{speed(self.recent):>{WIDE},.0f} ", f"{clock(self.seconds):>7}"]
        return "  ".join(filter(None, [" ".join([f"{row['round']:>{self._label}} ", *cells, *pace]), notes_of(row)]))


def value_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the losses and metrics of rows, in their order: the training loss, then those of validation."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("val_"))
    return ["train_loss", *names]


def label(name: str) -> str:
    """Return what a column is called.

    >>> label("val_loss"), label("val_accuracy"), label("val_mean_absolute_error")
    ('val', 'accuracy', 'mean_absolute…')
    """
    text = LOSSES.get(name, name.removeprefix("val_"))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def value_of(row: Mapping[str, Any], name: str) -> str:
    """Return a value as it is shown: empty where a round was not evaluated, nan where it is not finite."""
    if name not in row:
        return ""
    return "nan" if row[name] is None else number(row[name])


def notes_of(row: Mapping[str, Any]) -> str:
    """Return what went wrong in a round."""
    return ", ".join(f"{row[name]} {name}" for name in ("retried", "rejected") if row.get(name))


def _wide(name: str) -> int:
    return max(WIDE, len(label(name)))
