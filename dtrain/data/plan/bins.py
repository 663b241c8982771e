"""The rows of the parts that a shuffled pass holds open, in bins: what is kept of them, and how they are sorted.

Parts may have millions of rows. Each step of a pass is cut into bins of at most about `ORDERED_ROWS` rows::

    steps     |------- i -------|----- i + 1 -----|      step i opens part i
    bins      |----|----|----|--|----|----|----|--|

Of a row of an open part, only its index is kept, in 2 or 4 bytes, sorted by the bin that its place lies in. The rows of
a bin are sorted when they are needed, from places that are drawn once more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.plan.hashing import PART, ROW, SLICE, Compact, Hashes, Ints, compact, hash64, permutation, slices

ORDERED_ROWS = 8192
"""About this many rows of a pass are sorted together."""
MOST_BINS = 64
"""Bins of few rows are sorted together, up to this number."""

Rows: TypeAlias = npt.NDArray[np.integer]
Bins: TypeAlias = npt.NDArray[np.uint16] | Ints
DType: TypeAlias = np.dtype[np.integer]


class PartRows(NamedTuple):
    """The rows of a run, in order."""

    part: Ints
    """By row: index of its part in the partition."""
    row: Ints
    """By row: index within the part."""


def index_dtype(size: int) -> DType:
    """Return the dtype that holds the indices of the rows of a part of some size, while it is open."""
    return np.min_scalar_type(max(0, size - 1))


def bins_a_part(size: int, mixed_units: int) -> int:
    """Return the largest number of bins that the rows of a part lie in, if the largest part has some size."""
    return (mixed_units << _bits(size, mixed_units)) + 1


def _bits(size: int, mixed_units: int) -> int:
    """Return into how many bins steps are cut, as a power of two: few enough for bins of a part to have 16 bits."""
    most = ((1 << 15) // mixed_units).bit_length() - 1
    return max(0, min(((size - 1) // ORDERED_ROWS).bit_length(), most))


_BITS = 40
"""A place is a fixed-point number in half parts, with 40 bits behind the point, counted from a half part nearby."""
_NOT_DRAWN = np.uint64(64 - _BITS)


@dataclass(frozen=True, slots=True)
class OpenPart:
    """The rows of a part, sorted by the bin that emits them."""

    part: int
    state: int
    """Of the hash that draws the rows' places."""
    start: int
    """The half part at which its mixing window begins."""
    width: int
    """The length of its mixing window, in half parts."""
    first_bin: int
    rows: Rows
    cuts: Ints
    """Where the rows of `first_bin`, of the bin after it, and so on begin."""

    @property
    def end_bin(self) -> int:
        """The bin after its last one."""
        return self.first_bin + len(self.cuts) - 1

    def before(self, number: int) -> int:
        """Return how many of its rows earlier bins have emitted."""
        return int(self.cuts[max(0, min(number - self.first_bin, len(self.cuts) - 1))])

    def next_bin(self, number: int) -> int:
        """Return the first bin from `number` on that emits some of its rows; -1 if none does."""
        cut = int(self.cuts.searchsorted(self.before(number), side="right"))
        return self.first_bin + cut - 1 if cut < len(self.cuts) else -1


