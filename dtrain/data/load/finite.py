"""Which samples hold values that are not finite (``data.non_finite``): one streamed pass, unit by unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Array
from dtrain.data.plan.hashing import Ints
from dtrain.data.plan.labels import Labels
from dtrain.data.plan.multiplicity import anchor_numbers, multiplicities, tiles_of_block
from dtrain.data.plan.parts import Partition
from dtrain.data.plan.units import Box, DataPlan, box_slices
from dtrain.data.read.boxes import BoxReader
from dtrain.data.read.values import not_finite
from dtrain.data.samples import Field, Samples
from dtrain.data.tiles import Tile
from dtrain.data.variable import Variable
from dtrain.errors import NonFiniteData
from dtrain.urls import redacted_url

Counts = npt.NDArray[np.int64]
"""Of values that are not finite: int64[row or anchor, patch of the box]."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What a pass over neighbouring parts has seen."""

    kept: Labels
    """By sample, in C order [part, anchor, patch of the part's block]: 1 if it is kept, 0 if it is left out."""
    by_variable: Mapping[str, int]
    """The samples left out in which a variable has values that are not finite; a sample may count for several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """The samples of a store that are left out."""

    path: str
    samples: int
    of: int
    """How many there are."""
    by_variable: Mapping[str, int]

    @property
    def named(self) -> str:
        """The variables with the number of samples that are left out."""
        return ", ".join(f"{name} ({count:,})" for name, count in self.by_variable.items())


def pass_over(
    reader: BoxReader,
    partition: Partition,
    parts: range,
    on_unit: Callable[[int, int], None] = lambda units, samples: None,
) -> Seen:
    """Look for values that are not finite in the samples of some parts, as the model would see them.

    A sample is kept from ``DataConfig.min_valid`` on: the share of finite values among all values of its inputs and
    targets. A missing label that the loss leaves out counts as finite.

    Parameters
    ----------
    reader : BoxReader
    partition : Partition
        Of the split "all".
    parts : range
    on_unit : callable
        Called after each unit with the number of units and samples that are done.

    Raises
    ------
    NonFiniteData
        A variable without the sample dimension leaves nothing to keep.
    """
    samples, kept, by_variable = reader.samples, [], dict.fromkeys((v.name for v in reader.samples.variables), 0)
    statics = {name: _of_static(samples, name, values) for name, values in reader.statics.items()}
    done = 0
    for number, part in enumerate(parts, start=1):
        box, anchors = partition.box(part), partition.part_anchors(part)
        tiles = _tiles(partition.plan, part, partition)
        bad = _of_fields(samples, reader.read(box), statics, box, anchors, tiles)
        is_kept = _is_kept(samples, bad, (len(anchors), len(tiles)))
        for name, counts in bad.items():
            by_variable[name] += int((np.broadcast_to(counts > 0, is_kept.shape) & ~is_kept).sum())
        kept.append(is_kept.astype(np.uint8).ravel())
        done += is_kept.size
        on_unit(number, done)
    counted = {name: count for name, count in by_variable.items() if count}
    return Seen(np.concatenate(kept) if kept else np.zeros(0, np.uint8), counted)


def _fields(samples: Samples) -> tuple[Field, ...]:
    """Return the inputs and targets: a weight that is not finite is refused as it is read."""
    return samples.fields[: len(samples.config.inputs) + len(samples.config.targets)]


def _is_kept(samples: Samples, bad: Mapping[str, Counts], shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    least, total = samples.config.min_valid, sum(math.prod(samples.field_shape(f)) for f in _fields(samples))
    assert least is not None
    finite = np.full(shape, total)
    for counts in bad.values():
        finite -= counts
    return finite / total >= least  # as `least` is written: 7 of 100 are 0.07


def _tiles(plan: DataPlan, part: int, partition: Partition) -> Ints:
    """Return the tiles of the block of a part."""
    return tiles_of_block(plan.grid, int(partition.part_blocks[part])) if plan.blocks else np.arange(plan.patches)


def _of_fields(
    samples: Samples,
    rows: Mapping[str, tuple[int, Array]],
    statics: Mapping[str, Counts | None],
    box: Box,
    anchors: Ints,
    tiles: Ints,
) -> dict[str, Counts]:
    """Return, by variable that has some, the values that are not finite in each sample, int64[anchor, tile]."""
    of_rows = {name: _of_rows(samples, name, values, box, tiles) for name, (_, values) in rows.items()}
    bad: dict[str, Counts] = {}
    for field in _fields(samples):
        if field.name in of_rows:
            counts, first = of_rows[field.name], rows[field.name][0]
            found = None if counts is None else sum(counts[anchors + offset - first] for offset in field.offsets)
        else:
            of_static = statics[field.name]
            found = None if of_static is None else of_static[None, tiles]
        if found is not None:
            bad[field.name] = bad[field.name] + found if field.name in bad else np.asarray(found)
    return bad


def _of_rows(samples: Samples, name: str, values: Array, box: Box, tiles: Ints) -> Counts | None:
    """Return the values of each row that are not finite, int64[row, tile]; None if there are none."""
    variable = samples.variable(name)
    bad = not_finite(variable, values)
    if bad is None:
        return None
    parts = _slices(samples, variable, box_slices(variable, box), tiles)
    axes = tuple(range(1, bad.ndim))
    return np.stack([bad[(slice(None), *part)].sum(axis=axes, dtype=np.int64) for part in parts], axis=1)


def _of_static(samples: Samples, name: str, values: Array) -> Counts | None:
    """Return the same of a variable without the sample dimension, int64[tile]."""
    variable = samples.variable(name)
    bad = not_finite(variable, values)
    if bad is None or not bad.any():
        return None
    whole = tuple(slice(None) for _ in variable.row_axes)
    parts = _slices(samples, variable, whole, np.arange(len(samples.tiles)))
    counts = np.array([bad[part].sum() for part in parts], np.int64)
    if samples.config.min_valid == 1.0 and counts.all():
        raise NonFiniteData(
            f"{samples.path}: {name} is the same in all samples and holds {int(bad.sum()):,} values that are not "
            'finite: with data.non_finite = "skip" no sample is left.',
            "Repair it, leave it out, or set data.non_finite = { min_valid = 0.5 }: its missing values become 0.",
        )
    return counts


def _slices(samples: Samples, variable: Variable, block: Sequence[slice], tiles: Ints) -> Iterator[tuple[slice, ...]]:
    """Yield the part of a row that each tile covers, counted within the block; one of all of it where none is cut."""
    if not samples.tiles.cuts_any(variable):
        return iter([tuple(slice(None) for _ in block)] * len(tiles))
    starts = {variable.dims[axis]: part.start or 0 for axis, part in zip(variable.row_axes, block, strict=True)}
    shifted = (
        Tile(tuple((dim, a - starts.get(dim, 0), b - starts.get(dim, 0)) for dim, a, b in samples.tiles[n].ranges))
        for n in tiles.tolist()
    )
    return (tile.slices(variable) for tile in shifted)


def parts_of(partition: Partition, pieces: int) -> list[range]:
    """Return the parts of each piece of a pass over a partition: neighbours, as many in each as possible."""
    count = len(partition.units)
    pieces = max(1, min(pieces, count))
    return [range(n * count // pieces, (n + 1) * count // pieces) for n in range(pieces)]


def merged(samples: Samples, partition: Partition, pieces: Sequence[Seen]) -> tuple[Labels, LeftOut]:
    """Join what the pieces of a pass have seen.

    Returns
    -------
    values : uint8[anchor, patch]
        The multiplicities: 0 for what is left out.
    left_out : LeftOut
    """
    plan, by_variable = partition.plan, dict.fromkeys((v.name for v in samples.variables), 0)
    values, kept, at = multiplicities(plan), np.concatenate([piece.kept for piece in pieces]), 0
    every = anchor_numbers(plan)
    for part in range(len(partition.units)):
        numbers, tiles = every.of(partition.part_anchors(part)), _tiles(plan, part, partition)
        size = len(numbers) * len(tiles)
        values[np.ix_(numbers, tiles)] = kept[at : at + size].reshape(len(numbers), len(tiles))
        at += size
    for piece in pieces:
        for name, count in piece.by_variable.items():
            by_variable[name] += count
    found = {name: count for name, count in by_variable.items() if count}
    return values, LeftOut(
        path=redacted_url(samples.path), samples=int((kept == 0).sum()), of=len(kept), by_variable=found
    )
