"""The workers of a cluster: waited for, and told apart from those that are paused."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from dask.utils import format_bytes
from distributed import Client, Future

from dtrain.errors import ClusterUnreachable, OutOfMemory, listed
from dtrain.runtime.frozen import FrozenWorkers, answer, known_workers, warn_of_frozen
from dtrain.runtime.runner import SegmentLost

REQUESTED_TIMEOUT = 600.0
"""Seconds to wait for it while the cluster says that it is starting workers."""
POLL_SECONDS = 0.2
FULL_AT_START = 0.85
"""A worker that uses this share of its limit before it holds data has not enough left to train."""
SAY_SECONDS = 10.0
"""After so long it is said that no worker runs yet, and each time that it has become twice as long."""
STARTING, RUNNING, PAUSED = "init", "running", "paused"
LOG = logging.getLogger("dtrain")
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What the scheduler knows of a worker."""

    address: str
    status: str
    """`STARTING` until it is prepared for a run, `RUNNING`, `PAUSED`, or another."""
    memory: int
    """Bytes of the process."""
    limit: int
    """0: none."""

    def __str__(self) -> str:
        of = f" of {format_bytes(self.limit)}" if self.limit else ""
        return f"{self.address} ({format_bytes(self.memory)}{of} in use)"


def worker_states(client: Client) -> tuple[WorkerState, ...]:
    """Return the workers that the scheduler knows now."""
    return tuple(
        WorkerState(
            address=address,
            status=str(worker.get("status", RUNNING)),
            memory=int(worker.get("metrics", {}).get("memory", 0)),
            limit=int(worker.get("memory_limit") or 0),
        )
        for address, worker in sorted(known_workers(client).items())
    )


def first_workers(client: Client, timeout: float) -> tuple[WorkerState, ...]:
    """Wait until a worker runs; a cluster that has none is asked for one by a task, so that an adaptive one grows.

    Parameters
    ----------
    client : Client
    timeout : float
        Seconds; a cluster that is starting workers has `REQUESTED_TIMEOUT`.

    Raises
    ------
    ClusterUnreachable
        None has come.
    OutOfMemory
        There are workers, and all of them are paused.
    """
    started, states, next_words = time.monotonic(), worker_states(client), SAY_SECONDS
    with request_of_worker(client) as ask:
        while not any(worker.status == RUNNING for worker in states):
            if not states:
                ask()
            waited = time.monotonic() - started
            if waited > timeout and (waited > REQUESTED_TIMEOUT or not _has_requested(client)):
                raise _no_worker(client, states, waited)
            if waited > next_words:
                next_words *= 2
                LOG.warning("No worker runs yet, after %.0f s. Still waiting: jobs may be in a queue.", waited)
            time.sleep(POLL_SECONDS)
            states = worker_states(client)
    return states


def ask_workers(
    client: Client, function: Callable[..., Value | Awaitable[Value]], *arguments: object, timeout: float = 60.0
) -> dict[str, Value]:
    """Call a function in every worker, and return the answers by address: at least one.

    Where its module or the call takes long, `dtrain.runtime.plugins.call_in_thread` is the function.

    Workers may leave meanwhile, as those of an adaptive cluster do while nothing is to do: then others are waited for.
    Frozen ones are given up.

    Raises
    ------
    ClusterUnreachable
        There is no worker, or each one leaves before it answers.
    OutOfMemory
        All workers are paused.
    """
    started, frozen, given_up = time.monotonic(), FrozenWorkers(client), dict[str, float]()

    def look() -> Collection[str]:
        for worker, seconds in frozen.give_up().items():
            warn_of_frozen(worker, seconds)
            given_up[worker] = seconds
        return given_up

    while True:
        first_workers(client, timeout)
        try:
            answers = answer(
                client, lambda: client.run(function, *arguments, on_error="return"), look, before=[*given_up]
            )
        except SegmentLost:  # others are asked
            continue
        found = {address: answer for address, answer in answers.items() if not isinstance(answer, OSError)}
        if faults := [answer for answer in found.values() if isinstance(answer, Exception)]:
            raise faults[0]
        if found:
            return found
        if time.monotonic() - started > timeout:
            raise ClusterUnreachable(
                f"The workers of the scheduler at {client.scheduler.address} leave before they answer.",
                "Keep one: cluster.adapt(minimum=1, ...), or see why they end.",
            )


