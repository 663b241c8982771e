"""Find or start a Dask cluster, and check that it can run dtrain's tasks."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import logging
from collections.abc import Iterator
from concurrent.futures import CancelledError as FuturesCancelled
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from traceback import walk_tb
from urllib.parse import urlsplit

import cloudpickle
import dask
from dask.system import CPU_COUNT
from distributed import Client, LocalCluster, Security
from distributed.client import ClosedClientError
from distributed.comm import connect
from distributed.comm.core import CommClosedError
from distributed.protocol.pickle import dumps
from distributed.system import MEMORY_LIMIT

from dtrain.config.schema import ClusterConfig
from dtrain.config.values import parse_bytes
from dtrain.errors import (
    ClusterLost,
    ClusterUnreachable,
    ClusterUnsuitable,
    DiskFull,
    DtrainError,
    InvalidConfig,
    one_line,
)
from dtrain.runtime import forkserver, versions
from dtrain.runtime.dashboard import dashboard_link
from dtrain.runtime.plugins import call_in_thread, import_error
from dtrain.runtime.tls import security_for, tls_fault, try_tls
from dtrain.runtime.where import check_local_start, no_such_place, scheduler_text, with_protocol
from dtrain.runtime.workers import ask_workers, check_base_memory, first_workers, most_workers
from dtrain.urls import has_user

cloudpickle.register_pickle_by_value(versions)  # so that workers without dtrain answer too

CONNECT_TIMEOUT = 15.0
"""Seconds to wait for a scheduler."""
WORKERS_TIMEOUT = 60.0
"""Seconds to wait for its first worker."""
KNOWN_BY_SCHEDULER = ("python", "dtrain", "distributed")
"""Packages of which a scheduler needs the version that is here; it only needs to have the others."""

OWNED = {
    # spilled parameters would help nobody; a worker that torch's own memory has paused never resumes
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.scheduler.worker-ttl": "30s",
    "distributed.worker.profile.enabled": False,
    # with Dask's 64 kB malloc maps and unmaps every tensor anew: a third of the time of a small transformer's steps
    "distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None,
}
"""Dask's configuration of clusters that dtrain starts."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A cluster that answers and can run dtrain's tasks."""

    client: Client
    num_workers: int
    """Workers that are there."""
    worker_memory: int
    """Bytes: the smallest memory limit of a worker."""
    dashboard: str
    started: int = 0
    """Workers that dtrain has started; 0 for other clusters."""
    most_workers: int = 0
    """Workers that an adaptive cluster may grow to; 0 if that is not known."""


@contextmanager
def open_cluster(config: ClusterConfig, base: Path, client: Client | None = None) -> Iterator[Connection]:
    """Connect to a cluster, or start a local one.

    Parameters
    ----------
    config : ClusterConfig
        ``scheduler`` is ``local``, an address, or the path of a scheduler file (relative to `base`).
    base : Path
    client : Client, optional
        Takes precedence over ``scheduler``; it is not closed.

    Raises
    ------
    ClusterUnreachable
        No scheduler answers, or it has no worker.
    ClusterUnsuitable
        A worker has other versions, or lacks a package.
    ClusterLost
        It goes away.
    InvalidConfig
        The address is not allowed.
    """
    check_cluster(config, base, client)
    if client is not None:
        with _lost_cluster():
            yield _connection(client, started=False)
    else:
        with open_client(config, base) as own, _lost_cluster():
            yield _connection(own, started=config.scheduler == "local")


@contextmanager
def _lost_cluster() -> Iterator[None]:
    """Translate Dask's exceptions for a cluster that goes away, wherever it is used.

    Raises
    ------
    ClusterLost
        The same command may find it again.
    """
    try:
        yield
    except DtrainError:
        raise
    except (CommClosedError, ClosedClientError, TimeoutError, asyncio.CancelledError, FuturesCancelled) as error:
        if isinstance(error, TimeoutError) and not _is_of_dask(error):
            raise
        raise ClusterLost(
            f"Lost the cluster: {one_line(error)}. Committed rounds are safe.",
            "Run the same command again to continue.",
        ) from error


def _is_of_dask(error: BaseException) -> bool:
    """Whether an exception comes from Dask: a function of the user's, such as ``report``, may raise a TimeoutError."""
    modules = (str(frame.f_globals.get("__name__")) for frame, _ in walk_tb(error.__traceback__))
    return any(module.partition(".")[0] == "distributed" for module in modules)


