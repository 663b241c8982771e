"""How many bytes samples, units and the decoding of units take, and how a number of bytes is printed."""

from __future__ import annotations

import math
from collections.abc import Set

import numpy as np

from dtrain.data.encoding import DType
from dtrain.data.members import KEPT_STORES, differ
from dtrain.data.plan.bins import MOST_BINS, ORDERED_ROWS, bins_a_part, index_dtype
from dtrain.data.plan.hashing import SLICE
from dtrain.data.plan.labels import count_runs
from dtrain.data.plan.multiplicity import num_anchors
from dtrain.data.plan.order import STORED_ROWS
from dtrain.data.plan.readers import MIN_DENSITY, choose_readers, has_fine_shards
from dtrain.data.plan.units import Box, DataPlan, box_shape
from dtrain.data.samples import Samples
from dtrain.data.sparse import PIECE_VALUE_BYTES, PIECE_VALUES
from dtrain.data.variable import ROW_START_BYTES, Variable

INDEX_CACHE_BYTES = 64 << 20
"""The indices of shards that a reader keeps take at most so many bytes."""
INDEX_OVERHEAD_BYTES = 500
"""The Python objects around one index."""
ZARR_CONCURRENCY = 10
"""zarr's setting ``async.concurrency``: the chunks that it decodes at once."""

STORED_BYTES = 80
"""For each sample of a run in stored order: its part, its index, its place in the arena, and what gathering takes."""
SORTED_BYTES = 120
"""For each sample of a run that is sorted: the same, its place in the mixing window, and what sorting takes."""
DRAWN_BYTES = 80
"""For each sample of a part whose bin is drawn."""
OPENED_BYTES = 1000
"""For each part that is open; where its bins begin comes on top."""
UNIT_BYTES_IN_ORDER = 24
"""For each unit of a partition in stored order: its slot in this pass and the next, and where it begins."""
UNIT_BYTES_SHUFFLED = 48
"""The same, its place in both passes, and what drawing the permutation takes."""
LEAST_STARTS = 1 << 17
"""Where the rows of a sparse variable begin is read in pieces of at least so many."""
CELL_BYTES = 32
"""For each cell of a store while its partitions are computed."""
JUMP_BYTES = 40
"""For each jump while partitions are computed."""
LABEL_BYTES = 4
"""For each row with a label, while it is looked for where labels change."""
COUNTED_BYTES = 4
"""For each sample of a plan with multiplicities: its text, decoded, for training and for an evaluation."""
ENDS_BYTES = 5
"""For each sample of an open unit, where samples may come several times: where it ends among those of a pass."""
RUN_BYTES = 80
"""For each run of rows of one label, while partitions are computed."""


def sample_bytes(samples: Samples) -> int:
    """Return the bytes of one sample as the model sees it."""
    total = 0
    for field in samples.fields:
        variable = samples.variable(field.name)
        if samples.tiles.cuts_any(variable) or not variable.is_static:  # else it is one array for all samples
            total += math.prod(samples.field_shape(field)) * samples.field_dtype(field).itemsize
    return total


def slot_shape(samples: Samples, plan: DataPlan, variable: Variable) -> tuple[int, ...]:
    """Return the shape of a variable's largest unit in memory, with the halo of its windows."""
    return box_shape(samples, variable, _largest(plan))


def _largest(plan: DataPlan) -> Box:
    """Return the box of the largest unit, as if it began at the first place."""
    return Box(0, min(plan.unit_rows, plan.num_samples), plan.grid.extents)


def most_values(samples: Samples, plan: DataPlan, variable: Variable) -> int:
    """Return the most values of a sparse variable in a unit, with its halo."""
    return plan.values[samples.sparse.index(variable)] if plan.values else variable.arrays[-1].shape[0]


def slot_arrays(samples: Samples, plan: DataPlan, variable: Variable) -> dict[str, tuple[tuple[int, ...], DType]]:
    """Return, by name of the stored array, shape and dtype of the memory of a variable's largest unit."""
    shape, sparse = slot_shape(samples, plan, variable), variable.sparse
    if sparse is None:
        return {variable.name: (shape, variable.kept_dtype)}
    most = most_values(samples, plan, variable)
    return {
        sparse.indptr.name: ((shape[0] + 1,), np.dtype(np.int64)),
        sparse.indices.name: ((most,), sparse.columns_dtype),
        sparse.data.name: ((most,), variable.kept_dtype),
    }


def slot_bytes(samples: Samples, plan: DataPlan) -> int:
    """Return the bytes of a unit in memory, with its halo."""
    arrays = (array for v in samples.moving for array in slot_arrays(samples, plan, v).values())
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in arrays)


