"""Partition + cursor -> batches of numpy arrays, with no more than the window's units in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.data.order import Block, Ints, epoch_order
from dtrain.data.partition import DataPlan, Partition
from dtrain.data.samples import Field, Samples, Variable, model_dtype
from dtrain.data.store import chunk_missing, first_missing, first_truncated, object_keys, open_group
from dtrain.errors import ChunkUndecodable, NonFiniteData, OutOfMemory
from dtrain.types import Cursor

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one (micro-)batch; axis 0 is the sample axis, floats are float32, integers int64."""

    inputs: tuple[Array, ...]
    targets: tuple[Array, ...]

    @property
    def size(self) -> int:
        """Number of samples."""
        return len(self.targets[0])


class UnitReader:
    """Reads whole units of all variables, checks them, and counts what it reads.

    Array handles are opened once. One reader belongs to one thread.
    """

    def __init__(self, samples: Samples, plan: DataPlan) -> None:
        self.samples = samples
        self.plan = plan
        group = open_group(samples.path, samples.config.group)
        self._arrays: dict[str, Any] = {v.name: group[v.name] for v in samples.variables}
        self.units_decoded = 0
        self.bytes_read = 0

    def read(self, first: int, stop: int) -> dict[str, tuple[int, Array]]:
        """Return, by variable, the rows that samples with anchors in ``first:stop`` need, after the first row's number.

        Values are as stored, with the sample axis first.

        Raises
        ------
        ChunkMissing, ChunkUndecodable, NonFiniteData
            Names the array and the chunk.
        """
        found: dict[str, tuple[int, Array]] = {}
        for variable in self.samples.variables:
            low, high = self.samples.reach(variable.name)
            found[variable.name] = (first + low, self._read_variable(variable, first + low, stop + high))
        self.units_decoded += 1
        self.bytes_read += sum(array.nbytes for _, array in found.values())
        return found

    def _read_variable(self, variable: Variable, start: int, stop: int) -> Array:
        array = self._arrays[variable.name]
        axis = variable.sample_axis
        keys = list(object_keys(array, variable.objects, axis, start, stop))
        if self.samples.config.missing == "error" and (key := first_missing(array, keys)):
            raise chunk_missing(self.samples.path, variable, key)
        if key := first_truncated(array, keys):
            raise self._chunk_undecodable(variable, key, "the file is cut short")
        try:
            values = np.asarray(array[_along(axis, start, stop)])
        except MemoryError as error:
            raise OutOfMemory(
                f"{self.samples.path}: no memory for {variable.name}[{start}:{stop}].",
                "Give the workers more memory (cluster.memory), or store smaller chunks.",
            ) from error
        except Exception as error:
            raise self._undecodable(variable, start, stop, error) from error
        if self.samples.config.non_finite == "error" and values.dtype.kind == "f" and not _finite(values).all():
            raise self._non_finite(variable, start, values)
        return np.moveaxis(values, axis, 0)

    def _undecodable(self, variable: Variable, start: int, stop: int, error: Exception) -> ChunkUndecodable:
        """Find the object that cannot be decoded by reading them one by one."""
        array = self._arrays[variable.name]
        for selection, key in self._objects(variable, start, stop):
            try:
                array[selection]
            except Exception as cause:
                return self._chunk_undecodable(variable, key, _one_line(cause))
        return ChunkUndecodable(
            f"{self.samples.path}: {variable.name}[{start}:{stop}] could not be read: {_one_line(error)}",
            "Reading it again worked: the storage is unreliable. Run the same command again to continue.",
        )

    def _chunk_undecodable(self, variable: Variable, key: str, reason: str) -> ChunkUndecodable:
        return ChunkUndecodable(
            f"{self.samples.path}: chunk {key} of {variable.name} cannot be decoded: {reason}",
            "Restore it from a copy of the store.",
        )

    def _objects(self, variable: Variable, start: int, stop: int) -> Iterator[tuple[tuple[slice, ...], str]]:
        array = self._arrays[variable.name]
        keys = object_keys(array, variable.objects, variable.sample_axis, start, stop)
        shape = [
            range(start // size, -(-stop // size)) if dim == variable.sample_axis else range(-(-length // size))
            for dim, (length, size) in enumerate(zip(variable.shape, variable.objects, strict=True))
        ]
        for index, key in zip(np.ndindex(*map(len, shape)), keys, strict=True):
            corner = [r[i] * size for r, i, size in zip(shape, index, variable.objects, strict=True)]
            yield tuple(slice(c, c + size) for c, size in zip(corner, variable.objects, strict=True)), key

    def _non_finite(self, variable: Variable, start: int, values: Array) -> NonFiniteData:
        where = [int(i) for i in np.argwhere(~_finite(values))[0]]
        value = values[tuple(where)]
        where[variable.sample_axis] += start
        chunk = tuple(i // size for i, size in zip(where, variable.objects, strict=True))
        key = self._arrays[variable.name].metadata.encode_chunk_key(chunk)
        return NonFiniteData(
            f"{self.samples.path}: {variable.name}{where} in chunk {key} is {value}"
            f"{', which float32 cannot hold' if np.isfinite(value) else ''}.",
            'Repair or mask the data, or set data.non_finite = "allow".',
        )


def _finite(values: Array) -> Array:
    """Return where float values are finite as the model sees them: a large float64 is infinite in float32."""
    with np.errstate(over="ignore"):
        finite: Array = np.isfinite(values.astype(np.float32, copy=False))
    return finite


def _along(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return (slice(None),) * axis + (slice(start, stop),)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def read_batches(
    reader: UnitReader,
    partition: Partition,
    cursor: Cursor,
    sizes: Iterable[int],
    *,
    replica: int,
    shuffle: bool,
) -> Iterator[Batch]:
    """Yield batches of the given sizes from the cyclic stream of passes that begins at the cursor.

    Parameters
    ----------
    reader : UnitReader
    partition : Partition
        Not empty.
    cursor : Cursor
        Where to begin.
    sizes : iterable of int
        Samples of each batch. A batch that reaches beyond a pass goes on with the next one.
    replica : int
        Names the stream; it decides the order together with the plan's seed and the epoch.
    shuffle : bool
        Whether the passes are shuffled.
    """
    stream = _stream(reader, partition, cursor, replica, shuffle)
    fields, num_inputs = reader.samples.fields, len(reader.samples.config.inputs)
    block, opened = next(stream)
    done = 0
    for size in sizes:
        tensors = [_empty(reader.samples, field, size) for field in fields]
        filled = 0
        while filled < size:
            while done == len(block.part):
                (block, opened), done = next(stream), 0
            taken = slice(done, done + min(size - filled, len(block.part) - done))
            for field, tensor in zip(fields, tensors, strict=True):
                _gather(tensor, filled, field, opened, block.part[taken], block.row[taken])
            filled, done = filled + taken.stop - taken.start, taken.stop
        yield Batch(tuple(tensors[:num_inputs]), tuple(tensors[num_inputs:]))


@dataclass(frozen=True, slots=True)
class _Open:
    """A part in memory."""

    anchors: Ints
    """By row of the part."""
    values: dict[str, tuple[int, Array]]
    """By variable: the number of the first row, and the rows."""


def _stream(
    reader: UnitReader, partition: Partition, cursor: Cursor, replica: int, shuffle: bool
) -> Iterator[tuple[Block, dict[int, _Open]]]:
    """Yield blocks of the order with their parts, for ever.

    A part is read when its first row is due, and dropped when the block after its last one is asked for.
    """
    plan = reader.plan
    epoch, position = cursor.epoch, cursor.position
    while True:
        opened: dict[int, _Open] = {}
        blocks = epoch_order(
            partition.part_sizes,
            window=plan.window,
            shuffle=shuffle,
            seed=plan.seed,
            replica=replica,
            epoch=epoch,
            position=position,
        )
        for block in blocks:
            for part in np.unique(block.part).tolist():
                if part not in opened:
                    anchors = partition.part_anchors(part)
                    opened[part] = _Open(anchors, reader.read(int(anchors[0]), int(anchors[-1]) + 1))
            yield block, opened
            opened.pop(block.closed, None)
        opened.clear()  # before the next pass opens its own
        epoch, position = epoch + 1, 0


def _empty(samples: Samples, field: Field, size: int) -> Array:
    variable = samples.variable(field.name)
    window = (len(field.offsets),) if field.window else ()
    return np.empty((size, *window, *variable.sample_shape), model_dtype(variable.dtype))


def _gather(tensor: Array, start: int, field: Field, opened: dict[int, _Open], part: Ints, row: Ints) -> None:
    """Fill ``tensor[start:]`` with a field of the samples that are named by part and row."""
    offsets = np.array(field.offsets)
    for index in np.unique(part).tolist():
        where = np.flatnonzero(part == index)
        base, values = opened[index].values[field.name]
        rows = opened[index].anchors[row[where]] - base
        with np.errstate(over="ignore"):  # float64 beyond float32, under non_finite = "allow"
            tensor[start + where] = values[rows[:, None] + offsets if field.window else rows + offsets[0]]
