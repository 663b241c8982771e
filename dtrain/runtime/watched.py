"""Watched tasks report their place before they go on, so that the driver knows it if the process ends there.

Only tasks of work that has been lost before are watched: each call of a user's function costs a message to the
scheduler and its answer.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar

import psutil
from distributed import get_worker
from distributed.utils import sync
from torch import nn

from dtrain.config.functions import METRICS, Function, name_of

Item = TypeVar("Item")
SUFFIX = "-watched"
"""Ends the keys of such tasks."""
COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))
"""Files in which the kernel counts the processes that it has ended for want of memory."""
CALLED = ("__call__", "forward", "step", "update", "compute")
"""Methods of the user's classes that are watched."""


class Watch:
    """Reports the place of a task.

    Parameters
    ----------
    send : callable
        Called with a message of plain values; returns once it has arrived.
    key : str
        Of the task.
    """

    def __init__(self, send: Callable[[dict[str, Any]], None], key: str) -> None:
        self._send = send
        self._key = key
        self._batch = 0
        self._parameters = 0
        self._names: dict[CodeType, str] = {}

    def at_batch(self, number: int) -> None:
        """Note and report the batch that comes next."""
        self._batch = number
        self.report("")

    def report(self, function: str) -> None:
        """Report that a function is entered; an empty name stands for code of dtrain or torch."""
        memory, limit = _memory()
        place = {"key": self._key, "batch": self._batch, "function": function, "parameters": self._parameters}
        self._send({**place, "memory": memory, "limit": limit, "host": socket.gethostname(), "ended": _ended()})

    def leave(self) -> None:
        """Report that the task is done."""
        self._key = ""
        self.report("")

    def know(self, functions: Mapping[str, Function]) -> None:
        """Watch the calls of functions, by config key."""
        for key, function in functions.items():
            named = f"{METRICS if key.startswith(METRICS) else key} ({name_of(function)})"
            self._names.update(dict.fromkeys(_codes(function), named))

    def know_module(self, module: nn.Module, name: str) -> None:
        """Watch the forward pass of the model, which the function of a name has built."""
        self._parameters = sum(own.nbytes for own in module.parameters())
        self._names.update(dict.fromkeys(_codes(type(module)), f"model ({name})"))

    def on_call(self, frame: FrameType, event: str, _: Any) -> None:
        """Report that a function of the user's is called, or has returned. For `sys.setprofile`."""
        name = self._names.get(frame.f_code)
        if name is not None and event in ("call", "return"):
            self.report(name if event == "call" else "")


_watch: Watch | None = None
"""Of the task that runs in this process: one at a time runs the user's code."""


def at_batch(number: int) -> None:
    """Note the batch that comes next, if the task is watched."""
    if _watch is not None:
        _watch.at_batch(number)


def numbered(items: Iterator[Item]) -> Iterator[Item]:
    """Yield items, and note the number of each before it is made."""
    for number in count(1):
        at_batch(number)
        try:
            yield next(items)
        except StopIteration:
            return


def forward_of(module: nn.Module, name: str) -> None:
    """Watch the forward pass of the model, which the function of a name has built, if the task is watched."""
    if _watch is not None:
        _watch.know_module(module, name)


@contextmanager
def watching(topic: str, functions: Callable[[], Mapping[str, Function]]) -> Iterator[None]:
    """Watch the task that runs in this thread, if its key asks for it.

    Parameters
    ----------
    topic : str
        Gets the reports.
    functions : callable
        Returns the user's functions by config key.
    """
    global _watch
    worker = get_worker()
    key = str(worker.get_current_task())
    if not key.endswith(SUFFIX):
        yield
        return
    _watch = Watch(partial(_send, worker, topic), key)
    _watch.report("")
    _watch.know(functions())
    sys.setprofile(_watch.on_call)
    try:
        yield
    finally:
        sys.setprofile(None)
        _watch.leave()
        _watch = None


def _send(worker: Any, topic: str, message: dict[str, Any]) -> None:
    with suppress(OSError, TimeoutError):  # the scheduler is gone: nobody reads it
        sync(worker.loop, worker.scheduler.log_event, topic=topic, msg={**message, "worker": worker.address})


def _codes(function: Any) -> Iterator[CodeType]:
    """Yield the code of a function, or of the methods of a class or object that are called."""
    while isinstance(function, partial):
        function = function.func
    function = getattr(function, "__func__", function)
    if isinstance(code := getattr(function, "__code__", None), CodeType):
        yield code
        return
    kind = function if isinstance(function, type) else type(function)
    for name in CALLED:
        method = getattr(kind, name, None)
        is_of_torch = method is getattr(nn.Module, name, None)  # all modules share it: each layer would report itself
        if not is_of_torch and isinstance(code := getattr(method, "__code__", None), CodeType):
            yield code


def _memory() -> tuple[int, int]:
    """Return the resident memory of this process and its limit (0: none), in bytes."""
    manager = getattr(get_worker(), "memory_manager", None)
    return int(psutil.Process().memory_info().rss), int(getattr(manager, "memory_limit", 0) or 0)


def _ended() -> int:
    """Return how many processes the kernel has ended for want of memory, as far as it can be seen here."""
    for file in COUNTERS:
        with suppress(OSError, ValueError, StopIteration):
            lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
            return next(int(count) for name, count in lines if name == "oom_kill")
    return 0
