"""SerialRunner: a whole round as a plain loop in this process. Debugger, and oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.algorithm.batchnorm import with_statistics
from dtrain.algorithm.ema import next_ema
from dtrain.algorithm.evaluate import Sums, Term, merge
from dtrain.algorithm.metrics.state import Metric
from dtrain.algorithm.params import with_frozen
from dtrain.algorithm.pattern import (
    apart,
    by_replica,
    model_of,
    round_averages,
    settled,
    starts_of,
    summarise,
    together,
)
from dtrain.data.load.climate import add_sums
from dtrain.data.load.finite import Seen
from dtrain.data.load.moments import Moments
from dtrain.data.load.statistics import merge_moments
from dtrain.data.plan.splits import SplitName
from dtrain.events import StepsTaken, WorkerEvicted
from dtrain.runtime import tasks
from dtrain.runtime.resident import Resident
from dtrain.runtime.runner import Outcome
from dtrain.runtime.spec import RunSpec
from dtrain.runtime.trial import Initial, initialise
from dtrain.statefiles import held_state
from dtrain.types import (
    Broadcast,
    InitFile,
    OuterState,
    Parameters,
    Position,
    ReplicaState,
    RoundPlan,
    StoredState,
    TrainState,
)


@dataclass(frozen=True, slots=True)
class SerialRound:
    """The values after a round."""

    model: Parameters
    """Whole, with the frozen parameters."""
    broadcast: tuple[Broadcast, ...]
    replicas: tuple[ReplicaState, ...]
    outer: tuple[OuterState, ...]
    ema: Parameters | None
    """Whole, as `model`."""
    outcome: Outcome | None
    """None before the first round of a segment."""


class SerialRunner:
    """Runs every task at once, in the process that submits it."""

    num_workers = 2
    look_ahead: int | None = 0

    def __init__(self, spec: RunSpec) -> None:
        self.spec = spec
        self._resident = Resident(spec)
        self.on_progress: Callable[[StepsTaken], None] = lambda event: None
        self.on_evicted: Callable[[WorkerEvicted], None] = lambda event: None

    def open_dashboard(self) -> str:
        """Return no address: there is no dashboard."""
        return ""

    def publish(self, message: Mapping[str, Any]) -> None:
        """Do nothing: there is no dashboard."""

    def initialise(self, init: InitFile | None = None) -> Initial:
        """Build the model, take the tensors of a file into it, and try it on one batch."""
        return initialise(self._resident, init)

    def moments(self, most_units: int | None) -> dict[str, Moments]:
        """Return the moments of the variables of ``data.normalize``."""
        replicas = range(self.spec.plan.replicas)
        return merge_moments([tasks.take_moments(self._resident, k, most_units, self.on_progress) for k in replicas])

    def place_means(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return, by variable of ``RunSpec.climate_plan``, the means of the training rows at each place."""
        replicas = range(self.spec.plan.replicas)
        sums = reduce(add_sums, (tasks.take_places(self._resident, k, self.on_progress) for k in replicas))
        return {name: own.means for name, own in sums.items()}

    def seen(self) -> list[Seen]:
        """Return, by piece, which samples hold values that are not finite."""
        pieces = range(len(self._resident.counted))
        return [tasks.take_seen(self._resident, piece, self.on_progress) for piece in pieces]

    def evaluate(self, params: Parameters, split: SplitName) -> Sums | None:
        """Evaluate parameters on a split."""
        pieces = range(len(self._resident.pieces(split)))
        sums = [tasks.evaluate_piece(self._resident, params, split, piece) for piece in pieces]
        return merge(sums) if sums else None

    def losses_by_part(self, params: Parameters) -> list[list[Term]]:
        """Return, by stream, the loss of each of its parts."""
        streams = range(len(self._resident.by_unit))
        return [tasks.losses_by_part(self._resident, params, number) for number in streams]

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics that are computed batch by batch, to take the values of their states."""
        return self._resident.metrics_here

    @property
    def has_lost_workers(self) -> bool:
        """Whether workers have been lost: there are none."""
        return False

    def place(self, state: TrainState | StoredState, again: int = 0) -> SerialRound:
        """Return the state: its values are their own handles."""
        state = held_state(state) if isinstance(state, StoredState) else state
        return SerialRound(state.model, apart(state.broadcast), state.replicas, state.outer, state.ema, None)

    def submit(self, held: SerialRound, plan: RoundPlan) -> SerialRound:
        """Run a round and evaluate its model."""
        config = self.spec.config.average
        trained = [
            tasks.train_local(self._resident, task, start, state, held.model.frozen, self.on_progress)
            for task, start, state in zip(plan.tasks, held.broadcast, held.replicas, strict=True)
        ]
        means = round_averages(plan, held.broadcast, config)
        combined = [
            tasks.reduce(
                held.broadcast[mean.receivers[0]],
                starts_of(mean, held.broadcast, config),
                [trained[k][0] for k in mean.members],
                held.outer[mean.receivers[0]],
                config,
                self.spec.outer_factor(plan.round),
            )
            for mean in means
        ]
        averaged = with_frozen(model_of(means, [one.broadcast.params for one in combined]), held.model.frozen)
        model = self._recalibrated(averaged, plan)
        ema = self._recalibrated(next_ema(held.ema, averaged, config.ema), plan) if config.ema else None
        return SerialRound(
            model=model,
            broadcast=by_replica(means, [one.broadcast for one in combined]),
            replicas=tuple(state for _, state in trained),
            outer=by_replica(means, [one.outer for one in combined]),
            ema=ema,
            outcome=Outcome(
                summarise([[one.facts] for one in combined], model),
                self.evaluate(model, "val") if plan.evaluates else None,
                self.evaluate(ema, "val") if plan.evaluates and ema is not None else None,
            ),
        )

    def _recalibrated(self, params: Parameters, plan: RoundPlan) -> Parameters:
        """Return parameters with running statistics of their own, where they are asked for and evaluated."""
        if not plan.evaluates or not self.spec.config.average.recalibrate_batchnorm:
            return params
        replicas = range(len(plan.tasks))
        return with_statistics(params, [tasks.recalibrate(self._resident, params, k) for k in replicas])

    def collect(self, held: SerialRound, finished: int | None = None) -> Outcome:
        """Return the scalars of a round."""
        assert held.outcome is not None
        return held.outcome

    def gather(
        self, held: SerialRound, position: Position, directory: Callable[[int], Path] | None = None
    ) -> TrainState:
        """Return the state after a round."""
        broadcast, replicas = settled(held.broadcast, held.replicas)
        return TrainState(
            position=position,
            model=held.model,
            broadcast=together(broadcast, held.model),
            replicas=replicas,
            outer=held.outer,
            ema=held.ema,
        )

    def sees(self, directory: Path) -> None:
        """Return None: this process is the worker."""

    def close(self) -> None:
        """Close the loaders."""
        self._resident.close()
