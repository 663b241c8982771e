"""Read several stores as one: each part of a unit by the reader of its store. Few stores are open at a time."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np

from dtrain.data.encoding import Array, unpack
from dtrain.data.members import KEPT_STORES, codes_in, differ
from dtrain.data.plan.partition import with_values
from dtrain.data.plan.units import Box, DataPlan, rows_selection
from dtrain.data.read.boxes import BoxReader
from dtrain.data.read.kept import Kept
from dtrain.data.read.sparse import sparse_rows
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import Samples
from dtrain.data.sparse import SparseRows, Starts, starts_of
from dtrain.data.variable import Variable
from dtrain.errors import UnsuitableVariable


def open_reader(
    samples: Samples, reader: str = "auto", threads: int = 1, absent: tuple[tuple[int, int], ...] = ()
) -> BoxReader:
    """Return the reader of some samples, of one store or of several that are one; parameters as of `UnitReader`."""
    if samples.members:
        return JoinedReader(samples, reader, threads, absent)
    return UnitReader(samples, reader, threads, absent)


def values_counted(samples: Samples, plan: DataPlan) -> DataPlan:
    """Return the plan as it is with sparse variables: where their rows begin is read, to know the largest unit.

    Raises
    ------
    ChunkMissing, ChunkUndecodable
        Names the array and the chunk.
    """
    if not samples.sparse:
        return plan
    reader = open_reader(samples, samples.config.reader, absent=plan.absent)
    return with_values(samples, plan, tuple(int(reader.count_values(v, plan).max(initial=0)) for v in samples.sparse))


class JoinedReader(BoxReader):
    """Reads units of several stores that are one.

    Rows between two stores are not filled: they are no samples. What outlives an open store (preloaded rows, versions
    of files) is kept for each; the least recently used stores are given up.

    Parameters
    ----------
    samples : Samples
        With members.
    reader, threads, absent
        As of `UnitReader`.

    Raises
    ------
    DtrainError
        As `UnitReader`, when the first unit of a store is read.
    """

    def __init__(
        self, samples: Samples, reader: str = "auto", threads: int = 1, absent: tuple[tuple[int, int], ...] = ()
    ) -> None:
        self.samples = samples
        self._options = (reader, threads)
        self._runs = samples.row_runs
        self._absent = [_within(absent, run) for run in self._runs]
        preloaded = frozenset(v.name for v in samples.preloaded)
        starting = threading.Lock()
        self._kept = [Kept(preloaded, starting=starting) for _ in samples.members]
        by_name = {v.name: [one.variable(v.name) for one in samples.members] for v in samples.moving}
        self._unlike = {name for name, own in by_name.items() if differ(own)}
        self._open: OrderedDict[int, UnitReader] = OrderedDict()
        self._opening = [threading.Lock() for _ in samples.members]
        self._lock = threading.Lock()

    def member(self, number: int) -> UnitReader:
        """Return the reader of a store."""
        with self._opening[number]:
            with self._lock:
                if number in self._open:
                    self._open.move_to_end(number)
                    return self._open[number]
            opened = UnitReader(self.samples.members[number], *self._options, self._absent[number], self._kept[number])
            with self._lock:
                self._open[number] = opened
                while len(self._open) > KEPT_STORES:
                    self._open.popitem(last=False)
            return opened

    @cached_property
    def statics(self) -> dict[str, Array]:
        """The variables without the sample dimension, of the first store.

        Raises
        ------
        UnsuitableVariable
            They differ in another store.
        """
        statics = self.member(0).statics
        for number in range(1, len(self.samples.members) if statics else 0):
            for name, values in self.member(number).statics.items():
                if values.tobytes() != statics[name].astype(values.dtype).tobytes():
                    raise UnsuitableVariable(
                        f"{self.samples.members[number].path}: {name} has other values than in "
                        f"{self.samples.members[0].path}.",
                        f"It has no dimension {self.samples.sample_dim}, so that all samples have the same: write it "
                        "alike in all stores, or once for each row.",
                    )
        return statics

    def read_into(self, box: Box, out: Mapping[str, Array]) -> int:
        """Fill, by variable, the first rows of ``out[name]`` with the rows that the anchors of a box need."""
        decoded = 0
        for number, start, stop in self._anchors(box):
            for variable in self.samples.moving:
                if variable.sparse is None:
                    low, high = self.samples.reach(variable.name)
                    decoded += self._fill(variable, number, (start + low, stop + high), box, low, out[variable.name])
        for variable in self.samples.sparse:
            if variable.sparse is not None:
                decoded += self._fill_sparse(variable, box, sparse_rows(variable.sparse, out))
        return decoded

    def fill(self, variable: Variable, box: Box, out: Array) -> int:
        """Fill the first rows of `out` with the rows of a dense variable that a box covers, without a halo."""
        return sum(
            self._fill(variable, number, (start, stop), box, 0, out) for number, start, stop in self._anchors(box)
        )

    def read_sparse(self, variable: Variable, start: int, stop: int) -> SparseRows:
        """Return some rows of a sparse variable, without a halo; those between two stores have no values."""
        box = Box(start, stop)
        parts = [
            (first - start, self.member(number).read_sparse(variable, first - begin, after - begin))
            for number, first, after in self._anchors(box)
            for begin in (self._runs[number][0],)
        ]
        lengths = np.zeros(stop - start, np.int64)
        for place, rows in parts:
            lengths[place : place + len(rows)] = np.diff(rows.starts)
        values = [rows.values.astype(variable.kept_dtype, copy=False) for _, rows in parts]
        return SparseRows(np.concatenate(values), np.concatenate([r.columns for _, r in parts]), starts_of(lengths))

    def count_values(self, variable: Variable, plan: DataPlan) -> Starts:
        """Return, by unit of a plan, the values of a sparse variable, with the halo; of all stores together."""
        begins = enumerate(self.samples.begins)
        return sum(
            (self.member(number).count_values(variable, plan, begin) for number, begin in begins),
            np.zeros(plan.units_per_block, np.int64),
        )

    def _anchors(self, box: Box) -> Iterator[tuple[int, int, int]]:
        """Yield each store that has rows in a box: its number, its first row in it, and the one after its last."""
        runs = self._runs
        for number in range(max(0, bisect_right(self.samples.begins, box.start) - 1), len(runs)):
            begin, first, stop = runs[number]
            if begin >= box.stop:
                return
            if max(box.start, first) < min(box.stop, stop):
                yield number, max(box.start, first), min(box.stop, stop)

    def _fill(self, variable: Variable, number: int, rows: tuple[int, int], box: Box, low: int, out: Array) -> int:
        """Fill the rows of one store, those that it has; values are decoded where stores hold them in different ways.

        Parameters
        ----------
        variable : Variable
        number : int
            Of the store.
        rows : (int, int)
            The first row that its anchors need, and the one after the last; they may reach beyond the store.
        box : Box
        low : int
            The row ``box.start + low`` is the first of `out`.
        out : array[rows, *row]
        """
        begin, first, stop = self._runs[number]
        start, after = max(rows[0], first), min(rows[1], stop)
        if start >= after:
            return 0
        reader, own_box = self.member(number), Box(start - begin, after - begin, box.block)
        own, place = reader.samples.variable(variable.name), out[start - box.start - low :]
        if variable.name not in self._unlike:
            return reader.fill(own, own_box, place)
        row = (len(range(*rows_selection(own, own_box)[axis])) for axis in own.row_axes)
        stored = np.empty((after - start, *row), own.kept_dtype)
        decoded = reader.fill(own, own_box, stored)
        place[tuple(map(slice, stored.shape))] = unpack(_same_codes(stored, variable, own), own.encoding)
        return decoded

    def _fill_sparse(self, variable: Variable, box: Box, out: SparseRows) -> int:
        """Fill the first places of `out` with the rows that a box needs, store after store; values follow each other.

        Rows between two stores have no values.
        """
        (low, high), decoded, row, count = self.samples.reach(variable.name), 0, 0, 0
        for number, start, stop in self._anchors(box):
            begin, first, after = self._runs[number]
            start, stop = max(start + low, first), min(stop + high, after)
            if start >= stop:
                continue
            place = start - box.start - low
            part = SparseRows(out.values[count:], out.columns[count:], out.starts[place:])
            decoded += self.member(number).sparse[variable.name].read_into(start - begin, stop - begin, part, count)
            out.starts[row:place] = count
            row = place + stop - start + 1
            out.starts[place:row] += count
            count = int(out.starts[row - 1])
        out.starts[row:] = count
        return decoded


def _same_codes(stored: Array, joined: Variable, own: Variable) -> Array:
    """Return codes of one store as those of the same categories in all stores; other values as they are."""
    if own.categories is None or not len(table := codes_in(joined, own)):
        return stored
    is_known = (stored >= 0) & (stored < len(table))
    codes: Array = np.where(is_known, table[np.where(is_known, stored, 0)], stored)
    return codes


def _within(runs: tuple[tuple[int, int], ...], member: tuple[int, int, int]) -> tuple[tuple[int, int], ...]:
    """Return the runs of rows that lie in a store, in its own rows."""
    begin, first, stop = member
    cut = ((max(start, first) - begin, min(after, stop) - begin) for start, after in runs)
    return tuple((start, after) for start, after in cut if start < after)
