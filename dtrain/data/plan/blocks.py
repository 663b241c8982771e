"""Blocks of patches: how rows that are too large, or too few, are cut along the dimensions of ``data.patch``.

    a dimension   |-----|-----|-----|-----|-----|-----|--|     patches, and a last one that begins earlier
    blocks        |-----------------|--------------------|     3 patches a block, of whole chunks where that is possible

A box is a run of rows times one block of each patched dimension. The last block holds the patch that begins earlier,
beside the one that it overlaps: no value lies in two blocks. Blocks are numbered in C order, as tiles are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.data.plan.hashing import Ints
from dtrain.data.tiles import Cut


@dataclass(frozen=True, slots=True)
class BlockAxis:
    """A patched dimension, and how many neighbouring patches make a block."""

    dim: str
    length: int
    size: int
    """Of a patch."""
    together: int
    """Patches of a block; the last one may have fewer, or one more."""

    @property
    def num_tiles(self) -> int:
        """Number of patches."""
        return -(-self.length // self.size)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return -(-(self.length // self.size) // self.together)

    @property
    def extent(self) -> int:
        """Places of the longest block."""
        return max(stop - start for start, stop in map(self.bounds, (0, self.num_blocks - 1)))

    @property
    def most_tiles(self) -> int:
        """Patches of the block that has most."""
        return int(self.tiles_in(np.array([0, self.num_blocks - 1])).max())

    def bounds(self, block: int) -> tuple[int, int]:
        """Return the first place of a block, and the one after its last."""
        step = self.together * self.size
        return block * step, self.length if block == self.num_blocks - 1 else (block + 1) * step

    @property
    def all_bounds(self) -> tuple[Ints, Ints]:
        """By block: its first place, and the one after its last."""
        first: Ints = np.arange(self.num_blocks) * self.together * self.size
        return first, np.append(first[1:], self.length)

    def tiles_in(self, blocks: Ints) -> Ints:
        """Return the number of patches of each block."""
        last = self.num_tiles - (self.num_blocks - 1) * self.together
        return np.where(blocks == self.num_blocks - 1, last, self.together)

    def tile(self, blocks: Ints, index: Ints) -> Ints:
        """Return the number of patches along the dimension, from the block of each and the number within the block."""
        return blocks * self.together + index


@dataclass(frozen=True, slots=True)
class KeptAxis(BlockAxis):
    """A patched dimension of which a split holds some patches; blocks are read as they are."""

    kept: Ints
    """The patches, ascending."""

    @property
    def before(self) -> Ints:
        """By block, and after the last: the number of kept patches before it."""
        return np.searchsorted(self.kept, np.append(np.arange(self.num_blocks) * self.together, self.num_tiles))

    def tiles_in(self, blocks: Ints) -> Ints:
        """Return the number of kept patches of each block."""
        counts: Ints = np.diff(self.before)[blocks]
        return counts

    def tile(self, blocks: Ints, index: Ints) -> Ints:
        """Return the number of kept patches along the dimension, as `BlockAxis.tile`."""
        tiles: Ints = self.kept[self.before[blocks] + index]
        return tiles

    @property
    def places(self) -> Ints:
        """The places that the kept patches cover, ascending."""
        starts = np.minimum(self.kept * self.size, self.length - self.size)
        return np.unique(starts[:, None] + np.arange(self.size))


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of all patched dimensions; a single one of everything if rows are read whole."""

    axes: tuple[BlockAxis, ...] = ()

    def __len__(self) -> int:
        return math.prod(axis.num_blocks for axis in self.axes)

    @property
    def most_tiles(self) -> int:
        """Tiles of the block that has most."""
        return math.prod(axis.most_tiles for axis in self.axes)

    @property
    def is_ragged(self) -> bool:
        """Whether blocks have different shapes."""
        return any(
            axis.bounds(axis.num_blocks - 1) != (axis.length - axis.extent, axis.length)
            or axis.extent != min(axis.together * axis.size, axis.length)
            for axis in self.axes
        )

    @property
    def extents(self) -> tuple[tuple[str, int, int], ...]:
        """The shape of the largest block, as if it began at the first place."""
        return tuple((axis.dim, 0, axis.extent) for axis in self.axes)

    def bounds(self, block: int) -> tuple[tuple[str, int, int], ...]:
        """Return dimension, first place and the one after the last, of each patched dimension."""
        places = self._along(np.array([block]))
        return tuple((axis.dim, *axis.bounds(int(at[0]))) for axis, at in zip(self.axes, places, strict=True))

    def tiles_in(self, blocks: Ints) -> Ints:
        """Return the number of tiles of each block."""
        counts = np.ones(len(blocks), np.int64)
        for axis, at in zip(self.axes, self._along(blocks), strict=True):
            counts *= axis.tiles_in(at)
        return counts

    def tile(self, blocks: Ints, within: Ints) -> Ints:
        """Return the number of tiles, counted within the row, from the block of each and the number within the block.

        Parameters
        ----------
        blocks, within : int64[sample]
        """
        number, rest, step = np.zeros(len(blocks), np.int64), within, 1
        for axis, at in zip(reversed(self.axes), reversed(self._along(blocks)), strict=True):
            rest, index = np.divmod(rest, axis.tiles_in(at))
            number += axis.tile(at, index) * step
            step *= axis.num_tiles
        return number

    def _along(self, blocks: Ints) -> list[Ints]:
        """Return the place of each block along each axis."""
        places = []
        for axis in reversed(self.axes):
            blocks, at = np.divmod(blocks, axis.num_blocks)
            places.append(at)
        return places[::-1]


def tile_starts(cuts: Sequence[Cut], blocks: Blocks, tiles: Ints) -> list[Ints]:
    """Return, by patched dimension, where each tile begins, counted from the beginning of its block.

    Parameters
    ----------
    cuts : sequence of Cut
    blocks : Blocks
        Without axes, tiles begin where they begin in the row.
    tiles : int64[sample]
        Numbers of tiles within the row.
    """
    starts = []
    axes = blocks.axes or (None,) * len(cuts)
    for cut, axis in zip(reversed(cuts), reversed(axes), strict=True):
        tiles, index = np.divmod(tiles, cut.count)
        start = np.minimum(index * cut.size, cut.length - cut.size)
        if axis is not None:
            start -= np.minimum(index // axis.together, axis.num_blocks - 1) * axis.together * axis.size
        starts.append(start)
    return starts[::-1]
