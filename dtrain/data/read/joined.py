"""Read several stores as one: each part of a unit by the reader of its store. Few stores are open at a time."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Protocol

import numpy as np

from dtrain.data.encoding import Array, unpack
from dtrain.data.members import KEPT_STORES, codes_in, differ
from dtrain.data.plan.units import Box, rows_selection
from dtrain.data.read.units import Kept, UnitReader
from dtrain.data.samples import Samples
from dtrain.data.variable import Variable
from dtrain.errors import UnsuitableVariable


class BoxReader(Protocol):
    """Reads the boxes of some samples. Several threads may share one."""

    @property
    def samples(self) -> Samples:
        """What is read."""
        ...

    @property
    def statics(self) -> dict[str, Array]:
        """The variables without the sample dimension, read once."""
        ...

    def read_into(self, box: Box, out: Mapping[str, Array]) -> int:
        """Fill the first rows of each variable with the rows that the anchors of a box need; return decoded bytes."""
        ...

    def read_rows(self, variable: Variable, box: Box) -> Array:
        """Return the rows of one variable that a box covers, without a halo, as they are kept in memory."""
        ...


def open_reader(
    samples: Samples, reader: str = "auto", threads: int = 1, absent: tuple[tuple[int, int], ...] = ()
) -> BoxReader:
    """Return the reader of some samples, of one store or of several that are one; parameters as of `UnitReader`."""
    if samples.members:
        return JoinedReader(samples, reader, threads, absent)
    return UnitReader(samples, reader, threads, absent)


class JoinedReader:
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
        self._kept = [Kept(preloaded) for _ in samples.members]
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
        """Fill, by variable, the first rows of ``out[name]`` with the rows that the anchors of a box need.

        As `UnitReader.read_into`.
        """
        decoded = 0
        for number, start, stop in self._anchors(box):
            for variable in self.samples.moving:
                low, high = self.samples.reach(variable.name)
                decoded += self._fill(variable, number, (start + low, stop + high), box, low, out[variable.name])
        return decoded

    def read_rows(self, variable: Variable, box: Box) -> Array:
        """Return the rows of one variable that a box covers, without a halo; those between two stores are zeros."""
        row = [len(range(*part)) for part in (rows_selection(variable, box)[axis] for axis in variable.row_axes)]
        rows = np.zeros((box.stop - box.start, *row), variable.kept_dtype)
        for number, start, stop in self._anchors(box):
            self._fill(variable, number, (start, stop), box, 0, rows)
        return rows

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
