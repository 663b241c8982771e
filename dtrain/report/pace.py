"""How fast a run is, and how long it will take: arithmetic on the rows of its history."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

RECENT = 6
"""Rounds whose speed is shown: single rounds end in bursts, since they are submitted ahead."""
STEADY = 20
"""Rounds that the time left is estimated from, at most."""


def speed(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return samples a second over the last rounds."""
    recent = rows[-RECENT:]
    samples: int = sum(row["samples"] for row in recent)
    return samples / max(elapsed(recent), 1e-9)


def seconds_left(rows: Sequence[Mapping[str, Any]], rounds: int, fraction: float = 0.0) -> float | None:
    """Estimate the seconds until the last round; None before the first one. A rule of ``[stop]`` may end it earlier.

    Parameters
    ----------
    rows : sequence of mapping
        The last rows of the history.
    rounds : int
        Of the whole run.
    fraction : float
        The part of the next round that is done.

    Notes
    -----
    The first round, which opens data and models, counts only where it is the only one.

    >>> seconds_left([{"round": 1, "seconds": 9.0}, {"round": 2, "seconds": 2.0}], rounds=5, fraction=0.5)
    5.0
    """
    steady = [row for row in rows if row["round"] > 1][-STEADY:] or rows
    if not steady:
        return None
    finished: int = rows[-1]["round"]
    return max(0.0, elapsed(steady) / len(steady) * (rounds - finished - fraction))


def elapsed(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds of training up to the last row."""
    return math.fsum(row["seconds"] for row in rows)
