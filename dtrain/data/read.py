"""Partition + cursor -> batches of numpy arrays, with no more than the window's units in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.data.order import epoch_order
from dtrain.data.partition import DataPlan, Partition
from dtrain.data.samples import Samples, Variable, model_dtype
from dtrain.data.source import chunk_missing, first_missing, first_truncated, object_keys, open_group
from dtrain.errors import ChunkUndecodable, NonFiniteData
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

    def read(self, unit: int) -> dict[str, Array]:
        """Return the unit's rows of every variable, as stored but with the sample axis first.

        Raises
        ------
        ChunkMissing, ChunkUndecodable, NonFiniteData
            Names the array and the chunk.
        """
        start, stop = self.plan.unit_range(unit)
        arrays = {v.name: self._read_variable(v, start, stop) for v in self.samples.variables}
        self.units_decoded += 1
        self.bytes_read += sum(array.nbytes for array in arrays.values())
        return arrays

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
    rows: dict[str, Array] = {}
    for size in sizes:
        out = _empty(reader.samples, size)
        filled = 0
        while filled < size:
            if not rows:
                rows = next(stream)
            count = len(next(iter(rows.values())))
            taken = min(size - filled, count)
            for name, values in rows.items():
                out[name][filled : filled + taken] = values[:taken]
            rows = {name: values[taken:] for name, values in rows.items()} if taken < count else {}
            filled += taken
        config = reader.samples.config
        yield Batch(tuple(out[name] for name in config.inputs), tuple(out[name] for name in config.targets))


def _stream(
    reader: UnitReader, partition: Partition, cursor: Cursor, replica: int, shuffle: bool
) -> Iterator[dict[str, Array]]:
    """Yield runs of rows in order, for ever; a unit is read when its first row is due, dropped after its last."""
    plan = reader.plan
    epoch, position = cursor.epoch, cursor.position
    while True:
        opened: dict[int, tuple[dict[str, Array], npt.NDArray[np.int64]]] = {}
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
            for part in np.unique(block.part):
                if int(part) not in opened:
                    opened[int(part)] = (reader.read(int(partition.units[part])), partition.part_rows(int(part)))
            if len(block.part):
                yield _gathered(reader.samples, opened, block.part, block.row)
            opened.pop(block.closed, None)
        epoch, position = epoch + 1, 0


def _empty(samples: Samples, size: int) -> dict[str, Array]:
    return {v.name: np.empty((size, *v.sample_shape), model_dtype(v.dtype)) for v in samples.variables}


def _gathered(
    samples: Samples,
    opened: dict[int, tuple[dict[str, Array], npt.NDArray[np.int64]]],
    part: npt.NDArray[np.int64],
    row: npt.NDArray[np.int64],
) -> dict[str, Array]:
    out = _empty(samples, len(part))
    for index in np.unique(part):
        values, rows = opened[int(index)]
        where = np.flatnonzero(part == index)
        for name, target in out.items():
            with np.errstate(over="ignore"):  # non_finite = "allow"
                target[where] = values[name][rows[row[where]]]
    return out
