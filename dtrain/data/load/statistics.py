"""Mean and standard deviation of the training rows: one pass in bounded memory, merged exactly and in order."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np

from dtrain.data.encoding import Array, Encoding, Floats, Scaling, difference, holds_integers
from dtrain.data.plan.partition import Partition
from dtrain.data.plan.units import Box, cell_bounds
from dtrain.data.read.joined import BoxReader
from dtrain.data.variable import Variable
from dtrain.errors import NonFiniteData

CONSTANT = 1e-12
"""Decoded floats whose standard deviation is at most this share of their mean are constant, but for rounding."""
NEGLIGIBLE = 2.0**-44
"""A share of the standard deviation that the model's float32 does not show, but for values that are as near to 0."""
PIECE_VALUES = 128 << 10
"""Rows are summed in pieces of about so many values, which stay in the processor's cache as float64."""
MIN_VALUES = 16
"""Values of each mean in a piece, at least; merging a piece costs as much as a few values."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared differences from the mean, for each mean of a variable."""

    count: Floats
    mean: Floats
    rest: Floats
    """What float64 rounds off `mean`."""
    squares: Floats

    def __add__(self, other: Moments) -> Moments:
        """Merge two sets.

        References
        ----------
        Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample variances, 1979.
        """
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        step = (other.mean - self.mean) + (other.rest - self.rest)
        mean, rest = _two_sum(self.mean, self.rest + step * share)
        is_other = self.count == 0
        return Moments(
            count,
            np.where(is_other, other.mean, mean),
            np.where(is_other, other.rest, rest),
            self.squares + other.squares + step * step * self.count * share,
        )

    @property
    def std(self) -> Floats:
        """Standard deviation for each mean; 0 where there are no values."""
        variance = np.divide(self.squares, self.count, out=np.zeros_like(self.count), where=self.count > 0)
        return np.sqrt(variance)


def _two_sum(one: Floats, other: Floats) -> tuple[Floats, Floats]:
    """Return a sum as float64 rounds it, and what is rounded off, exactly.

    References
    ----------
    Knuth: The Art of Computer Programming, volume 2, section 4.2.2, theorem B.
    """
    total = one + other
    virtual = total - one
    return total, (one - (total - virtual)) + (other - virtual)


def moments_of(values: Array, encoding: Encoding | None = None, axes: tuple[int, ...] = ()) -> Moments:
    """Return the moments of rows of a variable; NaN is left out.

    Parameters
    ----------
    values : array[row, ...]
        As stored; at least one row.
    encoding : Encoding, optional
    axes : tuple of int
        The axes of a row of which each index has its own mean.
    """
    with np.errstate(all="ignore"):  # values that are not finite give moments that are not: refused by name
        return reduce(operator.add, (_moments(piece, encoding) for piece in _pieces(values, axes)))


