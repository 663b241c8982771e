"""How much memory the data path of a worker needs: a law that is printed before training, and kept.

    slots     (B open + R ahead + C cached) units     for each replica, and for each piece of an evaluation
    buffers   a few groups of batches                 likewise
    scratch   what decoding one unit needs            for each read thread, and the assembler

What a worker may hold changes its speed only: how many units it keeps, how many loaders it keeps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dtrain.data.plan.partition import DataPlan, Partition, format_bytes
from dtrain.data.plan.units import Box, box_shape
from dtrain.data.read.store import INDEX_CACHE_BYTES, is_remote
from dtrain.data.read.units import MIN_DENSITY, choose_readers, has_fine_shards
from dtrain.data.samples import Samples, Variable
from dtrain.errors import ChunkTooLarge, OutOfMemory

GROUP_BYTES = 4 << 20
"""Batches are assembled together until they have this size, so that small ones cost no more than large ones."""
GROUP_BATCHES = 32
BUFFERS = 4
"""One that is filled, one that waits, one that is used, one that was used last."""
LARGE_BATCH_BYTES = 32 << 20
"""Of batches larger than this there are two buffers only."""
AHEAD = 3
AHEAD_REMOTE = 8
THREADS = min(4, max(1, (os.cpu_count() or 2) // 2))
"""The assembler reads too when it would wait: together they use the cores, and more threads would fight for them."""
THREADS_REMOTE = 8
INDEX_OVERHEAD_BYTES = 500
"""Of the objects of Python that hold the index of a shard."""
ZARR_CONCURRENCY = 10
"""Its setting ``async.concurrency``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a loader may use."""

    ahead: int = AHEAD
    """Units that are read before they are due."""
    cached: int = 0
    """Units that are kept once they are read."""
    threads: int = THREADS
    """That read units, besides the assembler."""
    buffers: int = BUFFERS
    """Groups of batches; at least 2."""

    def slots(self, partition: Partition, shuffle: bool) -> int:
        """Return the units that a loader of a partition holds."""
        units = len(partition.units)
        cached = min(self.cached, units)
        open_or_ahead = (min(partition.plan.window, units) if shuffle else 1) + self.ahead
        return cached + min(open_or_ahead, 2 * (units - cached))


def sample_bytes(samples: Samples) -> int:
    """Return the bytes of one sample as the model sees it."""
    total = 0
    for field in samples.fields:
        variable = samples.variable(field.name)
        cut = any(part != slice(None) for part in samples.tiles[0].slices(variable))
        if cut or not variable.is_static:  # else it is one array for all
            total += math.prod(samples.field_shape(field)) * variable.model_dtype.itemsize
    return total


def group_batches(sizes: Iterator[int], samples: Samples) -> list[int]:
    """Take as many sizes as are assembled together; none if there are none."""
    taken: list[int] = []
    size = sample_bytes(samples)
    for batch in sizes:
        taken.append(batch)
        if sum(taken) * size >= GROUP_BYTES or len(taken) >= GROUP_BATCHES:
            break
    return taken


def slot_shape(samples: Samples, plan: DataPlan, variable: Variable) -> tuple[int, ...]:
    """Return the shape of the largest part of a variable: the rows of a unit, and the halo of its windows."""
    return box_shape(samples, variable, Box(0, min(plan.unit_rows, plan.num_samples)))


def slot_bytes(samples: Samples, plan: DataPlan) -> int:
    """Return the bytes of a unit in memory, with its halo."""
    return sum(math.prod(slot_shape(samples, plan, v)) * v.kept_dtype.itemsize for v in samples.moving)


def scratch_bytes(samples: Samples, plan: DataPlan) -> int:
    """Return what decoding a unit needs besides its slot: its chunks, stored and decoded, of one variable at a time."""
    readers = choose_readers(samples, samples.config.reader)
    return max(
        (_decoding_bytes(v, slot_shape(samples, plan, v)[0], readers[v.name][0]) for v in samples.streamed), default=0
    )


def index_bytes(samples: Samples) -> int:
    """Return the bytes of all indices of shards, as far as they are kept."""
    sharded = [v for v in samples.variables if v.objects != v.chunks]
    counts = [(v.num_objects, math.prod(v.objects) // math.prod(v.chunks)) for v in sharded]
    return min(INDEX_CACHE_BYTES, sum(objects * (16 * chunks + INDEX_OVERHEAD_BYTES) for objects, chunks in counts))


def _decoding_bytes(v: Variable, rows: int, reader: str) -> int:
    chunks, cut = math.ceil(rows / v.chunk_rows) + 1, False
    for axis, (size, (start, stop, step)) in enumerate(zip(v.chunks, v.select, strict=True)):
        if axis != v.sample_axis:
            chunks *= math.ceil(stop / size) - start // size
            cut = cut or (start, stop, step) != (0, v.shape[axis], 1)
    if reader == "numcodecs" and not has_fine_shards(v):  # else it may be zarrs where it is installed
        if v.objects == v.chunks:
            return 2 * v.chunk_bytes  # one after the other
        between = 1 / MIN_DENSITY if cut else 1  # of what is read in one request, more than the chunks themselves
        return v.chunk_bytes + int(chunks * between) * v.chunk_bytes
    if reader == "zarr":  # decodes a few at once in threads of its own, for each of which malloc keeps memory
        at_once = min(chunks, ZARR_CONCURRENCY)
        whole = 2 * chunks if v.objects != v.chunks else 2 * at_once  # a shard is decoded whole before it is copied
        return (whole + 2 * at_once) * v.chunk_bytes
    return 2 * chunks * v.chunk_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderLaw:
    """The bytes of one kind of loader of a worker, term by term."""

    kept: int
    """Loaders that a worker keeps. Without one they are made for each evaluation."""
    unit: int
    """Bytes of a unit in memory, with its halo."""
    open: int
    """Units that are mixed."""
    units: int
    """Of the longest partition."""
    limits: Limits
    buffers: int
    """Bytes of all buffers of a loader."""
    scratch: int
    """Bytes that a thread needs which decodes."""

    @property
    def moving(self) -> int:
        """Units of a loader that are open or read ahead: of those that are not kept each at most twice."""
        return min(self.open + self.limits.ahead, 2 * (self.units - self.limits.cached))

    @property
    def cached_bytes(self) -> int:
        """Bytes of the caches."""
        return self.kept * self.limits.cached * self.unit

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        each = self.moving * self.unit + self.buffers + (self.limits.threads + 1) * self.scratch
        return max(1, self.kept) * each + self.cached_bytes

    def sentence(self) -> str:
        """Return the law with its numbers."""
        limits = self.limits
        of = f" ({self.open} open, {limits.ahead} ahead)" if self.moving == self.open + limits.ahead else ""
        units = f"{self.moving} units{of} of {format_bytes(self.unit)} + " if self.moving else ""  # else all are kept
        return (
            f"{max(1, self.kept)} x ({units}"
            f"batches {format_bytes(self.buffers)} + decoding {limits.threads + 1} x {format_bytes(self.scratch)})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLaw:
    """The bytes of the data path of a worker."""

    train: LoaderLaw
    evaluate: LoaderLaw | None
    statics: int
    """Bytes of the variables without the sample dimension, and of small ones that are kept whole."""
    indices: int
    """Bytes of the indices of shards that are kept."""
    limit: int
    """What it must not exceed."""
    what: str
    """What the limit is."""

    @property
    def cached_bytes(self) -> int:
        """Bytes of the units that are kept."""
        return self.train.cached_bytes + (self.evaluate.cached_bytes if self.evaluate else 0)

    @property
    def total(self) -> int:
        """Bytes that a worker needs at most."""
        return self.train.total + (self.evaluate.total if self.evaluate else 0) + self.statics + self.indices

    def sentence(self) -> str:
        """Return the law with its numbers."""
        parts = [f"train {self.train.sentence()}"]
        if self.evaluate:
            parts.append(f"evaluate {self.evaluate.sentence()}")
        if self.cached_bytes:
            parts.append(f"cache {format_bytes(self.cached_bytes)}")
        if self.statics:
            parts.append(f"kept whole {format_bytes(self.statics)}")
        if self.indices:
            parts.append(f"indices of shards {format_bytes(self.indices)}")
        return " + ".join(parts) + f" = {format_bytes(self.total)}"

    def comparison(self) -> str:
        """Return the law with its numbers, and the limit."""
        return f"{self.sentence()} of {format_bytes(self.limit)} ({self.what})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a worker reads of a store: to train, or to evaluate."""

    samples: Samples
    plan: DataPlan
    loaders: int
    """Partitions that it reads, at most."""
    units: int
    """Of the longest of them."""
    batch_size: int
    """Samples of the largest batch."""
    shuffle: bool

    def law(self, kept: int, ahead: int, threads: int) -> LoaderLaw:
        """Return what `kept` loaders of it need."""
        samples, plan = self.samples, self.plan
        batch = self.batch_size * sample_bytes(samples)
        buffers = 2 if batch > LARGE_BATCH_BYTES else BUFFERS
        return LoaderLaw(
            kept=kept,
            unit=slot_bytes(samples, plan),
            open=min(plan.window if self.shuffle else 1, self.units),
            units=self.units,
            limits=Limits(ahead=ahead, threads=threads, buffers=buffers),
            buffers=buffers * max(batch, min(GROUP_BYTES + batch, GROUP_BATCHES * batch)),
            scratch=scratch_bytes(samples, plan),
        )