@contextmanager
def request_of_worker(client: Client) -> Iterator[Callable[[], None]]:
    """Give a function that asks for a worker, once, by a task: an adaptive cluster has none where nothing is to do."""
    asked: list[Future] = []

    def ask() -> None:
        if not asked:
            asked.append(client.submit(_nothing, key=f"dtrain-ready-{uuid.uuid4().hex[:8]}", pure=False))

    try:
        yield ask
    finally:
        asked.clear()  # a task that nobody refers to is given up


def _nothing() -> None:
    """Do nothing: a task that a cluster without workers starts one for."""


def most_workers(client: Client) -> int:
    """Return the number of workers that an adaptive cluster may grow to; 0 if it is not adaptive, or has no limit."""
    adaptive = getattr(client.cluster, "_adaptive", None)
    most = getattr(adaptive, "maximum", 0)
    return int(most) if isinstance(most, int | float) and math.isfinite(most) else 0


def _has_requested(client: Client) -> bool:
    """Whether the cluster object has asked for workers that have not come yet."""
    try:
        return len(client.cluster.plan) > len(client.cluster.observed)
    except (AttributeError, TypeError):
        return False


def _no_worker(client: Client, states: tuple[WorkerState, ...], waited: float) -> Exception:
    address = client.scheduler.address
    if paused := tuple(worker for worker in states if worker.status == PAUSED):
        return paused_error(paused)
    if states:
        return ClusterUnreachable(
            f"The scheduler at {address} has no worker that runs after {waited:.0f} s: {listed(states, most=3)}.",
            "They are starting, or ending: look at their logs, and try again.",
        )
    return ClusterUnreachable(
        f"The scheduler at {address} has no worker after {waited:.0f} s.",
        "Start one with `dask worker ADDRESS`, or grow the cluster: cluster.scale(2).",
    )


def paused_error(states: tuple[WorkerState, ...]) -> OutOfMemory:
    """Return the error for workers that are all paused."""
    named = listed(states, most=3)
    return OutOfMemory(
        f"Every worker is paused, because its memory is nearly full: {named}.",
        "Free the memory (client.restart()), or start workers with more of it.",
    )


def check_running(client: Client) -> None:
    """Refuse a cluster all of whose workers are paused.

    Raises
    ------
    OutOfMemory
        They are.
    """
    states = worker_states(client)
    if states and all(worker.status == PAUSED for worker in states):
        raise paused_error(states)


def check_base_memory(states: Collection[WorkerState]) -> None:
    """Refuse workers whose memory is full before they hold any data.

    Raises
    ------
    OutOfMemory
        One's is.
    """
    for state in states:
        if state.limit and state.memory > FULL_AT_START * state.limit:
            raise OutOfMemory(
                f"A worker may use {format_bytes(state.limit)} (cluster.memory), and its process alone, with PyTorch "
                f"and without any data, takes {format_bytes(state.memory)}.",
                f"Set cluster.memory to {format_bytes(2 * state.memory)} or more, or use fewer workers.",
            )


class Pauses:
    """Notices when for a long time no worker has run a task, because all of them are paused."""

    def __init__(self, client: Client, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._seconds = seconds
        self._now = now
        self._looked = self._running = now()

    def check(self, every: float) -> None:
        """Look at the workers, at most every so many seconds.

        Raises
        ------
        OutOfMemory
            All of them have been paused for too long.
        """
        now = self._now()
        if now - self._looked < every:
            return
        self._looked = now
        try:
            check_running(self._client)
            self._running = now
        except OutOfMemory:
            if now - self._running > self._seconds:
                raise
