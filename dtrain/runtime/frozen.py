"""Workers that freeze: they stay connected, and answer nothing."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

from distributed import Client
from distributed.core import rpc

from dtrain.errors import one_line
from dtrain.runtime.runner import SegmentLost

FROZEN_SECONDS = 30.0
"""A worker without a heartbeat for so long is given up."""
ALL_FROZEN_SECONDS = 120.0
"""The same, where no other worker could take its tasks over: all are silent, or all that may read a store."""
LOOK_SECONDS = 1.0
"""How often heartbeats are looked at, and `WORKERS_A_SECOND` longer on large clusters."""
WORKERS_A_SECOND = 200
SLEPT_SECONDS = 10.0
"""After so long without a look, this process was frozen itself, and cannot judge workers."""
KILL_SECONDS = 1.0
"""How long a nanny waits for a frozen worker to end by itself."""
POLL_SECONDS = 0.5
LOG = logging.getLogger("dtrain")
Value = TypeVar("Value")


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


class FrozenWorkers:
    """Gives up the workers of a client that are silent.

    Parameters
    ----------
    client : Client
    end : bool
        Whether to end their processes: dtrain started them.
    needed : iterable of collection of str
        Workers that alone do some of the tasks.
    """

    def __init__(self, client: Client, *, end: bool = False, needed: Iterable[Collection[str]] = ()) -> None:
        self._client = client
        self._end = end
        self._needed = tuple(needed)
        self._beats = Heartbeats()
        self._workers = 0

    def give_up(self) -> dict[str, float]:
        """Remove silent workers from the scheduler, now and then; return them, and for how many seconds they were."""
        given_up: dict[str, float] = {}
        if not self._beats.is_due(self._workers):
            return given_up
        with suppress(OSError, TimeoutError, RuntimeError, AttributeError):  # the scheduler is gone or busy
            workers = known_workers(self._client)
            self._workers = len(workers)
            silent = self._beats.silent({at: own["last_seen"] for at, own in workers.items()})
            for alone in () if self._end else (workers, *self._needed):
                if workers.keys() & set(alone) <= silent.keys():
                    silent = {at: s for at, s in silent.items() if at not in alone or s > ALL_FROZEN_SECONDS}
            for worker, seconds in silent.items():
                self._client.sync(self._unregister, worker, str(workers[worker].get("nanny") or ""))
                given_up[worker] = seconds
        return given_up

    async def _unregister(self, worker: str, nanny: str) -> None:
        """Remove a worker from the scheduler, which gives its tasks to others; end its process if dtrain started it."""
        await self._client.scheduler.unregister(address=worker, stimulus_id=f"dtrain-frozen-{worker}", close=False)
        if self._end and nanny:
            try:
                async with rpc(nanny, connection_args=self._client.connection_args) as own:
                    await own.kill(timeout=KILL_SECONDS, reason="dtrain-frozen")
            except Exception as error:  # Dask restarts it itself, later
                LOG.info("The frozen worker %s was not ended: %s", worker, one_line(error))


def known_workers(client: Client) -> Mapping[str, Mapping[str, Any]]:
    """Return what the scheduler knows of each worker, by address."""
    try:
        info: Mapping[str, Any] = client.scheduler_info(n_workers=-1)
    except TypeError:  # an older Dask always gives all of them
        info = client.scheduler_info()
    workers: Mapping[str, Mapping[str, Any]] = info["workers"]
    return workers


def warn_of_frozen(worker: str, seconds: float) -> None:
    """Say that a worker was given up, where there is no run yet to note it."""
    LOG.warning("The worker %s has not answered for %.0f s; its tasks run elsewhere.", worker, seconds)


# Answers -------------------------------------------------------------------------------------------------


def call_in_loop(client: Client, call: Callable[[], Coroutine[Any, Any, Value]]) -> concurrent.futures.Future[Value]:
    """Start what a client's methods return in its own loop: a coroutine."""

    async def awaited() -> Value:
        return await call()

    return asyncio.run_coroutine_threadsafe(awaited(), client.loop.asyncio_loop)


def answer(
    client: Client,
    call: Callable[[], Coroutine[Any, Any, Value]],
    look: Callable[[], Collection[str]],
    *,
    before: Collection[str] = (),
    addresses: Collection[str] = (),
) -> Value:
    """Send something to workers, or get it from them, and look at the workers meanwhile: a frozen one never answers.

    Parameters
    ----------
    client : Client
    call : callable
        Calls a method of the client; it is called in the client's loop, where that returns a coroutine.
    look : callable
        Called now and then; returns the workers that have been given up.
    before : collection of str
        Those that had been before the call.
    addresses : collection of str
        The workers; empty: it is not known which.

    Raises
    ------
    SegmentLost
        One of them is given up meanwhile.
    """
    future = call_in_loop(client, call)
    try:
        while True:
            try:
                return future.result(timeout=POLL_SECONDS)
            except concurrent.futures.TimeoutError:
                if future.done():  # it was its own
                    raise
            gone = set(look()) - set(before)
            if gone and (not addresses or gone & set(addresses)):
                raise SegmentLost(f"worker {min(gone)} does not answer", gone=True)
    finally:
        future.cancel()  # nothing, if it is done
