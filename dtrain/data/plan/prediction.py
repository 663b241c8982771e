"""How predictions are cut into units: what is read, computed and written at once. Integer arithmetic on metadata.

    along the samples   |---- unit ----|---- unit ----|---- unit ----|      whole chunks, about `UNIT_BYTES`
    a patched dimension |-- block --|-- block --|-- block --|               only where a row exceeds `ROW_BYTES`

A unit owns whole chunks of every array that is written. Units never look at memory or workers, since the batches of a
unit decide bits. They are numbered so that neighbours along one dimension (`sweep`) follow each other: a task that
predicts several of them in order decodes what two of them share once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dtrain.data.plan.blend import TileAxis, tile_axis
from dtrain.data.plan.grid import touched
from dtrain.data.plan.heads import Head, OutputArray
from dtrain.data.plan.predicted import Anchors
from dtrain.data.plan.units import Box, box_shape, rows_selection
from dtrain.data.samples import WHOLE_OBJECT_BYTES, Samples, common_rows, whole_rows

UNIT_BYTES = 16 << 20
"""Inputs and predictions of a unit have together at most about so many bytes, if a chunk is not larger."""
ROW_BYTES = 128 << 20
"""A row of inputs and predictions that has more is cut into blocks, if samples are patches."""
MULTIPLES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""Chunks of a block along a dimension."""
MANY_UNITS = 64
"""Units are smaller where there would be fewer, so that work can be shared."""
SMALL_CHUNK_BYTES = 1 << 20
"""Chunks of predictions have about so many bytes at least, if a unit has them."""
LARGE_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Unit:
    """Predictions that are computed and written together."""

    number: int
    start: int
    """The first place along the dimension of the samples."""
    stop: int
    blocks: tuple[int, ...]
    """By patched dimension: the number of the block."""