def _pieces(values: Array, axes: tuple[int, ...]) -> Iterator[Array]:
    """Yield rows in pieces ``[mean, value]``, contiguous."""
    means = math.prod(values.shape[axis + 1] for axis in axes)
    by_mean = np.moveaxis(values, [axis + 1 for axis in axes], range(len(axes)))
    length = max(MIN_VALUES, PIECE_VALUES // means)
    rows = max(1, length * means // max(1, math.prod(values.shape[1:])))
    for first in range(0, len(values), rows):
        some = by_mean[(slice(None),) * len(axes) + (slice(first, first + rows),)].reshape(means, -1)
        for start in range(0, some.shape[1], length):
            yield np.ascontiguousarray(some[:, start : start + length])


def _moments(values: Array, encoding: Encoding | None) -> Moments:
    """Return the moments of ``values[mean, :]``.

    All is counted from a value of the variable, so that a large mean does not drown a small standard deviation, and
    a constant has none.

    References
    ----------
    Chan, Golub, LeVeque: Algorithms for computing the sample variance, 1983: the corrected two-pass algorithm.
    """
    origin = _origin(values, encoding)
    centred = difference(values, encoding, origin[:, None])
    total = centred.sum(axis=1)
    count = np.full(total.shape, float(values.shape[1]))
    missing = np.isnan(centred) if np.isnan(total).any() else None
    if missing is not None:
        count -= missing.sum(axis=1)
        centred[missing] = 0.0
        total = centred.sum(axis=1)
    share = np.divide(1.0, count, out=np.zeros_like(count), where=count > 0)
    step = total * share
    centred -= step[:, None]
    if missing is not None:
        centred[missing] = 0.0
    left = centred.sum(axis=1)  # what rounding has left of the sum
    squares = np.square(centred, out=centred).sum(axis=1) - left * left * share
    mean, rest = _two_sum(origin, step + left * share)
    return Moments(count, mean, rest, np.maximum(squares, 0.0))


def _origin(values: Array, encoding: Encoding | None) -> Floats:
    """Return the first finite value for each mean; 0 where there is none."""
    zero = np.zeros((1, 1))
    origin = difference(values[:, :1], encoding, zero)
    if not np.isfinite(origin).all():
        decoded = difference(values, encoding, zero)
        first = np.isfinite(decoded).argmax(axis=1)
        origin = np.take_along_axis(decoded, first[:, None], axis=1)
    return np.where(np.isfinite(origin), origin, 0.0)[:, 0]


def partition_moments(
    reader: BoxReader,
    partition: Partition,
    names: Iterable[str],
    most_units: int | None = None,
    on_unit: Callable[[int, int], None] = lambda units, rows: None,
) -> dict[str, Moments]:
    """Return, by variable, the moments of the rows that a partition owns: one pass, unit by unit.

    Parameters
    ----------
    reader : BoxReader
    partition : Partition
    names : iterable of str
        Variables.
    most_units : int, optional
        Read only this many units of each variable, the first ones: the result is an estimate.
    on_unit : callable
        Called after each unit with the number of units and rows that are done.
    """
    moments: dict[str, Moments] = {}
    units = count = 0
    for name in dict.fromkeys(names):
        variable = reader.samples.variable(name)
        axes = variable.mean_axes or ()
        for rows in itertools.islice(_owned_rows(reader, partition, variable), most_units):
            more = moments_of(rows, variable.encoding, axes)
            moments[name] = moments[name] + more if name in moments else more
            units, count = units + 1, count + len(rows)
            on_unit(units, count)
    return moments


def _owned_rows(reader: BoxReader, partition: Partition, variable: Variable) -> Iterator[Array]:
    """Yield, unit by unit, the stored rows that a partition owns; a static variable is one row."""
    if variable.is_static:
        yield _of_patches(variable, partition, Box(0, 1), reader.statics[variable.name][None])
        return
    plan = partition.plan
    starts, stops = cell_bounds(plan, partition.cells)
    unit_of_cell = partition.cells // plan.cells_per_unit
    for unit in partition.units.tolist():
        cells = slice(*np.searchsorted(unit_of_cell, [unit, unit + 1]))
        first, last = int(starts[cells].min()), int(stops[cells].max())
        box = plan.box(unit // plan.units_per_block, first, last)
        rows = reader.read_rows(variable, box)
        is_owned = np.zeros(len(rows), bool)
        for start, stop in zip(starts[cells].tolist(), stops[cells].tolist(), strict=True):
            is_owned[start - first : stop - first] = True
        is_owned &= plan.is_of(partition.split, first, last)
        yield _of_patches(variable, partition, box, rows if is_owned.all() else rows[is_owned])


def _of_patches(variable: Variable, partition: Partition, box: Box, rows: Array) -> Array:
    """Return rows of a box without the places that patches of other splits cover."""
    bounds = {dim: (start, stop) for dim, start, stop in box.block}
    for number, axis in enumerate(variable.row_axes, start=1):
        start, stop = bounds.get(variable.dims[axis], (0, variable.row_shape[number - 1]))
        places = partition.plan.places_of(partition.split, variable.dims[axis], start, stop)
        rows = rows if places is None else np.take(rows, places, axis=number)
    return rows


def merge_moments(parts: list[dict[str, Moments]]) -> dict[str, Moments]:
    """Add the moments of several partitions, in the order given."""
    merged = dict(parts[0])
    for part in parts[1:]:
        merged = {name: merged[name] + part[name] for name in merged}
    return merged


def scalings_of(moments: dict[str, Moments], variables: tuple[Variable, ...]) -> dict[str, Scaling]:
    """Return means and standard deviations by variable; values that never change are divided by 1.

    Raises
    ------
    NonFiniteData
        A mean or a standard deviation is not finite.
    """
    return {v.name: _scaling(v, moments[v.name]) for v in variables if v.name in moments}


def _scaling(variable: Variable, moments: Moments) -> Scaling:
    std = moments.std
    if not (np.isfinite(moments.mean).all() and np.isfinite(std).all()):
        raise NonFiniteData(
            f"data.normalize: {variable.name} has no finite mean and standard deviation.",
            "Repair or mask the data, or leave it out of data.normalize.",
        )
    # integers are summed exactly: theirs is 0 if they are constant
    exact = holds_integers(np.dtype(variable.dtype), variable.encoding)
    std = np.where(std > (0.0 if exact else CONSTANT * np.abs(moments.mean)), std, 1.0)
    rest = tuple(moments.rest.tolist()) if (np.abs(moments.rest) > NEGLIGIBLE * std).any() else ()
    return Scaling(tuple(moments.mean.tolist()), tuple(std.tolist()), variable.mean_axes or (), rest)
