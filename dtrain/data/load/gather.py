"""Rows of units in the arena -> fields of batches: one `take` for each field, unpacked and standardised on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import TypeAlias

import numpy as np

from dtrain.data.encoding import Array, Floats, Scaling, unpack
from dtrain.data.load.buffers import PIECE_BYTES, FieldSpec, aligned_copy
from dtrain.data.load.slots import Rows
from dtrain.data.load.sparse import SparseGatherer
from dtrain.data.load.weights import alignments
from dtrain.data.plan.blocks import Blocks, tile_starts
from dtrain.data.plan.hashing import Ints
from dtrain.data.read.sparse import sparse_rows
from dtrain.data.read.weights import decoded_weights
from dtrain.data.samples import Field, Samples
from dtrain.data.tiles import Tile
from dtrain.data.variable import Variable

Scalings: TypeAlias = Mapping[str, Scaling]
"""By variable: how it is standardised."""

WHOLE_ROWS = Blocks()


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one (micro-)batch; axis 0 is the sample axis, floats are float32, integers int64."""

    inputs: tuple[Array, ...]
    targets: tuple[Array, ...]
    weights: tuple[Array, ...] = ()
    """With ``data.weight``: by target, float32 with the target's axes, of length 1 where it does not vary."""

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.targets[0])


