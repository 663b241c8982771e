"""Start the process that local workers are forked from, while this process still imports its own modules.

Importing torch takes seconds. Workers that are spawned would each do it anew, after the driver has done it. The fork
server does it once, beside the driver, and a worker is a copy of it. It has one thread and has not used torch, so
that it may be forked.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

METHOD = "forkserver"
PRELOAD = ["dtrain.runtime.forked", "dtrain.runtime.remote"]
"""Imported by the fork server: what a worker needs."""
OPTIMIZING = ["torch._dynamo"]
"""What torch imports at the first step of an optimizer: another second."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""As Dask sets it before it spawns a worker: libraries read it when they are imported."""


def is_available() -> bool:
    """Whether this platform can fork."""
    return METHOD in multiprocessing.get_all_start_methods()


def start(*, trains: bool = False) -> None:
    """Start the fork server, if it does not run yet; it imports in the background, also what training needs."""
    if not is_available():
        return
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload([*PRELOAD, *(OPTIMIZING if trains else ())])
    with _environment(ENVIRONMENT):
        forkserver.ensure_running()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: value for name, value in values.items() if before[name] is None})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
