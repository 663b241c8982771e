"""Means of the training rows at each place, by period: one streamed pass, in bounded memory, merged in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Floats, difference
from dtrain.data.load.statistics import owned_boxes
from dtrain.data.plan.hashing import Ints
from dtrain.data.plan.partition import Partition
from dtrain.data.plan.units import Box
from dtrain.data.read.boxes import BoxReader
from dtrain.data.sparse import SparseRows
from dtrain.data.variable import Variable

NO_PERIOD = 255
"""In the place of a row's period: it has none, and counts in no mean."""
BYTES_A_PLACE = 12
"""Of sum and count."""


@dataclass(frozen=True, slots=True, eq=False)
class PlaceSums:
    """Sums and counts of the finite values of a variable."""

    sums: Floats
    """float64[period, *row], in decoded units."""
    counts: npt.NDArray[np.int32]

    def __add__(self, other: PlaceSums) -> PlaceSums:
        return PlaceSums(self.sums + other.sums, self.counts + other.counts)

    @property
    def means(self) -> npt.NDArray[np.float32]:
        """float32[period, *row]; NaN where no training row has a value."""
        empty = np.full(self.sums.shape, np.nan)
        means: Floats = np.divide(self.sums, self.counts, out=empty, where=self.counts > 0)
        return means.astype(np.float32)


def partition_sums(
    reader: BoxReader,
    partition: Partition,
    names: Iterable[str],
    periods: npt.NDArray[np.uint8],
    count: int,
    on_unit: Callable[[int, int], None] = lambda units, rows: None,
) -> dict[str, PlaceSums]:
    """Return, by variable, the sums of the rows that a partition owns: one pass, unit by unit.

    Parameters
    ----------
    reader : BoxReader
    partition : Partition
    names : iterable of str
        Dense variables with the sample dimension.
    periods : uint8[row]
        The period of each row of the store; `NO_PERIOD` where it has none.
    count : int
        Number of periods.
    on_unit : callable
        Called after each unit with the number of units and rows that are done.
    """
    found: dict[str, PlaceSums] = {}
    units = rows = 0
    for name in names:
        variable = reader.samples.variable(name)
        shape = (count, *variable.row_shape)
        own = found[name] = PlaceSums(np.zeros(shape), np.zeros(shape, np.int32))
        for box, is_owned, stored in owned_boxes(reader, partition, variable):
            assert not isinstance(stored, SparseRows)
            values = difference(stored[is_owned], variable.encoding, np.zeros(1))
            _add(own, values, periods[box.start : box.stop][is_owned], _places(partition, variable, box))
            units, rows = units + 1, rows + len(values)
            on_unit(units, rows)
    return found


def _add(own: PlaceSums, values: Floats, periods: npt.NDArray[np.uint8], places: tuple[Sequence[Ints], bool]) -> None:
    """Add rows of a box to the sums at some places of a row."""
    index, is_whole = places
    is_finite = np.isfinite(values)
    values[~is_finite] = 0.0
    for period in np.unique(periods[periods != NO_PERIOD]).tolist():
        chosen = periods == period
        at = period if is_whole else (period, *np.ix_(*index))
        inside = slice(None) if is_whole else np.ix_(*(one - one[0] for one in index))
        own.sums[at] += values[chosen].sum(axis=0)[inside]
        own.counts[at] += is_finite[chosen].sum(axis=0, dtype=np.int32)[inside]


def _places(partition: Partition, variable: Variable, box: Box) -> tuple[Sequence[Ints], bool]:
    """Return the places of a row that a box covers and the partition's patches hold, by axis; and if they are all."""
    bounds = {dim: (start, stop) for dim, start, stop in box.block}
    index, is_whole = [], True
    for axis, length in zip(variable.row_axes, variable.row_shape, strict=True):
        dim = variable.dims[axis]
        start, stop = bounds.get(dim, (0, length))
        kept = partition.plan.places_of(partition.split, dim, start, stop)
        index.append(start + (np.arange(stop - start) if kept is None else kept))
        is_whole &= kept is None and (start, stop) == (0, length)
    return index, is_whole


def add_sums(ones: Mapping[str, PlaceSums], others: Mapping[str, PlaceSums]) -> dict[str, PlaceSums]:
    """Add the sums of two partitions."""
    return {name: own + others[name] for name, own in ones.items()}
