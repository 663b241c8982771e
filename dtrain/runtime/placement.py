"""Which worker runs which replica: pure arithmetic."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def place_replicas(previous: Mapping[int, str], workers: Sequence[str], replicas: int) -> dict[int, str]:
    """Return the worker of each replica: evenly spread, and the same as before where that stays even.

    >>> place_replicas({0: "a", 1: "b", 2: "b"}, ["b", "c"], 4)
    {0: 'c', 1: 'b', 2: 'b', 3: 'c'}
    """
    most = -(-replicas // len(workers))
    load = dict.fromkeys(workers, 0)
    placed: dict[int, str] = {}
    for replica in range(replicas):
        at = previous.get(replica)
        if at in load and load[at] < most:
            placed[replica] = at
            load[at] += 1
    free = sorted((count, worker) for worker, count in load.items())  # sorted is a heap
    for replica in range(replicas):
        if replica not in placed:
            count, at = free[0]
            placed[replica] = at
            heapq.heapreplace(free, (count + 1, at))
    return dict(sorted(placed.items()))
