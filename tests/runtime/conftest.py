"""Clusters to break."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

from tests.clusters import new_cluster


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.alone)


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
