"""SIGTERM ends a command as Ctrl-C does."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _Terminated(BaseException):
    """SIGTERM has come. Like KeyboardInterrupt it is no Exception, so that no handler of faults catches it."""


_came = False
"""True once SIGTERM ends this process; a further one would interrupt the shutdown."""


@contextmanager
def terminable(kept: str) -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does: the cluster is closed; `kept` says what is kept."""

    def stop(number: int, frame: FrameType | None) -> None:
        global _came
        _came = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        from dtrain.errors import Stopped  # not before: the signal may come while modules are imported

        raise Stopped("Stopped by SIGTERM.", kept) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def end_once() -> None:
    """Ignore SIGTERM in this process once one is ending it."""

    def end(number: int, frame: FrameType | None) -> None:
        if not _came:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
