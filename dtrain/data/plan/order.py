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

Runs are bins of the steps, sorted when they are needed (`dtrain.data.plan.bins`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import numpy as np

from dtrain.data.plan.bins import Group, OpenPart, OpenParts, PartRows, pass_of, seek
from dtrain.data.plan.hashing import Compact, Ints

STORED_ROWS = 1 << 16
"""A run has at most this many rows if nothing is shuffled."""


@dataclass(frozen=True, slots=True)
class RowRun:
    """Neighbouring rows of a pass, and the part that no later run needs."""

    size: int
    """Number of rows."""
    rows: Callable[[], PartRows]
    """Computes them: a run that is only planned takes little memory."""
    opens: tuple[int, ...]
    """The parts whose first rows since `position` are in this run."""
    closed: int
    """The part whose last rows are in this run, or -1."""

    @property
    def part(self) -> Ints:
        """By row: index of its part in the partition."""
        return self.rows().part

    @property
    def row(self) -> Ints:
        """By row: index within the part."""
        return self.rows().row


def epoch_order(
    sizes: Compact, *, mixed_units: int, shuffle: bool, seed: int, replica: int, epoch: int, position: int = 0
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
    if shuffle:
        return _shuffled(sizes, mixed_units, (seed, replica, epoch), position)
    return _in_order(sizes, position)


def _in_order(sizes: Compact, position: int) -> Iterator[RowRun]:
    ends = np.cumsum(sizes)
    first = int(np.searchsorted(ends, position, side="right"))
    start = position - int(ends[first - 1]) if first else position
    del ends
    for part in range(first, len(sizes)):
        size = int(sizes[part])
        opens: tuple[int, ...] = (part,)
        for low in range(start, size, STORED_ROWS):
            high = min(size, low + STORED_ROWS)
            yield RowRun(high - low, partial(_stored_rows, part, low, high), opens, part if high == size else -1)
            opens = ()
        start = 0


def _stored_rows(part: int, low: int, high: int) -> PartRows:
    return PartRows(np.full(high - low, part), np.arange(low, high))


# Shuffled -------------------------------------------------------------------------------------------------


def _shuffled(sizes: Compact, mixed_units: int, keys: tuple[int, int, int], position: int) -> Iterator[RowRun]:
    """Yield the runs of a pass, a bin each, from the one that holds `position` on.

    Step i opens the i-th part of the permuted pass and emits all rows that lie before the mixing window of part
    i + 1. Then part i + 1 - mixed_units is finished. Before step i, between starts[i + 1 - mixed_units] and starts[i]
    rows have been emitted.
    """
    order = pass_of(sizes, mixed_units, keys)
    first, before = seek(order, position)
    if first >= order.count:
        return
    opened = OpenParts(order, first)
    emitted = before + opened.emitted
    due: dict[int, list[int]] | None = None  # by bin: the parts that it opens; None before `position` is reached
    while opened.next_bin < order.num_bins:
        begin = opened.next_bin
        group, lengths, new = opened.advance()
        bounds = list(accumulate(lengths, initial=emitted))
        if due is not None:
            for part in new:
                due[part.next_bin(part.first_bin)].append(part.part)
        elif position < bounds[-1]:
            due = _due(opened.parts, group, begin, [bound - emitted for bound in bounds], position - emitted)
        for number, (low, high) in enumerate(pairwise(bounds), begin):
            opens, closed = tuple(due.pop(number, ())) if due else (), order.closed_by(number)
            low = max(low, min(position, high))
            if low < high or opens or closed >= 0:
                yield RowRun(high - low, partial(group.rows, low - emitted, high - emitted), opens, closed)
        emitted = bounds[-1]
        opened.close()


def _due(
    opened: Iterable[OpenPart], group: Group, begin: int, bounds: list[int], position: int
) -> defaultdict[int, list[int]]:
    """Return, by bin, the parts whose first rows it emits, if the pass starts at a position within a group.

    Parameters
    ----------
    opened : iterable of OpenPart
    group : Group
        The rows of bins from `begin` on.
    begin : int
    bounds : list of int
        Where the rows of each bin of the group begin, and where the last ones end.
    position : int
        Counted from the group's first row.
    """
    inside = bisect_right(bounds, position) - 1
    now, rest = begin + inside, set(group.rows(position, bounds[inside + 1]).part.tolist())
    due: defaultdict[int, list[int]] = defaultdict(list)
    for part in opened:
        due[now if part.part in rest else part.next_bin(max(part.first_bin, now + 1))].append(part.part)
    return due
