r"""ClusterRunner: a round as a handful of Dask tasks.

    replica 0    local ----> parameters_of --.
                     `-----> inner_of         \
    replica 1    local ----> parameters_of ----> reduce --> mixed_of ---> next round, evaluation
                     `-----> inner_of                |----> outer_of ---> next round
                                                     `----> summarise -> driver

Parameters go from worker to worker. The driver sees futures and scalars, and a whole state only when it commits.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from distributed import Client, Future, KilledWorker, WorkerPlugin, get_worker, wait
from distributed.client import ClosedClientError
from distributed.comm.core import CommClosedError

from dtrain.algorithm.evaluate import Sums
from dtrain.algorithm.params import InnerState, Parameters
from dtrain.data.load.statistics import Moments, merge_moments
from dtrain.data.plan.splits import SplitName
from dtrain.errors import ClusterLost, ClusterUnsuitable, DtrainError, one_line
from dtrain.events import StepsTaken
from dtrain.runtime import tasks
from dtrain.runtime.connect import Connection
from dtrain.runtime.resident import Resident, RunSpec, install, remove, resident_of
from dtrain.runtime.runner import SegmentLost
from dtrain.runtime.serial import state_after
from dtrain.runtime.tasks import Initial, Reduced, Update
from dtrain.types import LocalTask, RoundPlan, TrainState

RESOURCE = {"dtrain": 1}
"""Asked for by every task that runs the user's code, so that one runs at a time in a process."""
PRIORITY_LOCAL, PRIORITY_EVALUATE, PRIORITY_REDUCE = 1, 2, 10
"""A worker evaluates a round before it trains the next one: later would not be faster, and results come evenly."""
SMALL_BYTES = 1 << 20
"""What may travel for nothing, rather than be left behind by a task of its own."""
POLL_SECONDS = 0.5
ASK_SECONDS = 1.0
"""How long the list of workers is taken for true; tasks pinned to one that is gone run elsewhere."""
NO_WORKERS_SECONDS = 120.0
"""How long a cluster may be without any worker before the run gives up."""
GONE = (
    KilledWorker,
    CommClosedError,
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
    TimeoutError,
    OSError,
)
"""How Dask says that a value cannot be had any more."""


Value = TypeVar("Value")


class RunPlugin(WorkerPlugin):  # type: ignore[misc]
    """Gives each worker, also those that join late, the resident of a run and the resource `dtrain`."""

    def __init__(self, spec: RunSpec) -> None:
        self.name = f"dtrain-{spec.run_id}"
        self.spec = spec

    async def setup(self, worker: Any) -> None:
        """Prepare a worker."""
        install(self.spec)
        await worker.set_resources(**RESOURCE)

    def teardown(self, worker: Any) -> None:
        """Forget the run."""
        remove(self.spec.run_id)


