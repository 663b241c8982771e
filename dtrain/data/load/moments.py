"""Count, mean and squared differences of the values of a variable, merged exactly: of dense rows and of sparse ones."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np

from dtrain.data.encoding import Array, Encoding, Floats, difference
from dtrain.data.sparse import SparseRows, pieces

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


# Sparse rows ----------------------------------------------------------------------------------------------


def sparse_moments(rows: SparseRows, width: int, axes: tuple[int, ...] = ()) -> Moments:
    """Return the moments of rows of a sparse variable with all columns: those without a value count as 0.

    Values that are stored are summed in two passes, corrected as in `moments_of`, and merged with the zeros.

    Parameters
    ----------
    rows : SparseRows
        At least one; NaN is left out.
    width : int
        Number of columns.
    axes : tuple of int
        ``(0,)``: each column has its own mean; ``()``: all have one.
    """
    most_values = max(PIECE_VALUES, MIN_VALUES * width)
    with np.errstate(all="ignore"):  # values that are not finite give moments that are not: refused by name
        return reduce(
            operator.add,
            (_sparse_moments(rows.part(*piece), width, axes) for piece in pieces(rows.starts, most_values)),
        )


def _sparse_moments(rows: SparseRows, width: int, axes: tuple[int, ...]) -> Moments:
    group = rows.columns if axes else np.zeros(len(rows.columns), np.intp)
    means, total = (width, len(rows)) if axes else (1, len(rows) * width)
    values = rows.values.astype(np.float64)
    missing = np.zeros(means, np.int64)
    if (is_missing := np.isnan(values)).any():
        missing = np.bincount(group[is_missing], minlength=means)
        values, group = values[~is_missing], group[~is_missing]
    stored, zero = _stored_moments(values, group, means), np.zeros(means)
    return stored + Moments(total - missing - stored.count, zero, zero, zero)


def _stored_moments(values: Floats, group: Array, means: int) -> Moments:
    """Return the moments of values by the number of their mean; `values` are changed."""
    count = np.bincount(group, minlength=means).astype(np.float64)

    def per_value(sums: Array) -> Floats:
        return np.divide(sums, count, out=np.zeros(means), where=count > 0)

    mean = per_value(np.bincount(group, values, means))
    values -= mean[group]
    left = np.bincount(group, values, means)  # what rounding has left of the sum
    values *= values
    squares = np.bincount(group, values, means) - left * per_value(left)
    mean, rest = _two_sum(mean, per_value(left))
    return Moments(count, mean, rest, np.maximum(squares, 0.0))
