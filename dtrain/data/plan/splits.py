"""Divide the cells of a store into train, val and test: drawn at random by the seed, or cut along the sample axis."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.plan.hashing import SPLIT, Compact, Ints, compact, hash_each, slices
from dtrain.data.plan.units import DataPlan, cell_bounds, cells_of_rows

SplitName: TypeAlias = Literal["train", "val", "test", "all"]
Flags: TypeAlias = npt.NDArray[np.bool_]

SHARE_TOLERANCE = 0.1


def split_cells(plan: DataPlan, split: SplitName) -> Compact:
    """Return the cells of a split, ascending."""
    cells = present_cells(plan)
    if split == "all":
        return cells
    if plan.group == 1:
        return cells[_chosen(plan, cells, split)]
    begins = changes(cells // plan.group)
    chosen = _chosen(plan, cells[begins] // plan.group, split)
    return cells[np.repeat(chosen, np.diff(begins, append=len(cells)))]


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
    cells = compact(np.arange(first, plan.num_cells), plan.num_cells)
    if not plan.absent:
        return cells
    bounds = np.clip(np.array(plan.absent, np.int64), plan.first_row, plan.num_samples)
    starts, stops = bounds[bounds[:, 0] < bounds[:, 1]].T
    edges = np.zeros(len(cells) + 1, np.int32)
    np.add.at(edges, cells_of_rows(plan, starts) - first, 1)
    np.add.at(edges, cells_of_rows(plan, stops - 1) + 1 - first, -1)
    present: Compact = cells[np.cumsum(edges[:-1], dtype=np.int32) == 0]
    return present


def shares_met(plan: DataPlan) -> bool:
    """Return True if val and test get the share of rows that they ask for, within a tenth of it."""
    total = max(1, _num_rows(plan, present_cells(plan)))
    shares: tuple[tuple[SplitName, float], ...] = (("val", plan.val), ("test", plan.test))
    for name, share in shares:
        got = _num_rows(plan, split_cells(plan, name)) / total if share > 0 else 0.0
        if abs(got - share) > SHARE_TOLERANCE * share:
            return False
    return True


def _num_rows(plan: DataPlan, cells: Compact) -> int:
    rows = 0
    for part in slices(len(cells)):
        starts, stops = cell_bounds(plan, cells[part])
        rows += int((stops - starts).sum())
    return rows
