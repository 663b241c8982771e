"""Mean and standard deviation of the training rows, from one pass in bounded memory, merged exactly in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Scaling, unpack
from dtrain.data.plan.partition import Partition
from dtrain.data.plan.units import cell_bounds
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import Variable
from dtrain.errors import NonFiniteData

Floats = npt.NDArray[np.float64]

CHANNELS = ("channel", "channels", "band", "bands", "feature", "features", "variable", "level", "gene", "c")
"""Names of dimensions along which each place has a mean of its own."""


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


def channel_axis(variable: Variable) -> int | None:
    """Return which axis of a row has a mean and deviation for each place; None: one for all values.

    A dimension that is named as one of `CHANNELS`; else the only one (features), or the first of three or more
    (channels of an image or a volume).
    """
    dims = [variable.dims[axis].lower() for axis in variable.row_axes]
    for axis, dim in enumerate(dims):
        if dim in CHANNELS:
            return axis
    return 0 if len(dims) == 1 or len(dims) >= 3 else None


def moments_of(values: npt.NDArray[Any], axis: int | None) -> Moments:
    """Return the moments of rows, by channel; NaN is left out.

    Parameters
    ----------
    values : array[row, ...]
    axis : int or None
        The channel axis of a row.
    """
    channels = np.moveaxis(values, axis + 1, -1) if axis is not None else values[..., None]
    flat = channels.reshape(-1, channels.shape[-1]).astype(np.float64)
    there = ~np.isnan(flat)
    count = there.sum(axis=0).astype(np.float64)
    flat[~there] = 0
    mean = np.divide(flat.sum(axis=0), count, out=np.zeros_like(count), where=count > 0)
    flat -= mean
    flat[~there] = 0
    return Moments(count, mean, np.square(flat, out=flat).sum(axis=0))


def partition_moments(
    reader: UnitReader,
    partition: Partition,
    names: Iterable[str],
    most_units: int | None = None,
    on_unit: Callable[[int, int], None] = lambda units, rows: None,
) -> dict[str, Moments]:
    """Return, by variable, the moments of the rows that a partition owns: one pass, unit by unit.

    `most_units` makes it an estimate, from the first units. `on_unit` is told how many units and rows are done.
    """
    found: dict[str, Moments] = {}
    units = count = 0
    for name in names:
        variable = reader.samples.variable(name)
        axis = channel_axis(variable)
        for rows in itertools.islice(_rows(reader, partition, variable), most_units):
            more = moments_of(unpack(rows, variable.encoding), axis)
            found[name] = found[name] + more if name in found else more
            units, count = units + 1, count + len(rows)
            on_unit(units, count)
    return found


def _rows(reader: UnitReader, partition: Partition, variable: Variable) -> Iterator[npt.NDArray[Any]]:
    if variable.is_static:
        yield reader.statics[variable.name][None]
        return
    starts, stops = cell_bounds(partition.plan, partition.cells)
    owner = partition.cells // partition.plan.cells_per_unit
    for unit in partition.units.tolist():
        of_unit = slice(*np.searchsorted(owner, [unit, unit + 1]))
        first, last = int(starts[of_unit].min()), int(stops[of_unit].max())
        rows = reader.read_rows(variable, first, last)
        owned = np.zeros(len(rows), bool)
        for start, stop in zip(starts[of_unit].tolist(), stops[of_unit].tolist(), strict=True):
            owned[start - first : stop - first] = True
        yield rows if owned.all() else rows[owned]


def merge_moments(pieces: list[dict[str, Moments]]) -> dict[str, Moments]:
    """Add moments in the order given."""
    found = dict(pieces[0])
    for piece in pieces[1:]:
        found = {name: found[name] + piece[name] for name in found}
    return found


def scalings_of(moments: dict[str, Moments], variables: tuple[Variable, ...]) -> dict[str, Scaling]:
    """Return mean and deviation by variable; a channel that never changes is divided by 1.

    Raises
    ------
    NonFiniteData
        A channel has no finite mean.
    """
    found = {}
    for variable in variables:
        if variable.name in moments:
            of = moments[variable.name]
            std = np.sqrt(np.divide(of.squares, of.count, out=np.zeros_like(of.count), where=of.count > 0))
            if not (np.isfinite(of.mean).all() and np.isfinite(std).all()):
                raise NonFiniteData(
                    f"data.normalize: {variable.name} has no finite mean and standard deviation.",
                    "Repair or mask the data, or leave it out of data.normalize.",
                )
            std = np.where(std > 0, std, 1.0)
            found[variable.name] = Scaling(tuple(of.mean.tolist()), tuple(std.tolist()), channel_axis(variable))
    return found
