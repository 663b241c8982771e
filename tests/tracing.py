"""How much memory Python allocates meanwhile."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from zarr.core.sync import _get_loop


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Give a function that returns the most bytes so far.

    A read that fails at one chunk leaves threads behind that decode others. They are waited for: Python may crash if
    tracing stops while they allocate memory (cpython issue 128679).
    """
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        asyncio.run_coroutine_threadsafe(_others_end(), _get_loop()).result(timeout=60)
        tracemalloc.stop()


async def _others_end() -> None:
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=30)
