"""Inputs of units -> batches of samples for the model, and predictions of patches -> those of the unit.

Samples of a unit come row by row, and within a row patch by patch; batches never cross units.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Array, Floats
from dtrain.data.load.gather import FieldGatherer, Scalings, gatherer_of
from dtrain.data.load.slots import Rows
from dtrain.data.load.sparse import SparseGatherer
from dtrain.data.plan.hashing import Ints
from dtrain.data.plan.heads import Head
from dtrain.data.plan.prediction import PredictionPlan, Unit
from dtrain.data.read.sweep import PartRows
from dtrain.data.read.values import not_finite
from dtrain.data.samples import Samples
from dtrain.data.sparse import SparseRows
from dtrain.data.variable import Variable

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class UnitBatch:
    """Samples of a unit that the model sees together."""

    inputs: tuple[Array, ...]
    place: Ints
    """By sample: the place of its anchor in the unit."""
    tile: Ints
    """By sample: its patch, counted among those of the unit."""
    kept: Flags | None
    """By sample: False if it is left out; None: all are kept."""

    def __len__(self) -> int:
        return len(self.place)


class UnitGatherer:
    """Makes batches of the inputs of units.

    Parameters
    ----------
    samples : Samples
        Of the inputs alone.
    statics : mapping of str to array
        The variables without the sample dimension, as stored.
    scalings : mapping of str to Scaling
    plan : PredictionPlan
    """

    def __init__(
        self, samples: Samples, statics: Mapping[str, Array], scalings: Scalings, plan: PredictionPlan
    ) -> None:
        self._samples, self._plan = samples, plan
        self._gatherers = [gatherer_of(samples, field, scalings.get(field.name)) for field in samples.fields]
        self._statics = {
            g.field.name: g.decoded(statics[g.field.name])
            for g in self._gatherers
            if isinstance(g, FieldGatherer) and g.variable.is_static
        }
        self._raw_statics = statics
        self._values = sum(math.prod(samples.field_shape(field)) for field in samples.fields)
        """Values of a sample."""

    def batches(self, unit: Unit, parts: Sequence[PartRows], size: int) -> Iterator[UnitBatch]:
        """Yield the samples of a unit in batches of at most `size`."""
        tiles = self._plan.tiles(unit)
        total = (unit.stop - unit.start) * len(tiles)
        kept = self._kept(unit, parts, tiles)
        for start in range(0, total, size):
            place, tile = np.divmod(np.arange(start, min(start + size, total)), len(tiles))
            own = None if kept is None else kept[place, tile]
            yield UnitBatch(self._inputs(unit, parts, tiles, place, tile), place, tile, own)

    def _inputs(
        self, unit: Unit, parts: Sequence[PartRows], tiles: Sequence[tuple[int, ...]], place: Ints, tile: Ints
    ) -> tuple[Array, ...]:
        outs = [np.empty((len(place), *g.spec.shape), g.spec.dtype) for g in self._gatherers]
        for number in np.unique(tile).tolist():
            slices = self._tile_slices(unit, tiles[number])
            which = np.flatnonzero(tile == number)
            done = 0
            for rows in parts:
                first, after = done, done + len(rows.part.rows)
                done = after
                own = which[(place[which] >= first) & (place[which] < after)]
                if len(own):
                    anchors = rows.part.rows[place[own] - first] - rows.part.rows[0]
                    for out, gatherer in zip(outs, self._gatherers, strict=True):
                        self._fill(out, own, gatherer, rows, anchors, slices)
        return tuple(outs)

    def _fill(
        self,
        out: Array,
        which: Ints,
        gatherer: FieldGatherer | SparseGatherer,
        rows: PartRows,
        anchors: Ints,
        slices: Mapping[str, tuple[slice, slice]],
    ) -> None:
        """Fill ``out[which]``, the samples of some anchors of a part, cut to a patch."""
        name = gatherer.field.name
        if name in self._statics:
            variable = self._samples.variable(name)
            out[which] = self._statics[name][_cut(variable, slices, whole=True)]
            return
        is_run = int(which[-1] - which[0]) == len(which) - 1
        place = out[int(which[0]) : int(which[-1]) + 1] if is_run else np.empty((len(which), *out.shape[1:]), out.dtype)
        at = Rows(np.zeros(len(anchors), np.int64), anchors, None)
        values = rows.rows[name]
        if isinstance(values, SparseRows):
            assert isinstance(gatherer, SparseGatherer)
            gatherer.fill(place, SparseRows(values.values[None], values.columns[None], values.starts[None]), at)
        else:
            assert isinstance(gatherer, FieldGatherer)
            cut = (slice(None), *_cut(gatherer.variable, slices, whole=False))
            gatherer.fill(place, values[cut][None], at)
        if not is_run:
            out[which] = place

    def _tile_slices(self, unit: Unit, tile: tuple[int, ...]) -> dict[str, tuple[slice, slice]]:
        """Return, by patched dimension, the places of a patch: within what was read, and within the whole row."""
        slices = {}
        for axis, number, (_, low, _) in zip(self._plan.axes, tile, self._plan.needed(unit), strict=True):
            start = axis.start(number)
            slices[axis.dim] = (slice(start - low, start - low + axis.size), slice(start, start + axis.size))
        return slices

    # Samples that are left out --------------------------------------------------------------------------------

    def _kept(self, unit: Unit, parts: Sequence[PartRows], tiles: Sequence[tuple[int, ...]]) -> Flags | None:
        """Return which samples have enough finite values (``data.non_finite``), bool[place, tile]; None: all."""
        least = self._samples.config.min_valid
        if least is None:
            return None
        bad = np.zeros((unit.stop - unit.start, len(tiles)), np.int64)
        slices = [self._tile_slices(unit, tile) for tile in tiles]
        for gatherer in self._gatherers:
            field, variable, done = gatherer.field, self._samples.variable(gatherer.field.name), 0
            if variable.is_static:
                wrong = not_finite(variable, self._raw_statics[field.name])
                if wrong is not None:
                    bad += [wrong[_cut(variable, own, whole=True)].sum() for own in slices]
                continue
            for rows in parts:
                counts = _not_finite_rows(variable, rows.rows[field.name], slices)
                if counts is not None:
                    first = rows.part.rows - rows.part.rows[0] - self._samples.reach(field.name)[0]
                    bad[done : done + len(first)] += sum(counts[first + offset] for offset in field.offsets)
                done += len(rows.part.rows)
        kept: Flags = (self._values - bad) / self._values >= least
        return None if kept.all() else kept


def _cut(variable: Variable, slices: Mapping[str, tuple[slice, slice]], *, whole: bool) -> tuple[slice, ...]:
    """Return the slices of a row's axes for a patch: within a whole row, or within what was read."""
    return tuple(slices[dim][int(whole)] if dim in slices else slice(None) for dim in variable.row_dims)


