"""Imported by the fork server alone: it ends at once, as Python would take a second to take PyTorch apart.

Meanwhile it would hold the pipe to which the command prints, and ``dtrain plan | less`` would wait for it. A worker
whose driver ends while it starts finds its pipes gone, and ends without a word.
"""

from __future__ import annotations

import atexit
import os
import sys
from types import TracebackType


def _end(own: int) -> None:
    if os.getpid() == own:  # else it is a worker, forked from it
        os._exit(0)


def _say_nothing_of_the_end(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    if not isinstance(error, OSError | EOFError | KeyboardInterrupt):
        sys.__excepthook__(kind, error, frames)


atexit.register(_end, os.getpid())
sys.excepthook = _say_nothing_of_the_end
