"""The slots of the arena: which slot holds which part of a pass, and where in it each sample lies.

The arena is the memory of units: an array [slot, row, ...] for each variable. A slot holds the rows of one part, or
is free. A fixed set of parts, chosen by a hash, stays in its slots once read: the cache never evicts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dtrain.data.plan.hashing import CACHE, Ints, hash64
from dtrain.data.plan.memory import Limits
from dtrain.data.plan.order import RowRun
from dtrain.data.plan.partition import Partition
from dtrain.data.plan.units import Box


@dataclass(frozen=True, slots=True)
class Rows:
    """Where samples lie in the arena."""

    slot: Ints
    row: Ints
    """The sample's anchor, counted from the first anchor of its part."""
    tile: Ints | None
    """The patch; None if rows are not cut into patches."""

    def __len__(self) -> int:
        return len(self.slot)

    def part(self, start: int, stop: int) -> Rows:
        """Return samples ``start:stop``."""
        tile = None if self.tile is None else self.tile[start:stop]
        return Rows(self.slot[start:stop], self.row[start:stop], tile)


def part_box(partition: Partition, part: int) -> Box:
    """Return the box from the first to the last anchor of a part."""
    anchors = partition.part_anchors(part)
    return Box(int(anchors[0]), int(anchors[-1]) + 1)


class SlotTable:
    """Which slot holds which part of which pass: bookkeeping only, the memory is elsewhere.

    Parameters
    ----------
    partition : Partition
    limits : Limits
        Read-ahead and cached parts; they determine the number of slots.
    shuffle : bool
    """

    def __init__(self, partition: Partition, limits: Limits, shuffle: bool) -> None:
        plan = partition.plan
        ranks = np.argsort(hash64(plan.seed, CACHE, partition.units), kind="stable")
        self.count = limits.slots(partition, shuffle)
        self._partition = partition
        self._free = list(range(self.count))
        self._by_part: dict[int, Ints] = {}
        """By epoch and part: its slot, or -1."""
        self._cacheable = frozenset(ranks[: limits.cached].tolist())
        self._cached: dict[int, int] = {}
        """By part of the cache, once it is read or being read: its slot."""
        self._is_regular = plan.cell_rows >= plan.unit_rows  # then the anchors of a part are `stride` apart
        self._anchors: dict[int, Ints] = {}
        """By slot, unless parts are regular: the anchors of its part, counted from the first."""
        self._starts = np.zeros(self.count, np.int64)

    def has_slot(self, part: int) -> bool:
        """Whether a part has a slot of the cache, or a slot is free."""
        return bool(self._free) or part in self._cached

    def assign(self, epoch: int, part: int) -> int | None:
        """Give a slot to a part of a pass; return the slot if the part must be read, None if it is cached."""
        if epoch not in self._by_part:
            self._by_part[epoch] = np.full(len(self._partition.units), -1, np.int64)
        if part in self._cached:
            self._by_part[epoch][part] = self._cached[part]
            return None
        slot = self._by_part[epoch][part] = self._free.pop()
        if part in self._cacheable:
            self._cached[part] = slot
        if not self._is_regular:
            anchors = self._partition.part_anchors(part)
            self._anchors[slot] = anchors - anchors[0]
        return slot

    def slot(self, epoch: int, part: int) -> int:
        """Return the slot of a part."""
        return int(self._by_part[epoch][part])

    def release(self, epoch: int, part: int) -> None:
        """Free the slot of a part of a pass, if it has one and is not cached."""
        slot = self.slot(epoch, part)
        if slot >= 0 and part not in self._cacheable:
            self._by_part[epoch][part] = -1
            self._free.append(slot)

    def end_pass(self, epoch: int) -> None:
        """Free all slots of a pass but the cached ones."""
        for part in np.flatnonzero(self._by_part[epoch] >= 0).tolist():
            self.release(epoch, part)
        del self._by_part[epoch]

    def rows(self, epoch: int, run: RowRun) -> Rows:
        """Return where the samples of a run lie; each of its parts has a slot."""
        plan = self._partition.plan
        slot, row, tile = self._by_part[epoch][run.part], run.row, None
        if plan.patches > 1:
            row, tile = np.divmod(row, plan.patches)
        if not self._is_regular and len(slot):
            row = self._irregular_rows(slot, row)
        elif plan.stride > 1:
            row = row * plan.stride
        return Rows(slot, row, tile)

    def _irregular_rows(self, slot: Ints, index: Ints) -> Ints:
        """Return the anchors with an index within their part, counted from the part's first anchor."""
        slots = np.unique(slot)
        anchors = [self._anchors[number] for number in slots.tolist()]
        self._starts[slots] = np.cumsum([0, *map(len, anchors[:-1])])
        relative: Ints = np.concatenate(anchors)[self._starts[slot] + index]
        return relative
