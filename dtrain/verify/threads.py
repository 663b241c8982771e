"""Call a function on many items, some at a time, with results in the order of the items."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2
"""Items that wait, for each thread."""


def in_threads(function: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """Yield the results of a function, in order; items are taken as they are needed.

    If the caller stops, or a call raises, items that wait are dropped. Calls under way are not waited for, since a
    server may not answer them: the threads end with the process.

    Parameters
    ----------
    function : callable
    items : iterable
    threads : int

    >>> list(in_threads(abs, [-3, 2, -1], threads=2))
    [3, 2, 1]
    """
    todo: SimpleQueue[tuple[Item, Future[Result]] | None] = SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while (given := todo.get()) is not None and not stopped.is_set():
            item, future = given
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)

    for number in range(threads):
        threading.Thread(target=work, name=f"dtrain-verify-{number}", daemon=True).start()
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            future: Future[Result] = Future()
            todo.put((item, future))
            waiting.append(future)
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        stopped.set()
        for _ in range(threads):
            todo.put(None)
