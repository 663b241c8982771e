"""Learning-rate schedules: pure functions of the step.

Warm-up rises linearly from 1 / `warmup_steps` to 1, then the schedule runs over the remaining steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

Schedule: TypeAlias = Callable[[int, int], float]
"""(step, total steps) -> factor on the learning rate; `step` counts a replica's finished steps from 0."""


def constant(step: int, total: int) -> float:
    """Return 1."""
    return 1.0


def cosine(step: int, total: int) -> float:
    """Fall from 1 to 0 along half a cosine (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    return 0.5 * (1.0 + math.cos(math.pi * min(step, total) / total))


def linear(step: int, total: int) -> float:
    """Fall from 1 to 0 in a straight line."""
    return 1.0 - min(step, total) / total


SCHEDULES: dict[str, Schedule] = {"constant": constant, "cosine": cosine, "linear": linear}


def schedule_named(name: str, warmup_steps: int) -> Schedule:
    """Return a built-in schedule with a linear warm-up."""
    return with_warmup(SCHEDULES[name], warmup_steps)


def with_warmup(schedule: Schedule, warmup_steps: int) -> Schedule:
    """Return a schedule that rises linearly to 1 and then follows `schedule` over the remaining steps."""

    def warmed(step: int, total: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return schedule(step - warmup_steps, max(1, total - warmup_steps))

    return warmed
