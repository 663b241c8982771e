r"""ClusterRunner: a round as a handful of Dask tasks.

    replica 0    local ----> update ----.
                     `-----> state       \
    replica 1    local ----> update ------> means (`reducing`) --> next round, evaluation, moving average
                     `-----> state                          `----> summary -------> driver

Parameters go from worker to worker. The driver sees futures and scalars, and a whole state only when it commits.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
from distributed import Future

from dtrain.algorithm.evaluate import Sums, Term, merge
from dtrain.algorithm.metrics.state import Metric
from dtrain.algorithm.pattern import by_replica
from dtrain.data.load.climate import add_sums
from dtrain.data.load.finite import Seen
from dtrain.data.load.moments import Moments
from dtrain.data.load.statistics import merge_moments
from dtrain.data.plan.splits import SplitName
from dtrain.events import StepsTaken, WorkerEvicted
from dtrain.runtime import remote
from dtrain.runtime.client import HOLDERS, TaskClient
from dtrain.runtime.connect import Connection
from dtrain.runtime.dashboard import Messages, open_page
from dtrain.runtime.handles import ClusterRound, gathered, handles_of, scattered
from dtrain.runtime.placement import place_replicas
from dtrain.runtime.plugins import RESOURCE, RunPlugin
from dtrain.runtime.reducing import PRIORITY_REDUCE, Reduction, Sliced, reducer_slices
from dtrain.runtime.resident import Resident, install
from dtrain.runtime.runner import Outcome, SegmentLost
from dtrain.runtime.spec import RunSpec
from dtrain.runtime.storing import NotSeen, look_at, restored, stored
from dtrain.runtime.trial import Initial
from dtrain.types import InitFile, Parameters, Position, RoundPlan, StoredState, TrainState

PRIORITY_LOCAL, PRIORITY_EVALUATE = 1, 2
"""A worker evaluates a round before it trains the next one: later would not be faster, and results come evenly."""
FROM_THE_ROOT = re.compile(r"dtrain-(?:train-r0*(\d+)-|read-)")
"""Keys of the tasks that train a round, and that read what the segment starts from."""


class ClusterRunner:
    """Submits the tasks of a run to a Dask cluster.

    Tasks are pinned loosely to a worker by replica: Dask alone would run all of them on the holder of the
    parameters, and a strict pin hangs when the worker dies.
    """

    look_ahead: int | None = None

    def __init__(self, connection: Connection, spec: RunSpec) -> None:
        self._dashboard = connection.dashboard
        self._messages = Messages(connection.client, spec.run_id)
        self.spec = spec
        self.on_progress: Callable[[StepsTaken], None] = lambda event: None
        self.on_evicted: Callable[[WorkerEvicted], None] = lambda event: None
        self._client = TaskClient(
            connection.client,
            spec.run_id,
            remote.places_topic(spec.run_id),
            started=connection.started,
            needed=[(str(one.source.config.path), one.workers) for one in spec.sources if one.workers],
        )
        self._client.guard.on_evicted = lambda event: self.on_evicted(event)
        self._resident = Resident(spec)  # on the driver for its arithmetic only
        self._places: dict[int, str] = {}
        self._is_shared: bool | None = None  # whether workers see the run's directory; None: they have not tried
        self._progress: SimpleQueue[StepsTaken] = SimpleQueue()
        self._plugin = RunPlugin(remote.topic(spec.run_id), partial(install, spec), partial(remote.forget, spec.run_id))
        self._client.register(self._plugin)
        self.num_workers = len(self._client.workers())  # without those that did not answer
        connection.client.subscribe_topic(
            self._plugin.name, lambda event: self._progress.put(StepsTaken(**event[1]["steps"]))
        )

    def open_dashboard(self) -> str:
        """Add the page of the run to Dask's dashboard, and return its address; empty without a dashboard."""
        return open_page(self._client.dask, self._dashboard)

    def publish(self, message: Mapping[str, Any]) -> None:
        """Show a message on that page, without waiting."""
        self._messages.publish(message)

    def initialise(self, init: InitFile | None = None) -> Initial:
        """Build the model, take the tensors of a file into it, and try it on one batch."""
        allowed = self._allowed(0)

        def submit() -> list[Future]:
            sent = None if init is None else self._client.scatter(init, (allowed or self._client.workers())[:1])
            arguments = self.spec.run_id, sent
            return [
                self._client.submit(remote.initialise_run, "initialise", *arguments, at=allowed, resources=RESOURCE)
            ]

        initial: Initial = self._done("The first step", submit, watched=True)[0]
        return initial

    def moments(self, most_units: int | None) -> dict[str, Moments]:
        """Return the moments of ``data.normalize``, from one pass over the training rows."""

        def submit() -> list[Future]:
            self._placed(self.spec.plan.replicas)
            moments = self._by_replica(remote.take_moments, "moments", lambda k: (self.spec.run_id, k, most_units))
            return [self._client.submit(merge_moments, "moments", moments, at=self._places[0])]

        merged: dict[str, Moments] = self._done("The pass for data.normalize", submit)[0]
        return merged

    def place_means(self) -> dict[str, npt.NDArray[np.float32]]:
        """Return, by variable of ``RunSpec.climate_plan``, the means of the training rows at each place."""

        def submit() -> list[Future]:
            self._placed(self.spec.plan.replicas)
            parts = self._by_replica(remote.take_places, "climatology", lambda k: (self.spec.run_id, k))
            whole, at = parts[0], self._places[0]
            for number, part in enumerate(parts[1:], start=1):  # one after the other: each may be large
                whole = self._client.submit(add_sums, f"climatology-sum-k{number}", whole, part, at=at)
            return [self._client.submit(remote.place_means, "climatology", whole, at=at)]

        means: dict[str, npt.NDArray[np.float32]] = self._done("The pass for the climatology", submit)[0]
        return means

    def seen(self) -> list[Seen]:
        """Return, by piece, which samples hold values that are not finite: one pass over all."""
        pieces = self._resident.counted
        tasks = {f"seen-p{piece}": (self.spec.run_id, piece) for piece in range(len(pieces))}

        def submit() -> list[Future]:
            workers = self._client.workers()
            at = [source.workers or workers[piece % len(workers)] for piece, (source, _, _) in enumerate(pieces)]
            return self._client.submit_each(remote.take_seen, tasks, at=at, resources=RESOURCE)

        return self._done("The pass for data.non_finite", submit)

    def evaluate(self, params: Parameters, split: SplitName) -> Sums | None:
        """Evaluate parameters on a split."""
        if not self._resident.pieces(split):
            return None

        def submit() -> list[Future]:
            workers = self._client.workers()
            sent = self._client.scatter(params, workers)
            return [self._submit_evaluation((sent,), split, workers, None)]

        sums: Sums = self._done(f"The evaluation on {split}", submit)[0]
        return sums

    def losses_by_part(self, params: Parameters) -> list[list[Term]]:
        """Return, by stream, the loss of each of its parts."""
        streams = self._resident.by_unit

        def submit() -> list[Future]:
            workers = self._client.workers()
            sent = self._client.scatter(params, workers)
            tasks = {f"units-p{number}": (self.spec.run_id, sent, number) for number in range(len(streams))}
            at = [stream.source.workers or workers[n % len(workers)] for n, stream in enumerate(streams)]
            return self._client.submit_each(remote.losses_by_part, tasks, at=at, resources=RESOURCE)

        return self._done("The evaluation of partitions", submit)

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """The metrics that are computed batch by batch, to take the values of their states."""
        return self._resident.metrics_here

    # Rounds -------------------------------------------------------------------------------------------------

    @property
    def has_lost_workers(self) -> bool:
        """Whether workers have been lost since the segment was placed."""
        return self._client.has_lost_workers

    def place(self, state: TrainState | StoredState, again: int = 0) -> ClusterRound:
        """Bring a state from the driver or from its files to the workers of its replicas.

        Where workers wrote the files, they read them too; once one could not, the driver reads the state.
        """
        self._client.begin(again)
        at = self._placed(len(state.replicas))
        layout = state.layout if isinstance(state, StoredState) else state.model.layout
        slices = reducer_slices(self.spec.config, layout, len(set(at.values())), len(at))
        if isinstance(state, TrainState):
            return scattered(self._client, state, at, slices)
        return restored(self._client, state, at, slices, by_workers=self._is_shared is True)

    def submit(self, held: ClusterRound, plan: RoundPlan) -> ClusterRound:
        """Submit the local steps, the averages and the evaluation of a round."""
        config, before = self.spec.config.average, held.before
        places = list(self._placed(len(plan.tasks)).values())
        updates, replicas = self._submit_local(held, plan)
        reduction = Reduction(self._client, config, before, places, self.spec.outer_factor(plan.round))
        reduced = reduction.submit(plan, updates)
        model = self._recalibrated(held, reduced.model, plan, "model")
        ema = self._next_ema(held, reduced.model, plan) if config.ema else None
        name = f"summary-r{plan.round:05d}"
        return replace(
            held,
            before=replace(
                before,
                broadcast=by_replica(reduced.means, reduced.broadcast),
                outer=by_replica(reduced.means, reduced.outer),
            ),
            replicas=replicas,
            model=model,
            ema=ema,
            summary=self._client.submit(
                remote.summarise_round,
                name,
                [[*own] for own in reduced.facts],
                [*model],
                held.frozen_sent,
                at=places[0],
            ),
            sums=self._submit_evaluation(model, "val", places, held.frozen_sent, plan.round)
            if plan.evaluates
            else None,
            ema_sums=self._submit_evaluation(ema, "val", places, held.frozen_sent, plan.round)
            if plan.evaluates and ema is not None
            else None,
        )

    def _next_ema(self, held: ClusterRound, model: Sliced, plan: RoundPlan) -> Sliced:
        """Submit the moving average of models after a round."""
        before = held.ema or (None,) * len(model)
        decay = self.spec.config.average.ema
        averaged = tuple(
            self._client.submit(
                remote.next_average, f"ema-r{plan.round:05d}-s{n}", *pair, decay, priority=PRIORITY_REDUCE
            )
            for n, pair in enumerate(zip(before, model, strict=True))
        )
        return self._recalibrated(held, averaged, plan, "ema")

    def _recalibrated(self, held: ClusterRound, model: Sliced, plan: RoundPlan, label: str) -> Sliced:
        """Submit the recalibration of batch norm, where it is asked for and the model is evaluated."""
        if not plan.evaluates or not self.spec.config.average.recalibrate_batchnorm:
            return model
        name = f"{label}-r{plan.round:05d}"
        statistics = self._by_replica(
            remote.recalibrate,
            f"recalibrate-{name}",
            lambda k: (self.spec.run_id, [*model], k, held.frozen_sent),
            PRIORITY_EVALUATE,
        )
        at = self._places[0]
        last = self._client.submit(remote.recalibrated, f"recalibrated-{name}", model[-1], statistics, at=at)
        return (*model[:-1], last)

    def collect(self, held: ClusterRound, finished: int | None = None) -> Outcome:
        """Wait for the scalars of a round, or until a finished one is done again."""
        handles = [handle for handle in (held.summary, held.sums, held.ema_sums) if handle is not None]
        summary, *sums = self._gather(handles, None if finished is None else partial(_is_repeated, finished))
        return Outcome(summary, *(sums or [None]))

    def gather(
        self, held: ClusterRound, position: Position, directory: Callable[[int], Path] | None = None
    ) -> TrainState | StoredState:
        """Write the state after a round to files in the directory that is made for it, or bring it to the driver."""
        if directory is not None:
            state = stored(
                self._client,
                held,
                position,
                directory(position.round),
                self._places,
                self.spec.config.average,
                by_workers=self._is_shared is not False,
                meanwhile=self._report_progress,
            )
            self._is_shared = state.by_workers
            return state
        handles = handles_of(held)
        return gathered(held, position, dict(zip(handles, self._gather(list(handles.values())), strict=True)))

    def sees(self, directory: Path) -> bool:
        """Return whether workers seem to see a directory of the driver: some of them are asked."""
        here = look_at(directory.absolute())

        def submit() -> list[Future]:
            workers = self._client.workers()[:HOLDERS]
            tasks = {f"look-w{number}": (directory.absolute(),) for number in range(len(workers))}
            return self._client.submit_each(look_at, tasks, at=workers)

        return all(there == here for there in self._done("The look at run.dir", submit))

    def close(self) -> None:
        """Cancel what is not done, and take the run's residents away from the workers."""
        self._messages.close()
        self._client.close(self._plugin.name)

    # Tasks of a round ---------------------------------------------------------------------------------------

    def _submit_local(self, held: ClusterRound, plan: RoundPlan) -> tuple[list[Sliced], tuple[Future, ...]]:
        """Submit the local steps; return, by replica, the futures of what it sends and of what it keeps."""
        before, name = held.before, f"r{plan.round:05d}"
        trained = self._by_replica(
            remote.train_replica,
            f"train-{name}",
            lambda k: (self.spec.run_id, plan.tasks[k], [*before.broadcast[k]], held.replicas[k], held.frozen_sent),
            PRIORITY_LOCAL,
        )
        if before.small:  # sent whole
            return [(one,) for one in trained], tuple(trained)
        kept = self._parts(remote.state_of, f"replica-{name}-k{{}}", trained)
        if len(before.slices) == 1:
            return [(one,) for one in self._parts(remote.update_of, f"parameters-{name}-k{{}}", trained)], tuple(kept)
        codec = self.spec.config.average.codec
        slices = [
            self._parts(remote.update_slice, f"parameters-{name}-k{{}}-s{cut.number}", trained, cut, codec)
            for cut in before.slices
        ]
        return list(zip(*slices, strict=True)), tuple(kept)

    def _by_replica(
        self, function: Callable[..., Any], name: str, arguments: Callable[[int], Sequence[Any]], priority: int = 0
    ) -> list[Future]:
        """Submit a task for each replica that runs the user's code where the replica is."""
        return self._client.submit_each(
            function,
            {f"{name}-k{k}": arguments(k) for k in self._places},
            at=[self._allowed(k) or at for k, at in self._places.items()],
            resources=RESOURCE,
            priority=priority,
        )

    def _parts(self, part: Callable[..., Any], name: str, trained: Sequence[Future], *given: Any) -> list[Future]:
        """Submit a task for each replica that takes a part out of its result."""
        tasks = {name.format(k): (whole, *given) for k, whole in enumerate(trained)}
        return self._client.submit_each(part, tasks, at=list(self._places.values()), priority=PRIORITY_REDUCE)

    def _submit_evaluation(
        self, model: Sliced, split: SplitName, places: Sequence[str], frozen: Future | None, round: int | None = None
    ) -> Future | None:
        """Submit the evaluation of parameters on a split; None if it is empty.

        Dask takes a word of eight letters that begins as "evaluate" does for a hash, and would hide it from its pages.
        """
        pieces = self._resident.pieces(split)
        if not pieces:
            return None
        unique = uuid.uuid4().hex[:8]
        name = f"eval-{split}" + ("" if round is None else f"-r{round:05d}")
        sums = self._client.submit_each(
            remote.evaluate_piece,
            {
                f"{name}-p{piece}-{unique}": (self.spec.run_id, [*model], split, piece, frozen)
                for piece in range(len(pieces))
            },
            at=[stream.source.workers or places[piece % len(places)] for piece, stream in enumerate(pieces)],
            resources=RESOURCE,
            priority=PRIORITY_EVALUATE,
        )
        return self._client.submit(merge, f"merge-{unique}", sums, at=places[0])

    def _done(self, doing: str, submit: Callable[[], Sequence[Future]], *, watched: bool = False) -> list[Any]:
        return self._client.done(doing, submit, self._report_progress, watched=watched)

    def _gather(self, futures: Sequence[Future], undone: Callable[[str], bool] | None = None) -> list[Any]:
        try:
            return self._client.gather(futures, self._report_progress, undone)
        except SegmentLost as lost:
            if isinstance(lost.__cause__, NotSeen):
                self._is_shared = None  # the driver reads the state; with the next one they may try again
            raise

    def _report_progress(self) -> None:
        while not self._progress.empty():
            self.on_progress(self._progress.get())

    # Places -------------------------------------------------------------------------------------------------

    def _allowed(self, replica: int) -> tuple[str, ...]:
        """Return the only workers that may read a replica's store; empty: all may."""
        return self._resident.replicas[replica].source.workers

    def _placed(self, replicas: int) -> dict[int, str]:
        """Choose the worker of each replica, and return them."""
        live = dict.fromkeys(self._client.workers())
        self._places = place_replicas(self._places, list(live), replicas)
        for replica in range(replicas):
            if allowed := self._allowed(replica):
                self._places[replica] = next((worker for worker in allowed if worker in live), allowed[0])
        return self._places


def _is_repeated(finished: int, key: str) -> bool:
    """Whether a task that is at a worker repeats a finished round, an earlier one, or the reading of the root."""
    found = FROM_THE_ROOT.match(key)
    return found is not None and int(found[1] or 0) <= finished
