"""The memory budget of a worker that predicts: printed before, and kept.

    inputs    the unit that is predicted, the one read ahead, and what joining both takes
    decoding  chunks of one variable at a time
    batch     the samples that the model sees together
    outputs   the predictions of a unit, sums of patches, and the unit that is being written

How much memory a worker has changes only whether units are read ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.data.plan.footprint import decoding_bytes, format_bytes, index_bytes, sample_bytes, static_bytes
from dtrain.data.plan.heads import Head
from dtrain.data.plan.prediction import PredictionPlan, has_overlap, output_bytes
from dtrain.data.plan.readers import choose_readers
from dtrain.data.samples import Samples
from dtrain.data.variable import Variable
from dtrain.errors import ChunkTooLarge, OutOfMemory

RUN_BYTES = 40
"""For each run of anchors."""
ENCODED = 5
"""Copies of a chunk while it is encoded: as zarr takes it, as bytes, compressed, with its checksum, and handed over."""
LEFT_OUT = 3
"""Copies of the sums of a unit where patches may be left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionBudget:
    """The bytes of the data path of a worker that predicts."""

    unit: int
    """Bytes of the inputs of a unit, with halos and what else its last chunks hold."""
    scratch: int
    batch: int
    outputs: int
    """Bytes of the predictions of a unit."""
    encoding: int
    """Bytes that encoding a chunk needs."""
    sums: int
    """Bytes of the blended sums of a unit, and of what they are divided by."""
    kept: int
    """Bytes of variables and tables that stay in memory."""
    ahead: bool
    """Whether the next unit is read while one is predicted."""

    @property
    def units(self) -> int:
        """Units in memory at once: what is held, what is read, and what both become."""
        return 3 if self.ahead else 2

    @property
    def copies(self) -> int:
        """Predictions of how many units are in memory at once: of the one computed, and of the one being written."""
        return 2 if self.ahead else 1

    @property
    def total(self) -> int:
        """Bytes that a worker needs at most."""
        written = 3 if self.ahead else 2  # computed, and written: as they are, and encoded
        return self.units * self.unit + self.scratch + self.batch + written * self.outputs + self.sums + self.kept

    def sentence(self) -> str:
        """Return the terms with their numbers."""
        sums = f" + sums of patches {format_bytes(self.sums)}" if self.sums else ""
        kept = f" + preloaded {format_bytes(self.kept)}" if self.kept else ""
        return (
            f"{self.units} x inputs {format_bytes(self.unit)} + decoding {format_bytes(self.scratch)} + batch "
            f"{format_bytes(self.batch)} + {self.copies} x predictions {format_bytes(self.outputs)} + encoding "
            f"{format_bytes(self.encoding)}{sums}{kept} = {format_bytes(self.total)}"
        )


def plan_budget(
    samples: Samples, plan: PredictionPlan, heads: Sequence[Head], batch_size: int, limit: int, what: str
) -> PredictionBudget:
    """Return what a worker needs; it reads ahead if there is memory for that.

    Parameters
    ----------
    samples : Samples
        Of the inputs alone.
    plan : PredictionPlan
    heads : sequence of Head
    batch_size : int
        Samples that the model sees together.
    limit : int
        Bytes that the data path may use.
    what : str
        Names the limit in errors.

    Raises
    ------
    ChunkTooLarge, OutOfMemory
        It is more than the limit.
    """
    for v in samples.stored:
        if v.chunk_bytes > limit:
            raise ChunkTooLarge(
                f"{samples.path}: one chunk of {v.name} {v.chunks} decodes to {format_bytes(v.chunk_bytes)}; {what} is "
                f"{format_bytes(limit)}.",
                "Store it in smaller chunks, or give the workers more memory.",
            )
    extents = {axis.dim: min(axis.extent, axis.length) for axis in plan.axes}
    arrays = plan.rows * output_bytes(heads, samples.sample_dim, extents, blended=False)
    both = plan.rows * output_bytes(heads, samples.sample_dim, extents, blended=has_overlap(plan.axes))
    written = [array for head in heads for array in head.arrays]
    largest = max(math.prod(plan.chunks[array.name]) * array.numpy_dtype.itemsize for array in written)
    shapes = {v.name: _largest(samples, plan, v) for v in samples.streamed if v.sparse is None}
    dense = sum(math.prod(shape) * samples.variable(name).kept_dtype.itemsize for name, shape in shapes.items())
    sparse = sum((plan.rows * plan.anchors.stride) * v.row_bytes for v in samples.sparse)
    budgets = [
        PredictionBudget(
            unit=dense + sparse,
            scratch=_scratch(samples, shapes),
            batch=batch_size * sample_bytes(samples),
            outputs=arrays,
            encoding=ENCODED * largest,
            sums=(both - arrays) * (1 if samples.config.min_valid is None else LEFT_OUT),
            kept=static_bytes(samples) + index_bytes(samples) + RUN_BYTES * len(plan.anchors.first),
            ahead=ahead,
        )
        for ahead in (True, False)
    ]
    chosen = next((budget for budget in budgets if budget.total <= limit), None)
    if chosen is None:
        raise OutOfMemory(
            f"{samples.path}: predicting needs {budgets[-1].sentence()}; {what} is {format_bytes(limit)}.",
            "Give the workers more memory (cluster.memory, data.memory), or store smaller chunks.",
        )
    return chosen


def _largest(samples: Samples, plan: PredictionPlan, v: Variable) -> tuple[int, ...]:
    """Return the shape of the largest part of a variable that is held: rows, then the axes of a row."""
    low, high = samples.reach(v.name)
    rows = min(plan.rows * plan.anchors.stride + high - low + (0 if plan.sweep else v.chunk_rows), samples.num_rows)
    lengths = dict(zip(v.row_dims, v.row_shape, strict=True))
    for number, axis in enumerate(plan.axes, start=1):
        if axis.dim in lengths:
            needed = max(high - low for low, high in map(axis.needed, range(axis.num_blocks)))
            more = v.chunks[v.dims.index(axis.dim)] if plan.sweep == number else 0
            lengths[axis.dim] = min(axis.length, needed + more)
    return (rows, *lengths.values())


def _scratch(samples: Samples, shapes: dict[str, tuple[int, ...]]) -> int:
    needed = [0]
    for store in samples.stores:
        readers = choose_readers(store, samples.config.reader)
        for v in store.streamed:
            if v.sparse is not None:
                needed += [decoding_bytes(array, 4, True, readers[array.name][0]) for array in v.arrays[1:]]
                continue
            sizes = [v.chunk_rows, *(v.chunks[axis] for axis in v.row_axes)]
            chunks = math.prod(-(-n // size) + 1 for n, size in zip(shapes[v.name], sizes, strict=True))
            whole = math.prod(-(-n // size) for n, size in zip(v.shape, v.chunks, strict=True))
            needed.append(decoding_bytes(v, min(chunks, whole), True, readers[v.name][0]))
    return max(needed)
