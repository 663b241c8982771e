"""A Dask client that knows how work gets lost: tasks and values out, values or `SegmentLost` back."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from threading import Semaphore
from typing import Any, TypeAlias
from weakref import WeakSet

from dask._task_spec import Task, parse_input
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from distributed import Client, Future, KilledWorker, WorkerPlugin
from distributed.client import ClosedClientError
from distributed.comm.core import CommClosedError

from dtrain.config.functions import Function
from dtrain.errors import ClusterLost, DtrainError, listed, one_line
from dtrain.runtime.frozen import answer, call_in_loop
from dtrain.runtime.guard import Guard
from dtrain.runtime.runner import SegmentLost, given_up
from dtrain.runtime.watched import SUFFIX
from dtrain.runtime.workers import STARTING, Pauses, check_running, request_of_worker, worker_states

POLL_SECONDS = 0.5
WORKERS_SECONDS = 1.0
"""How long the list of workers is cached; tasks pinned to a worker that is gone run elsewhere."""
NO_WORKERS_SECONDS = 120.0
"""How long a cluster may be without any worker before the run gives up."""
CLOSE_SECONDS = 3.0
"""How long the end of a run waits for the workers."""
STUCK_SECONDS = 5.0
"""How long a task may find no worker after a loss, while there are some. Dask never starts a task again for which no
worker ran at the moment when its own ended, however loosely it is pinned to that one."""
MAX_AGAIN = 3
"""Times that work outside of rounds is submitted again."""
WATCHED_FROM = 1
"""Once the same work was lost so many times, its tasks report their place."""
HOLDERS = 16
"""Workers that a value is sent to. Dask names all holders with each task that needs it: 1,000 would be 25 kB a task."""
SCATTERED_AT_ONCE = 16
"""Values on their way to workers of their own."""
GATHERED_AT_ONCE = 16
"""Values that come back together, where each is used at once."""
KEPT_MESSAGES = 10
"""Messages to the scheduler that Dask's client keeps, to be looked at: with its 1,000, those of 1,000 replicas would
take a gigabyte of the driver's memory."""
PAUSES_SECONDS = 10.0
"""How often it is looked at whether all workers are paused, while results are waited for."""
GONE = (
    KilledWorker,
    CommClosedError,
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
    TimeoutError,
    OSError,
)
"""Dask's ways to say that a value cannot be had any more."""
CLOSING = "ConnectionPool is closed"
"""And what its RuntimeError says in a client that is being closed."""
NO_WORKER = "The cluster has had no worker"
AGAIN = "Run the same command again to continue."
At: TypeAlias = str | tuple[str, ...] | None
"""Where a task runs: preferably on a worker, or only on the workers of a tuple."""