@dataclass(frozen=True, kw_only=True)
class PredictionPlan:
    """The units of all predictions."""

    sample_dim: str
    anchors: Anchors
    rows: int
    """Places of a unit along the dimension of the samples; the last unit may have fewer."""
    axes: tuple[TileAxis, ...]
    sweep: int = 0
    """Units that follow each other are neighbours along this dimension: 0 for the samples, then `axes`."""
    chunks: Mapping[str, tuple[int, ...]]
    """By array that is written: the shape of its chunks."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of units along the dimension of the samples, and along each patched one."""
        return (-(-self.anchors.total // self.rows), *(axis.num_blocks for axis in self.axes))

    @property
    def num_units(self) -> int:
        """Number of all units."""
        return math.prod(self.counts)

    @property
    def _order(self) -> list[int]:
        """The dimensions, the one along which neighbours follow each other last."""
        return [*(k for k in range(len(self.counts)) if k != self.sweep), self.sweep]

    def unit(self, number: int) -> Unit:
        """Return a unit by its number."""
        at, rest, counts = [0] * len(self.counts), number, self.counts
        for k in reversed(self._order):
            rest, at[k] = divmod(rest, counts[k])
        return Unit(number, at[0] * self.rows, min(self.anchors.total, (at[0] + 1) * self.rows), tuple(at[1:]))

    def number(self, at: Sequence[int]) -> int:
        """Return the number of the unit at a place of the grid of units."""
        number, counts = 0, self.counts
        for k in self._order:
            number = number * counts[k] + at[k]
        return number

    def extents(self, unit: Unit) -> dict[str, int]:
        """Return, by patched dimension, the places of a unit."""
        return {dim: high - low for dim, low, high in self.owned(unit)}

    def owned(self, unit: Unit) -> tuple[tuple[str, int, int], ...]:
        """Return dimension, first place and the one after the last, of each patched dimension."""
        return tuple((axis.dim, *axis.bounds(k)) for axis, k in zip(self.axes, unit.blocks, strict=True))

    def needed(self, unit: Unit) -> tuple[tuple[str, int, int], ...]:
        """Return the same of all patches that cover some of a unit."""
        return tuple((axis.dim, *axis.needed(k)) for axis, k in zip(self.axes, unit.blocks, strict=True))

    def tiles(self, unit: Unit) -> list[tuple[int, ...]]:
        """Return the patches of each row of a unit, by their number along each dimension, in C order."""
        counts = [axis.tiles(k) for axis, k in zip(self.axes, unit.blocks, strict=True)]
        tiles: list[tuple[int, ...]] = [()]
        for along in counts:
            tiles = [(*before, tile) for before in tiles for tile in along]
        return tiles

    def own_tiles(self, unit: Unit) -> list[bool]:
        """Return which patches of `tiles` begin in the unit: each patch of a row begins in one."""
        bounds = self.owned(unit)
        return [
            all(
                low <= axis.start(tile) < high
                for axis, tile, (_, low, high) in zip(self.axes, along, bounds, strict=True)
            )
            for along in self.tiles(unit)
        ]

    def samples_in(self, unit: Unit) -> int:
        """Return the number of samples that begin in a unit."""
        return (unit.stop - unit.start) * sum(self.own_tiles(unit))

    def region(self, array: OutputArray, unit: Unit) -> tuple[slice, ...]:
        """Return the part of an array that a unit owns."""
        own = {self.sample_dim: slice(unit.start, unit.stop)}
        own |= {dim: slice(low, high) for dim, low, high in self.owned(unit)}
        return tuple(own.get(dim, slice(0, length)) for dim, length in array.lengths.items())


def plan_prediction(
    samples: Samples, anchors: Anchors, heads: Sequence[Head], patch: Mapping[str, int], overlap: float
) -> PredictionPlan:
    """Cut predictions into units.

    Parameters
    ----------
    samples : Samples
        Of the inputs alone.
    anchors : Anchors
    heads : sequence of Head
    patch : mapping of str to int
        ``data.patch``.
    overlap : float
        Share of a patch that the next one covers too.
    """
    lengths = row_lengths(samples)
    axes = tuple(tile_axis(dim, lengths[dim], size, overlap) for dim, size in patch.items())
    axes = _in_blocks(samples, heads, axes)
    rows = _unit_rows(samples, anchors, heads, axes)
    plan = PredictionPlan(sample_dim=samples.sample_dim, anchors=anchors, rows=rows, axes=axes, chunks={})
    plan = replace(plan, sweep=_sweep(samples, plan))
    arrays = [array for head in heads for array in head.arrays]
    return replace(plan, chunks={array.name: _chunks(samples, plan, array) for array in arrays})


def row_lengths(samples: Samples) -> dict[str, int]:
    """Return the selected length of each dimension of a row."""
    pairs = (pair for v in samples.variables for pair in zip(v.row_dims, v.row_shape, strict=True))
    return dict(pairs)


# Bytes ------------------------------------------------------------------------------------------------------


def input_bytes(samples: Samples, rows: int, block: tuple[tuple[str, int, int], ...]) -> int:
    """Return the bytes in memory of the inputs of neighbouring anchors, with the halo of windows.

    A sparse variable counts with the mean of its rows.
    """
    total = 0
    for v in samples.streamed:
        low, high = samples.reach(v.name)
        if v.sparse is not None:
            total += (rows + high - low) * v.row_bytes
        else:
            total += math.prod(box_shape(samples, v, Box(0, rows, block))) * v.kept_dtype.itemsize
    return total


def output_bytes(heads: Sequence[Head], sample_dim: str, extents: Mapping[str, int], *, blended: bool) -> int:
    """Return the bytes of the predictions of an anchor; where patches are blended, with the float64 of their sums."""
    arrays = sum(array.anchor_bytes(sample_dim, extents) for head in heads for array in head.arrays)
    return arrays + 8 * sum(math.prod(head.estimate_shape(extents)) for head in heads if blended)


def _row_bytes(samples: Samples, heads: Sequence[Head], axes: tuple[TileAxis, ...]) -> int:
    """Return the bytes of a row of the largest block: of its inputs, and of its predictions."""
    block = tuple((axis.dim, 0, _most_needed(axis)) for axis in axes)
    extents = {axis.dim: min(axis.extent, axis.length) for axis in axes}
    own = sum(v.row_bytes for v in samples.streamed if v.sparse is not None)
    for v in samples.streamed:
        if v.sparse is None:
            own += math.prod(box_shape(samples, v, Box(0, 1, block))[1:]) * v.kept_dtype.itemsize
    return own + output_bytes(heads, samples.sample_dim, extents, blended=has_overlap(axes))


def _most_needed(axis: TileAxis) -> int:
    return min(axis.length, axis.extent + 2 * (axis.size - 1)) if axis.num_blocks > 1 else axis.length


def has_overlap(axes: Sequence[TileAxis]) -> bool:
    """Whether rows are cut into patches at all: their predictions are put together."""
    return any(axis.count > 1 for axis in axes)


# Units ------------------------------------------------------------------------------------------------------


def _in_blocks(samples: Samples, heads: Sequence[Head], axes: tuple[TileAxis, ...]) -> tuple[TileAxis, ...]:
    """Return patched dimensions in blocks of whole chunks, if rows are large.

    Of the blocks that are small enough, those for which least is computed and decoded twice; else the smallest ones.
    """
    if not axes or _row_bytes(samples, heads, axes) <= ROW_BYTES:
        return axes
    tries = list(itertools.product(*(_extents(samples, heads, axis) for axis in axes)))
    sizes = [_row_bytes(samples, heads, one) for one in tries]
    fitting = [one for one, size in zip(tries, sizes, strict=True) if size <= ROW_BYTES]
    if not fitting:
        return tries[sizes.index(min(sizes))]
    decoded = {axis: _shared_places(samples, axis) for one in fitting for axis in one}
    return min(fitting, key=lambda one: _waste(one, [decoded[axis] for axis in one]))


def _extents(samples: Samples, heads: Sequence[Head], axis: TileAxis) -> list[TileAxis]:
    """Return a dimension with some lengths of blocks: multiples of chunks, and a single block."""
    if any(axis.dim not in head.dims for head in heads):  # its patches together make one prediction
        return [axis]
    chunk = chunk_places(samples, axis.dim)
    lengths = (chunk * number for number in MULTIPLES)
    return [*(replace(axis, extent=length) for length in lengths if length < axis.length), axis]


def _waste(axes: Sequence[TileAxis], decoded: Sequence[float]) -> float:
    """Return how often patches are computed, times how often chunks are decoded, but along one dimension."""
    patches = math.prod(sum(len(axis.tiles(k)) for k in range(axis.num_blocks)) / axis.count for axis in axes)
    return patches * math.prod(decoded) / max(decoded)


def chunk_places(samples: Samples, dim: str) -> int:
    """Return the interval, in selected places, at which the chunks of a dimension of rows can be cut together."""
    lengths = [
        max(1, v.chunks[axis] // v.select[axis][2])
        for v in samples.variables
        if v.sparse is None
        for axis in v.row_axes
        if v.dims[axis] == dim
    ]
    return common_rows(lengths) if lengths else 1


def _unit_rows(samples: Samples, anchors: Anchors, heads: Sequence[Head], axes: tuple[TileAxis, ...]) -> int:
    """Return the places of a unit along the dimension of the samples: those of whole chunks, if they are not large."""
    stride, streamed = anchors.stride, samples.streamed
    dense = [v for v in streamed if v.sparse is None]
    chunk = common_rows([v.chunk_rows for v in dense]) if dense else 1
    boundary = min(whole_rows(streamed), max(1, samples.num_samples)) if streamed else 1
    extents = {axis.dim: min(axis.extent, axis.length) for axis in axes}
    out = output_bytes(heads, samples.sample_dim, extents, blended=has_overlap(axes))
    each = max(1, _row_bytes(samples, heads, axes) - out + -(-out // stride))
    if boundary * each > WHOLE_OBJECT_BYTES and boundary % chunk == 0 and (not samples.sparse or boundary == chunk):
        boundary = chunk
    blocks = math.prod(axis.num_blocks for axis in axes)
    enough = max(1, samples.num_rows * blocks * each // MANY_UNITS)
    most = max(1, min(UNIT_BYTES, enough) // each)
    if boundary <= most:
        rows = most // boundary * boundary
    else:  # a chunk is larger: its predictions are cut where they, and not the chunk, are the reason
        rows = boundary // math.ceil(boundary * each / (4 * UNIT_BYTES)) if out > stride * (each - out) else boundary
    return min(anchors.total, max(1, rows // stride))


def _sweep(samples: Samples, plan: PredictionPlan) -> int:
    """Return the dimension along which neighbouring units share most of what they decode."""
    shared = [_shared_rows(samples, plan), *(_shared_places(samples, axis) for axis in plan.axes)]
    shared = [twice if count > 1 else 0.0 for twice, count in zip(shared, plan.counts, strict=True)]
    return max(range(len(shared)), key=lambda k: (round(shared[k], 6), k))


def _shared_rows(samples: Samples, plan: PredictionPlan) -> float:
    """Return how often a chunk is decoded along the samples, if units do not share it."""
    most = 1.0
    for v in samples.streamed:
        if v.sparse is None:
            low, high = samples.reach(v.name)
            rows, first = plan.rows * plan.anchors.stride, 8 * plan.rows * plan.anchors.stride
            chunks = -(-(first + rows + high) // v.chunk_rows) - (first + low) // v.chunk_rows
            most = max(most, chunks * v.chunk_rows / rows)
    return most


def _shared_places(samples: Samples, axis: TileAxis) -> float:
    """Return the same along a patched dimension."""
    most = 1.0
    for v in samples.streamed:
        if v.sparse is not None or axis.dim not in v.dims:
            continue
        place = v.dims.index(axis.dim)
        selections = (
            rows_selection(v, Box(0, 1, ((axis.dim, *axis.needed(block)),))) for block in range(axis.num_blocks)
        )
        total = sum(len(touched(v.chunks, select)[place]) for select in selections)
        most = max(most, total / len(touched(v.chunks, v.select)[place]))
    return most


# Chunks -----------------------------------------------------------------------------------------------------


def _chunks(samples: Samples, plan: PredictionPlan, array: OutputArray) -> tuple[int, ...]:
    """Return the shape of the chunks of an array: those of the inputs, or more where they would be small.

    A unit holds whole chunks. Dimensions that the inputs lack are whole, unless chunks would be very large.
    """
    blocks = {axis.dim: axis for axis in plan.axes}
    shape = {dim: min(blocks[dim].extent, n) if dim in blocks else n for dim, n in array.lengths.items()}
    shape[plan.sample_dim] = 1
    itemsize, inputs = array.numpy_dtype.itemsize, row_lengths(samples)
    for dim in (dim for dim in array.dims if inputs.get(dim) == array.lengths[dim] and dim != plan.sample_dim):
        chunk = chunk_places(samples, dim)
        if shape[dim] % chunk == 0 or dim not in blocks or blocks[dim].num_blocks == 1:
            small = {**shape, dim: min(chunk, shape[dim])}
            if itemsize * math.prod(shape.values()) > 4 * SMALL_CHUNK_BYTES:
                shape = small
    for dim in (dim for dim in array.computed[1:] if dim not in inputs):
        over = itemsize * math.prod(shape.values()) / LARGE_CHUNK_BYTES
        if over > 1:
            shape[dim] = max(1, int(shape[dim] / over))
    shape[plan.sample_dim] = _chunk_rows(samples, plan, itemsize * math.prod(shape.values()))
    return tuple(shape[dim] for dim in array.dims)


def _chunk_rows(samples: Samples, plan: PredictionPlan, anchor_bytes: int) -> int:
    """Return the places of a chunk along the samples, which divide those of a unit."""
    dense = [v.chunk_rows for v in samples.streamed if v.sparse is None]
    chunk = max(1, (common_rows(dense) if dense else plan.rows) // plan.anchors.stride)
    if plan.rows % chunk:
        return plan.rows if plan.rows * anchor_bytes <= LARGE_CHUNK_BYTES else _divisor(plan.rows, anchor_bytes)
    sizes = [chunk * n for n in range(1, plan.rows // chunk + 1) if plan.rows % (chunk * n) == 0]
    return next((size for size in sizes if size * anchor_bytes >= SMALL_CHUNK_BYTES), sizes[-1])


def _divisor(rows: int, anchor_bytes: int) -> int:
    """Return the largest divisor of some places whose predictions are no large chunk."""
    fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * anchor_bytes <= LARGE_CHUNK_BYTES]
    return fitting[-1] if fitting else 1
