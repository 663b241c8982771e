"""Monitor workers while tasks run: attribute those that end, evict those that freeze, restart local ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from queue import SimpleQueue
from threading import Lock

from distributed import Client

from dtrain.errors import listed
from dtrain.events import WorkerEvicted
from dtrain.runtime.frozen import FrozenWorkers, warn_of_frozen
from dtrain.runtime.worker_losses import MemoryExceeded, TaskPlace, WorkerLosses, task_place

LACKING_SECONDS = 20.0
"""After so long without some of its workers, a local cluster starts them again; Dask forgets them after 15 s."""
NANNY_TOPIC = "worker-restart-memory"
"""Topic of Dask's nannies: they end a worker for its memory."""


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
    needed : iterable of collection of str
        Workers that alone do some of the tasks.
    """

    def __init__(self, client: Client, topic: str, *, started: int = 0, needed: Iterable[Collection[str]] = ()) -> None:
        self.on_evicted: Callable[[WorkerEvicted], None] = lambda event: warn_of_frozen(event.worker, event.seconds)
        self._client = client
        self._topic = topic
        self._started = started
        self._complete = time.monotonic()
        self._heard: SimpleQueue[TaskPlace | MemoryExceeded] = SimpleQueue()
        self._losses = WorkerLosses()
        self._frozen = FrozenWorkers(client, end=started > 0, needed=needed)
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
            self._give_up_frozen()
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

    def _give_up_frozen(self) -> None:
        given_up = self._frozen.give_up()
        self._losses = self._losses.lost(given_up, "frozen")
        self.evicted |= given_up.keys()
        for worker, seconds in given_up.items():
            self.on_evicted(WorkerEvicted(worker=worker, seconds=round(seconds, 1)))

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
