"""Read units: choose a reader for each variable, read the rows that the anchors of a box need, check the values."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np

from dtrain.data.encoding import Array
from dtrain.data.plan.readers import choose_readers
from dtrain.data.plan.units import Box, DataPlan, box_slices, rows_selection
from dtrain.data.read.boxes import BoxReader
from dtrain.data.read.faults import Faults
from dtrain.data.read.files import FilesReader
from dtrain.data.read.kept import Kept
from dtrain.data.read.open import open_arrays
from dtrain.data.read.rows import ChunkReader
from dtrain.data.read.sparse import SparseReader, sparse_rows
from dtrain.data.read.values import Values
from dtrain.data.read.zarr import ZarrReader, ZarrsReader, best_settings, open_with_zarrs
from dtrain.data.samples import Samples
from dtrain.data.sparse import SparseRows, Starts
from dtrain.data.variable import Select, Variable
from dtrain.errors import InvalidConfig


class UnitReader(BoxReader):
    """Reads units of all variables of some samples, and checks them. Several threads may share it.

    Parameters
    ----------
    samples : Samples
    reader : str
        ``auto``, ``numcodecs``, ``zarrs`` or ``zarr``; all give the same bits.
    threads : int
        Threads that zarrs decodes with.
    absent : tuple of (int, int)
        Runs of rows that nobody needs (`DataPlan.absent`): chunks that are missing there are no fault.
    kept : Kept, optional
        Of the reader before, that was given up to keep few stores open.

    Raises
    ------
    InvalidConfig
        `reader` cannot read a variable.
    DataNotFound, NotZarr
        The group or an array is not there any more, or its metadata cannot be read.
    StoreForbidden, StoreUnavailable
        The server refuses or fails.
    """

    def __init__(
        self,
        samples: Samples,
        reader: str = "auto",
        threads: int = 1,
        absent: tuple[tuple[int, int], ...] = (),
        kept: Kept | None = None,
    ) -> None:
        self.samples = samples
        self.kept = kept or Kept(preloaded=frozenset(v.name for v in samples.preloaded))
        self.readers = choose_readers(samples, reader)
        """The reader of each variable, and the reason for it."""
        with best_settings(samples):
            self.store, self.arrays = open_arrays(samples)
        for array in self.arrays.values():
            self.store.watch(array)
        self.faults = Faults(samples, self.arrays, absent, self.kept.versions)
        self._values = Values(samples, self.faults, absent)
        self._chunk_readers = self._open_readers(reader, threads)
        self.sparse = {
            v.name: SparseReader(samples, v, v.sparse, self._fill, self.faults, self._values, self.kept)
            for v in samples.sparse
            if v.sparse is not None
        }
        """Of each sparse variable."""

    def _open_readers(self, wanted: str, threads: int) -> dict[str, ChunkReader]:
        by_zarrs = {name: self.arrays[name] for name, (chosen, _) in self.readers.items() if chosen == "zarrs"}
        if by_zarrs:
            by_zarrs, refused = open_with_zarrs(self.store.path, by_zarrs, threads)
            for name, why in refused.items():
                if wanted == "zarrs":
                    raise InvalidConfig(
                        f'data.reader = "zarrs" does not read {name}: {why}.', 'Set data.reader = "auto", or "zarr".'
                    )
                self.readers[name] = ("zarr", f"zarrs refuses it: {why}")
        by_numcodecs = {name: self.arrays[name] for name, (chosen, _) in self.readers.items() if chosen == "numcodecs"}
        by_zarr = ZarrReader(self.store, self.arrays, self.faults)
        readers: dict[str, ChunkReader] = {
            "zarr": by_zarr,
            "zarrs": ZarrsReader(self.store, by_zarrs, self.faults, by_zarr),
            "numcodecs": FilesReader(self.store, by_numcodecs, self.faults),
        }
        return {name: readers[chosen] for name, (chosen, _) in self.readers.items()}

    def read_into(self, box: Box, out: Mapping[str, Array]) -> int:
        """Fill, by variable, the first rows of ``out[name]`` with the rows that the anchors of a box need."""
        decoded = 0
        for variable in self.samples.moving:
            low, high = self.samples.reach(variable.name)
            if variable.sparse is None:
                decoded += self.fill(variable, Box(box.start + low, box.stop + high, box.block), out[variable.name])
            else:
                rows = sparse_rows(variable.sparse, out)
                decoded += self.sparse[variable.name].read_into(box.start + low, box.stop + high, rows)
        return decoded

    def fill(self, variable: Variable, box: Box, out: Array) -> int:
        """Fill the first rows of `out` with the rows of a dense variable that a box covers, without a halo."""
        select, decoded = rows_selection(variable, box), 0
        shape = (box.stop - box.start, *(len(range(*select[axis])) for axis in variable.row_axes))
        place = out[: box.stop - box.start]
        rows = place if place.shape == shape else np.empty(shape, place.dtype)  # readers fill contiguous memory
        if variable.name in self.kept.preloaded:
            first = box.start - self.samples.first_row
            rows[...] = self._preload(variable)[(slice(first, first + len(rows)), *box_slices(variable, box))]
        else:
            self._fill(variable, select, rows)
            decoded = rows.nbytes
        self._check(variable, select, rows)
        if rows is not place:
            place[tuple(map(slice, shape))] = rows
        return decoded

    def _preload(self, variable: Variable) -> Array:
        """Return all rows of a preloaded variable; they are read at the first call, and checked when they are used."""
        with self.kept.lock:
            if variable.name not in self.kept.rows:
                samples = self.samples
                rows = np.empty((samples.num_samples - samples.first_row, *variable.row_shape), variable.kept_dtype)
                self._fill(variable, variable.selection(samples.first_row, samples.num_samples), rows)
                self.kept.rows[variable.name] = rows
            return self.kept.rows[variable.name]

    def read_sparse(self, variable: Variable, start: int, stop: int) -> SparseRows:
        """Return some rows of a sparse variable, without a halo."""
        return self.sparse[variable.name].rows(start, stop)

    def count_values(self, variable: Variable, plan: DataPlan, begin: int = 0) -> Starts:
        """Return, by unit of a plan, the values of a sparse variable; row 0 of the store is row `begin` of the plan."""
        return self.sparse[variable.name].unit_values(plan, begin)

    @cached_property
    def statics(self) -> dict[str, Array]:
        """The variables without the sample dimension, read once."""
        statics = {}
        for variable in self.samples.variables:
            if variable.is_static:
                values = np.empty(variable.row_shape, variable.kept_dtype)
                self._fill(variable, variable.select, values)
                self._check(variable, variable.select, values)
                statics[variable.name] = values
        return statics

    def _fill(self, variable: Variable, select: Select, out: Array) -> None:
        try:
            self._chunk_readers[variable.name].read(variable, select, out)
        except MemoryError as error:
            raise self.faults.no_memory(variable, select) from error

    def _check(self, variable: Variable, select: Select, values: Array) -> None:
        self._values.check_integers(variable, select, values)
        if variable.name == self.samples.config.weight:
            self._values.check_weight(variable, select, values)
        if self.samples.config.non_finite == "error":
            self._values.check_finite(variable, select, values)
