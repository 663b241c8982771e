"""What is read at once: units and their cells (`DataPlan`), and the box of rows and patched columns that a read covers.

A unit is a run of rows of all variables; where samples are patches of large rows, or of few, it is such a run times a
block of patches (`dtrain.data.plan.blocks`). Units are numbered block by block: first all rows of the first block.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.plan.blocks import BlockAxis, Blocks, KeptAxis
from dtrain.data.plan.hashing import Compact, Ints
from dtrain.data.plan.labels import LABELS, REST, has_label, places_of, runs_of
from dtrain.data.samples import Samples
from dtrain.data.variable import Select, Variable

Whole: TypeAlias = Literal["cells", "rows", "blocks"]
"""What a split holds whole: cells, all cells of the same rows, or all cells of a block."""

SplitName: TypeAlias = Literal["train", "val", "test", "all"]

LATER: Mapping[str, Any] = {
    "jumps": "",
    "blocks": (),
    "whole": "cells",
    "values": (),
    "row_labels": "",
    "tile_dim": "",
    "tile_labels": "",
    "multiplicity": "",
    "members": (),
}
"""The fields of `DataPlan` that were added after runs had been stored, and their defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlan:
    """Which samples are read by whom: resolved once, at the first start of a run, and stored in its plan.json."""

    num_samples: int
    """Rows along the sample dimension."""
    unit_rows: int
    """Rows of a unit; the last unit may be shorter."""
    cell_rows: int
    """Rows of a cell, at most `unit_rows`; cells never cross units."""
    group: int = 1
    """Number of neighbouring cells that are dealt to one owner together: the cells of a shard."""
    first_row: int = 0
    """The first row that is used."""
    absent: tuple[tuple[int, int], ...] = ()
    """Runs of rows that are not stored and not used: the first row, and the one after the last."""
    patches: int = 1
    """Number of samples that every anchor is cut into."""
    stride: int
    """Anchors are multiples of it."""
    first_offset: int
    last_offset: int
    """The rows of a sample lie between these offsets from its anchor."""
    window: int
    """Units of the mixing window: so many are shuffled into each other."""
    replicas: int
    eval_pieces: int
    """Number of tasks that an evaluation is cut into."""
    val: float
    test: float
    sequential: bool
    """True: splits are cut along the sample axis; False: they are drawn at random."""
    contiguous: bool
    """True: partitions are runs of the training split; False: they are dealt by strata."""
    shuffle: bool
    seed: int
    source: str
    """`Samples.fingerprint` of the store."""
    jumps: str = ""
    """Rows that no window may hold together with the row before them (`dtrain.data.plan.gaps`): ascending, in decimal,
    with spaces between. They may be millions; as text they take little memory."""
    blocks: tuple[BlockAxis, ...] = ()
    """How the patched dimensions are cut; none: units are whole rows."""
    whole: Whole = "cells"
    """What a split holds whole, where there are blocks."""
    values: tuple[int, ...] = ()
    """By sparse variable: the most values of a unit, with its halo; none: not known, and all of them may be."""
    row_labels: str = ""
    """The label of each row (`dtrain.data.plan.labels`), where splits are given by coordinate or by group. Shares are
    drawn from the rest."""
    tile_dim: str = ""
    """The patched dimension along which splits are given by coordinate."""
    tile_labels: str = ""
    """The label of each patch along it."""
    multiplicity: str = ""
    """How many times a pass each sample comes (`dtrain.data.plan.multiplicity`); empty: each comes once."""
    members: tuple[tuple[int, int, int], ...] = ()
    """Where several stores are one: the row that each begins at, its first row in use, and the one after its last. Rows
    between them are padding, so that no stored object lies in two units."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the plan; a cursor is valid only together with it.

        It must never change for a stored plan. A field that is added later has a default, for which the data path
        does what it did before, and is left out of the fingerprint while it has that default.
        """
        values = {name: value for name, value in asdict(self).items() if name not in LATER or value != LATER[name]}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def jump_rows(self) -> Ints:
        """The rows of `jumps`."""
        return np.fromstring(self.jumps, np.int64, sep=" ") if self.jumps else np.zeros(0, np.int64)

    @property
    def row_runs(self) -> tuple[Ints, Ints]:
        """The rows in use, but absent ones: the first of each run, and the one after its last."""
        if not self.members:
            return np.array([self.first_row]), np.array([self.num_samples])
        _, first, stop = np.array(self.members, np.int64).T
        return first, stop

    @property
    def num_rows(self) -> int:
        """Number of rows in use, absent ones among them."""
        first, stop = self.row_runs
        return int((stop - first).sum())

    def anchors_in(self, low: Ints, high: Ints) -> tuple[Ints, Ints]:
        """Return the first anchor of each run of rows of one store, and the number of its anchors.

        Anchors are multiples of `stride` in the rows of each store.
        """
        begins = np.array([begin for begin, _, _ in self.members] or [0], np.int64)
        origins = begins[np.searchsorted(begins, low, side="right") - 1]
        first: Ints = origins - (origins - low) // self.stride * self.stride
        return first, np.maximum(0, -(-(high - first) // self.stride))

    @property
    def grid(self) -> Blocks:
        """The blocks; a single one of everything if units are whole rows."""
        return Blocks(self.blocks)

    @property
    def units_per_block(self) -> int:
        """Number of units of each block."""
        return math.ceil(self.num_samples / self.unit_rows)

    @property
    def num_units(self) -> int:
        """Number of units of the whole store."""
        return self.units_per_block * len(self.grid)

    @property
    def cells_per_unit(self) -> int:
        """Number of cells of a full unit."""
        return math.ceil(self.unit_rows / self.cell_rows)

    @property
    def cells_per_block(self) -> int:
        """Number of cells of each block. The last unit of its rows may have fewer cells than others."""
        full, rest = divmod(self.num_samples, self.unit_rows)
        return full * self.cells_per_unit + math.ceil(rest / self.cell_rows)

    @property
    def block_step(self) -> int:
        """What the number of a cell grows by from block to block."""
        return self.units_per_block * self.cells_per_unit

    @property
    def num_cells(self) -> int:
        """Number of cells of the whole store."""
        return self.cells_per_block * len(self.grid)

    @property
    def most_tiles(self) -> int:
        """Samples of an anchor of the unit that has most."""
        return self.grid.most_tiles if self.blocks else self.patches

    def label_of(self, split: SplitName) -> int:
        """Return the label of the rows and patches that a split holds, or that its share is drawn from."""
        is_share = split == "train" or {"val": self.val, "test": self.test}[split] > 0
        return REST if is_share else LABELS[split]

    def holds_out(self, split: Literal["val", "test"]) -> bool:
        """Return True if a split is asked for: as a share, or by coordinate or group."""
        label = self.label_of(split)
        return label == REST or any(text and has_label(text, label) for text in (self.row_labels, self.tile_labels))

    def grid_of(self, split: SplitName) -> Blocks:
        """Return the blocks with the patches that a split holds, or that its share is drawn from."""
        if not self.tile_labels or split == "all":
            return self.grid
        return self.grid_with(self.label_of(split))

    def grid_with(self, label: int) -> Blocks:
        """Return the blocks with the patches that have a label."""
        kept = places_of(self.tile_labels, label)
        return Blocks(
            tuple(
                KeptAxis(axis.dim, axis.length, axis.size, axis.together, kept) if axis.dim == self.tile_dim else axis
                for axis in self.blocks
            )
        )

    def is_of(self, split: SplitName, start: int, stop: int) -> npt.NDArray[np.bool_]:
        """Return which of some rows a split holds, or its share is drawn from."""
        if self.row_labels and split != "all":
            begins, ends = runs_of(self.row_labels, self.label_of(split))
        elif self.members:
            begins, ends = self.row_runs
        else:
            return np.ones(stop - start, bool)
        some = slice(np.searchsorted(ends, start, side="right"), np.searchsorted(begins, stop, side="left"))
        steps = np.zeros(stop - start + 1, np.int8)
        steps[np.maximum(begins[some], start) - start] += 1
        steps[np.minimum(ends[some], stop) - start] -= 1
        return np.cumsum(steps[:-1], dtype=np.int8) > 0

    def places_of(self, split: SplitName, dim: str, start: int, stop: int) -> Ints | None:
        """Return which of some places of a dimension the patches of a split cover, from 0 on; None: all of them."""
        axis = next((axis for axis in self.grid_of(split).axes if axis.dim == dim), None)
        if not isinstance(axis, KeptAxis):
            return None
        places = axis.places
        return places[(places >= start) & (places < stop)] - start

    def tiles_of(self, cells: Compact, split: SplitName = "all") -> Ints | int:
        """Return the number of samples of each anchor of some cells of a split."""
        if not self.blocks:
            return self.patches
        return self.grid_of(split).tiles_in(cells.astype(np.int64) // self.block_step)

    def blocks_of(self, cells: Compact) -> Ints:
        """Return the block of each cell."""
        return cells.astype(np.int64) // self.block_step

    def unit_box(self, unit: int) -> Box:
        """Return the rows of a unit, and its block."""
        block, number = divmod(unit, self.units_per_block)
        start = number * self.unit_rows
        return self.box(block, start, min(start + self.unit_rows, self.num_samples))

    def box(self, block: int, start: int, stop: int) -> Box:
        """Return the box of some rows of a block."""
        return Box(start, stop, self.grid.bounds(block) if self.blocks else ())


def cells_of_rows(plan: DataPlan, rows: Ints) -> Ints:
    """Return the cell of the first block that holds each row."""
    unit, within = np.divmod(rows, plan.unit_rows)
    cells: Ints = unit * plan.cells_per_unit + within // plan.cell_rows
    return cells


def cell_bounds(plan: DataPlan, cells: Compact) -> tuple[Ints, Ints]:
    """Return the first row of each cell and the row after its last."""
    unit, within = np.divmod(cells.astype(np.int64), plan.cells_per_unit)
    if plan.blocks:
        unit %= plan.units_per_block
    starts = unit * plan.unit_rows + within * plan.cell_rows
    ends = np.minimum((unit + 1) * plan.unit_rows, plan.num_samples)
    stops = np.minimum(starts + plan.cell_rows, ends)
    return np.clip(starts, plan.first_row, stops), stops


@dataclass(frozen=True, slots=True)
class Box:
    """Anchors that are read at once: a run of rows, and optionally a block of other dimensions.

    It does not include the halo: the further rows that windows need are added by `box_shape` and `box_selection`.
    """

    start: int
    """The first row."""
    stop: int
    """The row after the last."""
    block: tuple[tuple[str, int, int], ...] = ()
    """Dimension, start and stop, counted within the selected part of the dimension (``data.isel``).

    Dimensions that are not named are read whole.
    """


def box_shape(samples: Samples, variable: Variable, box: Box) -> tuple[int, ...]:
    """Return the shape of a variable's part of a box, with its halo: rows first, then `Variable.row_axes`."""
    low, high = samples.reach(variable.name)
    blocks = _blocks(box)
    lengths = zip(variable.row_axes, variable.row_shape, strict=True)
    row = [_length(blocks.get(variable.dims[axis]), length) for axis, length in lengths]
    return (box.stop + high - box.start - low, *row)


def box_selection(samples: Samples, variable: Variable, box: Box) -> Select:
    """Return the selection of a variable that a box covers, with its halo, in stored rows and columns."""
    low, high = samples.reach(variable.name)
    return rows_selection(variable, Box(box.start + low, box.stop + high, box.block))


def rows_selection(variable: Variable, box: Box) -> Select:
    """Return the selection of a variable that a box covers, without a halo."""
    rows = variable.selection(box.start, box.stop)
    if not box.block:
        return rows
    blocks = _blocks(box)
    return tuple(_cut(part, blocks.get(dim)) for dim, part in zip(variable.dims, rows, strict=True))


def box_slices(variable: Variable, box: Box) -> tuple[slice, ...]:
    """Return the part of each of a row's axes that a box covers."""
    blocks = _blocks(box)
    return tuple(slice(*blocks.get(variable.dims[axis], (None,))) for axis in variable.row_axes)


def _blocks(box: Box) -> Mapping[str, tuple[int, int]]:
    return {dim: (start, stop) for dim, start, stop in box.block}


def _length(block: tuple[int, int] | None, length: int) -> int:
    return length if block is None else block[1] - block[0]


def _cut(part: tuple[int, int, int], block: tuple[int, int] | None) -> tuple[int, int, int]:
    if block is None:
        return part
    first, _, step = part
    start, stop = block
    return first + start * step, first + (stop - 1) * step + 1, step
