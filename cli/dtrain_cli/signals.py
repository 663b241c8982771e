"""SIGTERM ends a command as Ctrl-C does."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class _Terminated(BaseException):
    """SIGTERM has come. Like KeyboardInterrupt it is no Exception, so that no handler of faults catches it."""


@contextmanager
def terminable(kept: str) -> Iterator[None]:
    """Let SIGTERM end the command as Ctrl-C does: the cluster is closed; `kept` says what is kept."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would end what the first one closes
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        from dtrain.errors import Stopped  # not before: the signal may come while modules are imported

        raise Stopped("Stopped by SIGTERM.", kept) from None
    finally:
        signal.signal(signal.SIGTERM, before)