class FieldGatherer:
    """Copies one field of samples out of the arena.

    Parameters
    ----------
    samples : Samples
    field : Field
    scaling : Scaling or None
    blocks : Blocks
        Of the units in the arena.
    """

    def __init__(self, samples: Samples, field: Field, scaling: Scaling | None, blocks: Blocks) -> None:
        self.field = field
        self.variable: Variable = samples.variable(field.name)
        row_shape = self.variable.row_shape
        self._standard = None if scaling is None else scaling.against(field.name, row_shape)
        dtype = samples.field_dtype(field) if scaling is None else np.dtype(np.float32)
        self.spec = FieldSpec(samples.field_shape(field), dtype)
        self._low = 0 if self.variable.is_static else samples.reach(field.name)[0]
        self.is_cut = samples.tiles.cuts_any(self.variable)
        """Whether the field differs from patch to patch."""
        self._cuts, self._blocks = samples.tiles.cuts, blocks
        steps = np.diff(field.offsets)
        config = samples.config
        is_input = any(field is one for one in samples.fields[: len(config.inputs)])
        self._zeroes = config.fills_inputs and is_input and dtype == np.float32
        """Whether values that are not finite become 0."""
        self._step = int(steps[0]) if len(steps) and steps[0] > 0 and (steps == steps[0]).all() else 0

    def fill(self, out: Array, arena: Array, rows: Rows) -> None:
        """Fill ``out[sample, ...]`` from ``arena[slot, row, ...]``; out is contiguous and of the model's dtype."""
        self._fill(out, arena, rows)
        if self._zeroes:
            fill_non_finite(out)

    def _fill(self, out: Array, arena: Array, rows: Rows) -> None:
        flat = arena.reshape(-1, *arena.shape[2:])
        first = rows.slot * arena.shape[1] + rows.row - self._low
        if not self.is_cut or rows.tile is None:
            self._take_all(out, flat, first)
        else:
            for samples, slices in self._by_tile(rows.tile, self._blocks):
                self._take_some(out, flat[(slice(None), *slices)], first[samples], samples)

    def fill_static(self, out: Array, values: Array, rows: Rows) -> None:
        """Fill ``out[sample, ...]`` with the patches of a variable that has no sample dimension."""
        if not self.is_cut or rows.tile is None:  # there is one patch, which is all of a row
            out[...] = values
            return
        for samples, slices in self._by_tile(rows.tile, WHOLE_ROWS):
            out[samples] = values[slices]

    def _by_tile(self, tile: Ints, blocks: Blocks) -> Iterator[tuple[Ints, tuple[slice, ...]]]:
        """Yield, for each place of a patch that occurs, the samples that are cut there, and its slices of a row."""
        starts = tile_starts(self._cuts, blocks, tile)
        own = [(cut, start) for cut, start in zip(self._cuts, starts, strict=True) if cut.dim in self.variable.dims]
        place = np.zeros(len(tile), np.int64)
        for cut, start in own:
            place = place * cut.length + start
        for number in np.unique(place).tolist():
            samples = np.flatnonzero(place == number)
            ranges = tuple((cut.dim, int(at[samples[0]]), int(at[samples[0]]) + cut.size) for cut, at in own)
            yield samples, Tile(ranges).slices(self.variable)

    def decoded(self, values: Array) -> Array:
        """Return a variable without the sample dimension as the model sees it."""
        decoded = np.empty(values.shape, self.spec.dtype)
        if self.variable.angle:
            decoded[...] = decoded_weights(self.variable, values)
        else:
            self._store(decoded, ..., values)
        if self._zeroes:
            fill_non_finite(decoded)
        return decoded

    def _take_all(self, out: Array, flat: Array, first: Ints) -> None:
        """Fill `out` with the windows that begin at rows `first`, counted from the field's first offset."""
        start = first + self.field.offsets[0]
        as_stored = self.variable.encoding is None and self._standard is None and flat.dtype == out.dtype
        if as_stored and not self.field.window:
            np.take(flat, start, axis=0, out=out, mode="clip")  # another mode makes numpy copy the output
            return
        for piece in self._pieces(flat, start):
            rows = start[piece]
            taken = self._windows(flat, rows) if self.field.window else np.take(flat, rows, axis=0, mode="clip")
            self._store(out, piece, taken)

    def _take_some(self, out: Array, flat: Array, first: Ints, samples: Ints) -> None:
        """Fill ``out[samples]`` in the same way, from rows that are cut to a patch."""
        start = first + self.field.offsets[0]
        for piece in self._pieces(flat, start):
            rows = start[piece]
            # np.take would copy all of the patch's rows first
            self._store(out, samples[piece], self._windows(flat, rows) if self.field.window else flat[rows])

    def _pieces(self, flat: Array, start: Ints) -> Iterator[slice]:
        sample_bytes = len(self.field.offsets) * flat.itemsize * math.prod(flat.shape[1:])
        size = max(1, PIECE_BYTES // max(1, sample_bytes))
        return (slice(begin, begin + size) for begin in range(0, len(start), size))

    def _windows(self, flat: Array, start: Ints) -> Array:
        """Return a copy of the windows that begin at rows `start`."""
        offsets = np.array(self.field.offsets)
        if self._step:
            return _all_windows(flat, len(offsets), self._step)[start]
        rows: Ints = start[:, None] + (offsets - offsets[0])
        return flat[rows]

    def _store(self, out: Array, where: slice | Ints | EllipsisType, taken: Array) -> None:
        encoding, standard = self.variable.encoding, self._standard
        with np.errstate(over="ignore", invalid="ignore"):  # float64 beyond float32, under non_finite = "allow"
            out[where] = unpack(taken, encoding) if standard is None else standard.apply(taken, encoding)


class BatchGatherer:
    """Copies all fields of samples out of the arena, and makes batches of them.

    A variable without the sample dimension has no memory in a bundle, unless rows are cut into patches: its values
    are repeated for all samples of a batch.

    Parameters
    ----------
    samples : Samples
    statics : mapping of str to array
        The variables without the sample dimension, as stored.
    scalings : mapping of str to Scaling
    blocks : Blocks
        Of the units in the arena.
    """

    def __init__(
        self, samples: Samples, statics: Mapping[str, Array], scalings: Scalings, blocks: Blocks = WHOLE_ROWS
    ) -> None:
        gatherers = [gatherer_of(samples, field, scalings.get(field.name), blocks) for field in samples.fields]
        decoded = [_decoded(gatherer, statics) for gatherer in gatherers]
        self._num_inputs = len(samples.config.inputs)
        self._num_unweighted = self._num_inputs + len(samples.config.targets)
        self._alignments = alignments(samples)
        self._repeated = [None if g.is_cut else values for g, values in zip(gatherers, decoded, strict=True)]
        """By field: the values of all samples; None if the field has memory."""
        self._all_filled = all(values is None for values in self._repeated)
        pairs = zip(gatherers, decoded, self._repeated, strict=True)
        self._filled = [(gatherer, static) for gatherer, static, values in pairs if values is None]
        """The fields that have memory, with their values if they are patches of a static variable."""
        self.specs = tuple(gatherer.spec for gatherer, _ in self._filled)
        """Of the fields that have memory."""

    def fill(self, field: int, out: Array, arena: Mapping[str, Array], rows: Rows) -> None:
        """Fill samples of one of the fields that have memory from the arena's slots."""
        gatherer, static = self._filled[field]
        if isinstance(gatherer, SparseGatherer):
            gatherer.fill(out, sparse_rows(gatherer.sparse, arena), rows)
        elif static is None:
            gatherer.fill(out, arena[gatherer.field.name], rows)
        else:
            gatherer.fill_static(out, static, rows)

    def batch(self, fields: tuple[Array, ...], size: int) -> Batch:
        """Return a batch made of the fields that have memory, and of those that are repeated."""
        arrays = fields if self._all_filled else self._with_repeated(fields, size)
        inputs, targets = arrays[: self._num_inputs], arrays[self._num_inputs : self._num_unweighted]
        return Batch(inputs, targets, tuple([alignment.apply(arrays[-1]) for alignment in self._alignments]))

    def _with_repeated(self, fields: tuple[Array, ...], size: int) -> tuple[Array, ...]:
        filled = iter(fields)
        # a copy for each batch: values that a model writes into it must not reach the next batch
        return tuple(
            next(filled) if values is None else repeated(aligned_copy(values), size) for values in self._repeated
        )


def gatherer_of(
    samples: Samples, field: Field, scaling: Scaling | None, blocks: Blocks = WHOLE_ROWS
) -> FieldGatherer | SparseGatherer:
    """Return what copies a field of samples out of the arena."""
    sparse = samples.variable(field.name).sparse
    if sparse is not None:
        return SparseGatherer(samples, field, scaling, sparse)
    return FieldGatherer(samples, field, scaling, blocks)


def _decoded(gatherer: FieldGatherer | SparseGatherer, statics: Mapping[str, Array]) -> Array | None:
    """Return a variable without the sample dimension as the model sees it; None for other variables."""
    if isinstance(gatherer, SparseGatherer) or not gatherer.variable.is_static:
        return None
    return gatherer.decoded(statics[gatherer.field.name])


def fill_non_finite(values: Array) -> None:
    """Replace the values of float32[sample, ...] that are not finite by 0, in pieces of `PIECE_BYTES`."""
    flat = values.reshape(-1)
    for start in range(0, len(flat), PIECE_BYTES // flat.itemsize):
        some = flat[start : start + PIECE_BYTES // flat.itemsize]
        with np.errstate(over="ignore", invalid="ignore"):  # of infinities of both signs
            total = some.sum()
        if not np.isfinite(total):
            some[~np.isfinite(some)] = 0.0


def target_scalings(samples: Samples, scalings: Scalings) -> tuple[tuple[Floats, Floats] | None, ...]:
    """Return mean and standard deviation of each target; None for a target that is not standardised.

    Decoded values are ``model's * std + mean``. The arrays broadcast against a batch of the target: sample axis, window
    axis if it has one, then the axes of a row, also where rows are cut into patches.

    Parameters
    ----------
    samples : Samples
    scalings : mapping of str to Scaling
    """
    first = len(samples.config.inputs)
    targets = samples.fields[first : first + len(samples.config.targets)]
    return tuple(_target_scaling(samples, field, scalings.get(field.name)) for field in targets)


def _target_scaling(samples: Samples, field: Field, scaling: Scaling | None) -> tuple[Floats, Floats] | None:
    if scaling is None:
        return None
    standard = scaling.against(field.name, samples.variable(field.name).row_shape)
    shape = ((1, 1) if field.window else (1,)) + standard.mean.shape
    return standard.mean.reshape(shape), standard.std.reshape(shape)


def repeated(values: Array, size: int) -> Array:
    """Return the same values for each of `size` samples, without copying them."""
    return np.lib.stride_tricks.as_strided(values, (size, *values.shape), (0, *values.strides))


def _all_windows(flat: Array, length: int, step: int) -> Array:
    """Return a view [start, place in the window, ...] of all windows of an array."""
    count = max(0, len(flat) - (length - 1) * step)
    strides = (flat.strides[0], flat.strides[0] * step, *flat.strides[1:])
    return np.lib.stride_tricks.as_strided(flat, (count, length, *flat.shape[1:]), strides, writeable=False)