@dataclass(frozen=True, slots=True)
class Pass:
    """A permuted pass, and how it is cut into bins."""

    sizes: Compact
    """Rows of each part."""
    parts: Compact
    """By step: the part that it opens."""
    mixed_units: int
    seed: Hashes
    """Of the hash that draws the rows' places, before part and row."""
    bits: int
    """A step has ``2 ** bits`` bins."""

    @property
    def count(self) -> int:
        """Number of parts, and of steps."""
        return len(self.sizes)

    @property
    def bins_a_step(self) -> int:
        """Number of bins of each step but the last, which emits all that is left."""
        return 1 << self.bits

    @property
    def bins_a_part(self) -> int:
        """The largest number of bins that the rows of a part lie in."""
        return (min(self.mixed_units, self.count) << self.bits) + 1

    @property
    def num_bins(self) -> int:
        """Number of bins of the pass."""
        return self._bin_after(2 * self.count)

    def closed_by(self, number: int) -> int:
        """Return the part that no later bin needs, or -1."""
        step, rest = divmod(number + 1, self.bins_a_step)
        return int(self.parts[step - self.mixed_units]) if not rest and self.mixed_units <= step < self.count else -1

    def _bin_after(self, half: int) -> int:
        """Return the bin after those of the places before a half part."""
        return (((half + self.mixed_units - 1) << self.bits) + 1) >> 1

    def open(self, first: int, after: int) -> Iterator[OpenPart]:
        """Draw a place in its mixing window for each row of the parts that steps ``first:after`` open.

        Parts of few rows are opened together, which saves time.
        """
        most = int(self.sizes.max())
        dtype = index_dtype(most)
        together = max(1, min(MOST_BINS, SLICE // most, (1 << 16) // self.bins_a_part))
        for begin in range(first, after, together):
            steps = range(begin, min(begin + together, after))
            yield from _open(self, steps, dtype)

    def windows(self, steps: range) -> _Windows:
        """Return the mixing window of the part of each step."""
        middles = 2 * np.arange(steps.start, steps.stop) + 1
        starts = np.maximum(0, middles - self.mixed_units)
        stops = np.minimum(2 * self.count, middles + self.mixed_units)
        first, after = (np.stack([starts, stops]) + self.mixed_units - 1) << self.bits
        return _Windows(starts, stops - starts, first >> 1, (after + 1) >> 1, (first & 1) << (_BITS - self.bits))


class _Windows(NamedTuple):
    """The mixing windows of some parts."""

    start: Ints
    """The half part at which it begins."""
    width: Ints
    """Its length, in half parts."""
    first_bin: Ints
    end_bin: Ints
    before: Ints
    """The places of the first bin that lie before the mixing window."""


def _open(order: Pass, steps: range, dtype: DType) -> Iterator[OpenPart]:
    """Draw the places of the rows of some parts, and sort the rows of each part by bin."""
    parts, most, windows = order.parts[steps.start : steps.stop], order.bins_a_part, order.windows(steps)
    sizes, states = order.sizes[parts].astype(np.int64), hash64(parts, start=order.seed)
    begins = np.cumsum(sizes) - sizes
    bins = _new_bins(int(sizes.sum()), len(parts) * most)
    owners = np.repeat(np.arange(len(parts)), sizes) if len(parts) > 1 else None
    for some in slices(len(bins)):
        owner = 0 if owners is None else owners[some]
        row = np.arange(some.start, some.stop) - begins[owner]
        draws = (hash64(row, start=states[owner]) >> _NOT_DRAWN).astype(np.int64)
        places = draws * windows.width[owner] + windows.before[owner]
        bins[some] = (places >> (_BITS + 1 - order.bits)) + owner * most
    rows, lengths = sorted_by(bins, len(parts) * most, dtype)
    if owners is not None:
        rows = (rows - begins[owners]).astype(dtype)
    cuts = np.zeros((len(parts), most + 1), np.int64)
    np.cumsum(lengths.reshape(len(parts), most), axis=1, out=cuts[:, 1:])
    columns = (parts, states, *windows[:4], begins, begins + sizes)
    facts = zip(*(column.tolist() for column in columns), strict=True)
    for own_cuts, (part, state, start, width, first, after, begin, end) in zip(cuts, facts, strict=True):
        yield OpenPart(part, state, start, width, first, rows[begin:end], own_cuts[: after - first + 1])


def _new_bins(size: int, most: int) -> Bins:
    """Return memory for bins that numpy sorts by radix, if they are few enough."""
    return np.empty(size, np.uint16) if most <= 1 << 16 else np.empty(size, np.int64)


def sorted_by(bins: Bins, most: int, dtype: DType) -> tuple[Rows, Ints]:
    """Return ``argsort(bins, kind="stable")``, and the number of rows in each bin.

    It takes little memory besides the result, which has the dtype if there are many rows.
    """
    if len(bins) <= SLICE:
        return np.argsort(bins, kind="stable"), np.bincount(bins, minlength=most)
    parts = [(part, np.bincount(bins[part], minlength=most)) for part in slices(len(bins))]
    lengths = sum((counts for _, counts in parts), np.zeros(most, np.int64))
    rows, begins = np.empty(len(bins), dtype), np.cumsum(lengths) - lengths
    for part, counts in parts:
        order = np.argsort(bins[part], kind="stable")
        places = np.repeat(begins - (np.cumsum(counts) - counts), counts) + np.arange(len(order))
        rows[places] = order + part.start
        begins += counts
    return rows, lengths


class OpenParts:
    """The parts that are open, from a step on."""

    def __init__(self, order: Pass, first: int) -> None:
        self.parts = deque(order.open(max(0, first + 1 - order.mixed_units), first))
        """In the order in which they were opened."""
        self.next_bin = first * order.bins_a_step
        """The bin that is emitted next."""
        self._order = order
        self._coming = order.open(first, order.count)
        self._emitted = deque(part.before(self.next_bin) for part in self.parts)
        """By part: its rows that have been emitted."""
        self._lengths = np.zeros(((order.mixed_units + 1) << order.bits) + order.bins_a_part + MOST_BINS, np.int64)
        """By bin from `next_bin` on: the rows of open parts."""
        for part in self.parts:
            self._expect(part)

    @property
    def emitted(self) -> int:
        """The rows of open parts that have been emitted."""
        return sum(self._emitted)

    def advance(self) -> tuple[Group, list[int], list[OpenPart]]:
        """Emit bins that are sorted together: their rows, the number of rows in each, and the parts that were opened.

        A step opens its part before its first bin: the rows of a bin are known once all parts of its step are open.
        """
        order, begin, total = self._order, self.next_bin, 0
        lengths: list[int] = []
        new: list[OpenPart] = []
        while begin + len(lengths) < order.num_bins and len(lengths) < MOST_BINS and total < ORDERED_ROWS:
            step, rest = divmod(begin + len(lengths), order.bins_a_step)
            if not rest and step < order.count:
                new.append(next(self._coming))
                self.parts.append(new[-1])
                self._emitted.append(0)
                self._expect(new[-1])
            lengths.append(int(self._lengths[len(lengths)]))
            total += lengths[-1]
        self.next_bin += len(lengths)
        self._lengths[: -len(lengths)] = self._lengths[len(lengths) :]
        self._lengths[-len(lengths) :] = 0
        emitted = deque(part.before(self.next_bin) for part in self.parts)
        group = Group([(part, a, b) for part, a, b in zip(self.parts, self._emitted, emitted, strict=True) if a < b])
        self._emitted = emitted
        return group, lengths, new

    def _expect(self, part: OpenPart) -> None:
        """Count the rows that bins from `next_bin` on emit."""
        lengths, at = np.diff(part.cuts), part.first_bin - self.next_bin
        self._lengths[max(0, at) : at + len(lengths)] += lengths[max(0, -at) :]

    def close(self) -> None:
        """Let go of the parts whose last rows have been emitted."""
        while self.parts and self.parts[0].end_bin <= self.next_bin:
            self.parts.popleft()
            self._emitted.popleft()


class Group:
    """Rows that are sorted together: by place, then part, then row, when the first of them are needed.

    Parameters
    ----------
    pieces : sequence of (OpenPart, int, int)
        Which rows of which parts, by their place among the part's sorted rows.
    """

    def __init__(self, pieces: Sequence[tuple[OpenPart, int, int]]) -> None:
        self._pieces = pieces
        self._rows: PartRows | None = None

    def rows(self, low: int, high: int) -> PartRows:
        """Return some of the rows."""
        if self._rows is None:
            self._rows, self._pieces = _sorted_rows(self._pieces), ()
        return PartRows(self._rows.part[low:high], self._rows.row[low:high])


def _sorted_rows(pieces: Sequence[tuple[OpenPart, int, int]]) -> PartRows:
    """Sort rows by place, then by part in the order of opening, then by row."""
    if not pieces:
        return PartRows(np.zeros(0, np.int64), np.zeros(0, np.int64))
    base = pieces[0][0].start
    facts = np.array([(part.part, part.width, (part.start - base) << _BITS) for part, _, _ in pieces])
    lengths = [stop - start for _, start, stop in pieces]
    rows = np.concatenate([part.rows[start:stop] for part, start, stop in pieces]).astype(np.int64)
    states = np.repeat(np.array([part.state for part, _, _ in pieces], np.uint64), lengths)
    part, width, start = (np.repeat(column, lengths) for column in facts.T)
    order = stable_order((hash64(rows, start=states) >> _NOT_DRAWN).astype(np.int64) * width + start)
    return PartRows(part[order], rows[order])


def pass_of(sizes: Compact, mixed_units: int, keys: tuple[int, int, int]) -> Pass:
    """Permute a pass that seed, replica and epoch identify, and cut its steps into bins."""
    count = len(sizes)
    mixed_units = min(mixed_units, 2 * count)  # from there on each mixing window is the whole pass
    bits = _bits(int(sizes.max()), min(mixed_units, count))
    return Pass(sizes, compact(permutation(count, *keys, PART), count), mixed_units, hash64(*keys, ROW), bits)


def seek(order: Pass, position: int) -> tuple[int, int]:
    """Return the first step that may reach beyond a position, and the rows of the parts that it no longer needs."""
    ends = np.cumsum(order.sizes[order.parts])
    first = int(np.searchsorted(ends, position, side="right"))
    oldest = first + 1 - order.mixed_units
    return first, int(ends[oldest - 1]) if oldest > 0 else 0


def stable_order(places: Ints) -> Ints:
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
