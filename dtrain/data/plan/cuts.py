"""Where to cut the sample axis: how many rows make a unit and a cell, and which cells are dealt together.

    sample axis   0 . . . . . . . . . . . . . . . . . . . . . . . N
    objects       |-------|-------|-------|-------|-------|-----|      as stored
    units         |---------------|---------------|-------------|      read and decoded at once: whole objects
    cells         |---------------|---------------|-------------|      dealt to splits and partitions

Cells are whole units where there are enough of them (20 a replica, and splits get their shares within 10 %).
Otherwise cells are runs of samples inside units, and a unit is decoded by each owner of one of its cells.

A shard that is too large for one unit holds several units. Their cells are dealt together, so that the shard has
one owner, where there are enough shards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from dtrain.data.plan.anchors import count_samples
from dtrain.data.plan.splits import changes, present_cells, shares_met
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import WHOLE_OBJECT_BYTES, Samples, common_rows, least_rows, whole_rows

UNIT_BYTES = 1 << 20
"""A unit holds at least so many decoded bytes, if that leaves enough units."""
PART_BYTES = 4 << 20
"""A unit of a large shard holds at most so many decoded bytes."""
GROWN_BYTES = 32 << 20
"""Units grow up to this size where windows would otherwise read much twice."""
MAX_AMPLIFICATION = 1.10
UNITS_PER_REPLICA = 20
"""With fewer units than this a replica, cuts go between samples inside units."""
MAX_CELLS = 1 << 16
"""Single samples are dealt if they make at most so many cells."""


def object_rows(samples: Samples) -> int:
    """Return the rows at which stored objects can be cut: the shortest possible unit of whole objects."""
    return min(whole_rows(samples.streamed), max(1, samples.num_samples))


def unit_rows(samples: Samples, replicas: int, row_bytes: int, blocks: int, *, whole: bool) -> int:
    """Return the rows of a unit: the smallest run that reads efficiently.

    Small objects are put together up to `UNIT_BYTES`; large shards are cut between inner chunks. Then the unit
    grows while windows reach so far beyond it that much is read twice, as long as there are enough units.

    Parameters
    ----------
    samples : Samples
    replicas : int
    row_bytes : int
        Of a row of a unit.
    blocks : int
        Number of units of the same rows.
    whole : bool
        False if rows are absent: then small objects are not put together, so that few rows are lost with one.
    """
    row_bytes, boundary = max(1, row_bytes), object_rows(samples)
    inner = common_rows([v.chunk_rows for v in samples.streamed if v.sparse is None] or [boundary])
    if boundary * row_bytes > WHOLE_OBJECT_BYTES and boundary > inner and boundary % inner == 0:
        sizes = _sizes_in_shards(boundary, inner, row_bytes)
        sizes = [size for size in sizes if size >= least_rows(samples.streamed)] or [boundary]
    else:
        sizes = _sizes_of_objects(samples, replicas, boundary, row_bytes, blocks, whole=whole)
    sizes = [size for size in sizes if size == sizes[0] or size * row_bytes <= GROWN_BYTES]
    enough = next((size for size in sizes if _amplification(samples, size) <= MAX_AMPLIFICATION), sizes[-1])
    return min(samples.num_samples, enough)


def _sizes_in_shards(boundary: int, inner: int, row_bytes: int) -> list[int]:
    """Return the possible rows of a unit, ascending, that divides a shard at its inner chunks."""
    sizes = [inner * n for n in range(1, boundary // inner + 1) if boundary % (inner * n) == 0]
    start = max([size for size in sizes if size * row_bytes <= PART_BYTES] or sizes[:1])
    return [size for size in sizes if size >= start]


def _sizes_of_objects(
    samples: Samples, replicas: int, boundary: int, row_bytes: int, blocks: int, *, whole: bool
) -> list[int]:
    """Return the possible rows of a unit, ascending, that consists of whole objects."""
    rows = samples.num_rows * blocks
    wanted = math.ceil(UNIT_BYTES / (boundary * row_bytes)) if whole else 1
    enough_units = rows // (boundary * 3 * UNITS_PER_REPLICA * replicas)
    start = boundary * max(1, min(wanted, enough_units))
    most = min(GROWN_BYTES // row_bytes, rows // (UNITS_PER_REPLICA * replicas))
    return [start, *range(start + boundary, most + 1, boundary)]


def _amplification(samples: Samples, unit_rows: int) -> float:
    """Return the bytes decoded for a unit in the middle of the store, divided by the bytes of its rows.

    Of a sparse variable its rows alone count: that it has few chunks more is known.
    """
    decoded = 0
    for v in samples.streamed:
        low, high = samples.reach(v.name)
        if v.sparse is not None:
            decoded += (unit_rows + high - low) * v.row_bytes
            continue
        first = (unit_rows * 8 + low) // v.chunk_rows
        decoded += (-(-(unit_rows * 9 + high) // v.chunk_rows) - first) * v.chunk_rows * v.row_bytes
    return decoded / max(1, unit_rows * samples.row_bytes)


def with_cells(samples: Samples, plan: DataPlan) -> DataPlan:
    """Return a plan of whole units as cells with its cells cut: grouped by shard, or shorter where units are few."""
    plan = replace(plan, group=1 if plan.blocks else _group(samples, plan))
    return plan if plan.group > 1 else replace(plan, cell_rows=_cell_rows(plan))


def _group(samples: Samples, plan: DataPlan) -> int:
    """Return how many units are dealt together: the units of a shard, if there are enough shards."""
    boundary = object_rows(samples)
    group = boundary // plan.unit_rows if boundary % plan.unit_rows == 0 else 1
    if group == 1:
        return 1
    candidate = replace(plan, group=group)
    groups = len(changes(present_cells(candidate) // group))
    enough = groups >= UNITS_PER_REPLICA * plan.replicas and shares_met(candidate)
    return group if enough else 1


def _cell_rows(plan: DataPlan) -> int:
    """Return the longest cell that gives every replica enough cells and every split its share."""
    candidate = plan
    for count in _cells_per_unit(plan):
        candidate = replace(plan, cell_rows=math.ceil(plan.unit_rows / count))
        if len(present_cells(candidate)) >= UNITS_PER_REPLICA * plan.replicas and shares_met(candidate):
            break
    return candidate.cell_rows


def _cells_per_unit(plan: DataPlan) -> Iterator[int]:
    """Yield the numbers of cells to try for a unit.

    A unit is decoded once for each owner of its cells, so few, long cells come first. Beyond one cell an owner,
    finer cuts cost nothing more. Where all units fit the mixing window, decoding them again is cheap: then single
    samples are dealt, unless they are too many, and the parts are equal.
    """
    yield 1
    if math.ceil(plan.num_rows / plan.unit_rows) * len(plan.grid) > plan.window:
        yield from range(2, min(plan.replicas + 2, plan.unit_rows) + 1)
    finest = max(plan.stride, math.ceil(plan.num_samples / MAX_CELLS))
    yield max(1, plan.unit_rows // finest)


def with_enough_cells(plan: DataPlan) -> DataPlan:
    """Return the plan with its cells cut so short that every replica gets samples, if they are not.

    Cells without anchors are dealt to nobody: with strides, windows and jumps they may be many. Where no cut is fine
    enough, the plan is returned for which most replicas would get some.
    """
    best, most = plan, count_samples(plan, "train").owners
    for count in _finer_cuts(plan):
        if most >= plan.replicas:
            break
        candidate = replace(plan, cell_rows=math.ceil(plan.unit_rows / count), group=1)
        owners = count_samples(candidate, "train").owners
        if owners > most and has_held_out(candidate):
            best, most = candidate, owners
    return best


def _finer_cuts(plan: DataPlan) -> Iterator[int]:
    """Yield numbers of cells of a unit beyond those that the plan has, ascending, up to single rows."""
    finest = math.ceil(plan.unit_rows / math.ceil(plan.num_samples / MAX_CELLS))
    count = plan.cells_per_unit
    while count < finest:
        count = min(finest, max(count + 1, count + count // 8))
        yield count


def has_held_out(plan: DataPlan) -> bool:
    """Whether the splits that are asked for hold samples."""
    names: tuple[Literal["val", "test"], ...] = ("val", "test")
    return all(count_samples(plan, name).samples for name in names if plan.holds_out(name))