def _not_finite_rows(
    variable: Variable, values: Array | SparseRows, slices: Sequence[Mapping[str, tuple[slice, slice]]]
) -> Ints | None:
    """Return the values of each row and patch that are not finite, int64[row, tile]; None if there are none."""
    if isinstance(values, SparseRows):
        wrong = not_finite(variable, values.values)
        if wrong is None:
            return None
        before = np.concatenate([[0], np.cumsum(wrong)])
        return np.diff(before[values.starts])[:, None] + np.zeros((1, len(slices)), np.int64)
    wrong = not_finite(variable, values)
    if wrong is None:
        return None
    axes = tuple(range(1, wrong.ndim))
    parts = [wrong[(slice(None), *_cut(variable, own, whole=False))].sum(axis=axes, dtype=np.int64) for own in slices]
    return np.stack(parts, axis=1)


# Predictions ------------------------------------------------------------------------------------------------


class Blender:
    """Adds the predictions of patches, by weight, to those of a unit: in float64, in the order of the patches.

    A patch that is left out does not count: the weights of others are divided by their sum.

    Parameters
    ----------
    head : Head
    plan : PredictionPlan
    unit : Unit
    """

    def __init__(self, head: Head, plan: PredictionPlan, unit: Unit) -> None:
        self._head, self._plan, self._unit = head, plan, unit
        self._tiles = plan.tiles(unit)
        self._extents = plan.extents(unit)
        self._sums = np.zeros((unit.stop - unit.start, *head.estimate_shape(self._extents)))
        self._lost: Floats | None = None

    def add(self, batch: UnitBatch, estimates: Array) -> None:
        """Add the estimates of a batch.

        Parameters
        ----------
        batch : UnitBatch
        estimates : float32[sample, *patch]
        """
        for number in range(len(batch)):
            to, part, weight = self._weighted(self._tiles[int(batch.tile[number])])
            place = (slice(int(batch.place[number]), int(batch.place[number]) + 1), *to)
            if batch.kept is None or batch.kept[number]:
                self._sums[place] += estimates[(slice(number, number + 1), *part)] * weight
            else:
                if self._lost is None:
                    self._lost = np.zeros(self._sums.shape)
                self._lost[place] += weight

    def _weighted(self, tile: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...], Floats]:
        """Return where a patch goes in the unit, which part of it does, and the weight of that part."""
        to, part, weight = [], [], np.ones((1,) * len(self._head.dims))
        numbers = {axis.dim: (axis, number) for axis, number in zip(self._plan.axes, tile, strict=True)}
        owned = {dim: (low, high) for dim, low, high in self._plan.owned(self._unit)}
        for dim, (axis, _) in numbers.items():
            if dim not in self._head.dims:  # all patches along it make one prediction
                weight = weight / axis.count
        for k, dim in enumerate(self._head.dims):
            if dim not in numbers:
                to.append(slice(None))
                part.append(slice(None))
                continue
            (axis, number), (low, high) = numbers[dim], owned[dim]
            start = axis.start(number)
            first, after = max(low, start), min(high, start + axis.size)
            to.append(slice(first - low, after - low))
            part.append(slice(first - start, after - start))
            shape = [1] * len(self._head.dims)
            shape[k] = after - first
            weight = weight * axis.weights(number)[part[-1]].reshape(shape)
        return tuple(to), tuple(part), weight

    def estimate(self) -> tuple[Floats, Flags | None]:
        """Return the blended estimate, float64[place, *block], and where nothing is known; None if nowhere."""
        if self._lost is None:
            return self._sums, None
        known = 1.0 - self._lost
        unknown = known < 1e-9
        with np.errstate(divide="ignore", invalid="ignore"):
            estimate = np.where(self._lost > 0, self._sums / known, self._sums)
        estimate[unknown] = np.nan
        return estimate, unknown
