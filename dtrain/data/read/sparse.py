"""Read rows of a sparse matrix: where they begin, once; then the values of a unit, checked as they are read.

Columns that ``data.isel`` does not select are dropped as soon as their values are decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Array
from dtrain.data.plan.footprint import row_starts_together
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.faults import Faults
from dtrain.data.read.kept import Kept
from dtrain.data.read.values import Values
from dtrain.data.samples import Samples
from dtrain.data.sparse import SparseRows, Starts, pieces, starts_of
from dtrain.data.variable import Select, Sparse, Variable
from dtrain.errors import DataChanged

Fill: TypeAlias = Callable[[Variable, Select, Array], None]
"""Fills an array with a selection of a stored array."""
Flags: TypeAlias = npt.NDArray[np.bool_]


class SparseReader:
    """Reads rows of a sparse variable. Several threads may share it.

    Parameters
    ----------
    samples : Samples
    variable : Variable
    sparse : Sparse
        Its arrays.
    fill : callable
        Reads them.
    faults : Faults
    values : Values
        Checks them.
    kept : Kept
        Row starts are kept there, and all rows if the variable is preloaded.
    """

    def __init__(
        self,
        samples: Samples,
        variable: Variable,
        sparse: Sparse,
        fill: Fill,
        faults: Faults,
        values: Values,
        kept: Kept,
    ) -> None:
        self._samples, self._variable, self._sparse = samples, variable, sparse
        self._fill, self._faults, self._values, self._kept = fill, faults, values, kept
        minor = 1 - variable.sample_axis
        self._width = variable.shape[minor]
        self._selected = range(*variable.select[minor])

    # Where rows begin ---------------------------------------------------------------------------------------

    @property
    def starts(self) -> Starts:
        """Where each selected row begins among the values of the store, and where the last one ends; read once.

        Raises
        ------
        ChunkUndecodable, ChunkMissing
            They do not ascend, or do not fit the values that there are.
        """
        name = self._variable.name
        if name not in self._kept.starts:
            with self._kept.starting:
                if name not in self._kept.starts:
                    self._kept.starts[name] = self._read_starts()
        return self._kept.starts[name]

    def _read_starts(self) -> Starts:
        indptr, first, stop = self._sparse.indptr, self._samples.first_row, self._samples.num_samples + 1
        starts, step = np.empty(stop - first, np.int64), row_starts_together(self._sparse.indptr)
        begin = first
        while begin < stop:
            end = min(stop, (begin // step + 1) * step)
            self._fill(indptr, ((begin, end, 1),), starts[begin - first : end - first])
            self._check_starts(starts, begin - first, end - first)
            begin = end
        if starts[-1] > self._sparse.count or (stop > self._sparse.rows and starts[-1] != self._sparse.count):
            values = f"{self._sparse.data.name} holds {self._sparse.count:,} values"
            raise self._faults.damaged(indptr, stop - 1, f", where {self._variable.name} ends; {values}")
        return starts

    def _check_starts(self, starts: Starts, begin: int, end: int) -> None:
        """Refuse starts that descend, or give a row more values than it has columns."""
        indptr, first = self._sparse.indptr, self._samples.first_row
        if begin == 0 and (starts[0] < 0 or (first == 0 and starts[0] != 0)):
            raise self._faults.damaged(indptr, first, "; the first row begins at 0")
        begin = max(begin - 1, 0)
        lengths = np.diff(starts[begin:end])
        wrong = np.flatnonzero((lengths < 0) | (lengths > self._width))
        if len(wrong):
            row = begin + int(wrong[0])
            what = f"; row {first + row:,} begins at {starts[row]:,} and has {self._width:,} columns"
            raise self._faults.damaged(indptr, first + row + 1, what)

    def unit_values(self, plan: DataPlan, begin: int = 0) -> Starts:
        """Return how many values each unit of a plan has, with its halo; row 0 of the store is row `begin` of it."""
        (low, high), rows = self._samples.reach(self._variable.name), len(self.starts) - 1
        first, before = np.arange(plan.units_per_block) * plan.unit_rows, begin + self._samples.first_row
        begins = np.clip(first + low - before, 0, rows)
        ends = np.clip(np.minimum(first + plan.unit_rows, plan.num_samples) + high - before, 0, rows)
        counts: Starts = self.starts[ends] - self.starts[begins]
        return counts

    # Rows ---------------------------------------------------------------------------------------------------

    def rows(self, start: int, stop: int) -> SparseRows:
        """Return some rows.

        Raises
        ------
        ChunkMissing, ChunkUndecodable, NonFiniteData, DataChanged
            Names the array and the chunk.
        """
        count = int(self.starts[stop - self._samples.first_row] - self.starts[start - self._samples.first_row])
        rows = self._empty(stop - start, count)
        self.read_into(start, stop, rows)
        return rows.part(0, len(rows))

    def read_into(self, start: int, stop: int, out: SparseRows, before: int = 0) -> int:
        """Fill the first places of `out` with some rows, and return the decoded bytes.

        Parameters
        ----------
        start, stop : int
            In stored rows.
        out : SparseRows
            It may hold more than these rows have.
        before : int
            Values of the unit in the stores before this one, where several are one.

        Raises
        ------
        ChunkMissing, ChunkUndecodable, NonFiniteData, DataChanged
            Names the array and the chunk.
        """
        first = self._samples.first_row
        if self._variable.name in self._kept.preloaded:
            _copy(self._preload(), start - first, stop - first, out)
            return 0
        return self._read(start, stop, out, before)

    def _preload(self) -> SparseRows:
        """Return all rows; they are read and checked at the first call."""
        with self._kept.lock:
            if self._variable.name not in self._kept.sparse:
                first, stop, count = self._samples.first_row, self._samples.num_samples, self.starts[-1]
                rows = self._empty(stop - first, int(count - self.starts[0]))
                self._read(first, stop, rows)
                self._kept.sparse[self._variable.name] = rows
            return self._kept.sparse[self._variable.name]

    def _empty(self, rows: int, count: int) -> SparseRows:
        columns, values = np.empty(count, self._sparse.columns_dtype), np.empty(count, self._variable.kept_dtype)
        return SparseRows(values, columns, np.empty(rows + 1, np.int64))

    def _read(self, start: int, stop: int, out: SparseRows, before: int = 0) -> int:
        sparse, first = self._sparse, self._samples.first_row
        known = self.starts[start - first : stop - first + 1]
        begin, end = int(known[0]), int(known[-1])
        if end - begin > len(out.values):
            together = f" ({before + end - begin:,} with the stores before it)" if before else ""
            raise DataChanged(
                f"{self._samples.path}: rows {start:,} to {stop - 1:,} of {self._variable.name} hold {end - begin:,} "
                f"values{together}, more than when the run was planned ({before + len(out.values):,}).",
                "Restore the data, or train under another --run NAME.",
            )
        rows = SparseRows(out.values[: end - begin], out.columns[: end - begin], out.starts[: len(known)])
        np.subtract(known, begin, out=rows.starts)
        if begin < end:
            where = ((begin, end, 1),)
            self._fill(sparse.indices, where, rows.columns)
            self._fill(sparse.data, where, rows.values)
            self._check(start, begin, rows)
            if self._samples.config.non_finite == "error":
                self._values.check_finite(sparse.data, where, rows.values)
            if len(self._selected) < self._width:
                _keep_columns(rows, self._selected)
        return rows.values.nbytes + rows.columns.nbytes

    def _check(self, start: int, begin: int, rows: SparseRows) -> None:
        """Refuse columns that are not there or stand twice in a row; values of others than selected become 0."""
        for low, high in pieces(rows.starts):
            some = rows.starts[low : high + 1]
            within = slice(int(some[0]), int(some[-1]))
            columns = rows.columns[within]
            if not len(columns):
                continue
            if columns.min() < 0 or columns.max() >= self._width:
                place = begin + within.start + int(np.argmax((columns < 0) | (columns >= self._width)))
                what = f"; {self._variable.name} has {self._width:,} columns"
                raise self._faults.damaged(self._sparse.indices, place, what)
            if not _ascend(columns, some):
                self._check_twice(start + low, columns, some)
            if len(self._selected) < self._width:
                rows.values[within][~_is_in(columns, self._selected)] = 0

    def _check_twice(self, row: int, columns: Array, starts: Starts) -> None:
        """Refuse a column that stands twice in a row: which of the values counts, or their sum, is anyone's guess."""
        places = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        places *= self._width
        places += columns
        places.sort()
        twice = np.flatnonzero(places[1:] == places[:-1])
        if len(twice):
            within, column = divmod(int(places[twice[0]]), self._width)
            raise self._faults.repeated(self._variable, row + within, column)


