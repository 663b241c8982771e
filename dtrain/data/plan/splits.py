"""Divide the cells of a store into train, val and test: drawn at random by the seed, or cut along the sample axis."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np

from dtrain.data.plan.hashing import SPLIT, Ints, hash64
from dtrain.data.plan.units import DataPlan, cell_bounds

SplitName: TypeAlias = Literal["train", "val", "test", "all"]
Runs: TypeAlias = tuple[tuple[int, int], ...]
"""Runs of rows: the first row of each, and the one after its last."""

SHARE_TOLERANCE = 0.1


def split_cells(plan: DataPlan, split: SplitName) -> Ints:
    """Return the cells of a split, ascending."""
    cells = present_cells(plan)
    groups = np.unique(cells // plan.group)
    count = len(groups)
    if split == "all":
        return cells
    num_val, num_test = round(count * plan.val), round(count * plan.test)
    bounds = {"train": (0, count - num_val - num_test), "val": (count - num_val - num_test, count - num_test)}
    start, stop = bounds.get(split, (count - num_test, count))
    ranked = groups
    if not plan.sequential:
        ranked = groups[np.argsort(hash64(plan.seed, SPLIT, groups), kind="stable")]
    return cells[np.isin(cells // plan.group, ranked[start:stop])]


def present_cells(plan: DataPlan) -> Ints:
    """Return the cells that hold rows in use and no absent row, ascending."""
    cells = np.arange(plan.num_cells)
    starts, stops = cell_bounds(plan, cells)
    return without_rows(plan, cells[starts < stops], plan.absent)


def without_rows(plan: DataPlan, cells: Ints, rows: Runs) -> Ints:
    """Return the cells that hold none of the rows."""
    if not rows:
        return cells
    starts, stops = cell_bounds(plan, cells)
    kept = np.ones(len(cells), bool)
    for first, after in rows:
        kept &= (stops <= first) | (starts >= after)
    return cells[kept]


def shares_met(plan: DataPlan) -> bool:
    """Return True if val and test get the share of rows that they ask for, within a tenth of it."""
    total = max(1, _num_rows(plan, present_cells(plan)))
    shares: tuple[tuple[SplitName, float], ...] = (("val", plan.val), ("test", plan.test))
    for name, share in shares:
        got = _num_rows(plan, split_cells(plan, name)) / total if share > 0 else 0.0
        if abs(got - share) > SHARE_TOLERANCE * share:
            return False
    return True


def _num_rows(plan: DataPlan, cells: Ints) -> int:
    starts, stops = cell_bounds(plan, cells)
    return int((stops - starts).sum())
