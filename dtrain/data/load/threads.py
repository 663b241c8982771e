"""The threads of a loader: they carry out the instructions of its schedule, and report events to it."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import perf_counter, thread_time

import numpy as np

from dtrain.data.encoding import Array
from dtrain.data.load.buffers import Allocate, Buffers, Bundle
from dtrain.data.load.counted import Counted
from dtrain.data.load.gather import BatchGatherer
from dtrain.data.load.messages import (
    Abandon,
    Emit,
    Event,
    Fail,
    Finish,
    Freed,
    Gather,
    Gathered,
    Instruction,
    Open,
    Read,
    ReadDone,
    ReadFailed,
    Recycle,
    Started,
)
from dtrain.data.load.pool import Lane
from dtrain.data.load.schedule import Schedule
from dtrain.data.plan.footprint import slot_arrays
from dtrain.data.plan.partition import Partition
from dtrain.data.read.boxes import BoxReader
from dtrain.data.read.clock import fetches_counted


class LoaderThreads:
    """Carries out the instructions of a schedule, and reports events to it.

    The assembler is the only thread that uses the schedule and the buffers. It gathers batches; the read threads of the
    store, and the assembler while it waits for a part, read.

    Parameters
    ----------
    schedule : Schedule
    reader : BoxReader
    partition : Partition
    gatherer : BatchGatherer
    allocate : callable
        Makes the memory of batches.
    readers : int
        The most threads of the store that read for it at a time.
    usual : callable
        Given the size of the first batch, the sizes of a bundle that is not one of the first, small ones.
    """

    def __init__(
        self,
        schedule: Schedule,
        reader: BoxReader,
        partition: Partition,
        gatherer: BatchGatherer,
        allocate: Allocate,
        *,
        readers: int,
        usual: Callable[[int], tuple[int, ...]],
    ) -> None:
        self.events: SimpleQueue[Event | None] = SimpleQueue()
        """For the assembler; None: wake up, it is closed."""
        self.bundles: SimpleQueue[Bundle | BaseException | None] = SimpleQueue()
        """For the consumer; None: there are no further ones."""
        self._units, self._bytes = 0, 0
        self._fetch, self._decode, self._gather, self._parts = 0.0, 0.0, 0.0, 0.0
        self._read_cpu, self._gather_cpu = 0.0, 0.0
        self.arena: dict[str, Array] = {
            name: np.empty((schedule.slots.count, *shape), dtype)
            for v in reader.samples.moving
            for name, (shape, dtype) in slot_arrays(reader.samples, partition.plan, v).items()
        }
        self._schedule = schedule
        self._reader = reader
        self._gatherer = gatherer
        put = self.events.put  # a batch that is kept keeps the queue alive, not the arena
        self._buffers = Buffers(gatherer.specs, allocate, on_free=lambda bundle: put(Freed(bundle)), usual=usual)
        self._closed = threading.Event()
        self._assembler = threading.Thread(target=self._assemble, name="dtrain-assemble", daemon=True)
        self._lane = Lane(reader, lambda read: self.events.put(self._read(read)), readers)

    @property
    def counted(self) -> Counted:
        """What has been counted so far, without the consumer's part."""
        return Counted(
            units=self._units,
            bytes=self._bytes,
            fetch=self._fetch,
            decode=self._decode,
            gather=self._gather,
            parts=self._parts,
            read_cpu=self._read_cpu,
            gather_cpu=self._gather_cpu,
        )

    @property
    def alive(self) -> bool:
        """Whether further bundles will come."""
        return self._assembler.is_alive()

    def start(self) -> None:
        """Start the assembler."""
        self._assembler.start()
        atexit.register(self.close)  # a thread that still reads when the interpreter ends may crash it

    def close(self) -> None:
        """Begin no further read, wait for those under way, and free all memory."""
        atexit.unregister(self.close)
        self._closed.set()
        self.events.put(None)
        self._lane.stop()
        if self._assembler is not threading.current_thread():  # garbage collection may close a loader in any thread
            self._assembler.join()
        self._lane.close()
        self.bundles.put(None)  # for a consumer that waits
        self.arena.clear()
        self._buffers.clear()

    def _read(self, read: Read) -> ReadDone | ReadFailed:
        try:
            out = {name: array[read.slot] for name, array in self.arena.items()}
            began, cpu = perf_counter(), thread_time()
            with fetches_counted() as clock:
                decoded = self._reader.read_into(read.box, out)
            seconds, cpu = perf_counter() - began, thread_time() - cpu
            return ReadDone(read.slot, decoded, clock.seconds, seconds - clock.seconds, cpu)
        except BaseException as error:  # the consumer raises it when it needs the part
            return ReadFailed(read.slot, error)

    def _assemble(self) -> None:
        event: Event | None = Started()
        try:
            while event is not None and not self._closed.is_set():
                if isinstance(event, ReadDone):
                    self._count(event)
                for instruction in self._schedule.handle(event):
                    self._execute(instruction)
                event = None if self._schedule.is_over else self._next_event()
        except BaseException as error:
            self.bundles.put(error)

    def _count(self, done: ReadDone) -> None:
        self._units += 1
        self._bytes += done.bytes
        self._fetch += done.fetch
        self._decode += done.decode
        self._read_cpu += done.cpu

    def _next_event(self) -> Event | None:
        """Return the next event; None if the loader is closed.

        While there is none, and a part is waited for, the assembler reads: a core has no better use.
        """
        try:
            return self.events.get_nowait()
        except Empty:
            pass
        if not self._schedule.waits_for_part:
            return self.events.get()
        read, began = self._lane.take(), perf_counter()
        event = self.events.get() if read is None else self._read(read)
        self._parts += perf_counter() - began
        return event

    def _execute(self, instruction: Instruction) -> None:
        match instruction:
            case Read():
                self._lane.put(instruction)
            case Open(bundle=bundle, sizes=sizes):
                self._buffers.open(bundle, sizes)
            case Gather(start=start, rows=rows):
                began, cpu = perf_counter(), thread_time()
                for field, first, after, out in self._buffers.pieces(start, start + len(rows)):
                    self._gatherer.fill(field, out, self.arena, rows.part(first - start, after - start))
                self._gather += perf_counter() - began
                self._gather_cpu += thread_time() - cpu
                self.events.put(Gathered())
            case Emit():
                self.bundles.put(self._buffers.lend())
            case Recycle(bundle=bundle):
                self._buffers.recycle(bundle)
            case Abandon(bundle=bundle):
                self._buffers.abandon(bundle)
            case Fail(error=error):
                self.bundles.put(error)
            case Finish():
                self.bundles.put(None)
