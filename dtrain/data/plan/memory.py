"""The memory budget of a worker's data path: printed before training, and kept.

    slots     (B open + R ahead + C cached) units     for each replica, and for each piece of an evaluation
    buffers   a few bundles of batches                likewise
    order     which samples come next                 likewise
    scratch   memory to decode one unit               for each read thread, and the assembler
    tables    partitions, marks of stored objects     once

How much memory a worker has changes its speed only: how many units and how many loaders it keeps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from dtrain.data.plan.footprint import (
    format_bytes,
    index_bytes,
    order_bytes,
    sample_bytes,
    scratch_bytes,
    slot_bytes,
    static_bytes,
)
from dtrain.data.plan.partition import Partition
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Samples
from dtrain.errors import ChunkTooLarge, OutOfMemory

BUNDLE_BYTES = 4 << 20
"""Batches are assembled in bundles of this size, so that small ones cost no more than large ones."""
BUNDLE_BATCHES = 32
BUFFERS = 4
"""One is filled, one waits, one is in use, one was in use before."""
LARGE_BATCH_BYTES = 32 << 20
"""Batches larger than this have two buffers only."""
AHEAD = 3
AHEAD_REMOTE = 8
THREADS = min(4, max(1, (os.cpu_count() or 2) // 2))
"""The assembler reads too when it would wait: together they use the cores, and more threads would compete for them."""
THREADS_REMOTE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a loader may use."""

    ahead: int = AHEAD
    """Units that are read before they are due."""
    cached: int = 0
    """Units that stay in memory once they are read."""
    threads: int = THREADS
    """Threads that read units, besides the assembler."""
    buffers: int = BUFFERS
    """Bundles of batches; at least 2."""

    def slots(self, partition: Partition, shuffle: bool) -> int:
        """Return how many units a loader of a partition holds."""
        units = len(partition.units)
        cached = min(self.cached, units)
        open_or_ahead = (min(partition.plan.window, units) if shuffle else 1) + self.ahead
        return cached + min(open_or_ahead, 2 * (units - cached))