class ClusterRunner:
    """Submits the tasks of a run to a Dask cluster.

    Tasks are pinned loosely to a worker by replica: Dask alone would run all of them on the holder of the
    parameters, and a strict pin hangs when the worker dies.
    """

    def __init__(self, connection: Connection, spec: RunSpec) -> None:
        self.num_workers = connection.num_workers
        self.dashboard = connection.dashboard
        self._client: Client = connection.client
        self._direct = True  # past the scheduler; until a worker turns out to be out of the client's reach
        self.spec = spec
        self._resident = Resident(spec)  # on the driver for its arithmetic only
        self._attempt = 0
        self._places: dict[int, str] = {}
        self._known: list[str] = []
        self._asked = 0.0
        self._travels_whole = False
        self._plugin = RunPlugin(spec)
        self._client.register_plugin(self._plugin)
        self.on_progress: Callable[[StepsTaken], None] = lambda event: None
        self._progress: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._client.subscribe_topic(self._plugin.name, lambda event: self._progress.put(event[1]["steps"]))

    def initialise(self) -> Initial:
        """Build the model and try it on one batch."""
        future = self._submit(_initialise, "initialise", self.spec.run_id, at=self._allowed(0), resources=RESOURCE)
        initial: Initial = self.collect([future])[0]
        return initial

    def place(self, state: TrainState[Any]) -> TrainState[Any]:
        """Scatter a state from the driver to the workers of its replicas."""
        self._attempt += 1
        self._known = []
        self._places = self._placed(len(state.params))
        try:
            distinct = {id(params): params for params in state.params}
            self._travels_whole = travels_whole(state)
            sent = {
                key: self._scatter(params, [self._places[k] for k, p in enumerate(state.params) if p is params])
                for key, params in distinct.items()
            }
            return replace(
                state,
                params=tuple(sent[id(params)] for params in state.params),
                inner=tuple(self._scatter(inner, [self._places[k]]) for k, inner in enumerate(state.inner)),
                outer=tuple(self._scatter(outer, [self._places[0]]) for outer in state.outer),
            )
        except GONE as error:
            raise self._lost(error) from error

    def submit_round(self, state: TrainState[Any], plan: RoundPlan) -> tuple[TrainState[Any], Any]:
        """Submit local steps and average of a round."""
        self._places = self._placed(len(plan.tasks))
        contributed: list[Future] = []
        inner: list[Future] = []
        for task in plan.tasks:
            k, at = task.replica, self._places[task.replica]
            name = f"r{plan.round:05d}-k{k}"
            update = self._submit(
                _train_local,
                f"local-{name}",
                self.spec.run_id,
                task,
                state.params[k],
                state.inner[k],
                at=self._allowed(k) or at,
                resources=RESOURCE,
                priority=PRIORITY_LOCAL,
            )
            contributed.append(self._part(tasks.parameters_of, f"parameters-{name}", update, at=at))
            inner.append(self._part(tasks.inner_of, f"inner-{name}", update, at=at))
        name = f"r{plan.round:05d}"
        reduced = self._submit(
            tasks.reduce_round,
            f"reduce-{name}",
            self.spec.config.average,
            contributed,
            state.params[0],
            list(state.outer),
            priority=PRIORITY_REDUCE,
        )
        outer = [
            self._part(tasks.outer_of, f"outer-{name}-s{piece}", reduced, piece) for piece in range(len(state.outer))
        ]
        mixed = self._part(tasks.mixed_of, f"mixed-{name}", reduced)
        summary = self._submit(tasks.summarise, f"summary-{name}", reduced, state.params[0])
        return state_after(self._resident, state, plan, mixed, inner, outer), summary

    def submit_moments(self, most_units: int | None) -> Any:
        """Submit a pass over the training rows."""
        self._places = self._placed(self.spec.plan.replicas)
        moments = [
            self._submit(
                _take_moments,
                f"moments-k{k}",
                self.spec.run_id,
                k,
                most_units,
                at=self._allowed(k) or at,
                resources=RESOURCE,
            )
            for k, at in self._places.items()
        ]
        return self._submit(merge_moments, "moments", moments)

    def submit_evaluation(self, params: Any, split: SplitName) -> Any:
        """Submit the evaluation of parameters on a split."""
        places = list(self._places.values()) or self._workers()
        pieces = self._resident.pieces(split)
        sums = [
            self._submit(
                _evaluate_piece,
                f"evaluate-{split}-p{piece}-{uuid.uuid4().hex[:8]}",
                self.spec.run_id,
                params,
                split,
                piece,
                at=source.workers or places[piece % len(places)],
                resources=RESOURCE,
                priority=PRIORITY_EVALUATE,
            )
            for piece, (source, _) in enumerate(pieces)
        ]
        return self._submit(tasks.merge_pieces, f"merge-{uuid.uuid4().hex[:8]}", sums) if sums else None

    def collect(self, handles: Sequence[Any]) -> list[Any]:
        """Wait for futures and return their values; None stays None."""
        try:
            self._wait([handle for handle in handles if handle is not None])
            return list(self._client.gather(list(handles), direct=self._direct))
        except DtrainError:
            raise
        except GONE as error:
            raise self._lost(error) from error

    def gather(self, state: TrainState[Any]) -> TrainState[Any]:
        """Bring a state to the driver."""
        distinct = {handle.key: handle for handle in (*state.params, *state.inner, *state.outer)}
        values = dict(zip(distinct, self.collect(list(distinct.values())), strict=True))
        mixed = {handle.key: tasks.mixed_of(values[handle.key]) for handle in state.params}
        return replace(
            state,
            params=tuple(mixed[handle.key] for handle in state.params),
            inner=tuple(tasks.inner_of(values[handle.key]) for handle in state.inner),
            outer=tuple(tasks.outer_of(values[handle.key], piece) for piece, handle in enumerate(state.outer)),
        )

    def close(self) -> None:
        """Take the run's residents away from the workers."""
        if self._connected():
            try:
                self._client.unsubscribe_topic(self._plugin.name)
                self._client.unregister_worker_plugin(self._plugin.name)
            except (*GONE, ValueError):
                pass  # they are gone already

    def _submit(
        self,
        function: Any,
        name: str,
        *arguments: Any,
        at: str | tuple[str, ...] | None = None,
        resources: Mapping[str, int] | None = None,
        priority: int = 0,
    ) -> Future:
        """Submit a task: best on the worker `at`, or on no other than those of the tuple `at`."""
        try:
            return self._client.submit(
                function,
                *arguments,
                key=f"dtrain-{name}-{self.spec.run_id}-a{self._attempt}",
                workers=[at] if isinstance(at, str) else list(at) if at else None,
                allow_other_workers=isinstance(at, str),
                resources=resources,
                priority=priority,
            )
        except ClosedClientError as error:  # the scheduler went away between two rounds
            raise self._lost(error) from error

    def _part(self, function: Any, name: str, whole: Future, *arguments: Any, at: str | None = None) -> Future:
        """Submit a task that takes a part out of a result, or, where that costs more than it saves, return it whole."""
        if self._travels_whole:
            return whole
        return self._submit(function, name, whole, *arguments, at=at, priority=PRIORITY_REDUCE)

    def _scatter(self, value: Any, places: list[str]) -> Future:
        # a list, since the values of a dict would be scattered one by one; broadcast within `places` only
        addresses = sorted(set(places))
        broadcast = len(addresses) > 1
        try:
            (future,) = self._client.scatter(
                [value], workers=addresses, broadcast=broadcast, direct=self._direct, hash=False
            )
        except (OSError, TimeoutError):
            if not self._direct or not set(addresses) <= set(self._live()):
                raise
            self._direct = False
            (future,) = self._client.scatter([value], workers=addresses, broadcast=broadcast, direct=False, hash=False)
        return future

    def _allowed(self, replica: int) -> tuple[str, ...]:
        """Return the only workers that may read a replica's store; none: all may."""
        return self.spec.sources[self._resident.stores[replica]].workers

    def _placed(self, replicas: int) -> dict[int, str]:
        """Return the worker of each replica."""
        live = self._workers()
        allowed = {k: own for k in range(replicas) if (own := self._allowed(k))}
        placed = place_replicas(self._places, live, replicas)
        for replica, workers in allowed.items():
            placed[replica] = next((worker for worker in workers if worker in live), workers[0])
        return placed

    def _workers(self) -> list[str]:
        """Return the addresses of the live workers, as of a second ago; wait a while for the first."""
        deadline = time.monotonic() + NO_WORKERS_SECONDS
        while True:
            self._check_alive(deadline)
            if self._known and time.monotonic() - self._asked < ASK_SECONDS:
                return self._known
            if addresses := self._live():
                self._known, self._asked = addresses, time.monotonic()
                return addresses
            time.sleep(0.2)

    def _live(self) -> list[str]:
        try:
            return sorted(self._client.nthreads())
        except (*GONE, AttributeError):  # a client without a scheduler has no attribute of it
            return []

    def _wait(self, futures: list[Future]) -> None:
        deadline = time.monotonic() + NO_WORKERS_SECONDS
        while True:
            try:
                wait(futures, timeout=POLL_SECONDS)
                return
            except TimeoutError:
                if self._live():
                    deadline = time.monotonic() + NO_WORKERS_SECONDS
                self._check_alive(deadline)
            finally:
                while not self._progress.empty():
                    self.on_progress(StepsTaken(**self._progress.get()))

    def _connected(self) -> bool:
        return self._client.status == "running" and self._client.scheduler is not None

    def _check_alive(self, deadline: float) -> None:
        if not self._connected():
            raise _scheduler_lost()
        if time.monotonic() > deadline:
            raise ClusterLost(
                f"The cluster has had no worker for {NO_WORKERS_SECONDS:.0f} s. Committed rounds are safe.", AGAIN
            )

    def _lost(self, error: BaseException) -> Exception:
        """Return what a vanished value means: the one place that knows how Dask says it."""
        if not self._connected():
            return _scheduler_lost()
        reason = one_line(error)
        return SegmentLost(reason, isinstance(error, KilledWorker))


