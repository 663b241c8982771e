"""The resident loader: partition + cursor -> batches, read ahead by threads in bounded memory.

    read threads      units --> slots of an arena          at most B (open) + R (ahead) + C (cached, never evicted)
    one assembler     slots --> groups of batches          a few buffers, used again when nobody refers to them;
                                                           it reads units too while it would have to wait for one
    the consumer      takes batches, in the order that the plan says

All three keep going while parameters travel, until they run out of slots or buffers. The order of samples is a
pure function of plan and cursor, so a loader can be thrown away and made again at any time: it decides when bytes
are read, never what they are.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import numpy as np

from dtrain.data.load.gather import Allocate, Array, Batch, Gatherer, Rows, Scalings, repeated
from dtrain.data.plan.footprint import slot_shape
from dtrain.data.plan.hashing import CACHE, Ints, hash64
from dtrain.data.plan.memory import Limits, group_batches
from dtrain.data.plan.order import RowRun, epoch_order
from dtrain.data.plan.partition import Partition
from dtrain.data.plan.units import Box
from dtrain.data.read.units import UnitReader
from dtrain.types import Cursor


class Loader:
    """Reads the cyclic stream of passes over a partition, from a cursor on.

    Parameters
    ----------
    reader : UnitReader
    partition : Partition
        Not empty.
    cursor : Cursor
        Where to begin.
    sizes : iterable of int
        Samples of each batch from there on. A batch that reaches beyond a pass goes on with the next one. An
        iterator may be endless. Where their sum is known (`total`, or a sequence), nothing more is read.
    replica : int
        Names the stream; it decides the order together with the plan's seed and the epoch.
    shuffle : bool
        Whether passes are shuffled.
    limits : Limits
        Slots and threads: speed, never bits.
    scalings : mapping of str to Scaling
        By variable: how it is standardised.
    allocate : callable
        Makes the buffers of batches; pinned memory, for example.
    total : int, optional
        Sum of the sizes, where it is known.
    """

    def __init__(
        self,
        reader: UnitReader,
        partition: Partition,
        cursor: Cursor,
        sizes: Iterable[int],
        *,
        replica: int,
        shuffle: bool,
        limits: Limits,
        scalings: Scalings | None = None,
        allocate: Allocate = np.empty,
        total: int | None = None,
    ) -> None:
        self.cursor = cursor
        """Of the next batch that will be taken."""
        self.reader = reader
        self.units_decoded = 0
        """Read so far, without those that were kept."""
        self.bytes_decoded = 0
        self.waited = 0.0
        """Seconds that the consumer has waited."""
        self.partition = partition
        self._counting = threading.Lock()
        self._told = Counted(0, 0, 0.0)
        self._sizes = iter(sizes)
        total = sum(sizes) if isinstance(sizes, Sequence) else total
        self._stream = _blocks(partition, cursor, replica, shuffle, total)
        self._slots = _Slots(reader, partition, limits, shuffle, self._count)
        self._ahead = limits.ahead
        self._buffers = _Buffers(reader, scalings or {}, allocate)
        self._groups: SimpleQueue[_Group | BaseException | None] = SimpleQueue()
        self._permits = threading.Semaphore(limits.buffers)
        self._closed = threading.Event()
        self._group: _Group | None = None
        self._next = 0
        self._retired: list[_Group] = []
        self._thread = threading.Thread(target=self._assemble, name="dtrain-assemble", daemon=True)
        self._thread.start()

    def take(self) -> Batch:
        """Return the next batch, waiting for it if need be.

        Raises
        ------
        DtrainError
            A unit could not be read.
        StopIteration
            There are no further sizes.
        """
        while self._group is None or self._next == len(self._group.sizes):
            self._advance()
        group, index = self._group, self._next
        self._next += 1
        self.cursor = _moved(self.cursor, group.sizes[index], self.partition.num_samples)
        return self._buffers.batch(group, index)

    def batches(self, sizes: Iterable[int]) -> Iterator[Batch]:
        """Yield the next batches; their sizes are those that the loader was made with."""
        for size in sizes:
            batch = self.take()
            if batch.size != size:
                raise AssertionError(f"the loader has a batch of {batch.size} samples, {size} are asked for")
            yield batch

    @property
    def alive(self) -> bool:
        """Whether it has not failed: what follows the batches that have been taken can be had."""
        return self._thread.is_alive()

    def stream(self) -> Iterator[Batch]:
        """Yield all batches, as far as the sizes go."""
        while True:
            try:
                batch = self.take()
            except StopIteration:
                return
            yield batch

    def close(self) -> None:
        """Stop reading, and forget what has been read."""
        self._closed.set()
        self._permits.release()
        self._slots.close()
        self._thread.join()
        self._groups.put(None)  # for a consumer that waits
        self._group = None
        self._retired.clear()
        self._slots.clear()

    def _advance(self) -> None:
        """Give back the buffers that nobody refers to any more, and wait for the next group."""
        if self._group is not None:
            self._retired.append(self._group)
            self._group = None
        for group in self._retired[:]:
            # the consumer may still hold the last batch: its memory is taken back a group later
            if group.references() == group.alone:
                self._retired = [other for other in self._retired if other is not group]
                self._buffers.put(group)
                self._permits.release()
        if len(self._retired) > 1:  # somebody keeps a batch, which then keeps its memory
            del self._retired[0]
            self._permits.release()
        began = time.monotonic()
        found = self._groups.get()
        self.waited += time.monotonic() - began
        if found is None:
            self._groups.put(None)
            raise StopIteration
        if isinstance(found, BaseException):
            self._groups.put(found)
            raise found
        self._group, self._next = found, 0

    def counted(self) -> Counted:
        """Return what has been counted since the last call."""
        with self._counting:
            now = Counted(self.units_decoded, self.bytes_decoded, self.waited)
            before, self._told = self._told, now
        return Counted(now.units - before.units, now.bytes - before.bytes, now.waited - before.waited)

    def _count(self, decoded: int) -> None:
        with self._counting:
            self.units_decoded += 1
            self.bytes_decoded += decoded

    # In the assembler's thread ------------------------------------------------------------------------------

    def _assemble(self) -> None:
        try:
            for group in self._fill_groups():
                self._groups.put(group)
            self._groups.put(None)
        except _Closed:
            pass
        except BaseException as error:
            if not self._closed.is_set():  # else it is that a read was cancelled
                self._groups.put(error)

    def _fill_groups(self) -> Iterator[_Group]:
        rows, done = Rows(np.zeros(0, np.int64), np.zeros(0, np.int64), None), 0
        blocks = self._read_blocks()
        while sizes := group_batches(self._sizes, self.reader.samples):
            self._permits.acquire()
            self._check_open()
            group = self._buffers.get(sizes)
            filled, total = 0, sum(sizes)
            while filled < total:
                if done == len(rows.slot):
                    rows, done = next(blocks), 0
                count = min(total - filled, len(rows.slot) - done)
                part = rows.part(done, done + count)
                self._buffers.fill(group, filled, filled + count, self._slots.arenas, part)
                filled, done = filled + count, done + count
            self._check_open()
            yield group

    def _read_blocks(self) -> Iterator[Rows]:
        """Yield the rows of each block once its parts are in memory; give slots back when the next one is due."""
        coming: deque[tuple[int, RowRun]] = deque()
        opened: set[tuple[int, int]] = set()
        wanted: deque[tuple[int, int]] = deque()  # in the order in which they are needed
        ahead = 0
        while True:
            while ahead <= self._ahead or len(coming) < 2:
                following = next(self._stream, None)
                if following is None:
                    break
                epoch, block = following
                opened.update((epoch, part) for part in block.opens)
                wanted.extend((epoch, part) for part in block.opens)
                ahead += len(block.opens)
                coming.append((epoch, block))
            self._request(wanted)
            if not coming:
                return
            epoch, block = coming.popleft()
            ahead -= len(block.opens)
            for part in block.opens:
                self._check_open()
                self._slots.wait(epoch, part)
            yield self._slots.rows(epoch, block)
            over = {(epoch, block.closed)} & opened
            if coming and coming[0][0] != epoch:  # the pass is over
                over = {key for key in opened if key[0] == epoch}
                self._slots.forget(epoch)
            for key in over:
                self._slots.release(*key)
            opened -= over
            self._request(wanted)

    def _request(self, wanted: deque[tuple[int, int]]) -> None:
        while wanted and self._slots.request(*wanted[0]):
            wanted.popleft()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise _Closed


class _Closed(Exception):
    pass


@dataclass(frozen=True, slots=True)
class Counted:
    """What a loader has read, and how long it was waited for."""

    units: int
    bytes: int
    """Decoded."""
    waited: float
    """Seconds."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring batches in one set of buffers, each at an aligned address."""

    memory: tuple[Array, ...]
    """By field: bytes. All arrays below are views of them, also to numpy."""
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    """The first sample of each batch."""
    batches: tuple[tuple[Array | None, ...], ...]
    """By batch and field; None for a field that is the same for all samples."""
    whole: tuple[Array, ...] | None
    """By field: all samples, if the batches lie without gaps."""
    alone: tuple[int, ...] = ()
    """What `references` is if nobody else has one of its arrays."""

    def references(self) -> tuple[int, ...]:
        """Count the references to each array.

        A tensor refers to the array that it was made of, and a view of an array to the memory.
        """
        views = [array for fields in self.batches for array in fields if array is not None]
        return (*map(sys.getrefcount, self.memory), *map(sys.getrefcount, views))