def plan_memory(train: Reading, evaluate: Reading | None, limit: int, what: str, cache: int | None = None) -> MemoryLaw:
    """Divide the memory of a worker between its loaders, and give what is left to their caches.

    Parameters
    ----------
    train, evaluate : Reading
        `evaluate` may be None.
    limit : int
        Bytes that the data path may use.
    what : str
        What the limit is, for errors.
    cache : int, optional
        Bytes of cached units at most; without it, what is left.

    Raises
    ------
    ChunkTooLarge
        A single chunk is larger than the limit.
    OutOfMemory
        The units that must be in memory at once are.
    """
    for reading in filter(None, (train, evaluate)):
        _check_chunks(reading.samples, limit, what)
    statics = sum(math.prod(v.row_shape) * 8 for v in train.samples.variables if v.is_static)
    rows = train.samples.num_samples - train.samples.first_row
    statics += sum(v.row_bytes * rows for v in train.samples.kept_whole)
    ahead, threads = (AHEAD_REMOTE, THREADS_REMOTE) if is_remote(train.samples.path) else (AHEAD, THREADS)
    # what speed asks for, then less and less of it
    candidates = [
        MemoryLaw(
            train=train.law(count, r, t),
            evaluate=evaluate.law(kept, r, t) if evaluate else None,
            statics=statics,
            indices=index_bytes(train.samples),
            limit=limit,
            what=what,
        )
        for r, t in ((ahead, threads), (2, min(2, threads)), (1, 1))
        for count, kept in [
            (train.loaders, evaluate.loaders if evaluate else 0),
            *((n, 0) for n in range(train.loaders, 0, -1)),
        ]
    ]
    found = next((candidate for candidate in candidates if candidate.total <= limit), None)
    if found is None:
        raise OutOfMemory(
            f"{train.samples.path}: the data path needs {candidates[-1].sentence()} ({candidates[-1].total:,} bytes); "
            f"{what} is {format_bytes(limit)} ({limit:,} bytes).",
            f"{_more(what)}, store smaller chunks, or use smaller batches.",
        )
    room = limit - found.total
    return _with_cache(found, train, evaluate, room if cache is None else min(cache, room))