def sparse_rows(sparse: Sparse, arrays: Mapping[str, Array]) -> SparseRows:
    """Return the memory of a sparse variable, given that of its arrays by name."""
    return SparseRows(arrays[sparse.data.name], arrays[sparse.indices.name], arrays[sparse.indptr.name])


def _copy(kept: SparseRows, first: int, stop: int, out: SparseRows) -> None:
    begin, end = int(kept.starts[first]), int(kept.starts[stop])
    out.values[: end - begin] = kept.values[begin:end]
    out.columns[: end - begin] = kept.columns[begin:end]
    np.subtract(kept.starts[first : stop + 1], begin, out=out.starts[: stop - first + 1])


def _ascend(columns: Array, starts: Starts) -> bool:
    """Return True if the columns of each row ascend, and none stands twice."""
    ascends = columns[1:] > columns[:-1]
    borders = starts[1:-1] - starts[0] - 1
    ascends[borders[(borders >= 0) & (borders < len(ascends))]] = True
    return bool(ascends.all())


def _is_in(columns: Array, selected: range) -> Flags:
    is_in: Flags = (columns >= selected.start) & (columns < selected.stop)
    if selected.step > 1:
        is_in &= (columns - selected.start) % selected.step == 0
    return is_in


def _keep_columns(rows: SparseRows, selected: range) -> None:
    """Move the values of selected columns to the front, in place; columns are counted among the selected ones."""
    done = begin = 0
    for low, high in list(pieces(rows.starts)):
        end = int(rows.starts[high])
        is_kept = _is_in(rows.columns[begin:end], selected)
        kept = starts_of(is_kept)
        after, stops = done + int(kept[-1]), rows.starts[low + 1 : high + 1]
        rows.values[done:after] = rows.values[begin:end][is_kept]
        rows.columns[done:after] = (rows.columns[begin:end][is_kept] - selected.start) // selected.step
        stops[...] = done + kept[stops - begin]
        done, begin = after, end