def _moved(cursor: Cursor, size: int, pass_size: int) -> Cursor:
    passes, position = divmod(cursor.position + size, pass_size)
    return Cursor(cursor.epoch + passes, position)


def _blocks(
    partition: Partition, cursor: Cursor, replica: int, shuffle: bool, total: int | None
) -> Iterator[tuple[int, RowRun]]:
    """Yield epoch and block of one pass after the other, until they hold `total` samples."""
    plan = partition.plan
    epoch, position, found = cursor.epoch, cursor.position, 0
    while True:
        for block in epoch_order(
            partition.part_sizes,
            mixed_units=plan.window,
            shuffle=shuffle,
            seed=plan.seed,
            replica=replica,
            epoch=epoch,
            position=position,
        ):
            if total is not None and found >= total:
                return
            yield epoch, block
            found += len(block.part)
        epoch, position = epoch + 1, 0


class _Read:
    """A read that a thread of the pool does, or the one that waits for it: whoever begins first."""

    def __init__(self, pool: ThreadPoolExecutor, read: Callable[[], None]) -> None:
        self._read = read
        self._future: Future[None] = pool.submit(self._read)

    @property
    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._future.done()

    def claimed(self) -> bool:
        """Take it away from the pool; false if that is too late."""
        return self._future.cancel()

    def run(self) -> None:
        """Do it now; what it raises is kept until it is waited for."""
        self._future = Future()
        try:
            self._future.set_result(self._read())
        except BaseException as error:
            self._future.set_exception(error)

    def result(self) -> None:
        """Wait for it, and raise what it raised."""
        self._future.result()


