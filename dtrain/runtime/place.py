"""The place where a run is executed: this process, or a Dask cluster. One line in `PLACES` for each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import torch
from distributed import Client
from distributed.protocol.pickle import dumps
from distributed.system import MEMORY_LIMIT

from dtrain.config.schema import ClusterConfig
from dtrain.errors import ClusterUnsuitable
from dtrain.runtime.cluster import ClusterRunner
from dtrain.runtime.connect import Connection, check_cluster, open_cluster
from dtrain.runtime.plugins import call_in_thread
from dtrain.runtime.runner import Runner
from dtrain.runtime.serial import SerialRunner
from dtrain.runtime.spec import RunSpec, Source
from dtrain.runtime.workers import ask_workers

Value = TypeVar("Value")
Device: TypeAlias = Literal["cpu", "cuda"]


class Place(Protocol):
    """Where tasks run."""

    @property
    def num_workers(self) -> int:
        """Workers, at the start."""
        ...

    @property
    def memory(self) -> int:
        """Bytes that the data path of a worker may use."""
        ...

    @property
    def memory_name(self) -> str:
        """What `memory` is, for people."""
        ...

    @property
    def shares(self) -> int:
        """Over how many workers the partitions are spread."""
        ...

    @property
    def device(self) -> Device:
        """``cuda`` if every worker has it, else ``cpu``."""
        ...

    def runner(self, spec: RunSpec) -> AbstractContextManager[Runner[Any]]:
        """Give a runner, and release what the run holds afterwards."""
        ...

    def call(self, source: Source | None, function: Callable[[], Value]) -> Value:
        """Call a function where a store can be seen; None: in this process."""
        ...


@dataclass(frozen=True, slots=True)
class SerialPlace:
    """The process itself."""

    num_workers: int = SerialRunner.num_workers
    memory: int = int(MEMORY_LIMIT) // 2
    memory_name: str = "half of this machine's memory"
    shares: int = 1

    @property
    def device(self) -> Device:
        """``cuda`` if this process has it, else ``cpu``."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @contextmanager
    def runner(self, spec: RunSpec) -> Iterator[Runner[Any]]:
        """Give a serial runner."""
        runner = SerialRunner(spec)
        try:
            yield runner
        finally:
            runner.close()

    def call(self, source: Source | None, function: Callable[[], Value]) -> Value:
        """Call a function."""
        return function()


@dataclass(frozen=True, slots=True)
class ClusterPlace:
    """A Dask cluster."""

    connection: Connection
    memory_name: str = "half of a worker's memory"

    @property
    def num_workers(self) -> int:
        """Workers, at the start; of an adaptive cluster those that it may grow to."""
        return max(self.connection.num_workers, self.connection.most_workers)

    @property
    def shares(self) -> int:
        """Over how many workers the partitions are spread."""
        return self.connection.num_workers

    @property
    def memory(self) -> int:
        """Half of a worker's memory: the rest is for parameters, activations and torch itself."""
        return self.connection.worker_memory // 2

    @property
    def device(self) -> Device:
        """``cuda`` if every worker has it, else ``cpu``."""
        answers = ask_workers(self.connection.client, call_in_thread, dumps(torch.cuda.is_available))
        return "cuda" if all(answers.values()) else "cpu"

    @contextmanager
    def runner(self, spec: RunSpec) -> Iterator[Runner[Any]]:
        """Give a runner on the cluster."""
        runner = ClusterRunner(self.connection, spec)
        try:
            yield runner
        finally:
            runner.close()

    def call(self, source: Source | None, function: Callable[[], Value]) -> Value:
        """Call a function on one of a store's own workers, if it has some, else in this process.

        Raises
        ------
        ClusterUnsuitable
            None of the workers is in the cluster.
        """
        if source is None or not source.workers:
            return function()
        known = self.connection.client.nthreads()
        live = [worker for worker in source.workers if worker in known]
        if not live:
            raise ClusterUnsuitable(
                f"data.path {source.config.path}: none of its workers ({', '.join(source.workers)}) is in the cluster.",
                f"There are {', '.join(sorted(known))}.",
            )
        value: Value = self.connection.client.submit(function, workers=live, pure=False).result()
        return value


OpenPlace: TypeAlias = Callable[[ClusterConfig, Path], AbstractContextManager[Place]]


@contextmanager
def _open_serial(config: ClusterConfig, base: Path) -> Iterator[Place]:
    yield SerialPlace()


@contextmanager
def _open_cluster(config: ClusterConfig, base: Path, client: Client | None = None) -> Iterator[Place]:
    with open_cluster(config, base, client) as connection:
        yield ClusterPlace(connection)


PLACES: dict[str, OpenPlace] = {"serial": _open_serial}
"""By ``cluster.scheduler``; any other value names a Dask cluster."""
PLACE_NAMES = ("local", *PLACES)
"""Values of ``cluster.scheduler`` that are neither an address nor a file."""


def check_place(config: ClusterConfig, base: Path, client: Client | None = None) -> None:
    """Refuse what can be seen to be no usable place, before anything is started or written.

    Raises
    ------
    ClusterUnreachable, InvalidConfig
        There is no such cluster, or it may not be used.
    """
    if client is not None or config.scheduler not in PLACES:
        check_cluster(config, base, client)


def open_place(config: ClusterConfig, base: Path, client: Client | None = None) -> AbstractContextManager[Place]:
    """Open the place that ``cluster.scheduler`` names; a client takes precedence.

    Raises
    ------
    ClusterUnreachable, ClusterUnsuitable, InvalidConfig
        There is no such cluster, it has no worker, or it does not fit.
    """
    if client is not None:
        return _open_cluster(config, base, client)
    return PLACES.get(config.scheduler, _open_cluster)(config, base)
