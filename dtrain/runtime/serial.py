"""SerialRunner: the whole of a round as a plain loop in this process. Debugger, and oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dtrain.algorithm.plan import cursor_after
from dtrain.data.load.statistics import merge_moments
from dtrain.data.plan.splits import SplitName
from dtrain.events import StepsTaken
from dtrain.runtime import tasks
from dtrain.runtime.resident import Resident, RunSpec
from dtrain.runtime.tasks import Initial
from dtrain.types import RoundPlan, TrainState


class SerialRunner:
    """Runs every task at once, where it is submitted."""

    num_workers = 2
    dashboard = ""

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self._resident = Resident(spec)
        self.on_progress: Callable[[StepsTaken], None] = lambda event: None

    def initialise(self) -> Initial:
        """Build the model and try it on one batch."""
        return tasks.initialise(self._resident)

    def place(self, state: TrainState[Any]) -> TrainState[Any]:
        """Return the state: its values are their own handles."""
        return state

    def submit_round(self, state: TrainState[Any], plan: RoundPlan) -> tuple[TrainState[Any], Any]:
        """Run a round."""
        updates = [
            tasks.train_local(
                self._resident, task, state.params[task.replica], state.inner[task.replica], self.on_progress
            )
            for task in plan.tasks
        ]
        reduced = tasks.reduce_round(
            self._resident.spec.config.average,
            [tasks.parameters_of(update) for update in updates],
            state.params[0],
            state.outer,
        )
        inner = [tasks.inner_of(update) for update in updates]
        after = state_after(self._resident, state, plan, reduced.params, inner, reduced.outer)
        return after, tasks.summarise(reduced, state.params[0])

    def submit_moments(self, most_units: int | None) -> Any:
        """Return the moments of the variables of ``data.normalize``."""
        replicas = range(self._resident.spec.plan.replicas)
        return merge_moments([tasks.take_moments(self._resident, k, most_units, self.on_progress) for k in replicas])

    def submit_evaluation(self, params: Any, split: SplitName) -> Any:
        """Evaluate parameters on a split."""
        pieces = range(len(self._resident.pieces(split)))
        if not pieces:
            return None
        return tasks.merge_pieces([tasks.evaluate_piece(self._resident, params, split, piece) for piece in pieces])

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        """Return the values."""
        return list(handles)

    def gather(self, state: TrainState[Any]) -> TrainState[Any]:
        """Return the state."""
        return state

    def close(self) -> None:
        """Close the loaders."""
        self._resident.close()


def state_after(
    resident: Resident,
    state: TrainState[Any],
    plan: RoundPlan,
    mixed: Any,
    inner: Sequence[Any],
    outer: Sequence[Any],
) -> TrainState[Any]:
    """Return the state after a round, from the handles of its results."""
    sizes = [partition.num_samples for partition in resident.partitions]
    return replace(
        state,
        round=plan.round,
        params=(mixed,) * len(plan.tasks),
        inner=tuple(inner),
        outer=tuple(outer),
        cursors=tuple(cursor_after(task, size) for task, size in zip(plan.tasks, sizes, strict=True)),
        steps=tuple(task.step + task.num_steps for task in plan.tasks),
    )