class _Slots:
    """An arena of units: each slot holds the rows of one part, or is free."""

    def __init__(
        self, reader: UnitReader, partition: Partition, limits: Limits, shuffle: bool, count: Callable[[int], None]
    ) -> None:
        samples, plan = reader.samples, partition.plan
        self._reader = reader
        self._count = count
        self._partition = partition
        self._patches = plan.patches
        slots = limits.slots(partition, shuffle)
        self.arenas: dict[str, Array] = {
            v.name: np.empty((slots, *slot_shape(samples, plan, v)), v.kept_dtype) for v in samples.moving
        }
        self._free = list(range(slots))
        self._closed = False
        self._pool = ThreadPoolExecutor(limits.threads, thread_name_prefix="dtrain-read")
        self._slot_of: dict[tuple[int, int], int] = {}
        self._reads: dict[tuple[int, int], _Read] = {}
        self._waiting: deque[_Read] = deque()
        """Reads that no thread may have begun, in the order in which they are needed."""
        ranks = np.argsort(hash64(plan.seed, CACHE, partition.units), kind="stable")
        self._cacheable = set(ranks[: limits.cached].tolist())
        self._cached: dict[int, tuple[int, _Read]] = {}
        self._by_part: dict[int, Ints] = {}
        """By epoch and part: its slot."""
        self._relative: dict[int, Ints] = {}
        self._table_start = np.zeros(len(partition.units), np.int64)
        self._regular = plan.cell_rows >= plan.unit_rows  # then a part's anchors are a run

    def request(self, epoch: int, part: int) -> bool:
        """Begin to read a part, unless it is kept; return whether there was a slot for it."""
        by_part = self._by_part.setdefault(epoch, np.full(len(self._partition.units), -1, np.int64))
        if part in self._cached:
            by_part[part] = self._cached[part][0]
            return True
        if not self._free:
            return False
        slot = by_part[part] = self._free.pop()
        anchors = self._partition.part_anchors(part)
        if not self._regular:
            self._relative[part] = anchors - anchors[0]
        read = _Read(self._pool, partial(self._read, slot, Box(int(anchors[0]), int(anchors[-1]) + 1)))
        while self._waiting and self._waiting[0].done:
            self._waiting.popleft()
        self._waiting.append(read)
        if part in self._cacheable:
            self._cached[part] = (slot, read)
        else:
            self._slot_of[epoch, part], self._reads[epoch, part] = slot, read
        return True

    def _read(self, slot: int, box: Box) -> None:
        self._count(self._reader.read_into(box, {name: arena[slot] for name, arena in self.arenas.items()}))

    def wait(self, epoch: int, part: int) -> None:
        """Wait until a part is in memory, and read what is due next meanwhile: a core has no better use."""
        read = self._cached[part][1] if part in self._cached else self._reads[epoch, part]
        while not read.done:
            if self._closed:
                return
            while self._waiting and not self._waiting[0].claimed():
                self._waiting.popleft()
            if self._waiting:
                self._waiting.popleft().run()
            else:
                break
        read.result()

    def rows(self, epoch: int, block: RowRun) -> Rows:
        """Return where the samples of a block lie."""
        if not len(block.part):
            return Rows(block.part, block.row, block.row if self._patches > 1 else None)
        relative, tile = block.row, None
        if self._patches > 1:
            relative, tile = np.divmod(block.row, self._patches)
        if self._regular:
            if self._partition.plan.stride > 1:
                relative = relative * self._partition.plan.stride
        else:
            parts = np.unique(block.part).tolist()
            tables = [self._relative[part] for part in parts]
            self._table_start[parts] = np.cumsum([0, *map(len, tables[:-1])])
            relative = np.concatenate(tables)[self._table_start[block.part] + relative]
        return Rows(self._by_part[epoch][block.part], relative, tile)

    def release(self, epoch: int, part: int) -> None:
        """Give back the slot of a part that is not needed any more; a cached one stays."""
        slot = self._slot_of.pop((epoch, part), None)
        if slot is not None:
            del self._reads[epoch, part]
            self._free.append(slot)

    def forget(self, epoch: int) -> None:
        """Give back what is known of a pass that is over."""
        self._by_part.pop(epoch, None)

    def close(self) -> None:
        """Begin no further read."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def clear(self) -> None:
        """Wait for the reads under way, and give the memory back."""
        self._pool.shutdown(wait=True)
        self.arenas.clear()
        self._cached.clear()
        self._reads.clear()
        self._waiting.clear()


ALIGNMENT = 64
"""Bytes: as torch aligns. What vectorised sums give depends on where in memory their operands lie."""


class _Buffers:
    """The memory of batches."""

    def __init__(self, reader: UnitReader, scalings: Scalings, allocate: Allocate) -> None:
        samples = reader.samples
        self._num_inputs = len(samples.config.inputs)
        self._gatherers = [Gatherer(samples, f, scalings.get(f.name)) for f in samples.fields]
        self._allocate = allocate
        self._free: list[_Group] = []
        self._statics: list[Array | None] = []
        for gatherer in self._gatherers:
            static = None
            if gatherer.variable.is_static:
                static = gatherer.decoded(reader.statics[gatherer.field.name])
            self._statics.append(static)

    def get(self, sizes: Sequence[int]) -> _Group:
        """Return memory for batches of these sizes."""
        if self._free and self._free[-1].sizes == tuple(sizes):
            return self._free.pop()
        group = self._cut(sizes)
        return replace(group, alone=group.references())

    def _cut(self, sizes: Sequence[int]) -> _Group:
        ends = np.cumsum(sizes)
        starts = tuple((ends - sizes).tolist())
        strides = [math.prod(g.shape) * g.variable.model_dtype.itemsize for g in self._gatherers]
        needed = [
            0 if self._is_shared(k) else ALIGNMENT + sum(-(-size * row // ALIGNMENT) * ALIGNMENT for size in sizes)
            for k, row in enumerate(strides)
        ]
        memory = self._memory(needed)
        gapless = all(size * row % ALIGNMENT == 0 for row in strides for size in sizes[:-1])
        batches, offsets = [], [0] * len(strides)
        for size in sizes:
            fields: list[Array | None] = []
            for k, gatherer in enumerate(self._gatherers):
                if self._is_shared(k):
                    fields.append(None)
                    continue
                shape = (size, *gatherer.shape)
                fields.append(_aligned(memory[k], offsets[k], shape, gatherer.variable.model_dtype))
                offsets[k] += -(-size * strides[k] // ALIGNMENT) * ALIGNMENT
            batches.append(tuple(fields))
        whole = None
        if gapless:
            whole = tuple(
                _aligned(array, 0, (0 if self._is_shared(k) else sum(sizes), *g.shape), g.variable.model_dtype)
                for k, (array, g) in enumerate(zip(memory, self._gatherers, strict=True))
            )
        return _Group(memory, tuple(sizes), starts, tuple(batches), whole)

    def _memory(self, needed: list[int]) -> tuple[Array, ...]:
        while self._free:
            memory = self._free.pop().memory
            if all(len(array) >= size for array, size in zip(memory, needed, strict=True)):
                return memory
        return tuple(_own(self._allocate((size,), np.dtype(np.uint8))) for size in needed)

    def _is_shared(self, k: int) -> bool:
        """Whether a field is one array for all samples."""
        return self._statics[k] is not None and not self._gatherers[k].is_cut

    def put(self, group: _Group) -> None:
        """Take memory back."""
        self._free.append(group)

    def fill(self, group: _Group, start: int, stop: int, arenas: dict[str, Array], rows: Rows) -> None:
        """Fill samples ``start:stop`` of a group."""
        if group.whole is not None:
            self._fill(tuple(array[start:stop] for array in group.whole), arenas, rows)
            return
        for first, size, batch in zip(group.starts, group.sizes, group.batches, strict=True):
            low, high = max(start, first), min(stop, first + size)
            if low < high:
                views = tuple(None if array is None else array[low - first : high - first] for array in batch)
                self._fill(views, arenas, rows.part(low - start, high - start))

    def _fill(self, fields: tuple[Array | None, ...], arenas: dict[str, Array], rows: Rows) -> None:
        for k, (array, gatherer) in enumerate(zip(fields, self._gatherers, strict=True)):
            static = self._statics[k]
            if array is None or self._is_shared(k):
                continue
            if static is not None:
                gatherer.fill_static(array, static, rows)
            else:
                gatherer.fill(array, arenas[gatherer.field.name], rows)

    def batch(self, group: _Group, index: int) -> Batch:
        """Return a batch of a group."""
        size = group.sizes[index]
        arrays = [
            # a copy for each batch: what a model writes into it must not reach the next one
            repeated(_copied(static), size) if array is None and static is not None else array
            for array, static in zip(group.batches[index], self._statics, strict=True)
        ]
        found = tuple(array for array in arrays if array is not None)
        return Batch(found[: self._num_inputs], found[self._num_inputs :])


def _copied(values: Array) -> Array:
    """Return a copy at an aligned address."""
    found = _aligned(np.empty(values.nbytes + ALIGNMENT, np.uint8), 0, values.shape, values.dtype)
    found[...] = values
    return found


def _own(memory: Array) -> Array:
    """Return the same memory as an array of which views know: they refer to the owner of a view, not to the view."""
    return np.frombuffer(memory.data, np.uint8) if memory.size else np.empty(0, np.uint8)


def _aligned(memory: Array, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return an array at an aligned address of some memory, so many bytes behind the first aligned one."""
    start = -memory.__array_interface__["data"][0] % ALIGNMENT + offset
    size = math.prod(shape) * dtype.itemsize
    return memory[start : start + size].view(dtype).reshape(shape)


def read_batches(
    reader: UnitReader,
    partition: Partition,
    cursor: Cursor,
    sizes: Iterable[int],
    *,
    replica: int,
    shuffle: bool,
    limits: Limits | None = None,
    scalings: Scalings | None = None,
) -> Generator[Batch, None, None]:
    """Yield batches of the given sizes from the cursor on; the loader lives as long as the iterator."""
    loader = Loader(
        reader,
        partition,
        cursor,
        sizes,
        replica=replica,
        shuffle=shuffle,
        limits=limits or Limits(),
        scalings=scalings,
    )
    try:
        yield from loader.stream()
    finally:
        loader.close()