def _more(what: str) -> str:
    """Return how to get more memory than a limit of that name."""
    if what in ("memory", "data.memory"):
        return f"Raise {what}"
    return "Use a machine with more memory" if "machine" in what else "Give the workers more memory (cluster.memory)"


def _check_chunks(samples: Samples, limit: int, what: str) -> None:
    for variable in samples.variables:
        if variable.chunk_bytes > limit:
            raise ChunkTooLarge(
                f"{samples.path}: one chunk of {variable.name} {variable.chunks} decodes to "
                f"{format_bytes(variable.chunk_bytes)}; {what} is {format_bytes(limit)}.",
                f"Store it in smaller chunks. Or: {_more(what).lower()}.",
            )


def _with_cache(law: MemoryLaw, train: Reading, evaluate: Reading | None, room: int) -> MemoryLaw:
    """Give all kept loaders the same share of the units that they read."""
    pairs = [(law.train, train.units)]
    if law.evaluate is not None and evaluate is not None:
        pairs.append((law.evaluate, evaluate.units))
    wanted = sum(of.kept * units * of.unit for of, units in pairs)
    share = min(1.0, room / wanted) if wanted else 0.0
    found = [replace(of, limits=replace(of.limits, cached=int(share * units) if of.kept else 0)) for of, units in pairs]
    return replace(law, train=found[0], evaluate=found[1] if len(found) > 1 else None)
