"""The resident loader: partition + cursor -> batches, read ahead by threads in bounded memory.

    read threads      units --> slots of the arena         at most B (open) + R (ahead) + C (cached, never evicted)
    one assembler     slots --> bundles of batches         a few buffers, used again when nobody refers to them
    the consumer      takes batches, in the order of the plan

All three go on while parameters are sent, until they run out of slots or buffers. The order of samples is a pure
function of plan and cursor, so a loader can be thrown away and made again at any time: it decides when bytes are
read, never which.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from dtrain.data.load.buffers import Allocate, Bundle
from dtrain.data.load.counted import Counted
from dtrain.data.load.gather import Batch, BatchGatherer, Scalings
from dtrain.data.load.messages import Taken
from dtrain.data.load.schedule import Schedule
from dtrain.data.load.threads import LoaderThreads
from dtrain.data.plan.memory import BUNDLE_BATCHES, Limits, bundles_of
from dtrain.data.plan.partition import Partition
from dtrain.data.read.boxes import BoxReader
from dtrain.data.samples import Samples
from dtrain.types import Cursor


class Loader:
    """Reads the cyclic stream of passes over a partition, from a cursor on.

    Its threads end when it is closed, or when the interpreter exits.

    Parameters
    ----------
    reader : BoxReader
    partition : Partition
        Not empty.
    cursor : Cursor
        Where to begin.
    sizes : iterable of int
        Samples of each batch from there on. A batch that reaches beyond a pass goes on with the next one. An
        iterator may be endless. Where their sum is known (`total`, or a sequence), nothing more is read.
    replica : int
        Identifies the stream; it decides the order together with the plan's seed and the epoch.
    shuffle : bool
        Whether passes are shuffled.
    limits : Limits
        Slots and threads: speed, never bits.
    scalings : mapping of str to Scaling
        By variable: how it is standardised.
    allocate : callable
        Makes the memory of batches; pinned memory, for example.
    total : int, optional
        Sum of the sizes, where it is known.
    """

    def __init__(
        self,
        reader: BoxReader,
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
        self._start, self._taken = cursor, 0
        self.pass_size = partition.num_samples
        """Samples of a pass."""
        self._bundle: Bundle | None = None
        self._next = 0
        """Of the batches of the bundle."""
        self._waited = 0.0
        self._told = Counted()
        total = sum(sizes) if isinstance(sizes, Sequence) else total
        schedule = Schedule(
            partition,
            cursor,
            growing_bundles(sizes, reader.samples),
            replica=replica,
            shuffle=shuffle,
            limits=limits,
            total=total,
        )
        self._gatherer = BatchGatherer(reader.samples, reader.statics, scalings or {}, partition.plan.grid)
        self._threads = LoaderThreads(
            schedule,
            reader,
            partition,
            self._gatherer,
            allocate,
            readers=limits.threads,
            usual=partial(_usual_bundle, total=total, samples=reader.samples),
        )
        self._threads.start()

    @property
    def cursor(self) -> Cursor:
        """Where the next batch begins."""
        passes, position = divmod(self._start.position + self._taken, self.pass_size)
        return Cursor(self._start.epoch + passes, position)

    def take(self) -> Batch:
        """Return the next batch, waiting for it if need be.

        Raises
        ------
        DtrainError
            A unit could not be read.
        StopIteration
            There are no further sizes.
        """
        while self._bundle is None or self._next == len(self._bundle.layout.sizes):
            self._advance()
        bundle, index = self._bundle, self._next
        size = bundle.layout.sizes[index]
        self._next += 1
        self._taken += size
        return self._gatherer.batch(bundle.fields(index), size)

    def _advance(self) -> None:
        """Report that the bundle is used up, and wait for the next one."""
        if self._bundle is not None:
            number, self._bundle = self._bundle.number, None  # if nobody holds a batch, `Freed` goes before `Taken`
            self._threads.events.put(Taken(number))
        began = time.monotonic()
        arrived = self._threads.bundles.get()
        self._waited += time.monotonic() - began
        if isinstance(arrived, Bundle):
            self._bundle, self._next = arrived, 0
            return
        self._threads.bundles.put(arrived)  # it is raised each time that a batch is asked for
        if arrived is None:
            raise StopIteration
        raise arrived

    def batches(self, sizes: Iterable[int]) -> Iterator[Batch]:
        """Yield the next batches; their sizes are those that the loader was made with."""
        for size in sizes:
            batch = self.take()
            if batch.size != size:
                raise AssertionError(f"the next batch of the loader has {batch.size} samples, {size} were requested")
            yield batch

    def stream(self) -> Iterator[Batch]:
        """Yield all batches that the sizes name."""
        while True:
            try:
                batch = self.take()
            except StopIteration:
                return
            yield batch

    @property
    def alive(self) -> bool:
        """Whether it has neither failed nor ended, so that batches follow those that have been taken."""
        return self._threads.alive

    def counted(self) -> Counted:
        """Return what has been counted since the last call."""
        before, self._told = self._told, replace(self._threads.counted, waited=self._waited)
        return self._told.since(before)

    def close(self) -> None:
        """End the threads, and free the memory of all units and of the batches that nobody holds."""
        self._threads.close()
        self._bundle = None


FIRST_BUNDLES = (1, 2, 4, 8, 16)
"""Batches of the first bundles: the first batch is there soon, and many loaders that begin together begin small."""


def growing_bundles(sizes: Iterable[int], samples: Samples) -> Iterator[tuple[int, ...]]:
    """Yield the sizes of the batches that are assembled together: few at first, then as `bundles_of` says."""
    sizes = iter(sizes)
    for count in FIRST_BUNDLES:
        yield from bundles_of(itertools.islice(sizes, count), samples)
    yield from bundles_of(sizes, samples)


def _usual_bundle(size: int, total: int | None, samples: Samples) -> tuple[int, ...]:
    """Return the sizes of a bundle of batches of one size that is not one of the first ones, if there are so many."""
    count = BUNDLE_BATCHES if total is None else min(BUNDLE_BATCHES, math.ceil(total / max(1, size)) or 1)
    return next(bundles_of([size] * count, samples))


def read_batches(
    reader: BoxReader,
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
