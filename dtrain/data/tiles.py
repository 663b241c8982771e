"""The patches that every row is cut into (``data.patch``): arithmetic, not an object each.

    dimension   0 . . . . . . . . . . . . . . . 10
    patches     |-----------|-----------|              size 4: two that follow each other,
                                    |-----------|      and a last one that begins earlier, so that it is whole

The number of a tile counts them in C order: the last dimension of ``data.patch`` moves first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from dtrain.data.variable import Variable


@dataclass(frozen=True, slots=True)
class Cut:
    """A dimension that is cut into patches."""

    dim: str
    length: int
    """Of its selected part."""
    size: int
    """Of a patch, at most `length`."""

    @property
    def count(self) -> int:
        """Number of patches along it."""
        return -(-self.length // self.size)

    def start(self, index: int) -> int:
        """Return where a patch begins."""
        return min(index * self.size, self.length - self.size)


@dataclass(frozen=True, slots=True)
class Tile:
    """The place of a patch within a row."""

    ranges: tuple[tuple[str, int, int], ...]
    """Dimension, start and stop, counted within the selected part of the dimension."""

    def slices(self, variable: Variable) -> tuple[slice, ...]:
        """Return the slice of each axis of a row."""
        by_dim = {dim: slice(start, stop) for dim, start, stop in self.ranges}
        return tuple(by_dim.get(variable.dims[axis], slice(None)) for axis in variable.row_axes)

    def shape_of(self, variable: Variable) -> tuple[int, ...]:
        """Return the shape of a row that is cut to the tile."""
        pairs = zip(variable.row_shape, self.slices(variable), strict=True)
        return tuple(len(range(length)[part]) for length, part in pairs)


@dataclass(frozen=True, slots=True)
class Tiles:
    """All tiles of a row; a single one of everything if nothing is cut."""

    cuts: tuple[Cut, ...] = ()

    def __len__(self) -> int:
        return math.prod(cut.count for cut in self.cuts)

    def __iter__(self) -> Iterator[Tile]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Tile:
        if not 0 <= number < len(self):
            raise IndexError(number)
        ranges = []
        for cut in reversed(self.cuts):
            number, index = divmod(number, cut.count)
            ranges.append((cut.dim, cut.start(index), cut.start(index) + cut.size))
        return Tile(tuple(reversed(ranges)))

    def cuts_any(self, variable: Variable) -> bool:
        """Whether the variable has a dimension that is cut."""
        dims = {variable.dims[axis] for axis in variable.row_axes}
        return any(cut.dim in dims for cut in self.cuts)


ONE_TILE = Tiles()
"""A single tile of everything."""