def scratch_bytes(samples: Samples, plan: DataPlan) -> int:
    """Return the bytes that decoding a unit needs besides its slot.

    They hold the stored and decoded chunks of one variable at a time, the variable's part of a unit where the unit
    may be smaller than its slot, and what is computed about a few values of sparse rows.
    """
    streamed = {v.name for v in samples.streamed}
    most = max((_scratch_of(samples, store, plan, streamed) for store in samples.stores), default=0)
    looking = max((PIECE_VALUES + v.shape[1 - v.sample_axis] for v in samples.sparse), default=0)
    return most + PIECE_VALUE_BYTES * looking


def _scratch_of(samples: Samples, store: Samples, plan: DataPlan, streamed: Set[str]) -> int:
    """Return the bytes for one store; `streamed` are the variables that are read unit by unit."""
    readers = choose_readers(store, samples.config.reader)
    needed = [0]
    for v in (store.variable(name) for name in streamed):
        if v.sparse is not None:
            most = most_values(samples, plan, samples.variable(v.name))
            parts = ((array, min(most, array.shape[0]) // array.chunks[0] + 2) for array in v.arrays[1:])
            needed += [decoding_bytes(array, chunks, True, readers[array.name][0]) for array, chunks in parts]
            continue
        is_copied = plan.grid.is_ragged or differ((v, samples.variable(v.name)))
        copied = math.prod(slot_shape(samples, plan, v)) * v.kept_dtype.itemsize if is_copied else 0
        (chunks, cut), reader = chunks_of_box(samples, store, plan, v), readers[v.name][0]
        others = chunks > 1 and reader != "numcodecs"  # malloc keeps as much as one chunk more
        needed.append(decoding_bytes(v, chunks + others, cut, reader) + copied)
    return max(needed)


def static_bytes(samples: Samples) -> int:
    """Return the bytes of the variables that stay in memory: those without the sample dimension, and preloaded ones."""
    statics = sum(math.prod(v.row_shape) * 8 for v in samples.variables if v.is_static)
    # of a sparse variable all rows count: those that are selected may be the long ones
    rows = ((v, samples.num_rows if v.sparse is None else v.sparse.rows) for v in samples.preloaded)
    return statics + sum(v.row_bytes * number for v, number in rows)


def index_bytes(samples: Samples) -> int:
    """Return the bytes of all indices of shards that are kept."""
    if samples.members:
        return sum(sorted(map(index_bytes, samples.members))[-KEPT_STORES:])
    sharded = [v for v in samples.stored if v.has_inner_chunks]
    counts = [(v.num_objects, math.prod(v.objects) // math.prod(v.chunks)) for v in sharded]
    return min(INDEX_CACHE_BYTES, sum(objects * (16 * chunks + INDEX_OVERHEAD_BYTES) for objects, chunks in counts))


def order_bytes(plan: DataPlan, units: int, ahead: int, *, shuffle: bool, largest: int = 0) -> int:
    """Return the bytes that a loader needs to know which samples come next, and where they lie.

    Parameters
    ----------
    plan : DataPlan
    units : int
        Units of the loader's partition.
    ahead : int
        Units that are read before they are due.
    shuffle : bool
    largest : int
        Samples of a pass of the largest unit, where samples may come several times.
    """
    each = math.ceil(min(plan.unit_rows, plan.num_samples) / plan.stride) * plan.most_tiles
    part = max(each, largest)
    whole = units * part
    ends = ENDS_BYTES * each if plan.multiplicity else 0
    if not shuffle:
        return STORED_BYTES * min(STORED_ROWS, part) + UNIT_BYTES_IN_ORDER * units + ends
    mixed = min(plan.window, units)
    # at the end of a pass its last parts are open, and the look-ahead opens the first ones of the next
    opened = min(mixed + mixed // 2 + ahead + 2, 2 * units)
    kept = opened * (part * index_dtype(part).itemsize + 8 * bins_a_part(part, mixed) + OPENED_BYTES + ends)
    opening = 2 * part + DRAWN_BYTES * min(SLICE, MOST_BINS * part, whole)
    return kept + opening + SORTED_BYTES * min(2 * ORDERED_ROWS, whole) + UNIT_BYTES_SHUFFLED * units


def tables_bytes(samples: Samples, plan: DataPlan, kept: int) -> int:
    """Return the bytes of the tables that a process has of a plan: partitions, stored objects, row starts.

    Parameters
    ----------
    samples : Samples
    plan : DataPlan
    kept : int
        Bytes of the partitions (`Partition.nbytes`).
    """
    jumps = JUMP_BYTES * plan.jumps.count(" ") + len(plan.jumps)
    labels = LABEL_BYTES * plan.num_samples + RUN_BYTES * count_runs(plan.row_labels) if plan.row_labels else 0
    objects = 8 * sum(v.num_objects for store in samples.stores for v in store.stored) + samples.store.kept_bytes
    counted = COUNTED_BYTES * num_anchors(plan) * plan.patches if plan.multiplicity else 0
    return kept + CELL_BYTES * plan.num_cells + jumps + labels + counted + objects + _row_starts_bytes(samples)


def _row_starts_bytes(samples: Samples) -> int:
    """Return the bytes of where the rows of sparse variables begin, and of reading them once, store by store."""
    if not samples.sparse:
        return 0
    kept, reading = 0, [0]
    for store in samples.stores:
        readers = choose_readers(store, samples.config.reader)
        kept += ROW_START_BYTES * (store.num_samples - store.first_row + 1) * len(store.sparse)
        for indptr in (v.arrays[0] for v in store.sparse):
            chunks = math.ceil(min(row_starts_together(indptr), indptr.shape[0]) / indptr.chunks[0]) + 1
            decoding = decoding_bytes(indptr, chunks, True, readers[indptr.name][0])
            reading.append(decoding + PIECE_VALUE_BYTES * PIECE_VALUES)
    return kept + max(reading)


def row_starts_together(indptr: Variable) -> int:
    """Return how many row starts of a sparse variable are read at once: whole stored objects."""
    return indptr.object_rows * math.ceil(LEAST_STARTS / indptr.object_rows)


def decoding_bytes(v: Variable, chunks: int, cut: bool, reader: str) -> int:
    """Return the bytes that decoding some chunks of a variable needs; `cut`: a shard is read in part."""
    if reader == "numcodecs" and not has_fine_shards(v):  # else zarrs may read it, where that is installed
        if not v.has_inner_chunks:
            return 2 * v.chunk_bytes  # one chunk after the other
        between = 1 / MIN_DENSITY if cut else 1  # one request reads more than the chunks themselves
        return v.chunk_bytes + int(chunks * between) * v.chunk_bytes
    if reader == "zarr":  # decodes a few at once in threads of its own, for each of which malloc keeps memory
        at_once = min(chunks, ZARR_CONCURRENCY)
        whole = 2 * chunks if v.has_inner_chunks else 2 * at_once  # a shard is decoded whole before it is copied
        return (whole + 2 * at_once) * v.chunk_bytes
    return 2 * chunks * v.chunk_bytes


def chunks_of_box(samples: Samples, store: Samples, plan: DataPlan, v: Variable) -> tuple[int, bool]:
    """Return how many chunks of a store a unit touches at most, and True if it covers another dimension in part."""
    axes = {axis.dim: axis for axis in plan.blocks}
    begins = math.gcd(plan.unit_rows, *samples.begins)  # units begin at multiples of it, but for the halo
    rows = most_chunks(slot_shape(samples, plan, v)[0], begins, samples.reach(v.name)[0], v.chunk_rows)
    chunks, cut = min(rows, math.ceil(v.shape[v.sample_axis] / v.chunk_rows)), False
    for number, (size, (start, stop, step)) in enumerate(zip(v.chunks, v.select, strict=True)):
        if number == v.sample_axis:
            continue
        touched = math.ceil(stop / size) - start // size
        if (axis := axes.get(v.dims[number])) is not None and axis.num_blocks > 1:
            first, last = (start + place * step for place in axis.all_bounds)
            touched, cut = int(((last - step) // size - first // size).max()) + 1, True
        chunks *= touched
        cut = cut or (start, stop, step) != (0, v.shape[number], 1)
    return chunks, cut


def most_chunks(rows: int, interval: int, offset: int, size: int) -> int:
    """Return the most chunks that a run of rows touches, if it begins `offset` rows after a multiple of an interval.

    >>> most_chunks(32, 32, 0, 32), most_chunks(33, 32, -1, 32), most_chunks(10, 5, 0, 7)
    (1, 2, 3)
    """
    together = math.gcd(interval, size)
    latest = size - together + offset % together  # counted from the first row of a chunk
    return (latest + rows - 1) // size + 1


def format_bytes(count: float) -> str:
    """Return a number of bytes in the unit that a person would use, in powers of 1000.

    >>> format_bytes(1_500_000)
    '1.5 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
