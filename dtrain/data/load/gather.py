"""Rows of units in memory -> fields of a batch: one `take` a field, unpacked and standardised on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Scaling, standardise, unpack
from dtrain.data.plan.hashing import Ints
from dtrain.data.samples import Field, Samples, Variable

Array = npt.NDArray[Any]
Allocate: TypeAlias = Callable[[tuple[int, ...], np.dtype[Any]], Array]

PIECE_BYTES = 512 << 10
"""What is gathered at once where it is copied a second time, to be cast or unpacked."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one (micro-)batch; axis 0 is the sample axis, floats are float32, integers int64."""

    inputs: tuple[Array, ...]
    targets: tuple[Array, ...]
    owner: object = field(default=None, repr=False)
    """What keeps the memory of the arrays."""

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.targets[0])


@dataclass(frozen=True, slots=True)
class Rows:
    """Samples that lie in slots of an arena."""

    slot: Ints
    relative: Ints
    """The sample's anchor, counted from the first anchor of its part."""
    tile: Ints | None
    """The patch; None if rows are not cut."""

    def part(self, start: int, stop: int) -> Rows:
        """Return some of them."""
        tile = None if self.tile is None else self.tile[start:stop]
        return Rows(self.slot[start:stop], self.relative[start:stop], tile)


class Gatherer:
    """Copies one field of samples out of an arena.

    Parameters
    ----------
    samples : Samples
    of : Field
    scaling : Scaling or None
    """

    def __init__(self, samples: Samples, of: Field, scaling: Scaling | None) -> None:
        self.field = of
        self.variable: Variable = samples.variable(of.name)
        self.shape = samples.field_shape(of)
        self._scaling = scaling
        self._low = 0 if self.variable.is_static else samples.reach(of.name)[0]
        cut = any(part != slice(None) for part in samples.tiles[0].slices(self.variable))
        self._slices = [tile.slices(self.variable) for tile in samples.tiles] if cut else None
        steps = np.diff(of.offsets)
        self._step = int(steps[0]) if len(steps) and steps[0] > 0 and (steps == steps[0]).all() else 0

    def fill(self, out: Array, arena: Array, rows: Rows) -> None:
        """Fill ``out[sample, ...]`` from ``arena[slot, row, ...]``; out is contiguous and of the model's dtype."""
        slot_rows = arena.shape[1]
        flat = arena.reshape(-1, *arena.shape[2:])
        first = rows.slot * slot_rows + rows.relative - self._low
        for where, slices in self._cuts(rows):
            self._take(out, where, flat[(slice(None), *slices)], first)
        if self._scaling is not None:
            self._standardise(out)

    def fill_static(self, out: Array, values: Array, rows: Rows) -> None:
        """Fill ``out[sample, ...]`` with the patches of a variable that is the same for all samples."""
        for where, slices in self._cuts(rows):
            out[where] = values[slices]

    def decoded(self, values: Array) -> Array:
        """Return the rows of a variable without the sample dimension as the model sees them."""
        found = _cast(unpack(values, self.variable.encoding), self.variable.model_dtype)
        if self._scaling is not None:
            standardise(found, self._scaling, found.ndim)
        return found

    @property
    def is_cut(self) -> bool:
        """Whether it is different from patch to patch."""
        return self._slices is not None

    def _cuts(self, rows: Rows) -> list[tuple[Any, tuple[slice, ...]]]:
        if self._slices is None or rows.tile is None:
            return [(slice(None), ())]
        return [(np.flatnonzero(rows.tile == tile), self._slices[tile]) for tile in np.unique(rows.tile).tolist()]

    def _take(self, out: Array, where: Any, flat: Array, first: Ints) -> None:
        offsets, whole = self.field.offsets, isinstance(where, slice)
        start = first[where] + offsets[0]
        if whole and not self.field.window and self.variable.encoding is None and flat.dtype == out.dtype:
            np.take(flat, start, axis=0, out=out, mode="clip")  # another mode makes numpy copy the output
            return
        sample_bytes = len(offsets) * flat.itemsize * math.prod(flat.shape[1:])
        size = max(1, PIECE_BYTES // max(1, sample_bytes))
        for begin in range(0, len(start), size):  # what is copied twice is small, and in the processor's cache
            piece = start[begin : begin + size]
            if not self.field.window and whole:  # it would copy all of what is cut
                taken = np.take(flat, piece, axis=0, mode="clip")
            elif not self.field.window:
                taken = flat[piece]
            elif self._step:
                taken = _windows(flat, len(offsets), self._step)[piece]
            else:
                taken = flat[piece[:, None] + (np.array(offsets) - offsets[0])]
            there = slice(begin, begin + size) if whole else where[begin : begin + size]
            with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32, under non_finite = "allow"
                out[there] = unpack(taken, self.variable.encoding)

    def _standardise(self, out: Array) -> None:
        assert self._scaling is not None
        standardise(out, self._scaling, len(self.variable.row_shape))


def _windows(flat: Array, length: int, step: int) -> Array:
    """Return a view [start, place in the window, ...] of all windows of an array."""
    count = max(0, len(flat) - (length - 1) * step)
    strides = (flat.strides[0], flat.strides[0] * step, *flat.strides[1:])
    return np.lib.stride_tricks.as_strided(flat, (count, length, *flat.shape[1:]), strides, writeable=False)


def _cast(values: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array(values, dtype)


def repeated(values: Array, size: int) -> Array:
    """Return the same values for each of `size` samples, without copying them."""
    return np.lib.stride_tricks.as_strided(values, (size, *values.shape), (0, *values.strides))


Scalings: TypeAlias = Mapping[str, Scaling]
