"""The samples of a partition, unit by unit: `Partition`, and a whole split as one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dtrain.data.plan.anchors import counted_runs
from dtrain.data.plan.blocks import Blocks
from dtrain.data.plan.hashing import Compact, Ints, compact
from dtrain.data.plan.multiplicity import Repeats, repeats_of
from dtrain.data.plan.splits import Runs, SplitName, changes
from dtrain.data.plan.units import Box, DataPlan


@dataclass(frozen=True)
class Partition:
    """The samples that one replica, or one evaluation task, owns. A sample is named by its anchor row and its tile.

    A *part* is a unit as one partition sees it: the anchors of the unit that the partition owns.
    """

    plan: DataPlan
    cells: Compact
    """Numbers of its cells, ascending; a cell in which windows meet jumps stands once for each run of its anchors."""
    first: Compact
    """The first anchor of each run."""
    count: Compact
    """The number of anchors of each run, at least 1; they are `plan.stride` apart."""
    split: SplitName = "all"
    """It says which patches of a row belong to the partition, where patches have labels."""
    samples: Compact | None = None
    """The samples of a pass in each run, at least 1; None if each sample comes once (`repeats_of`)."""

    @cached_property
    def _begins(self) -> Compact | None:
        """Where the runs of each part begin; None if each part is one run."""
        begins = changes(self.cells // self.plan.cells_per_unit)
        return None if len(begins) == len(self.cells) else compact(begins, len(self.cells))

    @cached_property
    def _before(self) -> Compact:
        """By run: the anchors of all runs before it."""
        total = np.cumsum(self.count, dtype=np.int64)
        return compact(total - self.count, int(total[-1]) + 1)

    @cached_property
    def units(self) -> Compact:
        """The units that hold its cells, ascending; ``units[part]`` is the unit of a part."""
        cells = self.cells if self._begins is None else self.cells[self._begins]
        return cells if self.plan.cells_per_unit == 1 else cells // self.plan.cells_per_unit

    @cached_property
    def part_sizes(self) -> Compact:
        """The number of samples of each part."""
        begins, plan = self._begins, self.plan
        if self.samples is not None:
            return self.samples if begins is None else _sums(self.samples, begins)
        anchors = self.count if begins is None else np.add.reduceat(self.count, begins, dtype=np.int64)
        if plan.patches == 1:
            return anchors
        tiles = self.grid.tiles_in(self.part_blocks.astype(np.int64)) if plan.blocks else plan.patches
        return compact(anchors.astype(np.int64) * tiles, plan.unit_rows * plan.most_tiles)

    @cached_property
    def part_blocks(self) -> Compact:
        """The block of each part."""
        return self.units // self.plan.units_per_block

    @cached_property
    def grid(self) -> Blocks:
        """The blocks, with the patches that belong to the partition; with all where others come not at all."""
        return self.plan.grid_of(self.split) if self.samples is None else self.plan.grid

    @cached_property
    def repeats(self) -> Repeats | None:
        """How many times a pass its samples come; None: once each."""
        return None if self.samples is None else repeats_of(self.plan, self.split)

    def part_ends(self, part: int) -> Compact:
        """Return, by sample of a part, the samples of a pass up to it, where samples may come several times."""
        assert self.repeats is not None
        return self.repeats.ends(int(self.part_blocks[part]), *self._runs_of(part))

    @property
    def num_samples(self) -> int:
        """Number of samples of a pass."""
        if self.samples is not None:
            return int(self.samples.sum(dtype=np.int64))
        return int((self.count.astype(np.int64) * self.plan.tiles_of(self.cells, self.split)).sum())

    @property
    def largest(self) -> int:
        """Samples of a pass of its largest part, where they are counted by multiplicity; else 0."""
        return 0 if self.samples is None else int(self.part_sizes.max(initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays that it keeps in the end."""
        begins = self._begins
        of_parts = 0 if begins is None else begins.nbytes + self._before.nbytes
        arrays = [self.cells, self.first, self.count, self.units, self.part_sizes]
        arrays += [self.part_blocks] if self.plan.blocks else []
        arrays += [] if self.samples is None else [self.samples]
        return of_parts + sum({id(array): array.nbytes for array in arrays}.values())

    def spans(self) -> tuple[Ints, Ints]:
        """Return the first anchor of each part, and the row after its last anchor."""
        if self._begins is None:
            first, last, count = self.first, self.first, self.count
        else:
            ends = np.append(self._begins[1:], len(self.cells)) - 1
            first, last, count = self.first[self._begins], self.first[ends], self.count[ends]
        return first.astype(np.int64), last + (count.astype(np.int64) - 1) * self.plan.stride + 1

    def part_anchors(self, part: int) -> Ints:
        """Return the anchors of a part, ascending."""
        first, count = self._runs_of(part)
        within = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        anchors: Ints = np.repeat(first, count) + self.plan.stride * within
        return anchors

    def rows(self, part: Ints, index: Ints) -> Ints:
        """Return some anchors by their index within their part, counted from the part's first anchor.

        Parameters
        ----------
        part, index : int64[sample]
        """
        stride, begins = self.plan.stride, self._begins
        if begins is None:
            row: Ints = index * stride if stride > 1 else index
            return row
        first_run, before = begins[part], self._before
        number = before[first_run] + index.astype(before.dtype)  # of the same dtype, else `before` would be copied
        run = np.searchsorted(before, number, side="right") - 1
        rows: Ints = (number - before[run]).astype(np.int64) * stride + (self.first[run] - self.first[first_run])
        return rows

    def box(self, part: int) -> Box:
        """Return the box from the first to the last anchor of a part."""
        first, count = self._runs_of(part)
        after = int(first[-1] + (count[-1] - 1) * self.plan.stride) + 1
        return self.plan.box(int(self.units[part]) // self.plan.units_per_block, int(first[0]), after)

    def _runs_of(self, part: int) -> tuple[Ints, Ints]:
        """Return the first anchor and the number of anchors of each run of a part."""
        begins = self._begins
        if begins is None:
            runs = slice(part, part + 1)
        else:
            runs = slice(int(begins[part]), int(begins[part + 1]) if part + 1 < len(begins) else None)
        return self.first[runs].astype(np.int64), self.count[runs].astype(np.int64)

    def chosen(self, which: Ints | slice) -> Partition:
        """Return the partition of some of its runs."""
        samples = None if self.samples is None else self.samples[which]
        return Partition(self.plan, self.cells[which], self.first[which], self.count[which], self.split, samples)


def _sums(values: Compact, begins: Compact) -> Compact:
    sums: Ints = np.add.reduceat(values, begins, dtype=np.int64)
    return compact(sums, int(sums.max()) + 1)


def cell_anchors(plan: DataPlan, split: SplitName, lost: Runs = ()) -> Partition:
    """Return all samples of a split as one partition, but those of `lost` rows (`eval_partitions`)."""
    runs = [
        (cells, compact(first, plan.num_samples), compact(count, plan.unit_rows + 1), samples)
        for cells, first, count, samples in counted_runs(plan, split, lost)
    ]
    if not runs:
        none = np.zeros(0, np.int64)
        return Partition(plan, none, none, none, split)
    if repeats_of(plan, split) is None:
        cells, first, count = (np.concatenate(column) for column in list(zip(*runs, strict=True))[:3])
        return Partition(plan, cells, first, count, split)
    cells, first, count, samples = (np.concatenate(column) for column in zip(*runs, strict=True))
    return Partition(plan, cells, first, count, split, compact(samples, int(samples.max(initial=0)) + 1))
