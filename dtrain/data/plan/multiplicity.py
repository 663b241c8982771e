"""How many times a pass each sample comes: 0 is left out (``data.non_finite``), k is repeated (``data.balance``).

    sample         0  1  2     3  4
    multiplicity   1  0  3     1  1
    of a pass      0  2  2  2  3  4      six samples: the indices 1 to 3 are sample 2

A plan keeps multiplicities as one text of a byte a sample (`DataPlan.multiplicity`), in C order [anchor, patch]. Only
training repeats samples: elsewhere a sample that comes several times comes once. Where several stores are one, anchors
are numbered through from store to store, each from its own first row on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dtrain.data.plan.blocks import Blocks
from dtrain.data.plan.hashing import COMPACT_BELOW, Compact, Ints
from dtrain.data.plan.labels import Labels, as_text, from_text
from dtrain.data.plan.units import DataPlan, SplitName

MOST = 255
"""A sample comes at most so many times a pass: its multiplicity is a byte."""
SUMMED = 1 << 20
"""So many multiplicities are summed at once."""
KEPT_SPLITS = 4
"""A process remembers the multiplicities of so many splits; each is a byte a sample."""


@dataclass(frozen=True, slots=True)
class AnchorNumbers:
    """Numbers the multiples of the stride, from store to store: those of a run of anchors follow each other."""

    begins: Ints
    """By store: the row that it begins at."""
    before: Ints
    """By store: the multiples of all stores before it; the last is the number of all."""
    stride: int

    def of(self, anchors: Ints) -> Ints:
        """Return the number of each anchor."""
        store = np.searchsorted(self.begins, anchors, side="right") - 1
        numbers: Ints = self.before[store] + (anchors - self.begins[store]) // self.stride
        return numbers


def anchor_numbers(plan: DataPlan) -> AnchorNumbers:
    """Return the numbers of all multiples of the stride, those before the first row in use and of padding among them.

    >>> AnchorNumbers(np.array([0, 4]), np.array([0, 2, 4]), stride=3).of(np.array([0, 3, 4, 7])).tolist()
    [0, 1, 2, 3]
    """
    begins = np.array([begin for begin, _, _ in plan.members] or [0], np.int64)
    counts = -(-np.diff(begins, append=plan.num_samples) // plan.stride)
    return AnchorNumbers(begins, np.concatenate([[0], np.cumsum(counts)]), plan.stride)


def num_anchors(plan: DataPlan) -> int:
    """Return the number of multiples of the stride."""
    return int(anchor_numbers(plan).before[-1])


def multiplicities(plan: DataPlan) -> Labels:
    """Return the multiplicities of a plan, uint8[anchor, patch]; a copy that may be changed. Without any, all are 1."""
    shape = (num_anchors(plan), plan.patches)
    if not plan.multiplicity:
        return np.ones(shape, np.uint8)
    return from_text(plan.multiplicity).reshape(shape).copy()


def multiplicity_text(values: Labels) -> str:
    """Return multiplicities, uint8[anchor, patch], as a plan keeps them."""
    return as_text(values)


@dataclass(frozen=True, slots=True)
class Repeats:
    """The multiplicities of the samples of a split, block by block: those of a run of anchors are neighbours."""

    values: Labels
    """uint8[sample]: in C order [block, anchor, patch of the block]."""
    begins: Ints
    """By block: where its first sample lies."""
    tiles: Ints
    """By block: its patches."""
    numbers: AnchorNumbers

    def totals(self, blocks: Ints, first: Ints, count: Ints) -> Ints:
        """Return the samples of a pass in some runs of anchors, int64[run].

        Parameters
        ----------
        blocks, first, count : int64[run]
            Block, first anchor and number of anchors of each run, in order.
        """
        starts = self._place(blocks, first)
        bounds = np.stack([starts, starts + count * self.tiles[blocks]], axis=1).ravel()
        before, total = np.zeros(len(bounds), np.int64), 0
        for begin in range(int(bounds[0]), int(bounds[-1]), SUMMED) if len(bounds) else ():
            end = min(begin + SUMMED, int(bounds[-1]))
            summed = np.concatenate([[total], total + np.cumsum(self.values[begin:end], dtype=np.int64)])
            some = slice(*np.searchsorted(bounds, [begin, end + 1]))
            before[some] = summed[bounds[some] - begin]
            total = int(summed[-1])
        totals: Ints = before[1::2] - before[::2]
        return totals

    def ends(self, block: int, first: Ints, count: Ints) -> Compact:
        """Return, by sample of some runs of a block, the samples of a pass up to it: its multiplicity is the step.

        Parameters
        ----------
        block : int
        first, count : int64[run]
        """
        starts = self._place(np.full(len(first), block), first)
        stops = starts + count * self.tiles[block]
        runs = [self.values[start:stop] for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
        values = runs[0] if len(runs) == 1 else np.concatenate(runs)
        if MOST * len(values) <= COMPACT_BELOW:
            return np.cumsum(values, dtype=np.int32)
        return np.cumsum(values, dtype=np.int64)

    def of_block(self, block: int) -> Labels:
        """Return the multiplicities of a block, uint8[anchor, patch of the block]."""
        length = self.begins[block + 1] - self.begins[block]
        some = self.values[self.begins[block] :][:length]
        return some.reshape(-1, int(self.tiles[block]))

    def _place(self, blocks: Ints, anchors: Ints) -> Ints:
        place: Ints = self.begins[blocks] + self.numbers.of(anchors) * self.tiles[blocks]
        return place


@lru_cache(maxsize=KEPT_SPLITS)
def repeats_of(plan: DataPlan, split: SplitName) -> Repeats | None:
    """Return the multiplicities of a split; None if each of its samples comes once a pass.

    Patches that the split does not hold come not at all.
    """
    if not plan.multiplicity:
        return None
    values = from_text(plan.multiplicity)
    if values.min(initial=1) == values.max(initial=1) == 1:
        return None
    if split != "train":
        values = np.minimum(values, 1)
    values, numbers = values.reshape(-1, plan.patches), np.arange(len(plan.grid))
    tiles = plan.grid.tiles_in(numbers) if plan.blocks else np.array([plan.patches])
    begins = np.concatenate([[0], np.cumsum(tiles * len(values))])
    arranged = np.empty(values.size, np.uint8)
    held = _held(plan, split)
    for block, (begin, end) in enumerate(zip(begins.tolist(), begins[1:].tolist(), strict=False)):
        own = tiles_of_block(plan.grid, block) if plan.blocks else slice(None)
        some = values[:, own] if held is None else values[:, own] * held[own]
        arranged[begin:end] = some.ravel()
    return Repeats(arranged, begins, tiles, anchor_numbers(plan))


def tiles_of_block(grid: Blocks, block: int) -> Ints:
    """Return the numbers of the tiles of a block, counted within the row."""
    within = np.arange(int(grid.tiles_in(np.array([block]))[0]))
    return grid.tile(np.full(len(within), block), within)


def _held(plan: DataPlan, split: SplitName) -> Labels | None:
    """Return, by tile of a row, 1 if a split holds it; None if it holds all of them."""
    if not plan.tile_labels or split == "all":
        return None
    grid, held = plan.grid_of(split), np.zeros(plan.patches, np.uint8)
    for block in range(len(grid)):
        held[tiles_of_block(grid, block)] = 1
    return held
