"""Which anchors a split holds, cell by cell, as runs of anchors that are `DataPlan.stride` apart.

The rows of a sample, from the first to the last of its window, must lie in one run of neighbouring cells of the split::

    split     train train train | val | train train
    anchors   ......  of windows [-2, 1]: all but the first two and the last one of each run

and no jump of the sample dimension's coordinate (`DataPlan.jumps`) may lie between them. Where rows have labels
(`DataPlan.row_labels`), they and the anchor must lie in one run of rows with the label; where several stores are one
(`DataPlan.members`), in one store. Other anchors are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from dtrain.data.plan.hashing import Compact, Ints, slices
from dtrain.data.plan.labels import LEFT_OUT, runs_of
from dtrain.data.plan.multiplicity import repeats_of
from dtrain.data.plan.splits import Runs, SplitName, changes, split_cells, without_rows
from dtrain.data.plan.units import DataPlan, cell_bounds

AnchorRuns: TypeAlias = tuple[Compact, Ints, Ints]
"""Cell, first anchor and number of anchors of each run. A cell in which windows meet a jump has several runs."""


def anchor_runs(plan: DataPlan, split: SplitName, lost: Runs = ()) -> Iterator[AnchorRuns]:
    """Yield the anchors of a split, in order, in slices of cells; each run holds an anchor, and no `lost` row."""
    cells = without_rows(plan, split_cells(plan, split), lost)
    neighbours = _neighbours(plan, cells) if (plan.first_offset, plan.last_offset) != (0, 0) else None
    segments = _segments(plan, split)
    for part in slices(len(cells)):
        owner = cells[part]
        low, high = cell_bounds(plan, owner)
        if neighbours is not None:
            start, stop = neighbours.bounds(part)
            low, high = np.maximum(low, start - plan.first_offset), np.minimum(high, stop - plan.last_offset)
        for begins, ends in segments:
            owner, low, high = _cut(owner, low, high, begins, ends)
        first, count = plan.anchors_in(low, high)
        kept = count > 0
        yield owner[kept], first[kept], count[kept]


def counted_runs(plan: DataPlan, split: SplitName, lost: Runs = ()) -> Iterator[tuple[Compact, Ints, Ints, Ints]]:
    """Yield the runs of `anchor_runs` that hold samples, and the number of samples of a pass in each."""
    repeats = repeats_of(plan, split)
    for cells, first, count in anchor_runs(plan, split, lost):
        if repeats is None:
            yield cells, first, count, count * plan.tiles_of(cells, split)
        else:
            samples = repeats.totals(plan.blocks_of(cells), first, count)
            kept = samples > 0
            yield cells[kept], first[kept], count[kept], samples[kept]


class Counts(NamedTuple):
    """How much of a split there is."""

    samples: int
    owners: int
    """Groups of cells that hold samples, or cells where partitions are contiguous: so many partitions can have some."""


def count_samples(plan: DataPlan, split: SplitName) -> Counts:
    """Count the samples of a split, and the partitions that it suffices for, without keeping its anchors."""
    samples = owners = 0
    last = -1
    for cells, _, _, of_runs in counted_runs(plan, split):
        if len(cells):
            dealt = cells if plan.contiguous else cells // plan.group
            owners += len(changes(dealt)) - (int(dealt[0]) == last)
            last = int(dealt[-1])
            samples += int(of_runs.sum())
    return Counts(samples, owners)


def count_left_out(plan: DataPlan) -> int:
    """Count the samples that labels leave out: their anchor, or their patch, is beside what a split holds."""
    total = 0
    rows = [some.astype(np.int64) for some in runs_of(plan.row_labels, LEFT_OUT)] if plan.row_labels else None
    tiles = plan.grid_with(LEFT_OUT) if plan.tile_labels else None
    for cells, first, count in anchor_runs(plan, "all"):
        if tiles is not None:
            total += int((count * tiles.tiles_in(cells.astype(np.int64) // plan.block_step)).sum())
        if rows is not None:
            owner, low, high = _cut(cells, first, first + (count - 1) * plan.stride + 1, *rows)
            total += int((plan.anchors_in(low, high)[1] * plan.tiles_of(owner)).sum())
    return total


@dataclass(frozen=True, slots=True)
class _Neighbours:
    """The runs of neighbouring cells of a split."""

    begins: Ints
    """Where each run begins among the cells of the split."""
    starts: Ints
    """The first row of each run."""
    stops: Ints
    """The row after its last."""

    def bounds(self, part: slice) -> tuple[Ints, Ints]:
        """Return the first row of the run that each cell of a slice lies in, and the row after the run's last."""
        run = np.searchsorted(self.begins, np.arange(part.start, part.stop), side="right") - 1
        return self.starts[run], self.stops[run]


def _neighbours(plan: DataPlan, cells: Compact) -> _Neighbours:
    is_first = np.diff(cells, prepend=-2) != 1
    if plan.blocks:
        is_first[changes(cells // plan.block_step)] = True
    begins = np.flatnonzero(is_first)
    lasts = np.append(begins, len(cells))[1:] - 1
    return _Neighbours(begins, cell_bounds(plan, cells[begins])[0], cell_bounds(plan, cells[lasts])[1])


def _segments(plan: DataPlan, split: SplitName) -> list[tuple[Ints, Ints]]:
    """Return the first anchor of each run of rows that is long enough for a window, and the row after its last anchor.

    Rows are cut into runs by the labels of a split, then by stores, then by jumps.
    """
    segments = []
    if plan.row_labels and split != "all":
        begins, ends = (rows.astype(np.int64) for rows in runs_of(plan.row_labels, plan.label_of(split)))
        segments.append(_with_window(plan, begins, ends))
    if plan.members:
        segments.append(_with_window(plan, *plan.row_runs))
    if plan.jumps:  # the anchor itself may lie beyond a jump
        jumps, far = plan.jump_rows, np.array([1 << 61])
        first = np.concatenate([-far, jumps]) - plan.first_offset
        after = np.concatenate([jumps, far]) - plan.last_offset
        segments.append((first[first < after], after[first < after]))
    return segments


def _with_window(plan: DataPlan, begins: Ints, ends: Ints) -> tuple[Ints, Ints]:
    """Return the anchors of runs of rows that hold an anchor with its window: the first, and the row after the last."""
    first, after = begins + max(0, -plan.first_offset), ends - max(0, plan.last_offset)
    return first[first < after], after[first < after]


def _cut(cells: Compact, low: Ints, high: Ints, first: Ints, after: Ints) -> tuple[Compact, Ints, Ints]:
    """Cut the rows ``low:high`` of cells where segments end: cell, first row and end of each run that is left."""
    begin = np.searchsorted(after, low, side="right")
    number = np.maximum(0, np.searchsorted(first, high, side="left") - begin)
    which = np.repeat(np.arange(len(cells)), number)
    segment = np.arange(len(which)) - np.repeat(np.cumsum(number) - number, number) + begin[which]
    return cells[which], np.maximum(low[which], first[segment]), np.minimum(high[which], after[segment])
