"""Sparse rows of units in the arena -> dense fields of batches: columns without a value are 0."""

from __future__ import annotations

import math

import numpy as np

from dtrain.data.encoding import Array, Scaling
from dtrain.data.load.buffers import PIECE_BYTES, FieldSpec
from dtrain.data.load.slots import Rows
from dtrain.data.samples import Field, Samples
from dtrain.data.sparse import SparseRows, pieces, scatter, starts_of
from dtrain.data.variable import Sparse


class SparseGatherer:
    """Writes one sparse field of samples out of the arena.

    Parameters
    ----------
    samples : Samples
    field : Field
    scaling : Scaling or None
    sparse : Sparse
        The arrays of the variable.
    """

    is_cut = False

    def __init__(self, samples: Samples, field: Field, scaling: Scaling | None, sparse: Sparse) -> None:
        self.field, self.sparse = field, sparse
        variable = samples.variable(field.name)
        self._row_shape = variable.row_shape
        self._standard = None if scaling is None else scaling.against(field.name, self._row_shape)
        self.spec = FieldSpec(samples.field_shape(field), variable.model_dtype)
        self._offsets = np.array(field.offsets) - samples.reach(field.name)[0]

    def fill(self, out: Array, arena: SparseRows, rows: Rows) -> None:
        """Fill ``out[sample, ...]`` from the arena's slots.

        Parameters
        ----------
        out : array
            C-contiguous, of the model's dtype.
        arena : SparseRows
            Its arrays have an axis of slots before their own.
        rows : Rows
        """
        row = (rows.row[:, None] + self._offsets).ravel()
        slot = np.repeat(rows.slot, len(self._offsets))
        first = arena.starts[slot, row]
        length = arena.starts[slot, row + 1] - first
        first += slot * arena.values.shape[1]
        values, columns = arena.values.reshape(-1), arena.columns.reshape(-1)
        dense = out.reshape(len(row), math.prod(self._row_shape))
        most_rows = max(1, PIECE_BYTES // dense[0].nbytes) if len(row) else 1
        for begin, end in pieces(starts_of(length), most_rows=most_rows):
            some = dense[begin:end]
            place = some if self._standard is None else np.empty(some.shape, values.dtype)
            place[...] = 0
            scatter(place, values, columns, first[begin:end], length[begin:end])
            if self._standard is not None:
                standard = self._standard.apply(place.reshape(-1, *self._row_shape), None)
                with np.errstate(over="ignore", invalid="ignore"):  # under non_finite = "allow"
                    some[...] = standard.reshape(some.shape)
