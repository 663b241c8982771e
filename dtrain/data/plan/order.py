"""The order of one pass over a partition: a pure function of (seed, replica, epoch), seekable in O(window).

Parts (the rows of one unit that the partition owns) are permuted, then every row draws a place in a window of
`window` parts around its own::

    part      0    1    2    3    4    5   ...
    row of 2  |---------------|                  window = 3: anywhere among parts 1, 2 and 3
    row of 3       |---------------|

so that rows of at most `window` parts are mixed at any time, and each part is open for `window` steps: the
staggered shuffle of MosaicML's *py1e*, in integer arithmetic. A row's place depends on nothing but its own
numbers, so any position can be sought without walking to it. A golden file pins the order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dtrain.data.plan.hashing import PART, ROW, Hashes, Ints, hash64, permutation

ORDERED_ROWS = 8192
"""About so many rows of a pass are put in order together."""


@dataclass(frozen=True, slots=True)
class Block:
    """A run of rows of a pass, in order, and the part that no later block needs."""

    part: Ints
    """Per row: index of its part in the partition."""
    row: Ints
    """Per row: index within the part."""
    opens: tuple[int, ...]
    """The parts of which it holds the first rows since `position`."""
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
        if skip < len(block.part):
            yield Block(block.part[skip:], block.row[skip:], block.opens, block.closed)
        elif block.opens or block.closed >= 0:
            yield Block(block.part[:0], block.row[:0], block.opens, block.closed)


def _in_order(sizes: Ints, position: int) -> Iterator[tuple[int, Block]]:
    ends = np.cumsum(sizes)
    first = int(np.searchsorted(ends, position, side="right"))
    for part in range(first, len(sizes)):
        size = int(sizes[part])
        skip = max(0, position - int(ends[part]) + size)
        yield skip, Block(np.full(size, part), np.arange(size), (part,), part)


def _shuffled(sizes: Ints, window: int, keys: tuple[int, int, int], position: int) -> Iterator[tuple[int, Block]]:
    """Yield (rows to leave out, block) for each step of the window that may reach beyond `position`.

    Step i opens the i-th part of the permuted pass and emits all rows that lie before the window of part i + 1.
    Then part i + 1 - window is finished. Before step i, between starts[i + 1 - window] and starts[i] rows are out.
    Steps of few rows are put in order together: that costs no more than one of them.
    """
    count = len(sizes)
    parts = permutation(count, *keys, PART)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[parts])])
    first = int(np.searchsorted(starts[1:], position, side="right"))
    if first >= count:
        return
    oldest = max(0, first + 1 - window)
    seed = hash64(*keys, ROW)
    opened = deque(_open(parts, sizes, range(oldest, first), window, seed))
    emitted, begin = int(starts[oldest]) + sum(part.before(first) for part in opened), first
    due: dict[int, list[int]] | None = None  # by step: the parts that it opens
    while begin < count:
        end = min(count, begin + max(1, min(64, ORDERED_ROWS * count // int(starts[-1]))))
        new = list(_open(parts, sizes, range(begin, end), window, seed))
        opened.extend(new)
        block_parts, rows, bounds = _emit(opened, begin, end, window, count)
        if due is not None:
            for part in new:
                due[part.next_step(part.first)].append(part.part)
        elif position < emitted + bounds[-1]:
            now = begin + int(np.searchsorted(bounds, position - emitted, side="right")) - 1
            rest = set(block_parts[position - emitted : bounds[now + 1 - begin]].tolist())
            due = defaultdict(list)
            for part in opened:
                due[now if part.part in rest else part.next_step(max(part.first, now + 1))].append(part.part)
        for i, (low, high) in zip(range(begin, end), pairwise(bounds), strict=True):
            closed = int(parts[i + 1 - window]) if i + 1 >= window and i + 1 < count else -1
            skip = max(0, min(high - low, position - emitted))
            opens = tuple(due.pop(i, ())) if due else ()
            yield skip, Block(block_parts[low:high], rows[low:high], opens, closed)
            emitted += high - low
        while opened and opened[0].first + window <= end:
            opened.popleft()
        begin = end


_BITS = 40
"""A place is a fixed-point number in half parts: 24 bits before the point, 40 behind it."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """The rows of a part, put together by the step that emits them."""

    part: int
    first: int
    """The step that opened it."""
    rows: Ints
    places: Ints
    cuts: Ints
    """Where the rows of step `first`, of the one after it, and so on begin."""

    def before(self, step: int) -> int:
        """Return how many of its rows earlier steps have emitted."""
        return int(self.cuts[max(0, min(step - self.first, len(self.cuts) - 1))])

    def next_step(self, step: int) -> int:
        """Return the first step from `step` on that emits some of its rows; -1 if none does."""
        found = int(np.searchsorted(self.cuts, self.before(step), side="right"))
        return self.first + found - 1 if found < len(self.cuts) else -1

    def of(self, begin: int, end: int) -> slice:
        """Return its rows of some steps."""
        return slice(self.before(begin), self.before(end))


def _open(parts: Ints, sizes: Ints, ranks: range, window: int, seed: Hashes) -> Iterator[_Opened]:
    """Draw a place in the window of the i-th part for each of its rows.

    A step emits what lies before the window of the next part, which begins at half part 2 * (step + 1) + 1 - window.
    """
    count = len(parts)
    chosen = parts[ranks.start : ranks.stop]
    for i, part, state in zip(ranks, chosen.tolist(), hash64(chosen, start=seed), strict=True):
        start, stop = max(0, 2 * i + 1 - window), min(2 * count, 2 * i + 1 + window)
        draws = (hash64(np.arange(sizes[part]), start=state) >> np.uint64(64 - _BITS)).astype(np.int64)
        places = (start << _BITS) + draws * (stop - start)
        steps = np.minimum(((places >> _BITS) + window - 1) // 2, count - 1) - i
        order = np.argsort(steps.astype(np.int16) if window < 1 << 14 else steps, kind="stable")  # 16 bits: by radix
        cuts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(steps))])
        yield _Opened(part, i, order, places[order], cuts)


def _emit(opened: Iterable[_Opened], begin: int, end: int, window: int, count: int) -> tuple[Ints, Ints, list[int]]:
    """Return part and row of what steps emit, and where each of them begins: by place, then by part, then by row."""
    found = [(part.part, part.rows[where], part.places[where]) for part in opened for where in (part.of(begin, end),)]
    lengths = [len(rows) for _, rows, _ in found]
    rows = np.concatenate([rows for _, rows, _ in found] or [np.zeros(0, np.int64)])
    parts = np.repeat(np.array([part for part, _, _ in found], np.int64), lengths)
    places = np.concatenate([places for _, _, places in found] or [np.zeros(0, np.int64)])
    order = _stable_order(places)
    limits = np.array([(2 * step + 3 - window) << _BITS for step in range(begin, end)], np.int64)
    bounds = [0, *np.searchsorted(places[order], limits).tolist()]
    if end == count:  # the last step emits the rest
        bounds[-1] = len(rows)
    return parts[order], rows[order], bounds


def _stable_order(places: Ints) -> Ints:
    """Return ``argsort(places, kind="stable")``: with room for the index in the key, by a sort that is not."""
    if not len(places):
        return places
    bits = (len(places) - 1).bit_length()
    low = int(places.min())
    if (int(places.max()) - low).bit_length() + bits > 63:
        return np.argsort(places, kind="stable")
    keys = (places - low) << bits | np.arange(len(places))
    keys.sort()
    return keys & ((1 << bits) - 1)