def bundles_of(sizes: Iterable[int], samples: Samples) -> Iterator[tuple[int, ...]]:
    """Yield the sizes of the batches that are assembled together: neighbouring ones, up to a size or a number."""
    row_bytes = sample_bytes(samples)
    bundle: list[int] = []
    total = 0
    for size in sizes:
        bundle.append(size)
        total += size
        if total * row_bytes >= BUNDLE_BYTES or len(bundle) >= BUNDLE_BATCHES:
            yield tuple(bundle)
            bundle, total = [], 0
    if bundle:
        yield tuple(bundle)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderBudget:
    """The bytes of all loaders of one kind of a worker, term by term."""

    kept: int
    """Loaders that a worker keeps. If 0, one is made for each evaluation."""
    unit: int
    """Bytes of a unit in memory, with its halo."""
    open: int
    """Units that are mixed."""
    units: int
    """Units of the longest partition."""
    limits: Limits
    buffers: int
    """Bytes of all buffers of a loader."""
    scratch: int
    """Bytes that a thread needs to decode a unit."""
    order: int
    """Bytes that a loader needs to know which samples come next."""

    @property
    def moving(self) -> int:
        """Units of a loader that are open or read ahead; of units that are not cached, each at most twice."""
        return min(self.open + self.limits.ahead, 2 * (self.units - self.limits.cached))

    @property
    def cached_bytes(self) -> int:
        """Bytes of the caches."""
        return self.kept * self.limits.cached * self.unit

    @property
    def total(self) -> int:
        """Bytes of all terms."""
        each = self.moving * self.unit + self.buffers + (self.limits.threads + 1) * self.scratch + self.order
        return max(1, self.kept) * each + self.cached_bytes

    def sentence(self) -> str:
        """Return the terms with their numbers."""
        limits = self.limits
        of = f" ({self.open} open, {limits.ahead} ahead)" if self.moving == self.open + limits.ahead else ""
        units = f"{self.moving} units{of} of {format_bytes(self.unit)} + " if self.moving else ""  # else all are cached
        return (
            f"{max(1, self.kept)} x ({units}"
            f"batches {format_bytes(self.buffers)} + decoding {limits.threads + 1} x {format_bytes(self.scratch)} + "
            f"order {format_bytes(self.order)})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """The bytes of the data path of a worker."""

    train: LoaderBudget
    evaluate: LoaderBudget | None
    statics: int
    """Bytes of the variables without the sample dimension, and of preloaded ones."""
    indices: int
    """Bytes of the indices of shards that are kept."""
    tables: int
    """Bytes of partitions, and of marks of stored objects."""
    limit: int
    """Bytes that `total` must not exceed."""
    what: str
    """Names the limit, for example ``data.memory``."""
    in_turn: bool = False
    """Loaders that train are closed before an evaluation, and those of the evaluation after it."""

    @property
    def cached_bytes(self) -> int:
        """Bytes of the units that are cached."""
        return self.train.cached_bytes + (self.evaluate.cached_bytes if self.evaluate else 0)

    @property
    def total(self) -> int:
        """Bytes that a worker needs at most."""
        both = [self.train.total, *([self.evaluate.total] if self.evaluate else [])]
        loaders = max(both) if self.in_turn else sum(both)
        return loaders + self.statics + self.indices + self.tables

    def sentence(self) -> str:
        """Return the terms with their numbers."""
        parts = [f"train {self.train.sentence()}"]
        if self.evaluate:
            parts.append(f"evaluate {self.evaluate.sentence()}")
        if self.cached_bytes:
            parts.append(f"cache {format_bytes(self.cached_bytes)}")
        if self.statics:
            parts.append(f"preloaded {format_bytes(self.statics)}")
        if self.indices:
            parts.append(f"indices of shards {format_bytes(self.indices)}")
        if self.tables:
            parts.append(f"partitions {format_bytes(self.tables)}")
        total = f" = {format_bytes(self.total)}"
        return " + ".join(parts) + total + (" (train and evaluate one after the other)" if self.in_turn else "")

    def comparison(self) -> str:
        """Return the terms with their numbers, and the limit."""
        return f"{self.sentence()} of {format_bytes(self.limit)} ({self.what})"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a worker reads of a store, to train or to evaluate."""

    samples: Samples
    plan: DataPlan
    loaders: int
    """The largest number of partitions that it reads."""
    units: int
    """Units of the longest of these partitions."""
    batch_size: int
    """Samples of the largest batch."""
    shuffle: bool
    tables: int = 0
    """Bytes of the tables that the process has of the plan (`tables_bytes`)."""
    largest: int = 0
    """Samples of a pass of the largest part."""

    @cached_property
    def unit(self) -> int:
        """Bytes of a unit in memory."""
        return slot_bytes(self.samples, self.plan)

    @cached_property
    def scratch(self) -> int:
        """Bytes that a thread needs to decode a unit."""
        return scratch_bytes(self.samples, self.plan)

    def budget(self, kept: int, ahead: int, threads: int, most_buffers: int = BUFFERS) -> LoaderBudget:
        """Return the budget of `kept` loaders."""
        batch = self.batch_size * sample_bytes(self.samples)
        buffers = 2 if batch > LARGE_BATCH_BYTES else most_buffers
        return LoaderBudget(
            kept=kept,
            unit=self.unit,
            open=min(self.plan.window if self.shuffle else 1, self.units),
            units=self.units,
            limits=Limits(ahead=ahead, threads=threads, buffers=buffers),
            buffers=buffers * _bundle_bytes(batch, sample_bytes(self.samples)),
            scratch=self.scratch,
            order=order_bytes(self.plan, self.units, ahead, shuffle=self.shuffle, largest=self.largest),
        )


def _bundle_bytes(batch: int, sample: int) -> int:
    """Return the most bytes of a bundle (`bundles_of`) of batches of at most some bytes."""
    return batch if sample >= BUNDLE_BYTES else max(batch, min(BUNDLE_BYTES + batch, BUNDLE_BATCHES * batch))


def plan_memory(
    train: Reading, evaluate: Reading | None, limit: int, what: str, cache: int | None = None
) -> MemoryBudget:
    """Divide the memory of a worker between its loaders, and give the rest to their caches.

    Parameters
    ----------
    train, evaluate : Reading
        `evaluate` may be None.
    limit : int
        Bytes that the data path may use.
    what : str
        Names the limit in errors.
    cache : int, optional
        The most bytes of cached units; all that is left if not given.

    Raises
    ------
    ChunkTooLarge
        A single chunk is larger than the limit.
    OutOfMemory
        The units that must be in memory at once are larger than the limit.
    """
    for reading in filter(None, (train, evaluate)):
        _check_chunks(reading.samples, limit, what)
    candidates = list(_candidates(train, evaluate, limit, what))
    chosen = next((candidate for candidate in candidates if candidate.total <= limit), None)
    if chosen is None:
        raise OutOfMemory(
            f"{train.samples.path}: the data path needs {candidates[-1].sentence()} ({candidates[-1].total:,} bytes); "
            f"{what} is {format_bytes(limit)} ({limit:,} bytes).",
            f"{_more(what)}, store smaller chunks, or use smaller batches.",
        )
    rest = limit - chosen.total
    return _with_cache(chosen, train, evaluate, rest if cache is None else min(cache, rest))


def _candidates(train: Reading, evaluate: Reading | None, limit: int, what: str) -> Iterator[MemoryBudget]:
    """Yield budgets: first the fastest, then fewer loaders, less read ahead, fewer buffers, and loaders in turn."""
    samples = train.samples
    ahead, threads = (AHEAD_REMOTE, THREADS_REMOTE) if samples.store.read_ahead else (AHEAD, THREADS)
    statics, indices = static_bytes(samples), index_bytes(samples)
    tables = train.tables + (evaluate.tables if evaluate else 0)
    loaders = [(train.loaders, evaluate.loaders if evaluate else 0), *((n, 0) for n in range(train.loaders, 0, -1))]
    speeds = ((ahead, threads, BUFFERS), (2, min(2, threads), BUFFERS), (1, 1, BUFFERS), (1, 1, 2))
    choices = [(*speed, *kept, False) for speed in speeds for kept in loaders]
    if evaluate is not None:
        choices.append((1, 1, 2, 1, 0, True))
    for r, t, buffers, count, kept, in_turn in choices:
        yield MemoryBudget(
            train=train.budget(count, r, t, buffers),
            evaluate=evaluate.budget(kept, r, t, buffers) if evaluate else None,
            statics=statics,
            indices=indices,
            tables=tables,
            limit=limit,
            what=what,
            in_turn=in_turn,
        )


def _more(what: str) -> str:
    """Return how to get more memory than the limit of that name."""
    if what in ("memory", "data.memory"):
        return f"Raise {what}"
    return "Use a machine with more memory" if "machine" in what else "Give the workers more memory (cluster.memory)"


def _check_chunks(samples: Samples, limit: int, what: str) -> None:
    variables = ((store.path, variable) for store in samples.stores for variable in store.stored)
    for path, variable in variables:
        if variable.chunk_bytes > limit:
            raise ChunkTooLarge(
                f"{path}: one chunk of {variable.name} {variable.chunks} decodes to "
                f"{format_bytes(variable.chunk_bytes)}; {what} is {format_bytes(limit)}.",
                f"Store it in smaller chunks. Or: {_more(what).lower()}.",
            )


def _with_cache(budget: MemoryBudget, train: Reading, evaluate: Reading | None, rest: int) -> MemoryBudget:
    """Give all kept loaders the same share of the units that they read."""
    pairs = [(budget.train, train.units)]
    if budget.evaluate is not None and evaluate is not None:
        pairs.append((budget.evaluate, evaluate.units))
    wanted = sum(loader.kept * units * loader.unit for loader, units in pairs)
    share = min(1.0, rest / wanted) if wanted else 0.0
    cached = [_cached(loader, int(share * units)) for loader, units in pairs]
    return replace(budget, train=cached[0], evaluate=cached[1] if len(cached) > 1 else None)


def _cached(loader: LoaderBudget, units: int) -> LoaderBudget:
    return replace(loader, limits=replace(loader.limits, cached=units if loader.kept else 0))
