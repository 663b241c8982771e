"""Read the inputs of units that follow each other: what neighbours share, halos and chunks, is decoded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dtrain.data.encoding import Array
from dtrain.data.plan.predicted import Part
from dtrain.data.plan.prediction import PredictionPlan, Unit
from dtrain.data.plan.units import Box
from dtrain.data.read.boxes import BoxReader
from dtrain.data.sparse import SparseRows
from dtrain.data.variable import Variable

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""First place and the one after the last: of rows, then of each patched dimension that a variable has."""


@dataclass(frozen=True, slots=True)
class PartRows:
    """The inputs of the predictions of a part."""

    part: Part
    rows: Mapping[str, Array | SparseRows]
    """By variable; the first row is that of the first anchor at the variable's smallest offset."""


@dataclass(frozen=True, slots=True)
class _Held:
    """What was read last of a variable; it may be more than was asked for."""

    ranges: Ranges
    values: Array


class SweepReader:
    """Reads units, and keeps of each variable what it has read last. One thread at a time may use it.

    Parameters
    ----------
    reader : BoxReader
    plan : PredictionPlan
    """

    def __init__(self, reader: BoxReader, plan: PredictionPlan) -> None:
        self._reader, self._plan, self._samples = reader, plan, reader.samples
        self._held: dict[str, _Held] = {}
        self._streamed = {v.name for v in self._samples.streamed}
        self.decoded = 0
        """Bytes of values that were decoded, without those of preloaded variables."""

    def read(self, unit: Unit) -> list[PartRows]:
        """Return the inputs of a unit, part by part.

        Raises
        ------
        DtrainError
            As `BoxReader.read`.
        """
        parts = self._plan.anchors.parts(unit.start, unit.stop)
        return [PartRows(part, {v.name: self._rows(v, part, unit) for v in self._samples.moving}) for part in parts]

    def _rows(self, variable: Variable, part: Part, unit: Unit) -> Array | SparseRows:
        low, high = self._samples.reach(variable.name)
        rows = int(part.rows[0]) + low, int(part.rows[-1]) + high + 1
        if variable.sparse is not None:
            return self._reader.read_sparse(variable, *rows)
        block = self._plan.needed(unit)
        if variable.name not in self._streamed:
            return self._reader.read_rows(variable, Box(*rows, block))
        return self._dense(variable, (rows, *((a, b) for dim, a, b in block if dim in variable.row_dims)), part.high)

    def _dense(self, variable: Variable, wanted: Ranges, last_row: int) -> Array:
        held = self._held.pop(variable.name, None)
        axis = None if held is None else _continues(held.ranges, wanted)
        if held is None or axis is None:
            held = self._fresh(variable, wanted, last_row)
        elif wanted[axis][1] > held.ranges[axis][1]:
            held = self._continued(variable, held, wanted, axis, last_row)
        self._held[variable.name] = held
        return _part(variable, self._cut_dims(variable), held, wanted)

    def _fresh(self, variable: Variable, wanted: Ranges, last_row: int) -> _Held:
        more = self._to_chunk_end(variable, wanted, self._axis_of(variable), last_row)
        return _Held(more, self._read(variable, more))

    def _continued(self, variable: Variable, held: _Held, wanted: Ranges, axis: int, last_row: int) -> _Held:
        """Return what is held from the first wanted place on, with the places that it lacks."""
        kept = (*wanted[:axis], (wanted[axis][0], held.ranges[axis][1]), *wanted[axis + 1 :])
        lacking = (*wanted[:axis], (held.ranges[axis][1], wanted[axis][1]), *wanted[axis + 1 :])
        more = self._to_chunk_end(variable, lacking, axis, last_row)
        values = [_part(variable, self._cut_dims(variable), held, kept), self._read(variable, more)]
        ranges = (*wanted[:axis], (wanted[axis][0], more[axis][1]), *wanted[axis + 1 :])
        return _Held(ranges, np.concatenate(values, axis=_array_axis(variable, axis, self._cut_dims(variable))))

    def _read(self, variable: Variable, ranges: Ranges) -> Array:
        block = tuple((dim, *at) for dim, at in zip(self._cut_dims(variable), ranges[1:], strict=True))
        values = self._reader.read_rows(variable, Box(*ranges[0], block))
        self.decoded += values.nbytes
        return values

    def _cut_dims(self, variable: Variable) -> list[str]:
        return [axis.dim for axis in self._plan.axes if axis.dim in variable.row_dims]

    def _axis_of(self, variable: Variable) -> int | None:
        """Return which of a variable's ranges grows from unit to unit."""
        if not self._plan.sweep:
            return 0
        dim, cut = self._plan.axes[self._plan.sweep - 1].dim, self._cut_dims(variable)
        return cut.index(dim) + 1 if dim in cut else None

    def _to_chunk_end(self, variable: Variable, ranges: Ranges, axis: int | None, last_row: int) -> Ranges:
        """Return ranges up to the end of the last chunk along an axis: it is decoded whole in any case."""
        if axis is None:
            return ranges
        start, stop = ranges[axis]
        if axis == 0:
            whole = min(last_row, -(-stop // variable.chunk_rows) * variable.chunk_rows)
        else:
            stored = variable.dims.index(self._cut_dims(variable)[axis - 1])
            size, (first, end, step) = variable.chunks[stored], variable.select[stored]
            boundary = ((first + (stop - 1) * step) // size + 1) * size
            whole = min(len(range(first, end, step)), -(-(boundary - first) // step))
        return (*ranges[:axis], (start, max(stop, whole)), *ranges[axis + 1 :])


def _continues(held: Ranges, wanted: Ranges) -> int | None:
    """Return the axis along which wanted places begin in what is held, or right after it; None if there is no such."""
    pairs = enumerate(zip(held, wanted, strict=True))
    others = [k for k, (own, new) in pairs if not (own[0] <= new[0] and new[1] <= own[1])]
    if not others:
        return 0
    (axis, *more) = others
    return axis if not more and held[axis][0] <= wanted[axis][0] <= held[axis][1] else None


def _array_axis(variable: Variable, axis: int, cut_dims: Sequence[str]) -> int:
    """Return the axis of an array in memory that a range belongs to."""
    return axis if axis == 0 else 1 + variable.row_dims.index(cut_dims[axis - 1])


def _part(variable: Variable, cut_dims: Sequence[str], held: _Held, wanted: Ranges) -> Array:
    """Return the wanted part of what is held, as a view."""
    index = [slice(None)] * held.values.ndim
    for axis, (own, new) in enumerate(zip(held.ranges, wanted, strict=True)):
        index[_array_axis(variable, axis, cut_dims)] = slice(new[0] - own[0], new[1] - own[0])
    return held.values[tuple(index)]
