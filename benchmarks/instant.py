"""A Dask cluster for measurements: a scheduler in a process of its own, and workers that answer without computing.

Scheduler and protocol are Dask's own. A task of an `InstantWorker` is done when it comes, and a value that it needs is
taken from the other worker of the same process: neither computing nor bytes cost time.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.metadata
import logging
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.queues import Queue
from typing import Any, ClassVar

import dask
import psutil
from distributed import Client, Scheduler, Worker
from distributed.comm import Comm, tcp
from distributed.comm import utils as comm_utils
from distributed.core import Status
from distributed.protocol import pickle, to_serialize

from dtrain.algorithm.evaluate import Sums
from dtrain.algorithm.replica import fresh_replica
from dtrain.types import Broadcast, Contribution, RoundSummary

HOST = "127.0.0.1"
QUIET = {"distributed.worker.profile.enabled": False}
AT_ONCE = 50
"""Workers that are started at once."""
TASK_SECONDS = 0.1
"""That a task is said to have taken: Dask decides by it whether to move others."""
VALUE_BYTES, TYPE = 1000, pickle.dumps(object)
REALLY_EXECUTED = "initialise"
TRAINED = fresh_replica()


# The scheduler --------------------------------------------------------------------------------------------

PASSED: Counter[str] = Counter()
"""Bytes that have passed through the connections of this process."""


def count_bytes() -> None:
    """Count the bytes of all connections of this process."""
    write, read = tcp.TCP.write, tcp.read_bytes_rw

    async def counted_write(self: Any, *arguments: Any, **options: Any) -> int:
        size: int = await write(self, *arguments, **options)
        PASSED["sent"] += size
        return size

    async def counted_read(stream: Any, size: int) -> Any:
        PASSED["received"] += size
        return await read(stream, size)

    tcp.TCP.write, tcp.read_bytes_rw = counted_write, counted_read


def run_scheduler(addresses: Queue[str]) -> None:
    """Run a scheduler in this process, and say where."""
    count_bytes()
    gc.set_threshold(*(3 * threshold for threshold in gc.get_threshold()))  # as `dask scheduler` does

    async def run() -> None:
        scheduler = await Scheduler(host=HOST, port=0, dashboard=False, dashboard_address=f"{HOST}:0")
        addresses.put(scheduler.address)
        await scheduler.finished()

    logging.getLogger("distributed").setLevel(logging.ERROR)
    with dask.config.set(QUIET):
        asyncio.run(run())


@dataclass(frozen=True)
class Usage:
    """What a process has used since it began."""

    cpu: float
    """Seconds."""
    memory: int
    """Bytes that are resident now."""
    passed: int = 0
    """Bytes through the scheduler."""


def usage() -> Usage:
    """Return what this process has used."""
    return Usage(time.process_time(), psutil.Process().memory_info().rss, PASSED.total())


# Workers --------------------------------------------------------------------------------------------------


def kind_of(key: object) -> str:
    """Return what a task does by its name: "train" of dtrain-train-r00001-k3-0badcafe-a1."""
    return str(key).split("-")[1]


class InstantWorker(Worker):
    """Says that a task is done when it comes, with a value by its name.

    It takes no part in Dask's state machine of workers: 1,000 of those in one process take more time than the
    scheduler. It sends the messages that one would send: which keys were fetched, and which task is finished.
    """

    peers: ClassVar[dict[str, InstantWorker]] = {}
    """By address: the workers of this process."""
    executed: ClassVar[Counter[str]] = Counter()
    """By kind: tasks of all workers of this process."""
    local_seconds: ClassVar[float] = 0.0
    """That the local steps of a replica take."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._really = {op: self.stream_handlers[op] for op in ("compute-task", "free-keys", "remove-replicas")}
        own = {"compute-task": self.compute, "free-keys": self.free, "remove-replicas": self.drop}
        self.stream_handlers.update({**own, "steal-request": self.refuse})
        for name in self.periodic_callbacks.keys() - {"heartbeat", "keep-alive"}:
            del self.periodic_callbacks[name]  # those look at the clock and at memory, many times a second

    def start_http_server(self, *arguments: Any, **options: Any) -> None:
        """Start none: nobody looks."""

    async def start_unsafe(self) -> InstantWorker:
        """Start, and be known to the others."""
        await super().start_unsafe()
        self.peers[self.address] = self
        return self

    def compute(self, key: str, who_has: dict[str, list[str]], run_id: int, **more: Any) -> None:
        """Take the values that a task needs from other workers of this process, and finish it."""
        kind = kind_of(key)
        self.executed[kind] += 1
        if kind == REALLY_EXECUTED:
            return self._really["compute-task"](key=key, who_has=who_has, run_id=run_id, **more)
        fetched = {needed: self._fetched(needed, who_has[needed]) for needed in who_has if needed not in self.data}
        self.data.update(fetched)
        if fetched:
            self.batched_send({"op": "add-keys", "keys": list(fetched), "stimulus_id": more["stimulus_id"]})
        value = answer(kind, (self.data[needed] for needed in who_has))
        seconds = self.local_seconds if kind == "train" else 0.0
        asyncio.get_running_loop().call_later(seconds, self.finish, key, value, run_id, more["stimulus_id"])

    def finish(self, key: str, value: object, run_id: int, stimulus_id: str) -> None:
        """Keep a value, and say that its task is finished."""
        now, self.data[key] = time.time(), value
        message = {"op": "task-finished", "status": "OK", "key": key, "run_id": run_id, "stimulus_id": stimulus_id}
        steps = [{"action": "compute", "start": now - TASK_SECONDS, "stop": now}]
        kind = {"nbytes": VALUE_BYTES, "type": TYPE, "typename": "object"}
        self.batched_send({**message, **kind, "metadata": {}, "thread": 0, "startstops": steps})

    def refuse(self, key: str, stimulus_id: str) -> None:
        """Keep a task that the scheduler would rather give to another worker."""
        self.batched_send({"op": "steal-response", "key": key, "state": "executing", "stimulus_id": stimulus_id})

    async def get_data(self, comm: Comm, keys: list[str], **more: Any) -> Status:
        """Send values to the driver, those that are still here."""
        there = {key: to_serialize(self.data[key]) for key in keys if key in self.data}
        await comm.write({"status": "OK", "data": there})
        await comm.read()  # that they have come
        return Status.dont_reply

    def _fetched(self, key: str, holders: list[str]) -> object:
        return next(self.peers[one].data[key] for one in holders if key in self.peers[one].data)

    def free(self, keys: list[str], stimulus_id: str) -> None:
        """Forget values."""
        self._really["free-keys"](keys=[key for key in keys if key in self.state.tasks], stimulus_id=stimulus_id)
        for key in keys:
            self.data.pop(key, None)

    def drop(self, keys: list[str], stimulus_id: str) -> None:
        """Forget values that others have too."""
        self._really["remove-replicas"](keys=[key for key in keys if key in self.state.tasks], stimulus_id=stimulus_id)
        for key in keys:
            if key not in self.state.tasks:
                self.data.pop(key, None)
                self.batched_send({"op": "release-worker-data", "key": key, "stimulus_id": stimulus_id})