class TaskClient:
    """Submits tasks, scatters and gathers values.

    Parameters
    ----------
    client : distributed.Client
    suffix : str
        Ends the key of each task: it names the run.
    topic : str
        Of the reports of watched tasks.
    started : int
        Workers of a cluster that dtrain has started.
    needed : sequence of (str, tuple of str)
        The path of a store, and the only workers that may read it.
    """

    def __init__(
        self,
        client: Client,
        suffix: str,
        topic: str = "",
        *,
        started: int = 0,
        needed: Sequence[tuple[str, tuple[str, ...]]] = (),
    ) -> None:
        self.dask = client
        self.guard = Guard(
            client, topic or f"dtrain-{suffix}-places", started=started, needed=[only for _, only in needed]
        )
        self._needed = needed
        if client.scheduler_comm is not None:
            client.scheduler_comm.recent_message_log = deque(maxlen=KEPT_MESSAGES)
        self._suffix = suffix
        self._direct = True  # past the scheduler, until a worker turns out to be out of the client's reach
        self._attempt = 0
        self._watched = False
        self._known: list[str] = []
        self._known_at = 0.0
        self._ready: set[str] = set()
        self._submitted: WeakSet[Future] = WeakSet()

    def begin(self, again: int = 0, *, watched: bool = False) -> None:
        """Begin work: its keys differ from those of earlier attempts, and the workers are looked up anew.

        If the attempt before was lost, its tasks are released: futures in reference cycles would keep them running.

        Parameters
        ----------
        again : int
            How many times the same work was lost before.
        watched : bool
            Whether its tasks report their place; without it they do once the work was lost `WATCHED_FROM` times.
        """
        if again:
            for future in list(self._submitted):  # finished ones too: Dask computes lost results of futures again
                future.release()
        self._attempt += 1
        self._known = []
        self._watched = watched or again >= WATCHED_FROM
        self.guard.begin(again)

    def submit(
        self,
        function: Function,
        name: str,
        *arguments: Any,
        at: At = None,
        resources: Mapping[str, int] | None = None,
        priority: int = 0,
    ) -> Future:
        """Submit a task."""
        try:
            future = self.dask.submit(
                function, *arguments, key=self._key(name), resources=resources, priority=priority, **_where(at)
            )
            self._submitted.add(future)
            return future
        except ClosedClientError as error:  # the scheduler went away between two rounds
            raise self.lost(error) from error

    def submit_each(
        self,
        function: Function,
        tasks: Mapping[str, Sequence[Any]],
        *,
        at: Sequence[At],
        resources: Mapping[str, int] | None = None,
        priority: int = 0,
    ) -> list[Future]:
        """Submit a task for each name, with its arguments, and by task the place where it runs.

        They go in one message: 1,000 messages take the scheduler longer than 1,000 tasks.
        """
        keys = [self._key(name) for name in tasks]
        places = {key: _where(place) for key, place in zip(keys, at, strict=True)}
        graph = {
            key: Task(key, function, *map(parse_input, given)) for key, given in zip(keys, tasks.values(), strict=True)
        }
        annotations: dict[str, Any] = {"resources": resources, "priority": priority}
        for option in ("workers", "allow_other_workers"):  # Dask calls a function by key; a layer a task is slow
            annotations[option] = {key: where[option] for key, where in places.items()}.get
        layers = {keys[0]: MaterializedLayer(graph, annotations)}
        try:
            futures: list[Future] = self.dask.get(
                HighLevelGraph(layers, {keys[0]: set()}), keys, sync=False, fifo_timeout=0
            )
        except ClosedClientError as error:
            raise self.lost(error) from error
        self._submitted.update(futures)
        return futures

    def _key(self, name: str) -> str:
        return f"dtrain-{name}{self._key_end()}"

    def _key_end(self) -> str:
        return f"-{self._suffix}-a{self._attempt}{SUFFIX if self._watched else ''}"

    def scatter_each(self, values: Sequence[object], places: Sequence[str]) -> list[Future]:
        """Send each value to its worker, several at a time: each takes three messages, and the waiting for answers."""
        with ThreadPoolExecutor(SCATTERED_AT_ONCE) as pool:
            return list(pool.map(lambda value, at: self.scatter(value, [at]), values, places))

    def scatter(self, value: object, places: Sequence[str]) -> Future:
        """Send a value to some workers, `HOLDERS` at most; others fetch it from them with the tasks that need it."""
        addresses = sorted(set(places))[:HOLDERS]
        try:
            return self._scatter(value, addresses)
        except DtrainError:
            raise
        except (OSError, TimeoutError) as error:
            if self.connected:
                check_running(self.dask)  # Dask sends nothing to workers that are paused
            if not self._direct or not set(addresses) <= set(self.live()):
                raise self.lost(error) from error
            self._direct = False
        except (*GONE, RuntimeError) as error:
            raise self.lost(error) from error
        try:
            return self._scatter(value, addresses)
        except DtrainError:
            raise
        except (*GONE, RuntimeError) as error:
            raise self.lost(error) from error

    def _scatter(self, value: object, addresses: list[str]) -> Future:
        # a list, since the values of a dict would be scattered one by one; broadcast within `addresses` only
        everywhere = len(addresses) > 1
        options = {"workers": addresses, "broadcast": everywhere, "direct": self._direct, "hash": False}
        (future,) = self._sent(lambda: self.dask.scatter([value], **options, asynchronous=True), addresses)
        scattered: Future = future
        return scattered

    def _sent(self, call: Callable[[], Coroutine[Any, Any, Any]], addresses: Collection[str] = ()) -> Any:
        """Send something to workers, and look at them meanwhile (`answer`)."""
        return answer(self.dask, call, self._look_at_workers(), before=self.guard.evicted, addresses=addresses)

    def on_all(self, call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Return what a call gives that all workers answer, except those that do not answer any more."""
        while True:
            with suppress(SegmentLost):  # then one is given up, and the call is made for the others
                return self._sent(call)

    def gather(
        self,
        futures: Sequence[Future],
        meanwhile: Callable[[], None],
        undone: Callable[[str], bool] | None = None,
    ) -> list[Any]:
        """Wait for futures and return their values.

        Parameters
        ----------
        futures : sequence of Future
        meanwhile : callable
            Called now and then.
        undone : callable, optional
            Takes the key of a task, and returns whether the task had been finished. The work is lost once workers are
            gone and such a task is at a worker again.
        """
        look = self._look_at_workers(undone)
        with self._losses():
            self._wait(futures, meanwhile, look)
            return self._values(futures, look)

    def _values(self, futures: Sequence[Future], look: Callable[[], Collection[str]]) -> list[Any]:
        """Return the values of futures that are done; where one is lost meanwhile, Dask computes it again."""
        options = {"direct": self._direct, "asynchronous": True}
        found = answer(self.dask, lambda: self.dask.gather(list(futures), **options), look, before=self.guard.evicted)
        return list(found)

    @contextmanager
    def _losses(self) -> Iterator[None]:
        """Translate Dask's exceptions for a value that is gone (`lost`)."""
        try:
            yield
        except DtrainError:
            raise
        except GONE as error:
            raise self.lost(error) from error
        except RuntimeError as error:
            if CLOSING not in str(error):  # of a task
                raise
            raise self.lost(error) from error

    def done(
        self,
        doing: str,
        submit: Callable[[], Sequence[Future]],
        meanwhile: Callable[[], None] = lambda: None,
        *,
        watched: bool = False,
    ) -> list[Any]:
        """Submit tasks outside of rounds, and return their values; what is lost is submitted again.

        Parameters
        ----------
        doing : str
            Names the work, as the beginning of a sentence.
        submit : callable
            Submits the tasks.
        meanwhile : callable
            As of `gather`.
        watched : bool
            As of `begin`.
        """
        again = 0
        while True:
            self.begin(again, watched=watched)
            try:
                return self.gather(submit(), meanwhile)
            except SegmentLost as lost:
                again += 1
                if again > MAX_AGAIN:
                    raise given_up(lost, doing, again, "") from lost

    def first_done(self, futures: Sequence[Future], meanwhile: Callable[[], None]) -> list[tuple[Future, Any]]:
        """Wait until one of some futures is done at least; return some that are, with their values."""
        look = self._look_at_workers()
        with self._losses():
            self._wait(futures, meanwhile, look, 1)
            done = [future for future in futures if future.done()][:GATHERED_AT_ONCE]
            return list(zip(done, self._values(done, look), strict=True))

    def _wait(
        self,
        futures: Sequence[Future],
        meanwhile: Callable[[], None],
        look: Callable[[], object],
        count: int | None = None,
    ) -> None:
        """Wait until all futures are done, or so many of them.

        Not by `distributed.wait` with a timeout: its errors and their frames refer to each other, so that futures stay
        alive, and their values on the workers, until the garbage collector comes.
        """
        done = Semaphore(0)
        for future in futures:
            future.add_done_callback(lambda _: done.release())
        left, looked = len(futures) if count is None else count, time.monotonic()
        while left > 0:
            if done.acquire(timeout=POLL_SECONDS):
                left -= 1
            if time.monotonic() - looked >= POLL_SECONDS:
                looked = time.monotonic()
                look()
            meanwhile()

    def _look_at_workers(self, undone: Callable[[str], bool] | None = None) -> Callable[[], Collection[str]]:
        """Return a function to call now and then while something is waited for: it returns the workers given up so far.

        It raises what `gather` raises while it waits.
        """
        deadline, pauses = time.monotonic() + NO_WORKERS_SECONDS, Pauses(self.dask, NO_WORKERS_SECONDS)
        moved = time.monotonic()

        def look() -> Collection[str]:
            nonlocal deadline, moved
            live = self.live()
            if not (lacking := self._lacking(live)):
                deadline = time.monotonic() + NO_WORKERS_SECONDS
            self._check_alive(deadline, lacking)
            self.guard.look(live)
            pauses.check(PAUSES_SECONDS)
            gone = self.guard.gone(live)
            if not (gone and live and self._is_stuck()):
                moved = time.monotonic()
            if time.monotonic() - moved > STUCK_SECONDS or (undone is not None and gone and self._does(undone)):
                raise SegmentLost(gone, full=self.guard.is_full, gone=True, left=bool(live))
            return self.guard.evicted

        return look

    def _does(self, wanted: Callable[[str], bool]) -> bool:
        """Whether a worker has a task of this attempt whose key is wanted."""
        own = self._key_end()
        try:
            keys = chain.from_iterable(self.dask.processing().values())
        except (*GONE, AttributeError, RuntimeError):  # as in `live`; the next look finds the scheduler gone
            return False
        return any(key.endswith(own) and wanted(key) for key in map(str, keys))

    def _is_stuck(self) -> bool:
        """Whether the scheduler has found no worker for a task of this attempt."""
        own = self._key_end()
        try:  # a lambda is sent as bytes: the scheduler imports nothing for it
            found: bool = self.dask.run_on_scheduler(
                lambda dask_scheduler: any(str(task.key).endswith(own) for task in dask_scheduler.unrunnable)
            )
        except (*GONE, AttributeError, RuntimeError):  # as above
            return False
        return found

    def register(self, plugin: WorkerPlugin) -> None:
        """Give each worker a plugin, also those that come later.

        Raises
        ------
        ClusterLost, OutOfMemory
            Workers end meanwhile, or the scheduler does.
        """
        again = 0
        while True:
            try:
                self.on_all(lambda: self.dask.register_plugin(plugin))
                return
            except GONE as error:
                again += 1
                self._check_alive(time.monotonic() + NO_WORKERS_SECONDS)
                if again > MAX_AGAIN:
                    raise given_up(
                        SegmentLost(one_line(error), full=self.guard.is_full), "The start", again, ""
                    ) from error
                time.sleep(POLL_SECONDS)

    def close(self, plugin: str) -> None:
        """Give up the tasks that are left, and take a plugin, and the topic of its name, away from the workers."""
        if self.connected:
            # ValueError: the plugin is gone already; KeyError: a worker that joins at this moment lacks it
            with suppress(*GONE, ValueError, KeyError):
                self.cancel()
                self.dask.unsubscribe_topic(plugin)
                removed = call_in_loop(self.dask, lambda: self.dask.unregister_worker_plugin(plugin))
                removed.result(timeout=CLOSE_SECONDS)  # the scheduler goes on without a worker that is frozen

    def cancel(self) -> None:
        """Give up the tasks that somebody still refers to: the run is over, and nobody waits for them.

        Dask's own `Client.cancel` fails in the scheduler where a task depends on one of them and nobody refers to it.
        """
        self.guard.close()
        for future in list(self._submitted):
            if not future.done():
                future.release()

    # Workers ------------------------------------------------------------------------------------------------

    def workers(self) -> list[str]:
        """Return the addresses of the workers, as of a second ago; ask for the first, and wait a while for it.

        Those that join, and are not prepared for the run yet, are left out. Each store has one of its own workers.
        """
        deadline, lacking = time.monotonic() + NO_WORKERS_SECONDS, NO_WORKER
        with request_of_worker(self.dask) as ask:
            while True:
                self._check_alive(deadline, lacking)
                if self._known and time.monotonic() - self._known_at < WORKERS_SECONDS:
                    return self._known
                addresses = self._prepared(self.live())
                if not (lacking := self._lacking(addresses)):
                    self._known, self._known_at = addresses, time.monotonic()
                    self.guard.saw(addresses)
                    return addresses
                try:
                    ask()
                except ClosedClientError as error:
                    raise self.lost(error) from error
                time.sleep(0.2)

    def live(self) -> list[str]:
        """Return the addresses of the workers that the scheduler knows now."""
        try:
            return sorted(self.dask.nthreads())
        except (*GONE, AttributeError, RuntimeError):  # a client without a scheduler has no attribute of it
            return []

    def _prepared(self, live: Collection[str]) -> list[str]:
        """Return the workers that take tasks, or have taken some; the scheduler is asked where there are new ones."""
        if not self._ready >= set(live):
            with suppress(*GONE, AttributeError, RuntimeError):  # as above
                starting = {worker.address for worker in worker_states(self.dask) if worker.status == STARTING}
                self._ready = set(live) - starting
        self._ready &= set(live)
        return sorted(self._ready)

    @property
    def has_lost_workers(self) -> bool:
        """Whether workers have been lost since the work was begun."""
        return bool(self.guard.gone(self.live()))

    @property
    def connected(self) -> bool:
        """Whether the scheduler is there."""
        return self.dask.status == "running" and self.dask.scheduler is not None

    def _lacking(self, workers: Collection[str]) -> str:
        """Return what the cluster lacks, as the beginning of a sentence; empty if all tasks can run."""
        if not workers:
            return NO_WORKER
        for store, only in self._needed:
            if not set(only) & set(workers):
                return f"data.path {store}: none of its workers ({listed(only, most=3)}) has been in the cluster"
        return ""

    def _check_alive(self, deadline: float, lacking: str = NO_WORKER) -> None:
        if not self.connected:
            raise _scheduler_lost()
        if time.monotonic() > deadline:
            start = "" if lacking == NO_WORKER else "Start one of them at its address (dask worker --worker-port). "
            raise ClusterLost(
                f"{lacking} for {NO_WORKERS_SECONDS:.0f} s. Committed rounds are safe.", f"{start}{AGAIN}"
            )

    def lost(self, error: BaseException) -> Exception:
        """Return the error that a vanished value means.

        Raises
        ------
        OutOfMemory, UserCodeFailed
            Memory or the user's code is at fault (`Guard.look`).
        """
        if not self.connected:
            return _scheduler_lost()
        live = self.live()
        self.guard.look(live)  # it may know better
        gone = self.guard.gone(live)
        killed = str(error.task) if isinstance(error, KilledWorker) else ""
        return SegmentLost(gone or one_line(error), killed, full=self.guard.is_full, gone=bool(gone), left=bool(live))


def _where(at: At) -> dict[str, Any]:
    """Return Dask's options for where a task runs."""
    workers = [at] if isinstance(at, str) else list(at or ()) or None
    return {"workers": workers, "allow_other_workers": isinstance(at, str)}


def _scheduler_lost() -> ClusterLost:
    return ClusterLost("Lost the Dask scheduler. Committed rounds are safe.", AGAIN)
