"""A unit is a box: a run of rows times a block of the patched dimensions. Only runs of whole rows are made so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dtrain.data.samples import Samples, Select, Variable


@dataclass(frozen=True, slots=True)
class Box:
    """What is read at once, without the halo that windows and patches need.

    Rows are those of the sample dimension. A dimension that `block` does not name is read whole.
    """

    start: int
    """Its first row."""
    stop: int
    """The row after its last."""
    block: tuple[tuple[str, int, int], ...] = ()
    """Dimension, start and stop, counted in what ``data.isel`` selects of the dimension."""


def box_shape(samples: Samples, variable: Variable, box: Box) -> tuple[int, ...]:
    """Return the shape of a variable's rows in a box, with the rows that windows reach to: row, then `row_axes`."""
    low, high = samples.reach(variable.name)
    blocks = _blocks(box)
    lengths = zip(variable.row_axes, variable.row_shape, strict=True)
    row = [_length(blocks.get(variable.dims[axis]), length) for axis, length in lengths]
    return (box.stop + high - box.start - low, *row)


def box_selection(samples: Samples, variable: Variable, box: Box) -> Select:
    """Return what is read of a variable for a box, in stored rows and columns, with the rows that windows reach to."""
    low, high = samples.reach(variable.name)
    blocks = _blocks(box)
    rows = variable.selection(box.start + low, box.stop + high)
    return tuple(_cut(part, blocks.get(dim)) for dim, part in zip(variable.dims, rows, strict=True))


def box_slices(variable: Variable, box: Box) -> tuple[slice, ...]:
    """Return where a box lies along each of a row's axes."""
    blocks = _blocks(box)
    return tuple(slice(*blocks.get(variable.dims[axis], (None,))) for axis in variable.row_axes)


def _blocks(box: Box) -> Mapping[str, tuple[int, int]]:
    return {dim: (start, stop) for dim, start, stop in box.block}


def _length(block: tuple[int, int] | None, length: int) -> int:
    return length if block is None else block[1] - block[0]


def _cut(part: tuple[int, int, int], block: tuple[int, int] | None) -> tuple[int, int, int]:
    if block is None:
        return part
    first, _, step = part
    start, stop = block
    return first + start * step, first + (stop - 1) * step + 1, step
