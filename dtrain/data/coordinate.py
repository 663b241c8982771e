"""The coordinate of the sample dimension: described with the samples, read to find rows that are no neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from dtrain.data.cf import CF_ATTRIBUTES, TIME_ATTRIBUTES, encoding_of, step_text, texts_of
from dtrain.data.dataset import NamedArray, find_named
from dtrain.data.encoding import Array, DType, is_missing
from dtrain.data.plan.gaps import (
    KEPT_STEPS,
    LARGEST_SHARE,
    Middle,
    Steps,
    as_text,
    jumps_of,
    largest_step,
    middle_steps,
    steps_between,
    too_many,
)
from dtrain.data.plan.hashing import Ints
from dtrain.data.read.faults import Faults, chunk_missing
from dtrain.data.read.open import open_arrays
from dtrain.data.read.presence import absent_chunks
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore
from dtrain.data.read.zarr import ZarrReader, best_settings
from dtrain.data.samples import Coordinate, Samples
from dtrain.data.variable import Variable
from dtrain.errors import CoordinateJumps, DtrainError, StoreUnavailable, UnsuitableVariable, one_line

BLOCK_ROWS = 1 << 18
"""About so many rows are read at once."""
SHOWN = 3
"""Jumps that a message shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """Where windows must not cross, and what `plan` says about it."""

    jumps: str = ""
    """`DataPlan.jumps`."""
    text: str = ""
    """Empty if samples have no windows."""


# Described ------------------------------------------------------------------------------------------------


def coordinate_of(samples: Samples, store: ReadStore) -> Coordinate | str:
    """Return the coordinate that has to be read, or why it cannot be; an empty text if it need not be."""
    if not samples.has_windows or samples.config.gaps == "allow":
        return ""
    dim = samples.sample_dim
    if all(variable.name == dim for variable in samples.moving):
        return f"{dim} is read as data"
    found = _find(samples, store)
    if isinstance(found, str):
        return found
    name, named = found
    rows = samples.moving[0].shape[samples.moving[0].sample_axis]
    if named.array.shape != (rows,) or named.dims != (dim,):
        return f"{name} has no coordinate of one dimension"
    dtype = np.dtype(named.array.dtype)
    if dtype.kind not in "iufmM" or named.categories is not None:
        return f"the coordinate {name} holds neither numbers nor dates ({dtype})"
    return _described(samples.path, name, named, dtype)


def _find(samples: Samples, store: ReadStore) -> tuple[str, NamedArray] | str:
    """Return name and array of the coordinate, or why there is none: in the groups of variables, the nearest first."""
    groups = [variable.name.split("/")[:-1] for variable in samples.moving]
    places = ([*parts[:depth], samples.sample_dim] for parts in groups for depth in range(len(parts), -1, -1))
    for name in dict.fromkeys(map("/".join, places)):
        try:
            named = find_named(store, samples.config.group, name)
        except StoreUnavailable:
            raise
        except DtrainError as error:  # a dtype or codec that zarr does not know, or a server that hides what is absent
            return f"the coordinate {name} cannot be opened: {one_line(error)}"
        if named is not None:
            return name, named
    return f"{samples.sample_dim} has no coordinate"


def _described(path: str, name: str, named: NamedArray, dtype: DType) -> Coordinate | str:
    array, known = named.array, (*CF_ATTRIBUTES, *TIME_ATTRIBUTES) if dtype.kind in "iuf" else ()
    attributes = {key: named.attributes[key] for key in known if key in named.attributes}
    try:
        encoding = encoding_of(path, name, attributes, dtype, zarr_format=array.metadata.zarr_format)
    except UnsuitableVariable as error:
        return one_line(error)
    shape, chunks, objects = (
        tuple(int(n) for n in lengths) for lengths in (array.shape, array.chunks, array.shards or array.chunks)
    )
    variable = Variable(
        name=name,
        dims=named.dims,
        shape=shape,
        dtype=dtype.str,
        chunks=chunks,
        objects=objects,
        sample_axis=0,
        checksums=False,
        select=((0, shape[0], 1),),
        encoding=encoding,
    )
    return Coordinate(variable=variable, attributes=attributes)


# Read -----------------------------------------------------------------------------------------------------


def find_gaps(samples: Samples) -> Gaps:
    """Find the rows that windows must not cross, as ``data.gaps`` says.

    The coordinate is read in blocks, up to six times if it is long and its steps all differ.

    Raises
    ------
    CoordinateJumps
        There are more jumps than ``data.gaps`` allows, or the coordinate descends.
    ChunkMissing, ChunkUndecodable, DataChanged
        Names the chunk of the coordinate.
    StoreForbidden, StoreUnavailable
        The server refuses or fails.
    """
    if not samples.has_windows:
        return Gaps()
    if samples.config.gaps == "allow":
        return Gaps(text='windows may cross them (data.gaps = "allow")')
    if isinstance(samples.coordinate, str):
        return Gaps(text=f"unchecked: {samples.coordinate or 'the coordinate was not described'}")
    reader, mode = _CoordinateReader(samples, samples.coordinate), samples.config.gaps
    middle, rows = middle_steps(reader.blocks), _Rows()
    ascends = middle is not None and largest_step(middle) > 0
    for some in jumps_of(reader.blocks, largest_step(middle) if middle is not None and ascends else math.inf):
        rows.add(some, keep=mode != "auto" or not too_many(rows.count + len(some), reader.steps))
    is_refused = {"auto": too_many(rows.count, reader.steps), "drop": False, "error": rows.count > 0}[mode]
    if is_refused or (reader.steps and not ascends):
        raise _refused(samples, reader, rows, middle)
    return Gaps(jumps=as_text(rows.kept), text=_text(reader, rows, middle))


