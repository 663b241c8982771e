"""Mean and standard deviation of the training rows: one pass in bounded memory, merged exactly and in order."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Array, Scaling, holds_integers
from dtrain.data.load.moments import Moments, moments_of, sparse_moments
from dtrain.data.plan.partition import Partition
from dtrain.data.plan.units import Box, cell_bounds
from dtrain.data.read.boxes import BoxReader
from dtrain.data.read.values import not_finite
from dtrain.data.sparse import SparseRows
from dtrain.data.variable import Variable
from dtrain.errors import NonFiniteData

CONSTANT = 1e-12
"""Decoded floats whose standard deviation is at most this share of their mean are constant, but for rounding."""
NEGLIGIBLE = 2.0**-44
"""A share of the standard deviation that the model's float32 does not show, but for values that are as near to 0."""


def partition_moments(
    reader: BoxReader,
    partition: Partition,
    names: Iterable[str],
    most_units: int | None = None,
    on_unit: Callable[[int, int], None] = lambda units, rows: None,
) -> dict[str, Moments]:
    """Return, by variable, the moments of the rows that a partition owns: one pass, unit by unit.

    Where samples with values that are not finite are left out, or kept in part, only finite values count.

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
            if isinstance(rows, SparseRows):
                more = sparse_moments(rows, math.prod(variable.row_shape), axes)
            else:
                own = _finite(variable, rows) if reader.samples.config.min_valid is not None else rows
                more = moments_of(own, variable.encoding, axes)
            moments[name] = moments[name] + more if name in moments else more
            units, count = units + 1, count + len(rows)
            on_unit(units, count)
    return moments


def _finite(variable: Variable, rows: Array) -> Array:
    """Return stored rows with NaN in place of values that are not finite: `moments_of` leaves it out."""
    bad = not_finite(variable, rows) if rows.dtype.kind == "f" else None
    return rows if bad is None else np.where(bad, rows.dtype.type(np.nan), rows)


def _owned_rows(reader: BoxReader, partition: Partition, variable: Variable) -> Iterator[Array | SparseRows]:
    """Yield, unit by unit, the stored rows that a partition owns; a static variable is one row."""
    if variable.is_static:
        yield _of_patches(variable, partition, Box(0, 1), reader.statics[variable.name][None])
        return
    for box, is_owned, rows in owned_boxes(reader, partition, variable):
        if isinstance(rows, SparseRows):
            yield rows if is_owned.all() else rows.chosen(is_owned)
        else:
            yield _of_patches(variable, partition, box, rows if is_owned.all() else rows[is_owned])


def owned_boxes(
    reader: BoxReader, partition: Partition, variable: Variable
) -> Iterator[tuple[Box, npt.NDArray[np.bool_], Array | SparseRows]]:
    """Yield, unit by unit, the box of a partition's rows, which of them it owns, and the stored rows of a variable."""
    plan = partition.plan
    starts, stops = cell_bounds(plan, partition.cells)
    unit_of_cell = partition.cells // plan.cells_per_unit
    for unit in partition.units.tolist():
        cells = slice(*np.searchsorted(unit_of_cell, [unit, unit + 1]))
        first, last = int(starts[cells].min()), int(stops[cells].max())
        box = plan.box(unit // plan.units_per_block, first, last)
        is_sparse = variable.sparse is not None
        rows = reader.read_sparse(variable, first, last) if is_sparse else reader.read_rows(variable, box)
        is_owned = np.zeros(len(rows), bool)
        for start, stop in zip(starts[cells].tolist(), stops[cells].tolist(), strict=True):
            is_owned[start - first : stop - first] = True
        yield box, is_owned & plan.is_of(partition.split, first, last), rows


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
