"""What workers run outside of tasks. Its modules are imported in a thread, and heartbeats go on meanwhile.

Dask unpickles plugins and functions where a worker also sends its heartbeats. There the import of PyTorch from a slow
file system would make a worker look frozen. So they are sent as bytes, and this module imports neither PyTorch nor
what needs it.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from typing import Any

from distributed import WorkerPlugin
from distributed.core import Status
from distributed.protocol.pickle import dumps, loads

from dtrain.errors import one_line

RESOURCE = {"dtrain": 1}
"""Asked for by every task that runs the user's code, so that one runs at a time in a process."""
BEAT_SECONDS = 1.0
"""A worker that joins sends heartbeats by itself only after its plugins are set up."""


async def call_in_thread(pickled: bytes) -> Any:
    """Return what a pickled function without arguments returns."""
    return await asyncio.to_thread(lambda: loads(pickled)())


def import_error() -> str:
    """Import what tasks need, and return why it cannot be imported; empty if it can."""
    try:
        importlib.import_module("dtrain.runtime.remote")
    except Exception as error:  # of a broken installation, whatever
        return one_line(error)
    return ""


class RunPlugin(WorkerPlugin):  # type: ignore[misc]
    """Prepares each worker for a run, also those that join late, and gives it the resource `dtrain`.

    Parameters
    ----------
    name : str
    prepare, forget : callable
        Called in a worker before its first task, and after its last one.
    """

    def __init__(self, name: str, prepare: Callable[[], object], forget: Callable[[], object]) -> None:
        self.name = name
        self._prepare, self._forget = dumps(prepare), dumps(forget)
        self._is_over = False

    async def setup(self, worker: Any) -> None:
        """Prepare a worker; one that joins gets no task before, and none at all if that fails."""
        if joins := not worker.periodic_callbacks["heartbeat"].is_running():
            worker.status = Status.init
        preparing = asyncio.ensure_future(call_in_thread(self._prepare))
        while not (await asyncio.wait([preparing], timeout=BEAT_SECONDS))[0]:
            await worker.heartbeat()
        preparing.result()
        if self._is_over:
            await call_in_thread(self._forget)
        is_new = not RESOURCE.keys() <= worker.state.total_resources.keys()
        await worker.set_resources(**RESOURCE)
        if (joins or is_new) and worker.status in (Status.init, Status.running):
            # the scheduler gives tasks that found no worker to one that begins to run, not to one that gets resources
            worker.status = Status.paused
            worker.status = Status.running

    async def teardown(self, worker: Any) -> None:
        """Forget the run."""
        self._is_over = True
        await call_in_thread(self._forget)
