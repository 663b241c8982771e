"""Clusters that are started by hand, and workers that end and are started again."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

ENVIRONMENT = {**os.environ, "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False"}


def dask(*arguments: str, where: Path) -> subprocess.Popen[bytes]:
    """Start a scheduler or worker, quietly."""
    command = [sys.executable, "-m", "distributed.cli.dask_" + arguments[0], *arguments[1:]]
    return subprocess.Popen(command, cwd=where, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@contextmanager
def scheduler(where: Path) -> Iterator[str]:
    """Start a scheduler by hand; yield its address."""
    file = where / "scheduler.json"
    process = dask(
        "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file), where=where
    )
    try:
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text().rstrip().endswith("}"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield str(file)
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def restarted_workers(tmp_path: Path) -> Callable[..., AbstractContextManager[str]]:
    """A function that starts a cluster of two workers without nannies, which end every few seconds and come back."""

    @contextmanager
    def start(kills: int, every: float = 6.0, away: float = 2.0) -> Iterator[str]:
        with scheduler(tmp_path) as file:
            arguments = ("worker", "--scheduler-file", file, "--no-nanny", "--nthreads", "2", "--host", "127.0.0.1")

            def worker() -> subprocess.Popen[bytes]:
                return dask(*arguments, "--no-dashboard", where=tmp_path)

            workers, over = [worker(), worker()], threading.Event()

            def keep() -> None:
                for _ in range(kills):
                    if over.wait(every):
                        return
                    for process in workers:
                        process.kill()
                        process.wait()
                    if over.wait(away):
                        return
                    workers[:] = [worker(), worker()]

            thread = threading.Thread(target=keep)
            thread.start()
            try:
                yield file
            finally:
                over.set()
                thread.join()
                for process in workers:
                    process.kill()
                    process.wait()

    return start
