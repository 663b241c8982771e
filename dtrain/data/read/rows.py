"""The protocol of readers, and the axes of rows in memory: sample axis first, without dropped dimensions."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from dtrain.data.encoding import Array
from dtrain.data.variable import Select, Variable


class ChunkReader(Protocol):
    """Reads and decodes selections of variables. Several threads may share one."""

    def read(self, variable: Variable, select: Select, out: Array) -> None:
        """Fill `out` with a selection of a variable.

        Parameters
        ----------
        variable : Variable
        select : Select
            In stored rows and columns.
        out : array[rows, *row]
            C-contiguous, of the variable's `kept_dtype`.

        Raises
        ------
        ChunkMissing, ChunkUndecodable, DataChanged
            Names the array and the chunk.
        StoreForbidden, StoreUnavailable
            The server refuses or fails.
        """


def as_stored(variable: Variable, select: Select, rows: Array) -> Array:
    """Return a view of rows with the axes of the array: the sample axis where it is stored, and the dropped axes."""
    lengths = [len(range(*part)) for part in select]
    if variable.sample_axis <= 0:
        return rows.reshape(lengths)
    axis = variable.sample_axis
    return np.moveaxis(rows.reshape(lengths[axis], *lengths[:axis], *lengths[axis + 1 :]), 0, axis)
