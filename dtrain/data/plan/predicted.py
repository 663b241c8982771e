"""Which anchors are predicted: every one whose input window is complete, in the order of the stores' rows.

rows       0 . . . . . . . . . | . . . . . . . . 18      | a jump, or rows that are not stored
anchors        2 3 4 5 6 7 8 9       12 13 ... 18        of windows that reach two rows back
places         0 1 2 3 4 5 6 7        8  9 ... 14        along the predictions, without holes
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dtrain.data.plan.hashing import Ints
from dtrain.data.plan.splits import Runs
from dtrain.data.samples import Samples
from dtrain.errors import TooFewSamples


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring predictions whose inputs are read together."""

    low: int
    """The first row that may be read with them; rows from here to `high` lie in one store, and are stored."""
    high: int
    rows: Ints
    """The anchors, ascending."""


@dataclass(frozen=True)
class Anchors:
    """The anchors that are predicted, as runs at equal distances; a place counts them from 0 on."""

    stride: int
    first: Ints
    """By run: its first anchor."""
    count: Ints
    region: Ints
    """By run: the number of its region."""
    low: Ints
    """By region: its first row; all rows of a region can be read together."""
    high: Ints

    @cached_property
    def ends(self) -> Ints:
        """By run: the number of predictions up to its end."""
        ends: Ints = np.cumsum(self.count)
        return ends

    @property
    def total(self) -> int:
        """Number of predictions along the dimension of the samples."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def rows(self, start: int, stop: int) -> Ints:
        """Return the anchors of some places."""
        places = np.arange(start, stop)
        run = np.searchsorted(self.ends, places, side="right")
        rows: Ints = self.first[run] + (places - (self.ends - self.count)[run]) * self.stride
        return rows

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """Yield the predictions of some places, region by region."""
        rows = self.rows(start, stop)
        region = self.region[np.searchsorted(self.ends, np.arange(start, stop), side="right")]
        for number in np.unique(region).tolist():
            yield Part(int(self.low[number]), int(self.high[number]), rows[region == number])


def predicted_anchors(samples: Samples, jumps: Ints, absent: Runs = ()) -> Anchors:
    """Return the anchors of samples whose whole window is stored and crosses no jump.

    Parameters
    ----------
    samples : Samples
        Of the inputs alone.
    jumps : int64[jump]
        Rows that no window may hold together with the row before them, ascending.
    absent : tuple of (int, int)
        Runs of rows that are not stored.

    Raises
    ------
    TooFewSamples
        There is none.
    """
    reach, stride = samples.reach(), samples.config.stride
    found: list[tuple[Ints, Ints, Ints]] = []
    regions: list[tuple[int, int]] = []
    for begin, first, stop in samples.row_runs or ((0, samples.first_row, samples.num_samples),):
        for low, high in without(first, stop, absent):
            inside = jumps[(jumps > low) & (jumps < high)]
            bounds = np.concatenate([[low], inside, [high]])
            after_first = np.maximum(bounds[:-1] - reach[0], first)
            before = np.minimum(bounds[1:] - reach[1], stop)
            anchors = begin - (begin - after_first) // stride * stride
            count = np.maximum(0, -(-(before - anchors) // stride))
            found.append((anchors[count > 0], count[count > 0], np.full(int((count > 0).sum()), len(regions))))
            regions.append((low, high))
    first_rows, counts, region = (np.concatenate(some) for some in zip(*found, strict=True))
    if not len(first_rows):
        span = reach[1] - reach[0] + 1
        raise TooFewSamples(
            f"{samples.path}: nothing to predict: no run of the {samples.num_rows:,} rows of {samples.sample_dim} "
            f"holds a whole input window of {span:,} rows.",
            "Give more rows, or select others (--set data.isel={}).",
        )
    low_rows, high_rows = np.array(regions, np.int64).T
    return Anchors(stride, first_rows, counts, region, low_rows, high_rows)


def without(first: int, stop: int, absent: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the runs of rows ``first:stop`` that hold no absent one.

    >>> list(without(0, 10, [(2, 4), (9, 12)]))
    [(0, 2), (4, 9)]
    """
    for begin, end in sorted(absent):
        if end <= first:
            continue
        if begin >= stop:
            break
        if begin > first:
            yield first, begin
        first = end
    if first < stop:
        yield first, stop