class _Rows:
    """The rows that jumps lead to: all that are kept, and the first ones."""

    def __init__(self) -> None:
        self.count = 0
        self.kept: list[Ints] = []
        self.shown: list[int] = []

    def add(self, rows: Ints, *, keep: bool) -> None:
        """Count further rows."""
        self.count += len(rows)
        self.shown += rows[: SHOWN - len(self.shown)].tolist()
        if keep:
            self.kept.append(rows)


class _CoordinateReader:
    """Reads the steps of a coordinate, block by block.

    Parameters
    ----------
    samples : Samples
    coordinate : Coordinate
    """

    def __init__(self, samples: Samples, coordinate: Coordinate) -> None:
        self.first, self.stop = samples.first_row, samples.num_samples
        self.coordinate = coordinate
        config = samples.config.model_copy(update={"missing": "fill"})
        both = replace(samples, config=config, variables=(*samples.variables, coordinate.variable))
        with best_settings(both):
            store, arrays = open_arrays(both)
        store.watch(arrays[coordinate.variable.name])
        if samples.config.missing in ("auto", "error"):
            _check_presence(both, store, arrays, coordinate.variable)
        self._reader = ZarrReader(store, arrays, Faults(both, arrays))
        self._kept: list[Steps] | None = None

    def values(self, start: int, stop: int) -> Array:
        """Return stored values of rows ``start:stop``, in native byte order."""
        variable = self.coordinate.variable
        out = np.empty(stop - start, variable.dtype)
        self._reader.read(variable, variable.selection(start, stop), out)
        return out.astype(out.dtype.newbyteorder("="), copy=False)

    @property
    def steps(self) -> int:
        """Number of steps between the selected rows."""
        return self.stop - self.first - 1

    def blocks(self) -> Iterator[Steps]:
        """Yield all steps; they are read once if they are few."""
        if self._kept is not None:
            return iter(self._kept)
        if self.steps <= KEPT_STEPS:
            self._kept = list(self._read())
            return iter(self._kept)
        return self._read()

    def _read(self) -> Iterator[Steps]:
        chunk = self.coordinate.variable.chunk_rows
        together = chunk * max(1, BLOCK_ROWS // chunk)
        last: Array | None = None
        for start in range(self.first - self.first % together, self.stop, together):
            first = max(start, self.first)
            values = self.values(first, min(start + together, self.stop))
            if last is not None:
                yield self._steps(first - 1, np.concatenate([last, values[:1]]))
            for low in range(0, len(values) - 1, BLOCK_ROWS):  # a chunk may be long
                yield self._steps(first + low, values[low : low + BLOCK_ROWS + 1])
            last = values[-1:].copy()

    def _steps(self, first: int, values: Array) -> Steps:
        encoding = self.coordinate.variable.encoding
        if encoding is None:
            return steps_between(first, values, np.zeros(len(values), bool))
        if encoding.unsigned:
            values = values.view(encoding.unsigned)
        return steps_between(first, values, is_missing(values, encoding), int(np.sign(encoding.scale or 1.0)))


def _check_presence(samples: Samples, store: ReadStore, arrays: Mapping[str, ArrayLike], variable: Variable) -> None:
    """Raise for a missing chunk of more than one row; of one row, zarr leaves it out if it holds the fill value."""
    for chunk in absent_chunks(samples, store, arrays, variable, full=True):
        if chunk.stop - chunk.start > 1:
            raise chunk_missing(samples, variable, chunk.key, 1, chunk.inner)


# Told -----------------------------------------------------------------------------------------------------


def _refused(samples: Samples, reader: _CoordinateReader, rows: _Rows, middle: Middle | None) -> CoordinateJumps:
    name, share = samples.sample_dim, rows.count / reader.steps
    shown = "; ".join(_jump_text(reader, row) for row in rows.shown)
    times = f"{rows.count:,} time{'s' if rows.count > 1 else ''}"
    jumps = f"{samples.path}: {name} jumps {times} in {reader.steps:,} steps ({share:.1%}): {shown}"
    ways = '"drop" to leave out the windows across jumps, or "allow" to use them all'
    if middle is None or largest_step(middle) <= 0:
        return CoordinateJumps(
            f"{samples.path}: {name} does not ascend in {rows.count:,} of {reader.steps:,} steps: {shown}.",
            f'Sort the store along {name}, or set data.gaps = "allow" to use windows in stored order.',
        )
    if samples.config.gaps == "error":
        return CoordinateJumps(f'{jumps} (data.gaps = "error").', f"Repair the store, or set data.gaps = {ways}.")
    return CoordinateJumps(
        f"{jumps}; the median step is {_median_text(reader, middle)}.",
        f'data.gaps = "auto" leaves out at most {LARGEST_SHARE:.0%}. Set {ways}.',
    )


def _text(reader: _CoordinateReader, rows: _Rows, middle: Middle | None) -> str:
    """Return what `plan` prints."""
    name = reader.coordinate.variable.name
    if middle is None:
        return f"none: {name} has no steps"
    steps = f"in {reader.steps:,} steps of {name} (median {_median_text(reader, middle)})"
    if not rows.count:
        return f"none {steps}"
    return f"{rows.count:,} {steps}: windows across them are left out; the first is {_jump_text(reader, rows.shown[0])}"


def _jump_text(reader: _CoordinateReader, row: int) -> str:
    before, after = texts_of(
        reader.coordinate.variable.name, reader.values(row - 1, row + 1), reader.coordinate.attributes
    )
    return f"from {before} to {after} at row {row:,}"


def _median_text(reader: _CoordinateReader, middle: Middle) -> str:
    dtype = np.dtype(reader.coordinate.variable.dtype)
    return step_text((middle[0] + middle[1]) / 2, dtype, reader.coordinate.attributes)
