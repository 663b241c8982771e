"""Monitor workers while tasks run: attribute those that end, evict those that freeze, restart local ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock
from typing import Any

from distributed import Client
from distributed.core import rpc

from dtrain.errors import listed, one_line
from dtrain.events import WorkerEvicted
from dtrain.runtime.worker_losses import MemoryExceeded, TaskPlace, WorkerLosses, task_place

FROZEN_SECONDS = 30.0
"""A worker without a heartbeat for so long is given up."""
LOOK_SECONDS = 1.0
"""How often heartbeats are looked at, and `WORKERS_A_SECOND` longer on large clusters."""
WORKERS_A_SECOND = 200
SLEPT_SECONDS = 10.0
"""After so long without a look, this process was frozen itself, and cannot judge workers."""
LACKING_SECONDS = 20.0
"""After so long without some of its workers, a local cluster starts them again; Dask forgets them after 15 s."""
KILL_SECONDS = 1.0
"""How long a nanny waits for a frozen worker to end by itself."""
NANNY_TOPIC = "worker-restart-memory"
"""Topic of Dask's nannies: they end a worker for its memory."""
LOG = logging.getLogger("dtrain")


class Heartbeats:
    """Tells which workers have been silent for long, by a clock of its own.

    Parameters
    ----------
    seconds : float
        Of silence.
    now : callable
        A monotonic clock, in seconds.
    """

    def __init__(self, seconds: float = FROZEN_SECONDS, now: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._now = now
        self._looked = now()
        self._changed: dict[str, tuple[float, float]] = {}

    def is_due(self, workers: int) -> bool:
        """Whether it is time to look."""
        return self._now() - self._looked >= LOOK_SECONDS + workers / WORKERS_A_SECOND

    def silent(self, seen: Mapping[str, float]) -> dict[str, float]:
        """Return the silent workers, and for how many seconds they have been.

        Parameters
        ----------
        seen : mapping of str to float
            By worker, when the scheduler heard of it last, on any clock.
        """
        now, before, slept = self._now(), self._changed, self._now() - self._looked > SLEPT_SECONDS
        self._looked = now
        self._changed = {
            worker: before[worker] if not slept and before.get(worker, (None,))[0] == at else (at, now)
            for worker, at in seen.items()
        }
        quiet = {worker: now - since for worker, (_, since) in self._changed.items()}
        return {worker: seconds for worker, seconds in quiet.items() if seconds > self._seconds}


class Guard:
    """Monitors the workers of a client while the driver waits for tasks of a run.

    Parameters
    ----------
    client : Client
    topic : str
        Of the reports of watched tasks.
    started : int
        Workers of a cluster that dtrain has started: frozen ones are ended, and those that do not come back are
        started again. 0 for other clusters.
    """

    def __init__(self, client: Client, topic: str, *, started: int = 0) -> None:
        self.on_evicted: Callable[[WorkerEvicted], None] = lambda event: None
        self._client = client
        self._topic = topic
        self._started = started
        self._complete = time.monotonic()
        self._heard: SimpleQueue[TaskPlace | MemoryExceeded] = SimpleQueue()
        self._losses = WorkerLosses()
        self._beats = Heartbeats()
        self._there: set[str] = set()
        self._again = 0
        self._looking = Lock()
        self.evicted: frozenset[str] = frozenset()
        """Workers that were given up since the work was begun."""
        client.subscribe_topic(topic, lambda event: self._heard.put(task_place(event[1])))
        client.subscribe_topic(
            NANNY_TOPIC, lambda event: self._heard.put(MemoryExceeded(str(event[1]["worker"]), int(event[1]["rss"])))
        )

    def begin(self, again: int) -> None:
        """Begin work, or begin the same work `again`: then earlier losses count too."""
        self._again = again
        self._there, self.evicted = set(), frozenset()
        if not again:
            self._losses = WorkerLosses()
            while not self._heard.empty():
                self._heard.get()

    def saw(self, live: Collection[str]) -> None:
        """Note workers that are there."""
        self._there |= set(live)

    def look(self, live: Collection[str]) -> None:
        """Look at the workers that are there.

        Raises
        ------
        OutOfMemory, UserCodeFailed
            The losses prove that memory or the user's code is at fault.
        """
        if not self._looking.acquire(blocking=False):  # another thread looks
            return
        try:
            self._listen()
            self.saw(live)
            if live or self._client.status == "running":
                self._losses = self._losses.only(live)
            self._give_up_frozen(live)
            self._start_lacking(len(live))
            if error := self._losses.error(lost=self._again > 0, alone=not live):
                raise error
        finally:
            self._looking.release()

    def _listen(self) -> None:
        while not self._heard.empty():
            news = self._heard.get()
            self._losses = (
                self._losses.exceeded(news) if isinstance(news, MemoryExceeded) else self._losses.reported(news)
            )

    @property
    def is_full(self) -> bool:
        """Whether a worker has ended for want of memory since the work was begun for the first time."""
        self._listen()
        return bool(self._losses.full) or any(map(self._losses.is_full, self._losses.losses))

    def gone(self, live: Collection[str]) -> str:
        """Return how workers were lost since the work was begun; empty if none was."""
        self._listen()
        full = {one.worker for one in self._losses.full}
        lost = sorted(self._there - set(live))
        ends = [f"worker {at} {'was ended, since its memory was full' if at in full else 'ended'}" for at in lost]
        return listed(ends, most=3)

    # Frozen workers -----------------------------------------------------------------------------------------

    def _give_up_frozen(self, live: Collection[str]) -> None:
        if not self._beats.is_due(len(live)):
            return
        given_up: dict[str, float] = {}
        with suppress(OSError, TimeoutError, RuntimeError, AttributeError):  # the scheduler is gone or busy
            workers: Mapping[str, Any] = self._client.scheduler_info(n_workers=-1)["workers"]
            for worker, seconds in self._beats.silent({at: own["last_seen"] for at, own in workers.items()}).items():
                self._client.sync(self._unregister, worker, str(workers[worker].get("nanny") or ""))
                given_up[worker] = seconds
        self._losses = self._losses.lost(given_up, "frozen")
        self.evicted |= given_up.keys()
        for worker, seconds in given_up.items():
            self.on_evicted(WorkerEvicted(worker=worker, seconds=round(seconds, 1)))

    async def _unregister(self, worker: str, nanny: str) -> None:
        """Remove a worker from the scheduler, which gives its tasks to others; end its process if dtrain started it."""
        await self._client.scheduler.unregister(address=worker, stimulus_id=f"dtrain-frozen-{worker}", close=False)
        if self._started and nanny:
            try:
                async with rpc(nanny, connection_args=self._client.connection_args) as own:
                    await own.kill(timeout=KILL_SECONDS, reason="dtrain-frozen")
            except Exception as error:  # Dask restarts it itself, later
                LOG.info("The frozen worker %s was not ended: %s", worker, one_line(error))

    def _start_lacking(self, live: int) -> None:
        """Start missing workers again: Dask does not restart one that ends while it starts."""
        now = time.monotonic()
        if live >= self._started:
            self._complete = now
        elif now - self._complete > LACKING_SECONDS and self._client.cluster is not None:
            self._complete = now
            self._client.cluster.scale(self._started)

    def close(self) -> None:
        """Unsubscribe from the topics."""
        for topic in (self._topic, NANNY_TOPIC):
            with suppress(ValueError):
                self._client.unsubscribe_topic(topic)
