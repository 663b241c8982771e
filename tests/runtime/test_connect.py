"""Clusters that fit, and those that do not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
from distributed import Client
from distributed.client import ClosedClientError
from distributed.comm.core import CommClosedError

from dtrain.config.schema import ClusterConfig
from dtrain.errors import ClusterLost, ClusterUnreachable, ClusterUnsuitable, DiskFull
from dtrain.runtime import connect
from dtrain.runtime.connect import check_scheduler, check_versions, local_worker_memory, local_workers, open_cluster
from dtrain.runtime.versions import versions


def test_workers_with_the_same_versions_are_accepted() -> None:
    found = {"tcp://127.0.0.1:1": versions(), "tcp://127.0.0.1:2": versions()}
    check_versions(found)
    with pytest.raises(ClusterUnsuitable):  # the same call can fail
        check_versions({**found, "tcp://127.0.0.1:3": {**versions(), "numpy": "0"}})


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        ("torch", "", "Worker tcp://127.0.0.1:2 lacks torch; this process has torch"),
        ("zarr", "2.18.7", "Worker tcp://127.0.0.1:2 has zarr 2.18.7; this process has zarr"),
        ("python", "3.9", "has python 3.9"),
    ],
)
def test_a_worker_with_others_is_named(package: str, version: str, words: str) -> None:
    found = {"tcp://127.0.0.1:1": versions(), "tcp://127.0.0.1:2": {**versions(), package: version}}
    with pytest.raises(ClusterUnsuitable, match=words) as caught:
        check_versions(found)
    assert caught.value.code == 6


@pytest.mark.parametrize(
    ("package", "version", "words"),
    [
        ("dtrain", "", "The scheduler tcp://127.0.0.1:1 lacks dtrain; this process has dtrain"),
        ("torch", "", "lacks torch"),
        ("distributed", "2023.1.0", r"has distributed 2023\.1\.0"),
    ],
)
def test_a_scheduler_needs_what_tasks_import(package: str, version: str, words: str) -> None:
    check_scheduler("tcp://127.0.0.1:1", {**versions(), "torch": "2.4.0"})  # it computes nothing
    with pytest.raises(ClusterUnsuitable, match=words):
        check_scheduler("tcp://127.0.0.1:1", {**versions(), package: version})


def test_versions_are_told_where_dtrain_is_not_installed() -> None:
    """The function travels by value, and needs the standard library alone."""
    import cloudpickle

    code = "import sys, pickle; print(pickle.loads(sys.stdin.buffer.read())()['python'])"
    blocked = f"import sys; sys.modules['dtrain'] = None; {code}"
    done = subprocess.run(
        [sys.executable, "-c", blocked], input=cloudpickle.dumps(versions), capture_output=True, cwd="/", check=True
    )
    assert done.stdout.decode().strip() == versions()["python"]


def test_a_scheduler_without_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(connect, "WORKERS_TIMEOUT", 0.5)
    with (
        LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address="127.0.0.1:0") as empty,
        Client(empty) as client,
        pytest.raises(ClusterUnreachable, match="has no worker"),
        open_cluster(ClusterConfig(), tmp_path, client),
    ):
        pass


def test_a_local_cluster_listens_on_the_loopback_interface_only(tmp_path: Path) -> None:
    config = ClusterConfig(workers=1, memory="1GB")
    with open_cluster(config, tmp_path) as connection:
        assert connection.num_workers == 1
        assert connection.worker_memory == 10**9
        family = [psutil.Process(os.getpid()), *psutil.Process(os.getpid()).children(recursive=True)]
        connections = [c for process in family for c in process.net_connections("inet")]
        listening = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN]
        info = connection.client.scheduler_info()
        ((address, worker),) = info["workers"].items()
        known = {info["services"]["dashboard"], worker["services"]["dashboard"]}
        known |= {urlsplit(one).port for one in (info["address"], address, worker["nanny"])}
    assert {place.ip for place in listening} == {"127.0.0.1"}
    assert known <= {place.port for place in listening}  # of the scheduler, the nanny, the worker, and their pages


def test_threads_decide_how_many_local_workers_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "CPU_COUNT", 8)
    monkeypatch.setattr(connect, "MEMORY_LIMIT", 16 * 2**30)
    assert local_workers(ClusterConfig()) == 8
    assert local_workers(ClusterConfig(threads=3)) == 2
    assert local_workers(ClusterConfig(threads=16)) == 1
    assert local_workers(ClusterConfig(workers=5)) == 5
    assert local_worker_memory(ClusterConfig(threads=4)) == 8 * 2**30
    assert local_worker_memory(ClusterConfig(memory="2GiB")) == 2 * 2**30


@pytest.mark.parametrize(
    ("reason", "error", "match"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull, "no space is left"),
        (
            OSError(errno.EPERM, "Operation not permitted"),
            ClusterUnreachable,
            "cannot be started: Nanny failed to start",
        ),
    ],
)
def test_what_keeps_local_workers_from_being_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reason: OSError, error: type[Exception], match: str
) -> None:
    def failing(**options: Any) -> None:
        raise RuntimeError("Nanny failed to start.") from reason

    monkeypatch.setattr(connect, "LocalCluster", failing)
    with pytest.raises(error, match=match), open_cluster(ClusterConfig(scheduler="local"), tmp_path):
        pass


@pytest.mark.parametrize("error", [CommClosedError("gone"), ClosedClientError("gone")])
def test_a_cluster_that_goes_away_while_it_is_used(client: Client, tmp_path: Path, error: Exception) -> None:
    with (
        pytest.raises(ClusterLost, match=r"Lost the cluster: gone\. Committed rounds are safe"),
        open_cluster(ClusterConfig(), tmp_path, client),
    ):
        raise error


def test_a_timeout_of_dask_and_one_of_the_user(client: Client, tmp_path: Path) -> None:
    with pytest.raises(ClusterLost, match="Lost the cluster"), open_cluster(ClusterConfig(), tmp_path, client):
        client.submit(time.sleep, 1.0, pure=False).result(timeout=0.01)
    with pytest.raises(TimeoutError, match="of a callback"), open_cluster(ClusterConfig(), tmp_path, client):
        raise TimeoutError("of a callback")
