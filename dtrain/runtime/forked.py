"""Imported by the fork server alone: it ends at once, as Python would take a second to take PyTorch apart.

Meanwhile it would hold the pipe to which the command prints, and ``dtrain plan | less`` would wait for it.
"""

from __future__ import annotations

import atexit
import os


def _end(own: int) -> None:
    if os.getpid() == own:  # else it is a worker, forked from it
        os._exit(0)


atexit.register(_end, os.getpid())
