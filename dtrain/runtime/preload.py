"""Run first in each worker of a local cluster: ignore Ctrl-C, which the driver handles.

A terminal sends SIGINT to every process of the command. The driver closes the cluster; workers that were interrupted
themselves would only print tracebacks.
"""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(worker: Any) -> None:
    """Ignore SIGINT; Dask calls this in the main thread of the worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
