"""What the page shows of all runs on a scheduler: bounded in memory, constant in time for each event."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from typing import Any

MOST_RUNS = 8
"""Runs that are kept: the ones that were begun last."""
MOST_ROUNDS = 500
"""Points of a curve; of more rounds every n-th is kept."""
MOST_SPANS = 1500
"""Tasks of the timeline."""
MOST_FAULTS = 50
MOST_REPLICAS = 2000
NUMBERS = ("round", "train_loss", "val_loss", "samples", "seconds", "bytes", "retried", "rejected")
"""Columns of a round; a value that is missing is None."""
ROWS = {"evaluate": -1, "average": -2}
"""Rows of the timeline below those of the replicas."""


class Thinned:
    """A list that keeps every n-th of its items when they become too many; the newest one is always there."""

    def __init__(self, most: int) -> None:
        self.most, self.stride, self.offered = most, 1, 0
        self.kept: list[Any] = []
        self.last: Any = None

    def append(self, item: Any) -> None:
        """Add an item."""
        if self.offered % self.stride == 0:
            self.kept.append(item)
            if len(self.kept) > self.most:
                self.kept, self.stride = self.kept[::2], 2 * self.stride
        self.offered, self.last = self.offered + 1, item

    def items(self) -> list[Any]:
        """Return the items that are kept, and the newest one."""
        return self.kept if not self.kept or self.kept[-1] is self.last else [*self.kept, self.last]

    def cut(self, last_round: int) -> None:
        """Remove the rounds after one: they are trained again."""
        self.kept = [row for row in self.kept if row["round"] <= last_round]
        self.last = self.kept[-1] if self.kept else None


class RunState:
    """What is known of one run."""

    def __init__(self, run: str, name: str = "") -> None:
        self.run, self.name = run, name or run
        self.client = ""
        self.facts: dict[str, Any] = {}
        self.rounds = Thinned(MOST_ROUNDS)
        self.spans: deque[dict[str, Any]] = deque(maxlen=MOST_SPANS)
        self.faults: deque[tuple[float, str]] = deque(maxlen=MOST_FAULTS)
        self.steps: dict[int, dict[str, Any]] = {}
        self.bytes = 0
        self.end = ""
        self.changes = 0

    @property
    def round(self) -> int:
        """Finished rounds."""
        last = self.rounds.last
        return int(last["round"] if last else self.facts.get("round", 0))

    def keep_steps(self, steps: dict[str, Any]) -> None:
        """Keep how far a replica is in its round."""
        if len(self.steps) < MOST_REPLICAS or steps["replica"] in self.steps:
            self.steps[steps["replica"]] = steps

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {
            "run": self.run,
            "name": self.name,
            **self.facts,
            "round": self.round,
            "end": self.end,
            "bytes": self.bytes,
            "history": self.rounds.items(),
            "tasks": list(self.spans),
            "steps": [self.steps[k] for k in sorted(self.steps)],
            "faults": [{"time": at, "text": text} for at, text in self.faults],
        }


class Board:
    """The runs of a scheduler."""

    def __init__(self) -> None:
        self.runs: OrderedDict[str, RunState] = OrderedDict()

    def newest(self) -> RunState | None:
        """Return the run that was begun last, of those that train if there are some."""
        states = list(self.runs.values())
        return next((state for state in reversed(states) if not state.end), states[-1] if states else None)

    def message(self, message: dict[str, Any], at: float | None = None) -> None:
        """Take account of what a client says of its run; what it does not know is passed over."""
        kind, run = message.get("event"), str(message.get("run", ""))
        if kind == "start":
            self.runs.pop(run, None)
            self.runs[run] = state = RunState(run, str(message.get("name", "")))
            state.client = str(message.get("client", ""))
            state.facts = {k: v for k, v in message.items() if k not in ("event", "run", "name", "client")}
            while len(self.runs) > MOST_RUNS:
                self.runs.popitem(last=False)
        if run not in self.runs:
            return
        state = self.runs[run]
        state.changes += 1
        if kind == "rounds":
            for row in message["rows"]:
                state.rounds.append({name: row.get(name) for name in NUMBERS})
                state.bytes += row.get("bytes") or 0
        elif kind == "fault":
            state.faults.append((time.time() if at is None else at, str(message.get("text", ""))))
            if "back_to" in message:
                state.rounds.cut(message["back_to"])
        elif kind == "end":
            state.end, state.steps = str(message.get("text", "")), {}

    def steps(self, run: str, steps: dict[str, Any]) -> None:
        """Take account of the progress of a replica."""
        state = self.runs.get(run)
        if state is not None and not state.end:
            state.changes += 1
            state.keep_steps(steps)

    def task(self, key: str, worker: str, startstops: Any) -> None:
        """Take account of a finished task, if it is one of a run: ``dtrain-train-r00003-k1-RUN-a1``."""
        parts = key.split("-")
        state = self.runs.get(parts[-2]) if len(parts) > 3 else None
        if state is None:
            return
        row = _row_of(parts)
        spans = [one for one in startstops if one["action"] == "compute"] if row is not None else []
        if not spans:
            return
        state.changes += 1
        rounds = [part[1:] for part in parts[2:-2] if part[:1] == "r" and part[1:].isdigit()]
        state.spans.append(
            {
                "what": parts[1],
                "row": row,
                "round": int(rounds[0]) if rounds else None,
                "worker": worker,
                "start": min(one["start"] for one in spans),
                "stop": max(one["stop"] for one in spans),
            }
        )

    def worker_left(self, worker: str) -> None:
        """Take account of a worker that has left the cluster while runs train."""
        for state in self.runs.values():
            if not state.end:
                state.changes += 1
                state.faults.append((time.time(), f"worker {worker} has left the cluster"))

    def client_left(self, client: str) -> None:
        """Take account of a client that has left: nobody goes on with its runs."""
        for state in self.runs.values():
            if state.client == client and not state.end:
                state.changes += 1
                state.end, state.steps = "stopped: its client has left", {}

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        return {"runs": [state.as_json() for state in self.runs.values()]}


def _row_of(parts: list[str]) -> int | None:
    """Return the row of the timeline that a task belongs to; None: it is not shown."""
    if parts[1] == "eval":
        return ROWS["evaluate"]
    if parts[1] in ("reduce", "mean", "step"):
        return ROWS["average"]
    if parts[1] == "train":
        return next((int(part[1:]) for part in parts[3:-2] if part[:1] == "k" and part[1:].isdigit()), None)
    return None
