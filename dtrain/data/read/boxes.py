"""What every reader of boxes does, whether samples lie in one store or in several that are one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from dtrain.data.encoding import Array
from dtrain.data.plan.units import Box, DataPlan, rows_selection
from dtrain.data.samples import Samples
from dtrain.data.sparse import SparseRows, Starts
from dtrain.data.variable import Variable


class BoxReader(ABC):
    """Reads the boxes of some samples. Several threads may share one."""

    samples: Samples
    """What is read."""

    @property
    @abstractmethod
    def statics(self) -> dict[str, Array]:
        """The variables without the sample dimension, read once."""

    def read(self, box: Box) -> dict[str, tuple[int, Array]]:
        """Return, by variable, the number of the first row, and the rows that the anchors of a box need.

        Raises
        ------
        ChunkMissing, ChunkUndecodable, NonFiniteData, DataChanged
            Names the array and the chunk.
        StoreForbidden, StoreUnavailable
            The server refuses or fails.
        """
        units = {}
        for variable in self.samples.moving:
            low, high = self.samples.reach(variable.name)
            rows = Box(box.start + low, box.stop + high, box.block)
            units[variable.name] = (rows.start, self.read_rows(variable, rows))
        return units

    @abstractmethod
    def read_into(self, box: Box, out: Mapping[str, Array]) -> int:
        """Fill, by variable, the first rows of ``out[name]`` with the rows that the anchors of a box need.

        Returns the number of decoded bytes, without those of preloaded variables.

        Parameters
        ----------
        box : Box
        out : dict of array[rows, *row]
            C-contiguous, of the variable's `kept_dtype`; the first row becomes ``box.start + reach(name)[0]``. A box
            whose block is smaller fills the first places of each row. A sparse variable has its three arrays, by name.
            Rows between two stores are not filled.
        """

    def read_rows(self, variable: Variable, box: Box) -> Array:
        """Return the rows of one variable that a box covers, without a halo, as they are kept in memory.

        Rows of a sparse variable have all their columns; rows between two stores are zeros.
        """
        row = [len(range(*part)) for part in (rows_selection(variable, box)[axis] for axis in variable.row_axes)]
        if variable.sparse is not None:
            return self.read_sparse(variable, box.start, box.stop).dense(math.prod(row)).reshape(-1, *row)
        rows = np.zeros((box.stop - box.start, *row), variable.kept_dtype)
        self.fill(variable, box, rows)
        return rows

    @abstractmethod
    def fill(self, variable: Variable, box: Box, out: Array) -> int:
        """Fill the first rows of `out` with the rows of a dense variable that a box covers, without a halo.

        Returns the number of decoded bytes; none if the variable is preloaded.

        Parameters
        ----------
        variable : Variable
        box : Box
        out : array[rows, *row]
            As of `read_into`.
        """

    @abstractmethod
    def read_sparse(self, variable: Variable, start: int, stop: int) -> SparseRows:
        """Return some rows of a sparse variable, without a halo; rows between two stores have no values."""

    @abstractmethod
    def count_values(self, variable: Variable, plan: DataPlan) -> Starts:
        """Return, by unit of a plan, the values of a sparse variable, with the halo; of all stores together."""
