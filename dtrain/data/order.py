"""The order of one pass over a partition: a pure function of (seed, replica, epoch), seekable in O(window).

Parts (the rows of one unit that the partition owns) are permuted, then every row draws a place in a window of
`window` parts around its own::

    part      0    1    2    3    4    5   ...
    row of 2  |---------------|                  window = 3: anywhere among parts 1, 2 and 3
    row of 3       |---------------|

so that rows of at most `window` parts are mixed at any time, and each part is open for `window` steps: the
staggered shuffle of MosaicML's *py1e*, in integer arithmetic. A row's place depends on nothing but its own
numbers, so any position can be sought without walking to it. The hash is written out here because the streams of
``numpy.random.Generator`` are not promised to be stable between versions; a golden file pins the order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

SPLIT, DEAL, PART, ROW = range(4)
"""What a hash is drawn for, so that no two draws are the same."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(*keys: int | Ints) -> Hashes:
    """Hash integers (broadcast against each other) to uint64: splitmix64's finaliser, once a key.

    References
    ----------
    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def permutation(length: int, *keys: int) -> Ints:
    """Return a permutation of ``range(length)`` that depends on the keys alone."""
    return np.argsort(hash64(*keys, np.arange(length)), kind="stable")


@dataclass(frozen=True, slots=True)
class Block:
    """A run of rows of a pass, in order, and the part that no later block needs."""

    part: Ints
    """Per row: index of its part in the partition."""
    row: Ints
    """Per row: index within the part."""
    closed: int
    """The part that is finished with this block, or -1."""


def epoch_order(
    sizes: Ints, *, window: int, shuffle: bool, seed: int, replica: int, epoch: int, position: int = 0
) -> Iterator[Block]:
    """Yield the rows of one pass from `position` on; never more than `window` parts are open at a time.

    Parameters
    ----------
    sizes : int64[part]
        Rows of each part; positive.
    window : int
        Parts that are mixed with each other, at least 1.
    shuffle : bool
        If not, parts and rows come in stored order.
    seed, replica, epoch : int
        Name the pass.
    position : int
        Rows of the pass to leave out at its start.
    """
    blocks = _shuffled(sizes, window, (seed, replica, epoch), position) if shuffle else _in_order(sizes, position)
    for skip, block in blocks:
        if skip >= len(block.part):
            if block.closed >= 0:
                yield Block(block.part[:0], block.row[:0], block.closed)
        else:
            yield Block(block.part[skip:], block.row[skip:], block.closed)


def _in_order(sizes: Ints, position: int) -> Iterator[tuple[int, Block]]:
    ends = np.cumsum(sizes)
    first = int(np.searchsorted(ends, position, side="right"))
    for part in range(first, len(sizes)):
        size = int(sizes[part])
        skip = max(0, position - int(ends[part]) + size)
        yield skip, Block(np.full(size, part), np.arange(size), part)


def _shuffled(sizes: Ints, window: int, keys: tuple[int, int, int], position: int) -> Iterator[tuple[int, Block]]:
    """Yield (rows to leave out, block) for each step of the window that may reach beyond `position`.

    Step i opens the i-th part of the permuted pass and emits all rows that lie before the window of part i + 1.
    Then part i + 1 - window is finished. Before step i, between starts[i + 1 - window] and starts[i] rows are out.
    """
    count = len(sizes)
    parts = permutation(count, *keys, PART)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[parts])])
    first = int(np.searchsorted(starts[1:], position, side="right"))
    if first >= count:
        return
    oldest = max(0, first + 1 - window)
    frontier = _frontier(first, window)
    pool = [_places(int(parts[i]), i, int(sizes[parts[i]]), count, window, keys) for i in range(oldest, first)]
    part, row, place = (np.concatenate([a[k] for a in pool] or [np.zeros(0, np.int64)]) for k in range(3))
    waiting = place >= frontier
    emitted = int(starts[oldest]) + int(np.count_nonzero(~waiting))
    part, row, place = part[waiting], row[waiting], place[waiting]
    for i in range(first, count):
        opened = _places(int(parts[i]), i, int(sizes[parts[i]]), count, window, keys)
        part, row, place = (np.concatenate(pair) for pair in zip((part, row, place), opened, strict=True))
        out = place < _frontier(i + 1, window) if i + 1 < count else np.ones(len(place), bool)
        order = np.flatnonzero(out)[np.argsort(place[out], kind="stable")]
        finished = range(max(0, i + 1 - window), i + 2 - window) if i + 1 < count else range(0)
        closed = int(parts[finished[0]]) if len(finished) else -1
        yield max(0, min(len(order), position - emitted)), Block(part[order], row[order], closed)
        emitted += len(order)
        part, row, place = part[~out], row[~out], place[~out]


_BITS = 40
"""A place is a fixed-point number in half parts: 24 bits before the point, 40 behind it."""


def _frontier(i: int, window: int) -> int:
    """Return the place where the window of the i-th part begins."""
    return max(0, 2 * i + 1 - window) << _BITS


def _places(
    part: int, i: int, size: int, count: int, window: int, keys: tuple[int, int, int]
) -> tuple[Ints, Ints, Ints]:
    """Draw a place in the window of the i-th part for each of its rows."""
    start, stop = max(0, 2 * i + 1 - window), min(2 * count, 2 * i + 1 + window)
    rows = np.arange(size)
    draws = (hash64(*keys, ROW, part, rows) >> np.uint64(64 - _BITS)).astype(np.int64)
    return np.full(size, part), rows, (start << _BITS) + draws * (stop - start)
