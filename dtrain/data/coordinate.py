"""The coordinate of the sample dimension: described with the samples, read to find rows that are no neighbours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.data.cf import step_text, texts_of
from dtrain.data.column import DATES, NUMBERS, ColumnReader, describe_column, find_coordinate
from dtrain.data.encoding import Array, is_missing
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
from dtrain.data.read.inventory import of_each
from dtrain.data.read.store import ReadStore
from dtrain.data.samples import Coordinate, Samples
from dtrain.errors import CoordinateJumps

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
    rows = samples.moving[0].shape[samples.moving[0].sample_axis]
    found = find_coordinate(store, samples.config.group, (v.name for v in samples.moving), dim, rows)
    if isinstance(found, str):
        return found
    name, named = found
    dtype = np.dtype(named.array.dtype)
    if dtype.kind not in NUMBERS + DATES or named.categories is not None:
        return f"the coordinate {name} holds neither numbers nor dates ({dtype})"
    return describe_column(samples.path, name, named)


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
    if samples.members:
        return _of_stores(samples, of_each(samples, find_gaps))
    if samples.config.gaps == "allow":
        return Gaps(text='windows may cross them (data.gaps = "allow")')
    if isinstance(samples.coordinate, str):
        return Gaps(text=f"unchecked: {samples.coordinate or 'the coordinate was not described'}")
    reader, mode = _StepsReader(samples, samples.coordinate), samples.config.gaps
    middle, rows = middle_steps(reader.blocks), _Rows()
    ascends = middle is not None and largest_step(middle) > 0
    for some in jumps_of(reader.blocks, largest_step(middle) if middle is not None and ascends else math.inf):
        rows.add(some, keep=mode != "auto" or not too_many(rows.count + len(some), reader.steps))
    is_refused = {"auto": too_many(rows.count, reader.steps), "drop": False, "error": rows.count > 0}[mode]
    if is_refused or (reader.steps and not ascends):
        raise _refused(samples, reader, rows, middle)
    return Gaps(jumps=as_text(rows.kept), text=_text(reader, rows, middle))


def _of_stores(samples: Samples, found: Sequence[Gaps]) -> Gaps:
    """Return where windows must not cross in any of several stores that are one."""
    with_jumps = [number for number, one in enumerate(found) if one.jumps]
    jumps = [np.fromstring(found[number].jumps, np.int64, sep=" ") + samples.begins[number] for number in with_jumps]
    number = with_jumps[0] if with_jumps else 0
    first = f"{samples.members[number].path}: {found[number].text}"
    count = f"{sum(map(len, jumps)):,}" if jumps else "none"
    where = f"in {len(with_jumps):,} of {len(found):,} stores" if jumps else f"in {len(found):,} stores"
    is_same = len({one.text for one in found}) == 1
    text = found[0].text if is_same and not jumps else f"{count} {where}; {first}"
    return Gaps(jumps=as_text(jumps), text=f"{text}; no window crosses from one store into another")


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


class _StepsReader:
    """Reads the steps of a coordinate, block by block.

    Parameters
    ----------
    samples : Samples
    coordinate : Coordinate
    """

    def __init__(self, samples: Samples, coordinate: Coordinate) -> None:
        self.coordinate = coordinate
        self.steps = samples.num_samples - samples.first_row - 1
        """Number of steps between the selected rows."""
        self._reader = ColumnReader(samples, coordinate, samples.first_row, samples.num_samples)
        self._kept: list[Steps] | None = None

    def values(self, start: int, stop: int) -> Array:
        """Return stored values of rows ``start:stop``."""
        return self._reader.values(start, stop)

    def blocks(self) -> Iterator[Steps]:
        """Yield all steps; they are read once if they are few."""
        if self._kept is not None:
            return iter(self._kept)
        if self.steps <= KEPT_STEPS:
            self._kept = list(self._read())
            return iter(self._kept)
        return self._read()

    def _read(self) -> Iterator[Steps]:
        last: Array | None = None
        for first, values in self._reader.blocks():
            if last is not None:
                yield self._steps(first - 1, np.concatenate([last, values[:1]]))
            if len(values) > 1:
                yield self._steps(first, values)
            last = values[-1:].copy()

    def _steps(self, first: int, values: Array) -> Steps:
        encoding = self.coordinate.variable.encoding
        if encoding is None:
            return steps_between(first, values, np.zeros(len(values), bool))
        if encoding.unsigned:
            values = values.view(encoding.unsigned)
        return steps_between(first, values, is_missing(values, encoding), int(np.sign(encoding.scale or 1.0)))


# Told -----------------------------------------------------------------------------------------------------


def _refused(samples: Samples, reader: _StepsReader, rows: _Rows, middle: Middle | None) -> CoordinateJumps:
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


def _text(reader: _StepsReader, rows: _Rows, middle: Middle | None) -> str:
    """Return what `plan` prints."""
    name = reader.coordinate.variable.name
    if middle is None:
        return f"none: {name} has no steps"
    steps = f"in {reader.steps:,} steps of {name} (median {_median_text(reader, middle)})"
    if not rows.count:
        return f"none {steps}"
    return f"{rows.count:,} {steps}: windows across them are left out; the first is {_jump_text(reader, rows.shown[0])}"


def _jump_text(reader: _StepsReader, row: int) -> str:
    before, after = texts_of(
        reader.coordinate.variable.name, reader.values(row - 1, row + 1), reader.coordinate.attributes
    )
    return f"from {before} to {after} at row {row:,}"


def _median_text(reader: _StepsReader, middle: Middle) -> str:
    dtype = np.dtype(reader.coordinate.variable.dtype)
    return step_text((middle[0] + middle[1]) / 2, dtype, reader.coordinate.attributes)
