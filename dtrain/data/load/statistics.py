"""Mean and standard deviation of the training rows: one pass in bounded memory, merged exactly and in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Scaling, unpack
from dtrain.data.load.buffers import Array
from dtrain.data.plan.partition import Partition
from dtrain.data.plan.units import cell_bounds
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import Variable
from dtrain.errors import NonFiniteData

Floats = npt.NDArray[np.float64]

CHANNELS = ("channel", "channels", "band", "bands", "feature", "features", "variable", "level", "gene", "c")
"""Names of dimensions along which every index has a mean of its own."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared differences from the mean, of each channel."""

    count: Floats
    mean: Floats
    squares: Floats

    def __add__(self, other: Moments) -> Moments:
        """Merge two sets.

        References
        ----------
        Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample variances, 1979.
        """
        count = self.count + other.count
        share = np.divide(other.count, count, out=np.zeros_like(count), where=count > 0)
        step = other.mean - self.mean
        return Moments(
            count,
            self.mean + step * share,
            self.squares + other.squares + step * step * self.count * share,
        )

    @property
    def std(self) -> Floats:
        """Standard deviation by channel; 0 for a channel without values."""
        variance = np.divide(self.squares, self.count, out=np.zeros_like(self.count), where=self.count > 0)
        return np.sqrt(variance)


def channel_axis(variable: Variable) -> int | None:
    """Return the axis of a row along which every index has its own mean; None: one mean for all values.

    A dimension that is named as one of `CHANNELS`; else the only dimension (features), or the first of three or more
    (channels of an image or a volume).
    """
    dims = [variable.dims[axis].lower() for axis in variable.row_axes]
    for axis, dim in enumerate(dims):
        if dim in CHANNELS:
            return axis
    return 0 if len(dims) == 1 or len(dims) >= 3 else None


def moments_of(values: Array, axis: int | None) -> Moments:
    """Return the moments of rows, by channel; NaN is left out.

    Parameters
    ----------
    values : array[row, ...]
    axis : int or None
        The channel axis of a row.
    """
    channels = np.moveaxis(values, axis + 1, -1) if axis is not None else values[..., None]
    flat = channels.reshape(-1, channels.shape[-1]).astype(np.float64)
    present = ~np.isnan(flat)
    count = present.sum(axis=0).astype(np.float64)
    flat[~present] = 0
    mean = np.divide(flat.sum(axis=0), count, out=np.zeros_like(count), where=count > 0)
    flat -= mean
    flat[~present] = 0
    return Moments(count, mean, np.square(flat, out=flat).sum(axis=0))


def partition_moments(
    reader: UnitReader,
    partition: Partition,
    names: Iterable[str],
    most_units: int | None = None,
    on_unit: Callable[[int, int], None] = lambda units, rows: None,
) -> dict[str, Moments]:
    """Return, by variable, the moments of the rows that a partition owns: one pass, unit by unit.

    Parameters
    ----------
    reader : UnitReader
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
    for name in names:
        variable = reader.samples.variable(name)
        axis = channel_axis(variable)
        for rows in itertools.islice(_owned_rows(reader, partition, variable), most_units):
            more = moments_of(unpack(rows, variable.encoding), axis)
            moments[name] = moments[name] + more if name in moments else more
            units, count = units + 1, count + len(rows)
            on_unit(units, count)
    return moments


def _owned_rows(reader: UnitReader, partition: Partition, variable: Variable) -> Iterator[Array]:
    """Yield, unit by unit, the stored rows that a partition owns; a static variable is one row."""
    if variable.is_static:
        yield reader.statics[variable.name][None]
        return
    starts, stops = cell_bounds(partition.plan, partition.cells)
    unit_of_cell = partition.cells // partition.plan.cells_per_unit
    for unit in partition.units.tolist():
        cells = slice(*np.searchsorted(unit_of_cell, [unit, unit + 1]))
        first, last = int(starts[cells].min()), int(stops[cells].max())
        rows = reader.read_rows(variable, first, last)
        is_owned = np.zeros(len(rows), bool)
        for start, stop in zip(starts[cells].tolist(), stops[cells].tolist(), strict=True):
            is_owned[start - first : stop - first] = True
        yield rows if is_owned.all() else rows[is_owned]


def merge_moments(parts: list[dict[str, Moments]]) -> dict[str, Moments]:
    """Add the moments of several partitions, in the order given."""
    merged = dict(parts[0])
    for part in parts[1:]:
        merged = {name: merged[name] + part[name] for name in merged}
    return merged


def scalings_of(moments: dict[str, Moments], variables: tuple[Variable, ...]) -> dict[str, Scaling]:
    """Return mean and standard deviation by variable; a channel that never changes is divided by 1.

    Raises
    ------
    NonFiniteData
        A channel has no finite mean.
    """
    return {v.name: _scaling(v, moments[v.name]) for v in variables if v.name in moments}


def _scaling(variable: Variable, moments: Moments) -> Scaling:
    std = moments.std
    if not (np.isfinite(moments.mean).all() and np.isfinite(std).all()):
        raise NonFiniteData(
            f"data.normalize: {variable.name} has no finite mean and standard deviation.",
            "Repair or mask the data, or leave it out of data.normalize.",
        )
    std = np.where(std > 0, std, 1.0)
    return Scaling(tuple(moments.mean.tolist()), tuple(std.tolist()), channel_axis(variable))