def answer(kind: str, needed: Iterator[object]) -> object:
    """Return the value of a task; what the driver gathers is as it would be."""
    if kind in ("train", "replica"):
        return TRAINED
    if kind == "summary":
        return SUMMARIES[0]
    if kind in ("evaluate", "merge"):
        return Sums(1, (1.0, 1.0), {})
    return next((value for value in needed if isinstance(value, Broadcast)), None)


SUMMARIES: list[RoundSummary] = []
"""The summary of every round."""


def summary_of(replicas: int) -> RoundSummary:
    each = [
        Contribution(replica=k, samples=1, steps=1, loss_sum=1.0, loss_count=1.0, finite=True, seconds=0.1)
        for k in range(replicas)
    ]
    return RoundSummary(contributions=tuple(each), params_sha256="0" * 64, finite=True, bytes_reduced=1000 * replicas)


def run_workers(address: str, count: int, local_seconds: float | None, folder: str, started: Queue[int]) -> None:
    """Run workers in this process: many that compute nothing, or, without `local_seconds`, one that computes."""
    instant = local_seconds is not None
    InstantWorker.local_seconds = local_seconds or 0.0
    SUMMARIES.append(summary_of(count))
    importlib.metadata.version = cache(importlib.metadata.version)  # each worker is asked for its versions
    options = {"nthreads": 2, "host": HOST, "dashboard": False, "memory_limit": 0, "local_directory": folder}
    start = partial(InstantWorker if instant else Worker, address, nanny=None, **options)
    comm_utils.OFFLOAD_THRESHOLD = 0 if instant else comm_utils.OFFLOAD_THRESHOLD  # large messages do not exist

    async def run() -> None:
        workers: list[Worker] = []
        for first in range(0, count, AT_ONCE):
            some = range(first, min(first + AT_ONCE, count))
            workers += await asyncio.gather(*(start() for _ in some))
        gc.disable()  # 1,000 workers in one process are many objects to look through
        started.put(len(workers))
        await asyncio.gather(*(worker.finished() for worker in workers))

    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # each worker would tell that the scheduler is gone
    with dask.config.set(QUIET):
        asyncio.run(run())


# Together -------------------------------------------------------------------------------------------------


@contextmanager
def cluster(workers: int, local_seconds: float | None = 0.0) -> Iterator[Client]:
    """Start a scheduler and workers, and give a client.

    Parameters
    ----------
    workers : int
    local_seconds : float, optional
        That local steps take where nothing is computed; None: workers compute, each in a process of its own.
    """
    context = multiprocessing.get_context("spawn")
    addresses, started = context.Queue(), context.Queue()
    processes = [context.Process(target=run_scheduler, args=(addresses,), daemon=True)]
    scratch = tempfile.TemporaryDirectory()
    try:
        processes[0].start()
        address = addresses.get(timeout=60)
        for count in [1] * workers if local_seconds is None else [workers]:
            arguments = (address, count, local_seconds, scratch.name, started)
            process = context.Process(target=run_workers, args=arguments, daemon=True)
            process.start()
            processes.append(process)
            started.get(timeout=120)
        with dask.config.set(QUIET), Client(address, direct_to_workers=True) as client:
            yield client
    finally:
        for process in reversed(processes):
            process.kill()
            process.join()
        scratch.cleanup()
