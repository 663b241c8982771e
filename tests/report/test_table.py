"""Rounds as a table: alignment, the best round, speed and time left."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.report.history import row_of
from dtrain.report.pace import seconds_left, speed
from dtrain.report.table import RoundTable
from tests.report.helpers import result_of

LOSSES = st.lists(st.none() | st.floats(-1e9, 1e9), min_size=1, max_size=12)


def table_lines(table: RoundTable, rows: list[dict[str, object]]) -> tuple[RoundTable, list[str]]:
    lines: list[str] = []
    for row in rows:
        table, more = table.after(row).printed(row)
        lines += more
    return table, lines


@given(losses=LOSSES, higher=st.booleans())
def test_the_best_round_is_the_first_of_the_best(losses: list[float | None], higher: bool) -> None:
    rows = [row_of(result_of(n, metrics={} if v is None else {"val_loss": v})) for n, v in enumerate(losses, 1)]
    table, lines = table_lines(RoundTable(rounds=12, width=80, higher=higher), rows)
    known = [v for v in losses if v is not None]
    best = None if not known else losses.index(max(known) if higher else min(known)) + 1
    assert table.best_round == best
    marked = [int(line.split()[0]) for line in lines if "*" in line]
    assert marked[-1:] == ([] if best is None else [best])


def test_a_value_that_is_not_finite_is_never_the_best() -> None:
    rows = [row_of(result_of(n, metrics={"val_loss": v})) for n, v in ((1, float("nan")), (2, 3.0))]
    table, lines = table_lines(RoundTable(rounds=2, width=80), rows)
    assert table.best_round == 2
    assert lines[1].split()[2] == "nan"


@given(width=st.integers(40, 200), names=st.lists(st.text("abcdefgh_", min_size=1, max_size=30), unique=True))
def test_lines_fit_the_terminal(width: int, names: list[str]) -> None:
    row = row_of(result_of(3, metrics={"val_loss": 0.5, **{f"val_{name}": 0.5 for name in names}}, samples=99999))
    _, lines = table_lines(RoundTable(rounds=99999, width=max(width, 60)), [row])
    assert max(map(len, lines[-2:])) <= max(width, 60)
    assert len(lines[-1]) >= len(lines[-2])  # nothing is cut


def test_speed_is_that_of_the_last_rounds() -> None:
    rows = [{"round": n, "samples": n, "seconds": 2.0} for n in range(1, 11)]
    assert speed(rows) == sum(range(5, 11)) / 12
    assert speed([]) == 0.0


@pytest.mark.parametrize(
    ("seconds", "rounds", "fraction", "left"),
    [
        ((9.0,), 4, 0.0, 27.0),  # of one round, the first, which is all that is known
        ((9.0, 2.0, 4.0), 5, 0.0, 6.0),
        ((9.0, 2.0, 4.0), 5, 0.5, 4.5),
        ((9.0, 2.0), 2, 0.0, 0.0),
        ((1.0, *[1.0] * 50, *[2.0] * 20), 72, 0.0, 2.0),
        ((), 3, 0.0, None),
    ],
)
def test_the_time_that_is_left(seconds: tuple[float, ...], rounds: int, fraction: float, left: float | None) -> None:
    rows = [{"round": n, "seconds": s} for n, s in enumerate(seconds, start=1)]
    assert seconds_left(rows, rounds, fraction) == left
