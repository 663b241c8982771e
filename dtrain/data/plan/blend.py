"""Overlapping patches along a dimension, and the weights by which their predictions are blended.

    a dimension   0 . . . . . . . . . . . . . . . . . 18
    patches       |-----------|                              size 8, overlap 0.25: a step of 6
                          |-----------|
                                      |-----------|          the last one begins earlier, so that it is whole
    blocks        |-----------|-----------|---------|        what one unit predicts; it needs every patch that covers it

The weight of a place in a patch is a Hann window, sin^2(pi (i + 1/2) / size): positive everywhere, largest in the
middle. Of several dimensions weights are multiplied, and at each place they are divided by their sum.

References
----------
Pielawski and Wählby 2020, "Introducing Hann windows for reducing edge-effects in patch-based image segmentation",
PLoS ONE 15(3): e0229839.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from dtrain.data.encoding import Floats


@dataclass(frozen=True, slots=True)
class TileAxis:
    """A dimension that is cut into patches, and into blocks of which a unit predicts one."""

    dim: str
    length: int
    """Of its selected part."""
    size: int
    """Of a patch."""
    step: int
    """From the beginning of a patch to that of the next."""
    extent: int
    """Places of a block; the last one may have fewer."""

    @property
    def count(self) -> int:
        """Number of patches."""
        return -(-(self.length - self.size) // self.step) + 1

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return -(-self.length // self.extent)

    def start(self, tile: int) -> int:
        """Return where a patch begins."""
        return min(tile * self.step, self.length - self.size)

    def bounds(self, block: int) -> tuple[int, int]:
        """Return the first place of a block, and the one after its last."""
        return block * self.extent, min(self.length, (block + 1) * self.extent)

    def tiles(self, block: int) -> range:
        """Return the patches that cover some of a block."""
        low, high = self.bounds(block)
        first = min(max(0, (low - self.size) // self.step + 1), self.count - 1)
        last = self.count - 1 if self.length - self.size < high else (high - 1) // self.step
        return range(first, last + 1)

    def needed(self, block: int) -> tuple[int, int]:
        """Return the places that the patches of a block cover: the first, and the one after the last."""
        tiles = self.tiles(block)
        return self.start(tiles[0]), self.start(tiles[-1]) + self.size

    def weights(self, tile: int) -> Floats:
        """Return the weight of each place of a patch, float64[size]; those of all patches of a place add up to 1."""
        start = self.start(tile)
        return hann(self.size) / _sums(self.length, self.size, self.step)[start : start + self.size]


def tile_axis(dim: str, length: int, size: int, overlap: float) -> TileAxis:
    """Return a patched dimension as a single block.

    Parameters
    ----------
    dim : str
    length, size : int
        Of the dimension and of a patch.
    overlap : float
        Share of a patch that the next one covers too, at least 0 and below 1.
    """
    step = max(1, size - round(overlap * size))
    return TileAxis(dim, length, size, step, length)


def hann(size: int) -> Floats:
    """Return the Hann window of so many places, float64[size], positive everywhere.

    >>> [round(x, 3) for x in hann(4).tolist()], hann(1).tolist()
    ([0.146, 0.854, 0.854, 0.146], [1.0])
    """
    window: Floats = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    return window


@lru_cache(maxsize=64)
def _sums(length: int, size: int, step: int) -> Floats:
    """Return the sum of the windows of all patches at each place, float64[length]."""
    axis, window = TileAxis("", length, size, step, length), hann(size)
    sums = np.zeros(length)
    for tile in range(axis.count):
        start = axis.start(tile)
        sums[start : start + size] += window
    return sums
