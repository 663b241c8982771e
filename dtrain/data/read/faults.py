"""Faults of stored objects: missing, truncated, undecodable, modified. The one place for their sentences.

Readers report observations; `Faults` decides which of them are faults, and raises an error that names the chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Array
from dtrain.data.plan.footprint import format_bytes
from dtrain.data.plan.missing import absence_of, stands_for
from dtrain.data.read.codecs import TRUNCATED
from dtrain.data.read.local import Version
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import key_of
from dtrain.data.samples import Samples
from dtrain.data.variable import Select, Variable
from dtrain.errors import (
    ChunkMissing,
    ChunkUndecodable,
    DataChanged,
    DtrainError,
    NonFiniteData,
    OutOfMemory,
    UnsuitableVariable,
    one_line,
)

DAMAGED_INDEX = "its index is truncated or damaged"


@dataclass(frozen=True, slots=True)
class Observation:
    """A stored object, as a reader has seen it."""

    place: tuple[int, ...]
    """In the grid of the array's stored objects."""
    key: str
    is_absent: bool
    is_truncated: bool
    version: Version | None
    """None if there is no file, or the store is not local."""


class Faults:
    """Decides which stored objects of some samples are at fault. Threads may share it.

    Parameters
    ----------
    samples : Samples
    arrays : mapping of str to zarr.Array
        By variable.
    absent : tuple of (int, int)
        Runs of rows that nobody needs: chunks that are missing there are no fault.
    seen : dict of uint64[*grid], optional
        By variable, marks of the versions that were read first: 8 bytes a file, since there may be many. They are
        noted here.
    """

    def __init__(
        self,
        samples: Samples,
        arrays: Mapping[str, ArrayLike],
        absent: tuple[tuple[int, int], ...] = (),
        seen: dict[str, npt.NDArray[np.uint64]] | None = None,
    ) -> None:
        self._samples = samples
        self._arrays = arrays
        self._absent = absent
        self._seen = {} if seen is None else seen
        for v in samples.stored:
            self._seen.setdefault(v.name, np.zeros(v.grid, np.uint64))
        self._absence = {v.name: absence_of(samples, v) for v in samples.stored}
        self._gone: set[tuple[str, tuple[int, ...], bool]] = set()
        """Chunks that are not there and read as NaN, which is refused as a value: name, place, in a shard or not."""

    def looks_for_missing(self, variable: Variable) -> bool:
        """Return False if a chunk that is not there is no fault of its own."""
        absence = self._absence[variable.name]
        return absence in ("error", "skip") or (absence == "nan" and self._samples.config.non_finite == "error")

    def check(self, variable: Variable, observations: Sequence[Observation]) -> None:
        """Raise the first fault among the observations made while a selection was read.

        Raises
        ------
        ChunkUndecodable, ChunkMissing, DataChanged
        """
        for seen in observations:
            if seen.is_truncated:
                raise self.undecodable(variable, seen.key, TRUNCATED)
        for seen in observations:
            if seen.is_absent:
                self.check_missing(variable, seen.key, seen.place)
        for seen in observations:
            self.check_version(variable, seen.key, seen.place, seen.version)

    def check_missing(self, variable: Variable, key: str, place: tuple[int, ...], *, inner: bool = False) -> None:
        """Raise for a chunk that is not there, unless the fill value may stand for it or nobody needs its rows.

        Parameters
        ----------
        variable : Variable
        key : str
            The key of the object, or of the shard that should hold the chunk.
        place : tuple of int
            In the grid of stored objects; of an inner chunk, in the grid of chunks.
        inner : bool
            True for an inner chunk of a shard.
        """
        absence = self._absence[variable.name]
        if absence == "nan" and self._samples.config.non_finite == "error":
            self._gone.add((variable.name, place, inner))
        if absence in ("fill", "nan"):
            return
        if absence == "skip":
            rows = variable.chunk_rows if inner else variable.object_rows
            first = place[variable.sample_axis] * rows
            after = min(first + rows, self._samples.num_samples)
            if any(start <= first and after <= stop for start, stop in self._absent):
                return
        raise chunk_missing(self._samples, variable, key, inner=place if inner else None)

    def check_version(self, variable: Variable, key: str, place: tuple[int, ...], version: Version | None) -> None:
        """Raise if a file of a local store is another version than when it was first read."""
        if not self._samples.store.is_local:
            return
        mark = (hash(version) | 1) & (2**64 - 1)
        seen = self._seen[variable.name]
        if not seen[place]:
            seen[place] = mark
        if seen[place] != mark:
            raise DataChanged(
                f"{self._samples.path}: chunk {key} of {variable.name} has been modified since it was first read.",
                "Train on data that nobody writes to; start a new run (--run NAME) for the data as they are now.",
            )

    def undecodable(self, variable: Variable, key: str, reason: str) -> ChunkUndecodable:
        """Return the error for an object that cannot be read or decoded."""
        return ChunkUndecodable(
            f"{self._samples.path}: chunk {key} of {variable.name} cannot be decoded: {reason}",
            "Restore it from a copy of the store.",
        )

    def no_memory(self, variable: Variable, select: Select, key: str = "") -> OutOfMemory:
        """Return the error for an object, or a selection of several, that there is no memory to decode."""
        size = f"; a chunk should have {format_bytes(variable.chunk_bytes)}"
        return OutOfMemory(
            f"{self._samples.path}: no memory for {variable.name}{rows_text(variable, select)}"
            f"{f', in chunk {key}' if key else ''}{size}.",
            "Give the workers more memory (cluster.memory), or store smaller chunks. A chunk that needs far more than "
            "it should is damaged: restore it from a copy of the store.",
        )

    def vanished(self, variable: Variable, key: str) -> ChunkMissing:
        """Return the error for a shard that has gone while it was read."""
        return ChunkMissing(
            f"{self._samples.path}: chunk {key} of {variable.name} is missing; it has gone while it was read.",
            "Train on data that nobody writes to; repair the store.",
        )

    def unreliable(self, variable: Variable, select: Select, error: Exception) -> ChunkUndecodable:
        """Return the error for a selection that could not be read, while each of its objects can be read alone."""
        return ChunkUndecodable(
            f"{self._samples.path}: {variable.name}{rows_text(variable, select)} could not be read: {one_line(error)}",
            "Reading it again worked: the storage is unreliable. Run the same command again to continue.",
        )

    def damaged(self, variable: Variable, place: int, what: str) -> ChunkUndecodable:
        """Return the error for a number of an array of a sparse matrix that cannot be true."""
        return ChunkUndecodable(
            f"{self.stored(variable, [place])[0]}{what}.", "It is damaged: restore it from a copy of the store."
        )

    def repeated(self, variable: Variable, row: int, column: int) -> UnsuitableVariable:
        """Return the error for a place of a sparse matrix that has several values."""
        return UnsuitableVariable(
            f"{self._samples.path}: {variable.name} holds several values for row {row:,}, column {column:,}.",
            f"Add them up and write it again, with scipy: {variable.name.rpartition('/')[2]}.sum_duplicates().",
        )

    def is_gone(self, variable: Variable, place: list[int]) -> bool:
        """Return True if a value is of a chunk that is not there."""
        shapes = ((variable.objects, False), (variable.chunks, True))
        return any(
            (variable.name, tuple(i // size for i, size in zip(place, sizes, strict=True)), inner) in self._gone
            for sizes, inner in shapes
        )

    def stored(self, variable: Variable, place: list[int]) -> tuple[str, Array]:
        """Return a sentence that names a value and its chunk, and the stored value: in memory it may be rounded."""
        array = self._arrays[variable.name]
        key = key_of(array, tuple(i // size for i, size in zip(place, variable.objects, strict=True)))
        try:
            value = np.asarray(array[tuple(place)])
        except DtrainError:
            raise
        except Exception as error:  # zarrs looks at less of a chunk than zarr
            raise self.undecodable(variable, key, one_line(error)) from error
        value = value.astype(value.dtype.newbyteorder("="))
        return f"{self._samples.path}: {variable.name}{place} in chunk {key} is {value}", value


def chunk_missing(
    samples: Samples, variable: Variable, key: str, count: int = 1, inner: tuple[int, ...] | None = None
) -> ChunkMissing | NonFiniteData:
    """Return the error for a chunk that is not stored.

    Parameters
    ----------
    samples : Samples
    variable : Variable
    key : str
        The key of the object, or of the shard that should hold the chunk.
    count : int
        How many objects are missing.
    inner : tuple of int, optional
        The place of an inner chunk of a shard in the grid of chunks.
    """
    chunk = f"chunk {key} of {variable.name}" if inner is None else f"chunk {inner} of {variable.name}, in shard {key},"
    others = f" ({count:,} of {variable.num_objects:,} are)" if count > 1 else f" (1 of {variable.num_objects:,})"
    text = f"{samples.path}: {chunk} is missing{others if inner is None else ''}; Zarr would read it as the fill value"
    if absence_of(samples, variable) == "nan":
        return NonFiniteData(f"{text}, which means NaN.", ways(samples, variable))
    is_packed = variable.encoding is not None and variable.encoding.is_packed
    return ChunkMissing(
        f"{text}, {'which means ' if is_packed else ''}{stands_for(variable)}.", ways(samples, variable)
    )


def some_missing(samples: Samples, variable: Variable, key: str, missing: int, looked: int, count: int) -> ChunkMissing:
    """Return the error for a variable of very many stored objects, of which some were looked for."""
    return ChunkMissing(
        f"{samples.path}: chunk {key} of {variable.name} is missing: its metadata claim {count:,} stored objects, and "
        f"of {looked} that were looked for {missing} are missing.",
        ways(samples, variable),
    )


def ways(samples: Samples, variable: Variable) -> str:
    """Say what to do about a chunk that is not stored."""
    if absence_of(samples, variable) == "skip":
        return "It was there when the run was planned. Repair the store, or train under another --run NAME."
    skip = "" if variable.is_static or variable.part_of else '; to leave out their samples: data.missing = "skip"'
    if math.isnan(variable.absent_value):
        auto = 'data.missing = "auto" and ' if samples.config.missing == "error" else ""
        return f'Repair the store. If the model is to see NaN there: {auto}data.non_finite = "allow"{skip}.'
    return f'Repair the store. If it leaves out chunks that hold only the fill value: data.missing = "fill"{skip}.'


def rows_text(variable: Variable, select: Select) -> str:
    """Return the rows of a selection as ``[first:last]``; empty for a variable without the sample dimension."""
    return "" if variable.is_static else "[{}:{}]".format(*select[variable.sample_axis][:2])
