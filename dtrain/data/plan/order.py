"""The order of one pass over a partition: a pure function of (seed, replica, epoch) that can start at any position.

Parts (the rows of one unit that the partition owns) are permuted. Then every row draws a place in a mixing window of
`mixed_units` parts around its own::

    part      0    1    2    3    4    5   ...
    row of 2  |---------------|                  mixed_units = 3: anywhere among parts 1, 2 and 3
    row of 3       |---------------|

Rows of at most `mixed_units` parts are mixed at any time, and each part is open for `mixed_units` steps: the
staggered shuffle of MosaicML's *py1e*, in integer arithmetic. A row's place depends only on its own numbers, so the
order from any position is computed without walking to it: the work grows with the mixing window, not with the
position. A golden file pins the order.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dtrain.data.plan.hashing import PART, ROW, Hashes, Ints, hash64, permutation

ORDERED_ROWS = 8192
"""About this many rows of a pass are sorted together."""


@dataclass(frozen=True, slots=True)
class RowRun:
    """Neighbouring rows of a pass, in order, and the part that no later run needs."""

    part: Ints
    """By row: index of its part in the partition."""
    row: Ints
    """By row: index within the part."""
    opens: tuple[int, ...]
    """The parts whose first rows since `position` are in this run."""
    closed: int
    """The part whose last rows are in this run, or -1."""


def epoch_order(
    sizes: Ints, *, mixed_units: int, shuffle: bool, seed: int, replica: int, epoch: int, position: int = 0
) -> Iterator[RowRun]:
    """Yield the rows of one pass from `position` on; never more than `mixed_units` parts are open at a time.

    Parameters
    ----------
    sizes : int64[part]
        Rows of each part; positive.
    mixed_units : int
        Length of the mixing window in parts, at least 1.
    shuffle : bool
        If false, parts and rows come in stored order.
    seed, replica, epoch : int
        Identify the pass.
    position : int
        Number of rows to leave out at the start of the pass.
    """
    runs = _shuffled(sizes, mixed_units, (seed, replica, epoch), position) if shuffle else _in_order(sizes, position)
    for skip, run in runs:
        if skip < len(run.part):
            yield RowRun(run.part[skip:], run.row[skip:], run.opens, run.closed)
        elif run.opens or run.closed >= 0:
            yield RowRun(run.part[:0], run.row[:0], run.opens, run.closed)


def _in_order(sizes: Ints, position: int) -> Iterator[tuple[int, RowRun]]:
    ends = np.cumsum(sizes)
    first = int(np.searchsorted(ends, position, side="right"))
    for part in range(first, len(sizes)):
        size = int(sizes[part])
        skip = max(0, position - int(ends[part]) + size)
        yield skip, RowRun(np.full(size, part), np.arange(size), (part,), part)


def _shuffled(sizes: Ints, mixed_units: int, keys: tuple[int, int, int], position: int) -> Iterator[tuple[int, RowRun]]:
    """Yield (rows to leave out, run) for each step of the mixing window that may reach beyond `position`.

    Step i opens the i-th part of the permuted pass and emits all rows that lie before the mixing window of part
    i + 1. Then part i + 1 - mixed_units is finished. Before step i, between starts[i + 1 - mixed_units] and starts[i]
    rows have been emitted. Steps of few rows are sorted together: that costs no more than one of them.
    """
    count = len(sizes)
    parts = permutation(count, *keys, PART)
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes[parts])])
    first = int(np.searchsorted(starts[1:], position, side="right"))
    if first >= count:
        return
    oldest = max(0, first + 1 - mixed_units)
    seed = hash64(*keys, ROW)
    opened = deque(_open(parts, sizes, range(oldest, first), mixed_units, seed))
    emitted, begin = int(starts[oldest]) + sum(part.before(first) for part in opened), first
    due: dict[int, list[int]] | None = None  # by step: the parts that it opens; None before `position` is reached
    while begin < count:
        end = min(count, begin + max(1, min(64, ORDERED_ROWS * count // int(starts[-1]))))
        new = list(_open(parts, sizes, range(begin, end), mixed_units, seed))
        opened.extend(new)
        run_parts, rows, bounds = _emit(opened, begin, end, mixed_units, count)
        if due is not None:
            for part in new:
                due[part.next_step(part.first)].append(part.part)
        elif position < emitted + bounds[-1]:
            now = begin + int(np.searchsorted(bounds, position - emitted, side="right")) - 1
            due = _due(opened, now, set(run_parts[position - emitted : bounds[now + 1 - begin]].tolist()))
        for i, (low, high) in zip(range(begin, end), pairwise(bounds), strict=True):
            closed = int(parts[i + 1 - mixed_units]) if i + 1 >= mixed_units and i + 1 < count else -1
            skip = max(0, min(high - low, position - emitted))
            opens = tuple(due.pop(i, ())) if due else ()
            yield skip, RowRun(run_parts[low:high], rows[low:high], opens, closed)
            emitted += high - low
        while opened and opened[0].first + mixed_units <= end:
            opened.popleft()
        begin = end


def _due(opened: Iterable[_Opened], now: int, rest: set[int]) -> defaultdict[int, list[int]]:
    """Return, by step, the parts whose first rows it emits, if the pass starts within step `now`.

    `rest` holds the parts of the rows that step `now` emits from that position on.
    """
    due: defaultdict[int, list[int]] = defaultdict(list)
    for part in opened:
        due[now if part.part in rest else part.next_step(max(part.first, now + 1))].append(part.part)
    return due


_BITS = 40
"""A place is a fixed-point number in half parts: 24 bits before the point, 40 behind it."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """The rows of a part, sorted by the step that emits them."""

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
        cut = int(np.searchsorted(self.cuts, self.before(step), side="right"))
        return self.first + cut - 1 if cut < len(self.cuts) else -1

    def emitted(self, begin: int, end: int) -> slice:
        """Return the slice of its rows that steps ``begin:end`` emit."""
        return slice(self.before(begin), self.before(end))


def _open(parts: Ints, sizes: Ints, ranks: range, mixed_units: int, seed: Hashes) -> Iterator[_Opened]:
    """Draw a place in the mixing window of the i-th part for each of its rows.

    A step emits the rows that lie before the mixing window of the next part. That window begins at half part
    2 * (step + 1) + 1 - mixed_units.
    """
    count = len(parts)
    chosen = parts[ranks.start : ranks.stop]
    for i, part, state in zip(ranks, chosen.tolist(), hash64(chosen, start=seed), strict=True):
        start, stop = max(0, 2 * i + 1 - mixed_units), min(2 * count, 2 * i + 1 + mixed_units)
        draws = (hash64(np.arange(sizes[part]), start=state) >> np.uint64(64 - _BITS)).astype(np.int64)
        places = (start << _BITS) + draws * (stop - start)
        steps = np.minimum(((places >> _BITS) + mixed_units - 1) // 2, count - 1) - i
        narrow = steps.astype(np.int16) if mixed_units < 1 << 14 else steps  # numpy sorts 16 bits by radix
        order = np.argsort(narrow, kind="stable")
        cuts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.bincount(steps))])
        yield _Opened(part, i, order, places[order], cuts)


def _emit(
    opened: Iterable[_Opened], begin: int, end: int, mixed_units: int, count: int
) -> tuple[Ints, Ints, list[int]]:
    """Return part and row of the rows that steps emit, and where each step begins: by place, then part, then row."""
    pieces = [
        (part.part, part.rows[which], part.places[which]) for part in opened for which in (part.emitted(begin, end),)
    ]
    lengths = [len(rows) for _, rows, _ in pieces]
    rows = np.concatenate([rows for _, rows, _ in pieces] or [np.zeros(0, np.int64)])
    parts = np.repeat(np.array([part for part, _, _ in pieces], np.int64), lengths)
    places = np.concatenate([places for _, _, places in pieces] or [np.zeros(0, np.int64)])
    order = _stable_order(places)
    limits = np.array([(2 * step + 3 - mixed_units) << _BITS for step in range(begin, end)], np.int64)
    bounds = [0, *np.searchsorted(places[order], limits).tolist()]
    if end == count:  # the last step emits the rest
        bounds[-1] = len(rows)
    return parts[order], rows[order], bounds


def _stable_order(places: Ints) -> Ints:
    """Return ``argsort(places, kind="stable")``; faster where key and index fit into one integer."""
    if not len(places):
        return places
    bits = (len(places) - 1).bit_length()
    low = int(places.min())
    if (int(places.max()) - low).bit_length() + bits > 63:
        return np.argsort(places, kind="stable")
    keys = (places - low) << bits | np.arange(len(places))
    keys.sort()
    return keys & ((1 << bits) - 1)
