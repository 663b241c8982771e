"""The slots of the arena: which slot holds which part of a pass, and where in it each sample lies.

The arena is the memory of units: an array [slot, row, ...] for each variable. A slot holds the rows of one part, or
is free. A fixed set of parts, chosen by a hash, stays in its slots once read: the cache never evicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.plan.hashing import CACHE, Compact, Ints, hash_each
from dtrain.data.plan.memory import Limits
from dtrain.data.plan.order import RowRun
from dtrain.data.plan.partition import Partition
from dtrain.data.plan.splits import changes

Slots: TypeAlias = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Rows:
    """Where samples lie in the arena."""

    slot: Ints
    row: Ints
    """The sample's anchor, counted from the first anchor of its part."""
    tile: Ints | None
    """The patch, counted within the row; None if rows are not cut into patches."""

    def __len__(self) -> int:
        return len(self.slot)

    def part(self, start: int, stop: int) -> Rows:
        """Return samples ``start:stop``."""
        tile = None if self.tile is None else self.tile[start:stop]
        return Rows(self.slot[start:stop], self.row[start:stop], tile)


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
        parts = len(partition.units)
        self.count = limits.slots(partition, shuffle)
        self._partition = partition
        self._stack: Slots = np.arange(self.count, dtype=np.int32)
        """The slots that are free, and memory for the others."""
        self._num_free = self.count
        self._by_part: dict[int, Slots] = {}
        """By epoch and part: its slot, or -1."""
        self._is_cached = np.zeros(parts, bool)
        """By part: whether it stays in its slot once it is read."""
        self._is_cached[_cached_parts(partition, limits.cached)] = True
        self._cached: Slots = np.full(parts if limits.cached else 0, -1, np.int32)
        """By part of the cache: its slot once it is read or being read, else -1."""
        self._ends: dict[int, Compact] = {}
        """By open part: `Partition.part_ends`, where samples may come several times a pass."""

    @property
    def free(self) -> Slots:
        """The slots that hold no part."""
        return self._stack[: self._num_free]

    def has_slot(self, part: int) -> bool:
        """Whether a part has a slot of the cache, or a slot is free."""
        return self._num_free > 0 or self._cached_slot(part) >= 0

    def _cached_slot(self, part: int) -> int:
        return int(self._cached[part]) if len(self._cached) else -1

    def assign(self, epoch: int, part: int) -> int | None:
        """Give a slot to a part of a pass; return the slot if the part must be read, None if it is cached."""
        if epoch not in self._by_part:
            self._by_part[epoch] = np.full(len(self._partition.units), -1, np.int32)
        slot = self._cached_slot(part)
        is_there = slot >= 0
        if not is_there:
            self._num_free -= 1
            slot = int(self._stack[self._num_free])
            if self._is_cached[part]:
                self._cached[part] = slot
        self._by_part[epoch][part] = slot
        return None if is_there else slot

    def slot(self, epoch: int, part: int) -> int:
        """Return the slot of a part."""
        return int(self._by_part[epoch][part])

    def release(self, epoch: int, part: int) -> None:
        """Free the slot of a part of a pass, if it has one and is not cached."""
        self._ends.pop(part, None)
        slot = self.slot(epoch, part)
        if slot >= 0 and not self._is_cached[part]:
            self._by_part[epoch][part] = -1
            self._stack[self._num_free] = slot
            self._num_free += 1

    def end_pass(self, epoch: int) -> None:
        """Free all slots of a pass but the cached ones."""
        for part in np.flatnonzero(self._by_part[epoch] >= 0).tolist():
            self.release(epoch, part)
        del self._by_part[epoch]

    def rows(self, epoch: int, run: RowRun) -> Rows:
        """Return where the samples of a run lie; each of its parts has a slot."""
        part, index = run.rows()
        tile, plan = None, self._partition.plan
        if self._partition.samples is not None:
            index = self._samples(part, index)
        if plan.blocks:
            blocks = self._partition.part_blocks[part].astype(np.int64)
            index, within = np.divmod(index, self._partition.grid.tiles_in(blocks))
            tile = self._partition.grid.tile(blocks, within)
        elif plan.patches > 1:
            index, tile = np.divmod(index, plan.patches)
        return Rows(self._by_part[epoch][part].astype(np.int64), self._partition.rows(part, index), tile)

    def _samples(self, part: Ints, index: Ints) -> Ints:
        """Return which sample of its part each is, from its index among the samples of a pass.

        Parameters
        ----------
        part, index : int64[sample]
        """
        samples = np.empty(len(index), np.int64)
        short = part.astype(np.min_scalar_type(len(self._partition.units)))  # numpy sorts 16 bits by radix
        order = np.argsort(short, kind="stable")
        for some in np.split(order, changes(short[order])[1:]) if len(order) else ():
            number = int(part[some[0]])
            if number not in self._ends:
                self._ends[number] = self._partition.part_ends(number)
            ends = self._ends[number]
            samples[some] = np.searchsorted(ends, index[some].astype(ends.dtype), side="right")
        return samples


def _cached_parts(partition: Partition, count: int) -> Ints:
    """Return the parts that a cache of so many parts holds: a fixed set, chosen by a hash."""
    return np.argsort(hash_each(partition.units, partition.plan.seed, CACHE))[:count] if count else _NONE


_NONE = np.zeros(0, np.int64)