@contextmanager
def open_client(config: ClusterConfig, base: Path) -> Iterator[Client]:
    """Connect to a cluster, or start a local one, as `open_cluster`; its workers and versions are not looked at."""
    check_cluster(config, base)
    config = config.model_copy(update={"scheduler": with_protocol(config.scheduler)})
    if config.scheduler == "local":
        with _local_cluster(config) as cluster, Client(cluster, direct_to_workers=True) as client:
            yield client
    else:
        with _connected(config, base) as client:
            yield client


def check_cluster(config: ClusterConfig, base: Path, client: Client | None = None) -> None:
    """Refuse what can be seen to be no usable cluster before anything is started; arguments as of `open_cluster`."""
    if client is not None:
        scheduler_text(client)
    elif config.scheduler == "local":
        check_local_start()
    elif "://" in (address := with_protocol(config.scheduler)):
        _check_address(config, address, f'cluster.scheduler = "{address}"')
        security_for(address, config, base)
    elif not Path(base, config.scheduler).expanduser().is_file():
        raise no_such_place(config.scheduler)


def local_workers(config: ClusterConfig) -> int:
    """Return the number of workers of a local cluster: one core for each thread of a task."""
    return max(1, CPU_COUNT // config.threads) if config.workers == "auto" else config.workers


def local_worker_memory(config: ClusterConfig) -> int:
    """Return the bytes that a worker of a local cluster may use."""
    if config.memory != "auto":
        return parse_bytes(config.memory, "cluster.memory")
    return int(MEMORY_LIMIT) // local_workers(config)


@contextmanager
def _local_cluster(config: ClusterConfig) -> Iterator[LocalCluster]:
    forkserver.start()
    method = {"distributed.worker.multiprocessing-method": forkserver.METHOD} if forkserver.is_available() else {}
    with dask.config.set({**OWNED, **method}), _not_started():
        cluster = LocalCluster(
            n_workers=local_workers(config),
            threads_per_worker=2,  # one trains (resource dtrain), one reduces and answers
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=local_worker_memory(config),
            silence_logs=logging.CRITICAL,
            preload=["dtrain.runtime.preload"],
        )
    with cluster:
        yield cluster


@contextmanager
def _not_started() -> Iterator[None]:
    """Name what keeps local workers from being started.

    Raises
    ------
    DiskFull
        A file system is full: Python's processes share semaphores in /dev/shm.
    ClusterUnreachable
        It is something else.
    """
    try:
        yield
    except (RuntimeError, OSError, TimeoutError) as error:
        reason: BaseException | None = error
        while reason is not None and not (isinstance(reason, OSError) and reason.errno == errno.ENOSPC):
            reason = reason.__cause__ or reason.__context__
        if reason is not None:
            raise DiskFull(
                "Local workers cannot be started: no space is left on a file system that processes share.",
                "Free some in /dev/shm and in the temporary directory (df -h), or use --scheduler serial.",
            ) from error
        raise ClusterUnreachable(
            f"Local workers cannot be started: {one_line(error)}", "Use --scheduler serial, or see --debug."
        ) from error


@contextmanager
def _connected(config: ClusterConfig, base: Path) -> Iterator[Client]:
    address = config.scheduler
    if "://" not in address:
        with _unreachable(config, address):
            address = str(json.loads(Path(base, address).expanduser().read_text(encoding="utf-8"))["address"])
        _check_address(config, with_protocol(address), f'cluster.scheduler = "{config.scheduler}" leads to {address}')
    security = security_for(address, config, base)
    with _unreachable(config, address):
        if security is not None:
            try_tls(address, security, CONNECT_TIMEOUT)
        _wait_for_answer(address, security)
        client = Client(address, timeout=CONNECT_TIMEOUT, security=security)
    with client:
        yield client


@contextmanager
def _unreachable(config: ClusterConfig, address: str) -> Iterator[None]:
    try:
        yield
    except (OSError, TimeoutError, ValueError, TypeError, KeyError, AssertionError) as error:  # of a half-written file
        if fault := tls_fault(address, error):
            raise fault from None
        raise ClusterUnreachable(
            f"No Dask scheduler answers at {config.scheduler} ({type(error).__name__} within {CONNECT_TIMEOUT:.0f} s).",
            "Start one with `dask scheduler` and `dask worker ADDRESS`, or use --scheduler local. "
            "One that speaks TLS is reached by tls:// alone.",
        ) from error


def _wait_for_answer(address: str, security: Security | None) -> None:
    """Exchange the first messages with a scheduler: a client waits for them without a time limit.

    Raises
    ------
    OSError, TimeoutError
        Nothing answers within `CONNECT_TIMEOUT` seconds, or something else than a scheduler does.
    """

    async def greet() -> None:
        arguments = {} if security is None else security.get_connection_args("client")
        comm = await asyncio.wait_for(connect(address, timeout=CONNECT_TIMEOUT, **arguments), CONNECT_TIMEOUT)
        await comm.close()

    with ThreadPoolExecutor(1) as pool:  # the caller's thread may have a running event loop, as in a notebook
        pool.submit(asyncio.run, greet()).result()


def _check_address(config: ClusterConfig, address: str, named: str) -> None:
    """Refuse an address; `named` says where it stands."""
    if has_user(address):
        raise InvalidConfig(
            f"{named}: the address of a scheduler has no user or password.",
            "Certificates say who may connect: tls://host:port with cluster.tls (`dtrain certs DIR`).",
        )
    scheme = urlsplit(address).scheme
    if scheme not in ("tcp", "tls"):
        raise InvalidConfig(
            f"{named}: allowed are tcp:// and tls://.", "Start the scheduler with --protocol tls, or tcp."
        )
    if scheme == "tcp" and not is_loopback(address) and not config.allow_plain:
        raise InvalidConfig(
            f"{named}, which is neither encrypted nor on this machine: whoever reaches that port can run code as you.",
            "Use tls:// with certificates (`dtrain certs DIR`); or, if the network is yours alone, set "
            "cluster.allow_plain = true.",
        )


def is_loopback(address: str) -> bool:
    """Whether an address is on this machine; a name is not, whatever it resolves to."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _connection(client: Client, *, started: bool) -> Connection:
    """Wait for a worker, and compare versions, unless dtrain has just started the cluster."""
    address = client.scheduler.address
    try:
        states = first_workers(client, WORKERS_TIMEOUT)
        if started:
            check_base_memory(states)
        else:
            check_scheduler(address, client.run_on_scheduler(versions.versions))
            check_versions(ask_workers(client, versions.versions))
            _check_imports(client)
    except (OSError, TimeoutError, RuntimeError, AttributeError, asyncio.CancelledError) as error:
        if isinstance(error, DtrainError):
            raise
        raise ClusterUnreachable(
            f"The Dask scheduler at {address} does not answer: {one_line(error)}", "Start a new cluster."
        ) from error
    return Connection(
        client=client,
        num_workers=len(states),
        worker_memory=min(state.limit or int(MEMORY_LIMIT) for state in states),
        dashboard=dashboard_link(client),
        started=len(states) if started else 0,
        most_workers=most_workers(client),
    )


def check_scheduler(address: str, there: dict[str, str]) -> None:
    """Compare a scheduler's versions with those here: it imports the functions of tasks, and computes none of them.

    Raises
    ------
    ClusterUnsuitable
        Names the package, what the scheduler has and what is needed.
    """
    for package, version in versions.versions().items():
        has = there.get(package, "")
        if not has or (package in KNOWN_BY_SCHEDULER and has != version):
            raise _other_version(f"The scheduler {address}", package, has, version)


def check_versions(by_worker: dict[str, dict[str, str]]) -> None:
    """Compare the versions of all workers with those here.

    Raises
    ------
    ClusterUnsuitable
        Names the worker, the package, what it has and what is needed.
    """
    here = versions.versions()
    for address, there in sorted(by_worker.items()):
        for package, version in here.items():
            if there.get(package, "") != version:
                raise _other_version(f"Worker {address}", package, there.get(package, ""), version)


def _check_imports(client: Client) -> None:
    """Import PyTorch on scheduler and workers: later it would be imported where they answer heartbeats."""
    imports = dumps(import_error)
    scheduler = f"The scheduler {client.scheduler.address}"
    failed = {scheduler: client.run_on_scheduler(call_in_thread, imports)}
    failed |= {f"Worker {at}": text for at, text in sorted(ask_workers(client, call_in_thread, imports).items())}
    for process, text in failed.items():
        if text:
            raise ClusterUnsuitable(
                f"{process} cannot import dtrain or PyTorch: {text}", "Repair its environment, and start it again."
            )


def _other_version(process: str, package: str, has: str, needed: str) -> ClusterUnsuitable:
    what = f"has {package} {has}" if has else f"lacks {package}"
    return ClusterUnsuitable(
        f"{process} {what}; this process has {package} {needed}.",
        "Install the same versions on client, scheduler and workers; the bits depend on them.",
    )
