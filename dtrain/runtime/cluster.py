r"""ClusterRunner: a round as a handful of Dask tasks.

    replica 0    local ----> update_of ---.
                     `-----> state_of      \
    replica 1    local ----> update_of -----> combine --> broadcast_of ---> next round, evaluation
                     `-----> state_of                |--> outer_of -------> next round
                                                     `--> summarise ------> driver

Parameters go from worker to worker. The driver sees futures and scalars, and a whole state only when it commits.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any

from distributed import Future

from dtrain.algorithm.average import apart, by_replica, round_averages, settled, together
from dtrain.algorithm.evaluate import Sums, merge
from dtrain.algorithm.mix import Average
from dtrain.algorithm.params import with_frozen, without_frozen
from dtrain.data.load.statistics import Moments, merge_moments
from dtrain.data.plan.splits import SplitName
from dtrain.events import StepsTaken
from dtrain.runtime import remote
from dtrain.runtime.client import GONE, TaskClient
from dtrain.runtime.connect import Connection
from dtrain.runtime.placement import place_replicas
from dtrain.runtime.remote import RESOURCE
from dtrain.runtime.resident import Resident
from dtrain.runtime.runner import Outcome
from dtrain.runtime.spec import RunSpec
from dtrain.runtime.trial import Initial
from dtrain.types import Flat, Parameters, Position, RoundPlan, TrainState

PRIORITY_LOCAL, PRIORITY_EVALUATE, PRIORITY_REDUCE = 1, 2, 10
"""A worker evaluates a round before it trains the next one: later would not be faster, and results come evenly."""
SMALL_BYTES = 1 << 20
"""Results whose other parts are below this size are sent whole; a task to split them would cost more."""


@dataclass(frozen=True, slots=True)
class ClusterRound:
    """Futures of the values after a round; replicas that share a value hold the same future."""

    model: Future
    broadcast: tuple[Future, ...]
    replicas: tuple[Future, ...]
    outer: tuple[Future, ...]
    """Without an outer optimizer its empty states themselves."""
    small: bool
    """Whether results are sent whole."""
    frozen: Flat
    """The frozen parameters, on the driver."""
    frozen_sent: Future | None
    """The same on the workers, sent to each once; None without frozen parameters."""
    summary: Future | None = None
    """None before the first round of a segment."""
    sums: Future | None = None
    """None without a validation split too, and after rounds that are not evaluated."""


class ClusterRunner:
    """Submits the tasks of a run to a Dask cluster.

    Tasks are pinned loosely to a worker by replica: Dask alone would run all of them on the holder of the
    parameters, and a strict pin hangs when the worker dies.
    """

    look_ahead: int | None = None

    def __init__(self, connection: Connection, spec: RunSpec) -> None:
        self.num_workers = connection.num_workers
        self.dashboard = connection.dashboard
        self.spec = spec
        self.on_progress: Callable[[StepsTaken], None] = lambda event: None
        self._client = TaskClient(connection.client, spec.run_id)
        self._resident = Resident(spec)  # on the driver for its arithmetic only
        self._places: dict[int, str] = {}
        self._progress: SimpleQueue[StepsTaken] = SimpleQueue()
        self._plugin = remote.RunPlugin(spec)
        connection.client.register_plugin(self._plugin)
        connection.client.subscribe_topic(
            self._plugin.name, lambda event: self._progress.put(StepsTaken(**event[1]["steps"]))
        )

    def initialise(self) -> Initial:
        """Build the model and try it on one batch."""
        future = self._client.submit(
            remote.initialise_run, "initialise", self.spec.run_id, at=self._allowed(0), resources=RESOURCE
        )
        initial: Initial = self._gather([future])[0]
        return initial

    def moments(self, most_units: int | None) -> dict[str, Moments]:
        """Return the moments of ``data.normalize``, from one pass over the training rows."""
        moments = [
            self._client.submit(
                remote.take_moments,
                f"moments-k{k}",
                self.spec.run_id,
                k,
                most_units,
                at=self._allowed(k) or at,
                resources=RESOURCE,
            )
            for k, at in self._placed(self.spec.plan.replicas).items()
        ]
        merged: dict[str, Moments] = self._gather([self._client.submit(merge_moments, "moments", moments)])[0]
        return merged

    def evaluate(self, params: Parameters, split: SplitName) -> Sums | None:
        """Evaluate parameters on a split."""
        if not self._resident.pieces(split):
            return None
        workers = self._client.workers()
        sent = self._client.scatter(params, workers)
        sums: Sums = self._gather([self._submit_evaluation(sent, split, workers, None)])[0]
        return sums

    # Rounds -------------------------------------------------------------------------------------------------

    def place(self, state: TrainState) -> ClusterRound:
        """Scatter a state from the driver to the workers of its replicas."""
        self._client.begin()
        at = self._placed(len(state.broadcast))
        starts, frozen = apart(state.broadcast), state.model.frozen
        broadcast = self._client.scatter_each(starts, at)
        outer = state.outer
        if self.spec.config.average.outer is not None:
            outer = self._client.scatter_each(state.outer, dict.fromkeys(at, at[0]))
        return ClusterRound(
            model=broadcast[0] if _is_shared(state) else self._client.scatter(without_frozen(state.model), [at[0]]),
            broadcast=broadcast,
            replicas=tuple(self._client.scatter(own, [at[k]]) for k, own in enumerate(state.replicas)),
            outer=outer,
            small=_is_small(replace(state, broadcast=starts)),
            frozen=frozen,
            frozen_sent=self._client.scatter(frozen, list(at.values())) if len(frozen) else None,
        )

    def submit(self, held: ClusterRound, plan: RoundPlan) -> ClusterRound:
        """Submit the local steps, the averages and the evaluation of a round."""
        self._placed(len(plan.tasks))
        updates, replicas = self._submit_local(held, plan)
        means = round_averages(plan, held.broadcast, self.spec.config.average)
        names = [f"r{plan.round:05d}" + (f"-g{number}" if len(means) > 1 else "") for number in range(len(means))]
        combined = [self._submit_mean(held, mean, name, updates) for mean, name in zip(means, names, strict=True)]
        parts = [self._part(held, remote.broadcast_of, f"mixed-{n}", c) for n, c in zip(names, combined, strict=True)]
        outer = [self._outer_part(held, f"outer-{n}", c) for n, c in zip(names, combined, strict=True)]
        model = parts[0]
        if len(means) > 1:
            model = self._client.submit(
                remote.mean_model, f"model-r{plan.round:05d}", means, combined, priority=PRIORITY_REDUCE
            )
        return replace(
            held,
            model=model,
            broadcast=by_replica(means, parts),
            replicas=replicas,
            outer=by_replica(means, outer),
            summary=self._client.submit(
                remote.summarise_round, f"summary-r{plan.round:05d}", combined, model, held.model, held.frozen_sent
            ),
            sums=self._submit_evaluation(model, "val", list(self._places.values()), held.frozen_sent)
            if plan.evaluates
            else None,
        )

    def collect(self, held: ClusterRound) -> Outcome:
        """Wait for the scalars of a round."""
        handles = [handle for handle in (held.summary, held.sums) if handle is not None]
        summary, *sums = self._gather(handles)
        return Outcome(summary, sums[0] if sums else None)

    def gather(self, held: ClusterRound, position: Position) -> TrainState:
        """Bring the state after a round to the driver."""
        outer_handles = held.outer if self.spec.config.average.outer is not None else ()
        handles = {handle.key: handle for handle in (held.model, *held.broadcast, *held.replicas, *outer_handles)}
        values = dict(zip(handles, self._gather(list(handles.values())), strict=True))
        return _state(held, position, values, outer_handles)

    def close(self) -> None:
        """Cancel what is not done, and take the run's residents away from the workers."""
        if self._client.connected:
            try:
                self._client.cancel()
                self._client.dask.unsubscribe_topic(self._plugin.name)
                self._client.dask.unregister_worker_plugin(self._plugin.name)
            except (*GONE, ValueError):
                pass  # they are gone already

    # Tasks of a round ---------------------------------------------------------------------------------------

    def _submit_local(self, held: ClusterRound, plan: RoundPlan) -> tuple[list[Future], tuple[Future, ...]]:
        """Submit the local steps; return, by replica, the futures of what it sends and of what it keeps."""
        updates, replicas = [], []
        for task in plan.tasks:
            k, at, name = task.replica, self._places[task.replica], f"r{plan.round:05d}-k{task.replica}"
            trained = self._client.submit(
                remote.train_replica,
                f"local-{name}",
                self.spec.run_id,
                task,
                held.broadcast[k],
                held.replicas[k],
                held.frozen_sent,
                at=self._allowed(k) or at,
                resources=RESOURCE,
                priority=PRIORITY_LOCAL,
            )
            updates.append(self._part(held, remote.update_of, f"parameters-{name}", trained, at))
            replicas.append(self._part(held, remote.state_of, f"replica-{name}", trained, at))
        return updates, tuple(replicas)

    def _submit_mean(self, held: ClusterRound, mean: Average, name: str, updates: Sequence[Future]) -> Future:
        first = mean.receivers[0]
        return self._client.submit(
            remote.combine_replicas,
            f"reduce-{name}",
            self.spec.config.average,
            held.broadcast[first],
            [updates[k] for k in mean.members],
            held.outer[first],
            priority=PRIORITY_REDUCE,
        )

    def _submit_evaluation(
        self, model: Future, split: SplitName, places: Sequence[str], frozen: Future | None
    ) -> Future | None:
        """Submit the evaluation of parameters on a split; None if it is empty."""
        sums = [
            self._client.submit(
                remote.evaluate_piece,
                f"evaluate-{split}-p{piece}-{uuid.uuid4().hex[:8]}",
                self.spec.run_id,
                model,
                split,
                piece,
                frozen,
                at=stream.source.workers or places[piece % len(places)],
                resources=RESOURCE,
                priority=PRIORITY_EVALUATE,
            )
            for piece, stream in enumerate(self._resident.pieces(split))
        ]
        return self._client.submit(merge, f"merge-{uuid.uuid4().hex[:8]}", sums) if sums else None

    def _part(
        self, held: ClusterRound, part: Callable[[Any], Any], name: str, whole: Future, at: str | None = None
    ) -> Future:
        """Submit a task that takes a part out of a result; a small result is its own part."""
        return whole if held.small else self._client.submit(part, name, whole, at=at, priority=PRIORITY_REDUCE)

    def _outer_part(self, held: ClusterRound, name: str, whole: Future) -> Future:
        if self.spec.config.average.outer is None:
            return ()
        return self._part(held, remote.outer_of, name, whole)

    def _gather(self, futures: Sequence[Future]) -> list[Any]:
        return self._client.gather(futures, self._report_progress)

    def _report_progress(self) -> None:
        while not self._progress.empty():
            self.on_progress(self._progress.get())

    # Places -------------------------------------------------------------------------------------------------

    def _allowed(self, replica: int) -> tuple[str, ...]:
        """Return the only workers that may read a replica's store; empty: all may."""
        return self._resident.replicas[replica].source.workers

    def _placed(self, replicas: int) -> dict[int, str]:
        """Choose the worker of each replica, and return them."""
        live = self._client.workers()
        self._places = place_replicas(self._places, live, replicas)
        for replica in range(replicas):
            if allowed := self._allowed(replica):
                self._places[replica] = next((worker for worker in allowed if worker in live), allowed[0])
        return self._places


