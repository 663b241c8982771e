"""Divide the cells of a store into train, val and test.

Shares are drawn at random by the seed, or cut along the sample axis. Where splits are given by coordinate or by group,
each row or patch has a label (`dtrain.data.plan.labels`): a cell may belong to several splits, which hold its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.plan.hashing import SPLIT, Compact, Ints, compact, hash_each, slices
from dtrain.data.plan.labels import REST, runs_of
from dtrain.data.plan.units import DataPlan, cell_bounds, cells_of_rows
from dtrain.data.plan.units import SplitName as SplitName

Flags: TypeAlias = npt.NDArray[np.bool_]
Runs: TypeAlias = tuple[tuple[int, int], ...]
"""Runs of rows: the first row of each, and the one after its last."""

SHARE_TOLERANCE = 0.1


def split_cells(plan: DataPlan, split: SplitName) -> Compact:
    """Return the cells of a split, ascending: those that hold a row and a patch of it."""
    cells = present_cells(plan)
    if split == "all":
        return cells
    cells = _labelled_cells(plan, cells, split)
    if plan.label_of(split) != REST:
        return cells
    owners = _owners(plan, cells)
    if owners is not None:
        names, of_cell = np.unique(owners.astype(np.int64), return_inverse=True)
        kept: Compact = cells[_chosen(plan, names, split)[of_cell]]
        return kept
    if plan.group == 1:
        return cells[_chosen(plan, cells, split)]
    begins = changes(cells // plan.group)
    chosen = _chosen(plan, cells[begins] // plan.group, split)
    return cells[np.repeat(chosen, np.diff(begins, append=len(cells)))]


def _labelled_cells(plan: DataPlan, cells: Compact, split: SplitName) -> Compact:
    """Return the cells that hold a row and a patch with the label of a split."""
    if plan.tile_labels:
        cells = cells[plan.grid_of(split).tiles_in(cells.astype(np.int64) // plan.block_step) > 0]
    if not plan.row_labels:
        return cells if plan.tile_labels or plan.label_of(split) == REST else cells[:0]
    return _cells_with(plan, cells, *runs_of(plan.row_labels, plan.label_of(split)))


def _cells_with(plan: DataPlan, cells: Compact, begins: Compact, ends: Compact) -> Compact:
    """Return the cells that hold a row of some runs, which are ascending."""
    if not len(begins):
        return cells[:0]
    kept = np.zeros(len(cells), bool)
    for part in slices(len(cells)):
        starts, stops = cell_bounds(plan, cells[part])
        nearest = np.minimum(np.searchsorted(ends, starts, side="right"), len(begins) - 1)
        kept[part] = (begins[nearest] < stops) & (ends[nearest] > starts)
    held: Compact = cells[kept]
    return held


def _owners(plan: DataPlan, cells: Compact) -> Compact | None:
    """Return what a split holds whole, by cell, if that is neither the cell nor its group."""
    if plan.whole == "rows":
        return cells % plan.block_step
    return cells // plan.block_step if plan.whole == "blocks" else None


def changes(values: Compact) -> Ints:
    """Return the places of an array whose value differs from the one before, and the first place."""
    is_new = np.ones(len(values), bool)
    np.not_equal(values[1:], values[:-1], out=is_new[1:])
    return np.flatnonzero(is_new)


def _chosen(plan: DataPlan, groups: Compact, split: SplitName) -> Flags:
    """Return, by group, True if it belongs to a split: the groups between two ranks."""
    count = len(groups)
    num_val, num_test = round(count * plan.val), round(count * plan.test)
    bounds = {"train": (0, count - num_val - num_test), "val": (count - num_val - num_test, count - num_test)}
    start, stop = bounds.get(split, (count - num_test, count))
    chosen = np.zeros(count, bool)
    if plan.sequential or start >= stop:
        chosen[start:stop] = True
        return chosen
    hashes = hash_each(groups, plan.seed, SPLIT)  # different groups have different hashes: nothing is tied
    low, high = np.partition(hashes, (start, stop - 1))[[start, stop - 1]]
    np.greater_equal(hashes, low, out=chosen)
    chosen &= hashes <= high
    return chosen


def present_cells(plan: DataPlan) -> Compact:
    """Return the cells that hold rows in use and no absent row, ascending."""
    if plan.first_row >= plan.num_samples:
        return np.zeros(0, np.int64)
    first = int(cells_of_rows(plan, np.array([plan.first_row]))[0])
    of_block, begins = np.arange(first, plan.cells_per_block), np.arange(len(plan.grid)) * plan.block_step
    cells = compact((begins[:, None] + of_block).ravel(), len(begins) * plan.block_step)
    if plan.members:
        cells = _cells_with(plan, cells, *plan.row_runs)
    return without_rows(plan, cells, plan.absent)


def without_rows(plan: DataPlan, cells: Compact, rows: Runs) -> Compact:
    """Return the cells that hold none of the rows."""
    if not rows:
        return cells
    begins, ends = np.array(sorted(rows), np.int64).T
    last = np.append(np.int64(-1), np.maximum.accumulate(ends))  # by number of runs: where the last of them ends
    kept = np.ones(len(cells), bool)
    for part in slices(len(cells)):
        starts, stops = cell_bounds(plan, cells[part])
        kept[part] = last[np.searchsorted(begins, stops)] <= starts
    left: Compact = cells[kept]
    return left


def shares_met(plan: DataPlan) -> bool:
    """Return True if val and test get the share of rows that they ask for, within a tenth of it.

    A row of a block counts as many times as the block has tiles. What is given by coordinate or by group counts not.
    """
    total = max(1, _num_rows(plan, _labelled_cells(plan, present_cells(plan), "train")))
    shares: tuple[tuple[SplitName, float], ...] = (("val", plan.val), ("test", plan.test))
    for name, share in shares:
        got = _num_rows(plan, split_cells(plan, name)) / total if share > 0 else 0.0
        if abs(got - share) > SHARE_TOLERANCE * share:
            return False
    return True


def _num_rows(plan: DataPlan, cells: Compact) -> int:
    """Return the rows of cells that shares are drawn from."""
    rows = 0
    before = _rows_before(plan)
    for part in slices(len(cells)):
        starts, stops = cell_bounds(plan, cells[part])
        tiles = plan.tiles_of(cells[part], "train") if plan.blocks else 1
        rows += int(((before(stops) - before(starts)) * tiles).sum())
    return rows


def _rows_before(plan: DataPlan) -> Callable[[Ints], Ints]:
    """Return a function of rows that counts those before each that shares are drawn from."""
    if not plan.row_labels and not plan.members:
        return lambda rows: rows
    begins, ends = runs_of(plan.row_labels, REST) if plan.row_labels else plan.row_runs
    lengths = np.concatenate([[0], np.cumsum(ends - begins, dtype=np.int64)])
    stops = np.concatenate([[0], ends])

    def before(rows: Ints) -> Ints:
        run = np.searchsorted(begins, rows, side="right")  # so many runs begin at or before each
        counted: Ints = lengths[run] - np.maximum(0, stops[run] - rows)
        return counted

    return before
