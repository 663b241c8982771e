"""Fault schedules, drawn from a seed: what happens to drivers, workers and schedulers while a run trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

Action: TypeAlias = Literal[
    "kill worker", "freeze worker", "join", "leave", "kill driver", "stop driver", "kill scheduler"
]
ACTIONS: dict[Action, float] = {
    "kill worker": 0.36,
    "freeze worker": 0.14,
    "join": 0.12,
    "leave": 0.12,
    "kill driver": 0.12,
    "stop driver": 0.06,
    "kill scheduler": 0.08,
}
"""How often each is drawn."""
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"average": {"mix": {"topology": "ring"}}},
    {"average": {"mix": {"topology": "exponential"}}},
    {"average": {"mix": {"topology": "hierarchical", "groups": 2, "period": 2}, "replicas": 4}},
    {"average": {"codec": {"name": "int8"}}},
    {"average": {"codec": {"name": "int4"}, "outer": {"optimizer": "sgd"}}},
    {"average": {"codec": {"name": "bf16"}, "weights": "uniform"}},
    {"average": {"outer": {"optimizer": "adam", "args": {"lr": 0.01}}}},
    {"average": {"control": True}},
    {"average": {"ema": 0.9, "inner_state": "average"}},
    {"average": {"reduce": "median"}, "train": {"optimizer": "adam", "optimizer_args": {"lr": 0.01}}},
    {"train": {"micro_batch": 5}},
    {"train": {"eval_every": 2}},
)
"""Ways of averaging and training."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens."""

    after: float
    """Seconds since the one before, or since the first start."""
    action: Action
    pick: int
    """Which worker, modulo their number."""
    seconds: float
    """That a worker is frozen; that its successor takes to come."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """A run and what happens to it."""

    seed: int
    workers: int
    way: dict[str, Any]
    commit_every: int | str
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        happens = "; ".join(f"+{one.after:.1f} s {one.action}" for one in self.faults)
        return f"seed {self.seed}: {self.workers} workers, {self.way}, commit_every {self.commit_every}: {happens}"


def drawn(seed: int) -> Schedule:
    """Return the schedule of a seed."""
    rng = np.random.default_rng(seed)
    actions = rng.choice(list(ACTIONS), size=int(rng.integers(2, 7)), p=list(ACTIONS.values()))
    faults = tuple(
        Fault(
            after=float(rng.uniform(0.2, 2.5)),
            action=str(action),  # type: ignore[arg-type]
            pick=int(rng.integers(100)),
            seconds=float(rng.choice([0.5, 1.5, 3.0, 8.0])),
        )
        for action in actions
    )
    return Schedule(
        seed=seed,
        workers=int(rng.integers(1, 4)),
        way=WAYS[int(rng.integers(len(WAYS)))],
        commit_every=[1, 2, 3, 50, "auto"][int(rng.integers(5))],
        faults=faults,
    )