def travels_whole(state: TrainState[Any]) -> bool:
    """Whether results travel whole: parameters together with the states of the optimizers.

    Those states are for nothing where the parameters go, so they must be small. Before the first step they are
    empty, and say nothing of what they will be.
    """
    states = (*state.inner, *state.outer) if state.round > 0 else state.params
    return all(value.nbytes <= SMALL_BYTES for value in states)


AGAIN = "Run the same command again to continue."


def _scheduler_lost() -> ClusterLost:
    return ClusterLost("Lost the Dask scheduler. Committed rounds are safe.", AGAIN)


def place_replicas(previous: Mapping[int, str], workers: Sequence[str], replicas: int) -> dict[int, str]:
    """Return the worker of each replica: evenly spread, and where it was before if that is still even.

    >>> place_replicas({0: "a", 1: "b", 2: "b"}, ["b", "c"], 4)
    {0: 'c', 1: 'b', 2: 'b', 3: 'c'}
    """
    most = -(-replicas // len(workers))
    load = dict.fromkeys(workers, 0)
    placed: dict[int, str] = {}
    for replica in range(replicas):
        at = previous.get(replica)
        if at in load and load[at] < most:
            placed[replica] = at
            load[at] += 1
    for replica in range(replicas):
        if replica not in placed:
            at = min(workers, key=lambda worker: (load[worker], worker))
            placed[replica] = at
            load[at] += 1
    return dict(sorted(placed.items()))


def _initialise(run_id: str) -> Initial:
    return tasks.initialise(resident_of(run_id))


def _train_local(run_id: str, task: LocalTask, params: Reduced | Parameters, inner: Update | InnerState) -> Update:
    resident, progress = resident_of(run_id), partial(_tell, run_id)
    return tasks.train_local(resident, task, tasks.mixed_of(params), tasks.inner_of(inner), progress)


def _tell(run_id: str, event: StepsTaken) -> None:
    get_worker().log_event(f"dtrain-{run_id}", {"steps": asdict(event)})  # Dask adds a key


def _evaluate_piece(run_id: str, params: Reduced | Parameters, split: SplitName, piece: int) -> Sums:
    return tasks.evaluate_piece(resident_of(run_id), tasks.mixed_of(params), split, piece)


def _take_moments(run_id: str, replica: int, most_units: int | None) -> dict[str, Moments]:
    return tasks.take_moments(resident_of(run_id), replica, most_units, partial(_tell, run_id))


def call_there(connection: Connection, path: str, workers: tuple[str, ...], call: Callable[[], Value]) -> Value:
    """Call a function on a worker that can see a store.

    Raises
    ------
    ClusterUnsuitable
        None of the workers is there.
    """
    live = [worker for worker in workers if worker in connection.client.nthreads()]
    if not live:
        raise ClusterUnsuitable(
            f"data.path {path}: none of its workers ({', '.join(workers)}) is in the cluster.",
            f"There are {', '.join(sorted(connection.client.nthreads()))}.",
        )
    found: Value = connection.client.submit(call, workers=live, pure=False).result()
    return found
