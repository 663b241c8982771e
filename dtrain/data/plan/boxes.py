"""Choose the blocks of patches of a plan: of whole chunks, as small as reads well, and finer only if they must be.

Rows of at most `WHOLE_OBJECT_BYTES` are read whole, if they are enough for splits and partitions. Larger rows are cut
into blocks. Splits hold whole rows where that gives them their share, as without blocks: patches of one image would
be in training and test otherwise. ``data.split.patches`` asks for the opposite: whole blocks, of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dtrain.data.plan.anchors import count_samples
from dtrain.data.plan.blocks import BlockAxis, Blocks
from dtrain.data.plan.cuts import (
    GROWN_BYTES,
    MAX_AMPLIFICATION,
    UNIT_BYTES,
    UNITS_PER_REPLICA,
    has_held_out,
    unit_rows,
    with_cells,
    with_enough_cells,
)
from dtrain.data.plan.grid import touched
from dtrain.data.plan.splits import shares_met
from dtrain.data.plan.units import Box, DataPlan, box_shape, rows_selection
from dtrain.data.samples import WHOLE_OBJECT_BYTES, Samples, common_rows
from dtrain.data.variable import Variable

Axes = tuple[BlockAxis, ...]

MIXED_BYTES = 16 << 20
"""The mixing window of boxes holds about so many bytes, between `LEAST_MIXED` and 64 boxes."""
LEAST_MIXED, LEAST_MIXED_ROWS = 4, 8


def with_units(samples: Samples, plan: DataPlan, window_bytes: int) -> DataPlan:
    """Return the plan with its units, cells and mixing window.

    Parameters
    ----------
    samples : Samples
    plan : DataPlan
        Its units are not cut yet.
    window_bytes : int
        Of the mixing window of whole rows.
    """
    rows = _with_rows(samples, replace(plan, blocks=_one_block(samples) if plan.tile_labels else ()), samples.row_bytes)
    rows = replace(rows, window=window_units(rows.unit_rows * samples.row_bytes, window_bytes))
    rows = with_enough_cells(with_cells(samples, rows))
    if len(samples.tiles) == 1:
        return rows
    by_patch = samples.config.split.patches and plan.val + plan.test > 0
    if samples.row_bytes <= WHOLE_OBJECT_BYTES and not by_patch and _suffices(rows):
        return rows
    aligned = _aligned(samples, plan.replicas)
    best = _with_blocks(samples, plan, aligned)
    for axes in _finer(aligned):
        if _suffices(best):
            break
        best = _with_blocks(samples, plan, axes)
    return best


def _suffices(plan: DataPlan) -> bool:
    """Whether splits get their shares, and every replica samples."""
    return shares_met(plan) and has_held_out(plan) and count_samples(plan, "train").owners >= plan.replicas


def _with_rows(samples: Samples, plan: DataPlan, row_bytes: int) -> DataPlan:
    rows = unit_rows(samples, plan.replicas, row_bytes, len(plan.grid), whole=not plan.absent)
    return replace(plan, unit_rows=rows, cell_rows=rows)


def window_units(unit_bytes: int, window_bytes: int, least: int = LEAST_MIXED_ROWS) -> int:
    """Return how many units are mixed, of which each has so many bytes."""
    return min(64, max(least, window_bytes // max(1, unit_bytes)))


def _with_blocks(samples: Samples, plan: DataPlan, axes: Axes) -> DataPlan:
    """Return the plan with boxes as units; splits hold whole blocks, whole rows, or cells."""
    row_bytes = _row_bytes(samples, axes)
    cut = _with_rows(samples, replace(plan, blocks=axes), row_bytes)
    cut = replace(cut, window=window_units(cut.unit_rows * row_bytes, MIXED_BYTES, LEAST_MIXED))
    if samples.config.split.patches:
        return with_enough_cells(with_cells(samples, replace(cut, whole="blocks")))
    by_rows = with_enough_cells(with_cells(samples, replace(cut, whole="rows")))
    if plan.sequential or _suffices(by_rows):
        return by_rows
    return with_enough_cells(with_cells(samples, cut))


# Blocks ---------------------------------------------------------------------------------------------------


def _one_block(samples: Samples) -> Axes:
    """Return a single block of everything."""
    return tuple(BlockAxis(cut.dim, cut.length, cut.size, cut.length // cut.size) for cut in samples.tiles.cuts)


def blocks_with_labels(samples: Samples) -> Axes:
    """Return the blocks of samples whose patches have labels."""
    return blocks_for(samples) or _one_block(samples)


def blocks_for(samples: Samples) -> Axes:
    """Return the blocks of samples whose splits are given by rows: none if rows are small."""
    return () if samples.row_bytes <= WHOLE_OBJECT_BYTES or len(samples.tiles) == 1 else _aligned(samples, 1)


def _aligned(samples: Samples, replicas: int) -> Axes:
    """Return the smallest blocks of whole chunks that read efficiently, if that leaves enough of them."""
    axes = tuple(
        BlockAxis(cut.dim, cut.length, cut.size, min(cut.length // cut.size, _together(samples, cut.dim, cut.size)))
        for cut in samples.tiles.cuts
    )
    rows = common_rows([v.chunk_rows for v in samples.streamed])
    runs = math.ceil(samples.num_rows / rows)
    for grown in _growing(samples, axes):
        size = rows * _row_bytes(samples, grown)
        few = runs * len(Blocks(grown)) < 3 * UNITS_PER_REPLICA * replicas
        if size > GROWN_BYTES or (few and _amplification(samples, axes) <= MAX_AMPLIFICATION):
            break
        axes = grown
        if size >= UNIT_BYTES and _amplification(samples, axes) <= MAX_AMPLIFICATION:
            break
    return axes


def _together(samples: Samples, dim: str, size: int) -> int:
    """Return how many patches of a size make whole chunks along a dimension, or about one chunk."""
    lengths = [_chunk_length(v, v.dims.index(dim)) for v in samples.streamed if dim in v.dims]
    return math.ceil(common_rows([*lengths, size]) / size) if lengths else 1


def _chunk_length(v: Variable, axis: int) -> int:
    """Return the length of a chunk in selected places."""
    return max(1, v.chunks[axis] // v.select[axis][2])


def _growing(samples: Samples, axes: Axes) -> Iterator[Axes]:
    """Yield blocks, each larger than the one before: first as they are, then longer where most is decoded twice."""
    yield axes
    steps = [axis.together for axis in axes]
    while any(axis.num_blocks > 1 for axis in axes):
        twice = [_amplification_along(samples, axis) if axis.num_blocks > 1 else 0.0 for axis in axes]
        grown = max(range(len(axes)), key=lambda k: (round(twice[k], 6), k))  # else along the last one
        axis = axes[grown]
        longer = min(axis.length // axis.size, axis.together + steps[grown])
        axes = (*axes[:grown], replace(axis, together=longer), *axes[grown + 1 :])
        yield axes


def _finer(axes: Axes) -> Iterator[Axes]:
    """Yield blocks, each smaller than the one before, down to single patches."""
    while any(axis.together > 1 for axis in axes):
        longest = max(range(len(axes)), key=lambda k: axes[k].together)
        axis = axes[longest]
        axes = (*axes[:longest], replace(axis, together=math.ceil(axis.together / 2)), *axes[longest + 1 :])
        yield axes


def _row_bytes(samples: Samples, axes: Sequence[BlockAxis]) -> int:
    """Return the bytes of a row of the largest block."""
    largest = Box(0, 1, Blocks(tuple(axes)).extents)
    shapes = ((v, box_shape(samples, v, largest)[1:]) for v in samples.moving)
    return sum(math.prod(shape) * v.kept_dtype.itemsize for v, shape in shapes)


def _amplification(samples: Samples, axes: Axes) -> float:
    """Return how often a value is decoded in a pass, at most of all variables."""
    return math.prod(_amplification_along(samples, axis) for axis in axes)


def _amplification_along(samples: Samples, axis: BlockAxis) -> float:
    most = 1.0
    for v in samples.streamed:
        if axis.dim not in v.dims:
            continue
        place = v.dims.index(axis.dim)
        distinct = len(touched(v.chunks, v.select)[place])
        bounds = (((axis.dim, *axis.bounds(block)),) for block in range(axis.num_blocks))
        total = sum(len(touched(v.chunks, rows_selection(v, Box(0, 1, block)))[place]) for block in bounds)
        most = max(most, total / distinct)
    return most
