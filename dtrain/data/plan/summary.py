"""The counts of a plan that a person wants to see: units, cells, samples of each split, bytes decoded a pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.data.plan.anchors import count_left_out, count_samples
from dtrain.data.plan.grid import touched
from dtrain.data.plan.hashing import Compact, Ints, slices
from dtrain.data.plan.multiplicity import multiplicities, multiplicity_text
from dtrain.data.plan.partition import Partition, train_partitions
from dtrain.data.plan.splits import SplitName, changes
from dtrain.data.plan.units import Box, DataPlan, rows_selection
from dtrain.data.samples import Samples
from dtrain.data.variable import Sparse, Variable

SPLITS: tuple[SplitName, ...] = ("train", "val", "test")


def describe_plan(samples: Samples, plan: DataPlan) -> dict[str, Any]:
    """Return the counts of a plan by name, as ``dtrain plan --json`` prints them."""
    parts = train_partitions(plan)
    dropped = dropped_samples(plan)
    touched = sum(len(part.units) for part in parts)
    distinct = _num_distinct_units(plan, parts)
    decoded, distinct_bytes = decoded_bytes(samples, parts)
    return {
        "units": plan.num_units,
        "unit_rows": plan.unit_rows,
        "unit_block": {axis.dim: axis.extent for axis in plan.blocks},
        "cells": plan.num_cells,
        "cell_rows": plan.cell_rows,
        "window_units": plan.window,
        "partition_samples": [part.num_samples for part in parts],
        "val_samples": count_samples(plan, "val").samples,
        "test_samples": count_samples(plan, "test").samples,
        "dropped_samples": sum(dropped.values()),
        "dropped": dropped,
        "jumps": len(plan.jump_rows),
        "decodes_per_unit": touched / distinct,
        "partition_units": max(len(part.units) for part in parts),
        "decoded_bytes": decoded,
        "read_amplification": decoded / max(1, distinct_bytes),
        "patches": plan.patches,
        "absent_rows": sum(stop - start for start, stop in plan.absent),
    }


def dropped_samples(plan: DataPlan) -> dict[str, int]:
    """Return how many samples no split holds, by the reason.

    ``missing``: a chunk of its rows, or of a cell beside them, is not stored; ``gaps``: its window holds a jump;
    ``split``: its window leaves its split or the store. Where splits are given by coordinate, ``left_out``: it is in
    the gap beside a split, or its patch is cut by an end of it. Where several stores are one, ``stores``: its window
    leaves its store. Where samples are counted, ``non_finite``: it holds values that are not finite.
    """
    if plan.multiplicity:
        bare, ones = replace(plan, multiplicity=""), _without_repeats(plan)
        lost = sum(count_samples(bare, split).samples - count_samples(ones, split).samples for split in SPLITS)
        return {**dropped_samples(bare), "non_finite": lost}
    kept = sum(count_samples(plan, split).samples for split in SPLITS)
    stored, smooth = replace(plan, jumps=""), replace(plan, jumps="", absent=())
    whole, of_stored, of_smooth = (count_samples(each, "all").samples for each in (smooth, stored, plan))
    anchors = int(plan.anchors_in(*plan.row_runs)[1].sum()) * plan.patches
    left_out = {"left_out": count_left_out(plan)} if plan.row_labels or plan.tile_labels else {}
    stores = {"stores": anchors - whole} if plan.members else {}
    return {
        "split": anchors - whole + of_smooth - kept - sum(left_out.values()) - sum(stores.values()),
        "gaps": of_stored - of_smooth,
        "missing": whole - of_stored,
        **left_out,
        **stores,
    }


def _without_repeats(plan: DataPlan) -> DataPlan:
    """Return a plan in which no sample comes more than once."""
    return replace(plan, multiplicity=multiplicity_text(np.minimum(multiplicities(plan), 1)))


def _num_distinct_units(plan: DataPlan, parts: tuple[Partition, ...]) -> int:
    is_used = np.zeros(plan.num_units, bool)
    for part in parts:
        is_used[part.units] = True
    return int(is_used.sum())


def decoded_bytes(samples: Samples, parts: tuple[Partition, ...]) -> tuple[int, int]:
    """Return the bytes decoded in a pass over all partitions, and the bytes of the distinct chunks among them."""
    plan, spans = parts[0].plan, [part.spans() for part in parts]
    starts, stops = (np.concatenate(column) for column in zip(*spans, strict=True))
    anchors = _Runs(np.concatenate([part.part_blocks for part in parts]), starts, stops)
    counted = _decoded_in_blocks if plan.blocks else _decoded_in_rows
    counts = [
        counted(store, store.variable(v.name), plan, _rows_of(store, v.name, own))
        for store, own in _by_store(samples, plan, anchors)
        for v in samples.streamed
    ]
    return sum(decoded for decoded, _ in counts), sum(distinct for _, distinct in counts)


@dataclass(frozen=True, slots=True)
class _Runs:
    """Runs of anchors that are read at once, or of the rows that they need."""

    blocks: Compact
    starts: Ints
    stops: Ints


def _rows_of(samples: Samples, name: str, anchors: _Runs) -> _Runs:
    """Return the rows of a variable that runs of anchors need."""
    low, high = samples.reach(name)
    starts = np.maximum(anchors.starts + low, samples.first_row)
    return _Runs(anchors.blocks, starts, np.minimum(anchors.stops + high, samples.num_samples))


def _by_store(samples: Samples, plan: DataPlan, anchors: _Runs) -> Iterator[tuple[Samples, _Runs]]:
    """Yield the anchors in each store, in its own rows."""
    if not samples.members:
        yield samples, anchors
        return
    order = np.argsort(anchors.starts, kind="stable")
    blocks, starts, stops = anchors.blocks[order], anchors.starts[order], anchors.stops[order]
    for store, (begin, first, stop) in zip(samples.members, plan.members, strict=True):
        some = slice(*np.searchsorted(starts, [first - plan.unit_rows, stop]))  # a run is at most as long as a unit
        low, high = np.maximum(starts[some], first), np.minimum(stops[some], stop)
        kept = low < high
        yield store, _Runs(blocks[some][kept], low[kept] - begin, high[kept] - begin)


def _decoded_in_rows(samples: Samples, v: Variable, plan: DataPlan, rows: _Runs) -> tuple[int, int]:
    if v.sparse is not None:
        return _decoded_sparse(samples, v.sparse, rows)
    begins = _row_chunks(samples, v)
    total = _count_row_chunks(v, rows.starts, rows.stops, begins)
    return total * v.chunk_rows * v.row_bytes, int(np.count_nonzero(np.cumsum(begins))) * v.chunk_rows * v.row_bytes


def _decoded_sparse(samples: Samples, sparse: Sparse, rows: _Runs) -> tuple[int, int]:
    """Return the same for a sparse variable, as if all rows held as many values.

    A run of values that begins anywhere touches one chunk more than it is long, but for a single value.
    """
    begins, each = np.zeros(samples.num_samples + 1, np.int32), sparse.count / max(1, sparse.rows)
    np.add.at(begins, rows.starts, 1)
    np.subtract.at(begins, rows.stops, 1)
    decoded, distinct = int((rows.stops - rows.starts).sum()) * each, np.count_nonzero(np.cumsum(begins)) * each
    arrays = [(np.dtype(array.dtype).itemsize, array.chunks[0] - 1) for array in (sparse.data, sparse.indices)]
    return (
        sum(int(size * (decoded + len(rows.starts) * more)) for size, more in arrays),
        sum(int(size * distinct) for size, _ in arrays),
    )


def _decoded_in_blocks(samples: Samples, v: Variable, plan: DataPlan, rows: _Runs) -> tuple[int, int]:
    axes = [axis for axis in v.row_axes if v.dims[axis] in {axis.dim for axis in plan.blocks}]
    order = np.argsort(rows.blocks, kind="stable")
    cuts = np.append(changes(rows.blocks[order])[: len(order)], len(order))
    is_decoded = np.zeros((len(_row_chunks(samples, v)), *(-(-v.shape[axis] // v.chunks[axis]) for axis in axes)), bool)
    total = 0
    for first, after in pairwise(cuts.tolist()):
        some, begins = order[first:after], _row_chunks(samples, v)
        number = _count_row_chunks(v, rows.starts[some], rows.stops[some], begins)
        select = rows_selection(v, Box(0, 1, plan.grid.bounds(int(rows.blocks[some[0]]))))
        columns = [touched(v.chunks, select)[axis] for axis in axes]
        total += number * math.prod(map(len, columns))
        is_decoded[np.ix_(np.flatnonzero(np.cumsum(begins)), *(np.array(along, np.int64) for along in columns))] = True
    row = [v.chunks[axis] if axis in axes else len(range(*v.select[axis])) for axis in v.row_axes]
    chunk = v.chunk_rows * math.prod(row) * v.kept_dtype.itemsize
    return total * chunk, int(np.count_nonzero(is_decoded)) * chunk


def _row_chunks(samples: Samples, v: Variable) -> npt.NDArray[np.int32]:
    return np.zeros(-(-samples.num_samples // v.chunk_rows) + 1, np.int32)


def _count_row_chunks(v: Variable, starts: Ints, stops: Ints, begins: npt.NDArray[np.int32]) -> int:
    """Return how many rows of chunks some runs of rows decode, and mark in `begins` where they begin and end."""
    decoded = 0
    for some in slices(len(starts)):
        first, after = starts[some] // v.chunk_rows, -(-stops[some] // v.chunk_rows)
        decoded += int((after - first).sum())
        np.add.at(begins, first, 1)
        np.subtract.at(begins, after, 1)
    return decoded