def _state(
    held: ClusterRound, position: Position, values: Mapping[str, Any], outer_handles: Sequence[Future]
) -> TrainState:
    """Return the state after a round, of results by key."""
    model = with_frozen(remote.model_in(values[held.model.key]), held.frozen)
    starts = {handle.key: remote.broadcast_of(values[handle.key]) for handle in held.broadcast}
    broadcast, replicas = settled(
        [starts[handle.key] for handle in held.broadcast],
        [remote.state_of(values[handle.key]) for handle in held.replicas],
    )
    outer = {handle.key: remote.outer_of(values[handle.key]) for handle in outer_handles}
    return TrainState(
        position=position,
        model=model,
        broadcast=together(broadcast, model),
        replicas=replicas,
        outer=tuple(outer[handle.key] for handle in outer_handles) or held.outer,
    )


def _is_shared(state: TrainState) -> bool:
    """Whether the model that is evaluated is what every replica starts from."""
    return all(own.params is state.model for own in state.broadcast)


def _is_small(state: TrainState) -> bool:
    """Whether results are sent whole: parameters together with the states of replicas and outer optimizer.

    Those states are useless where the parameters go, so they must be small. Before the first step they are empty, and
    do not show the size that they will have.
    """
    if state.round == 0:
        return all(own.nbytes <= SMALL_BYTES for own in state.broadcast)
    outer = [piece.nbytes for states in state.outer for piece in states]
    return all(nbytes <= SMALL_BYTES for nbytes in [*(own.nbytes for own in state.replicas), *outer])
