"""Stores, models and clusters for whole runs."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

import dtrain
from dtrain.data.samples import Samples
from dtrain.runtime.connect import OWNED


@pytest.fixture(scope="session")
def blobs(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    """A store of 611 samples in ragged chunks: x float64[n, 6], y int32[n]."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(611, 6))
    y = (x @ rng.normal(size=(6, 3))).argmax(1).astype("int32")
    return write_store(
        tmp_path_factory.mktemp("blobs") / "blobs.zarr",
        {
            "x": {"dims": ("n", "f"), "values": x, "chunks": (40, 6)},
            "y": {"dims": ("n",), "values": y, "chunks": (60,)},
        },
    )


@pytest.fixture(scope="session")
def samples(blobs: Path) -> Samples:
    return dtrain.open_samples(blobs, inputs=["x"], targets=["y"])


def new_cluster(workers: int) -> LocalCluster:
    with dask.config.set(OWNED):
        return LocalCluster(
            n_workers=workers,
            threads_per_worker=2,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        )


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    with new_cluster(2) as started:
        yield started


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[Client]:
    with Client(cluster, direct_to_workers=True) as connected:
        yield connected


@pytest.fixture
def own_client() -> Iterator[Client]:
    """A client of a cluster of one's own, to break."""
    with new_cluster(2) as started, Client(started) as connected:
        yield connected


@pytest.fixture
def kill_worker_in() -> Iterator[Callable[[Client, str], threading.Thread]]:
    """A function that starts a thread: SIGKILL the worker that runs the first task of a name, once."""
    stop = threading.Event()
    threads: list[threading.Thread] = []

    def start(client: Client, name: str) -> threading.Thread:
        thread = threading.Thread(target=_kill, args=(client, name, client.run(os.getpid), stop))
        threads.append(thread)
        thread.start()
        return thread

    yield start
    stop.set()
    for thread in threads:
        thread.join()


def _kill(client: Client, name: str, pids: dict[str, int], stop: threading.Event) -> None:
    while not stop.is_set():
        for address, keys in client.processing().items():
            if address in pids and any(str(key).startswith(f"dtrain-{name}") for key in keys):
                time.sleep(0.05)  # let it get into the middle of the task
                os.kill(pids[address], signal.SIGKILL)
                return
        time.sleep(0.01)


@pytest.fixture
def train_table() -> dict[str, Any]:
    return {"loss": "cross_entropy", "metrics": ["accuracy"], "rounds": 3, "batch_size": 16}
