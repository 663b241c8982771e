"""The decisions of a loader, without threads, files or a clock: events in, instructions out.

`Schedule.handle` notes an event and returns all that can be done now. Which samples a bundle of batches holds depends
only on plan, cursor and sizes; the order of events decides when parts are read and samples are gathered, never which.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

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
    Taken,
)
from dtrain.data.load.slots import Rows, SlotTable
from dtrain.data.plan.bins import PartRows
from dtrain.data.plan.memory import Limits
from dtrain.data.plan.order import RowRun, epoch_order
from dtrain.data.plan.partition import Partition
from dtrain.errors import TooFewSamples
from dtrain.types import Cursor


class Schedule:
    """The decisions of a loader. One thread at a time may call `handle`.

    Parameters
    ----------
    partition : Partition
        Not empty.
    cursor : Cursor
        Where to begin.
    bundles : iterator of tuple of int
        The sizes of the batches of each bundle.
    replica : int
        Identifies the order, together with the plan's seed and the epoch.
    shuffle : bool
    limits : Limits
        Slots, read-ahead, cached parts, and the number of bundles that have memory at a time.
    total : int, optional
        Sum of all sizes; no part that only later samples need is read.

    Raises
    ------
    TooFewSamples
        The partition is empty, as an earlier version planned some.
    """

    def __init__(
        self,
        partition: Partition,
        cursor: Cursor,
        bundles: Iterator[tuple[int, ...]],
        *,
        replica: int,
        shuffle: bool,
        limits: Limits,
        total: int | None = None,
    ) -> None:
        if not partition.num_samples:  # no run would ever come
            raise TooFewSamples(
                f"The plan of the run gives replica {replica} no samples.", "Start a new run with fewer replicas."
            )
        self.slots = SlotTable(partition, limits, shuffle)
        self._partition = partition
        self._lookahead = _Lookahead(row_runs(partition, cursor, replica, shuffle, total), limits.ahead)
        self._memory = _BundleMemory(limits.buffers)
        self._bundles = bundles
        self._sizes: tuple[int, ...] | None = None
        """Of the next bundle, while it waits for memory."""
        self._bundle: _OpenBundle | None = None
        self._epoch, self._run = cursor.epoch, RowRun(0, _no_rows, (), -1)
        self._rows: Rows | None = _NO_ROWS
        """The samples of the run; None until all its parts are read."""
        self._done = 0
        """Samples of the run that have been gathered."""
        self._gathering = 0
        """Samples that are being gathered."""
        self._loading: set[int] = set()
        """Slots into which parts are being read."""
        self._failed: dict[int, BaseException] = {}
        """By slot: why its part could not be read."""
        self.is_over = False
        """Whether no further bundle follows."""

    @property
    def waits_for_part(self) -> bool:
        """Whether nothing can be gathered before another part is read."""
        return self._rows is None and not self.is_over

    def handle(self, event: Event) -> list[Instruction]:
        """Note an event, and return what to do next, in this order."""
        todo: list[Instruction] = []
        match event:
            case ReadDone(slot=slot):
                self._loading.remove(slot)
            case ReadFailed(slot=slot, error=error):
                self._loading.remove(slot)
                self._failed[slot] = error
            case Gathered():
                self._note_gathered()
            case Taken(bundle=bundle):
                todo = self._memory.taken(bundle)
            case Freed(bundle=bundle):
                todo = self._memory.freed(bundle)
        while (more := self._step()) is not None:
            todo += more
        return todo

    def _step(self) -> list[Instruction] | None:
        """Return the next instructions; None if an event must come first."""
        if self.is_over or self._gathering:
            return None
        if self._bundle is None:
            return self._open()
        if self._bundle.filled == self._bundle.total:
            self._bundle = None
            return [Emit()]
        if self._rows is None:
            return self._locate()
        if self._done == len(self._rows):
            return self._next_run()
        return self._gather(self._bundle, self._rows)

    def _open(self) -> list[Instruction] | None:
        if self._sizes is None:
            self._sizes = next(self._bundles, None)
        if self._sizes is None:
            self.is_over = True
            return [Finish()]
        number = self._memory.take()
        if number is None:
            return None
        sizes, self._sizes = self._sizes, None
        self._bundle = _OpenBundle(sum(sizes))
        return [Open(number, sizes)]

    def _next_run(self) -> list[Instruction]:
        """Free what the last run has used, request parts for the free slots, and begin the next run."""
        if self._lookahead.epoch not in (self._epoch, None):
            self.slots.end_pass(self._epoch)
        elif self._run.closed >= 0:
            self.slots.release(self._epoch, self._run.closed)
        todo = self._request()
        self._lookahead.fill()
        todo += self._request()
        self._epoch, self._run = self._lookahead.pop()
        self._rows = None
        return todo

    def _request(self) -> list[Instruction]:
        """Assign slots to the parts that are wanted next, as long as there are free ones."""
        todo: list[Instruction] = []
        wanted = self._lookahead.wanted
        while wanted and self.slots.has_slot(wanted[0][1]):
            epoch, part = wanted.popleft()
            slot = self.slots.assign(epoch, part)
            if slot is not None:
                self._loading.add(slot)
                todo.append(Read(slot, self._partition.box(part)))
        return todo

    def _locate(self) -> list[Instruction] | None:
        """Look up where the samples of the run lie, once all parts that it opens are read."""
        for part in self._run.opens:
            slot = self.slots.slot(self._epoch, part)
            if slot in self._loading:
                return None
            if slot in self._failed:
                self.is_over = True
                return [Fail(self._failed[slot])]
        self._rows, self._done = self.slots.rows(self._epoch, self._run), 0
        return []

    def _gather(self, bundle: _OpenBundle, rows: Rows) -> list[Instruction]:
        self._gathering = min(bundle.total - bundle.filled, len(rows) - self._done)
        return [Gather(bundle.filled, rows.part(self._done, self._done + self._gathering))]

    def _note_gathered(self) -> None:
        if self._bundle is not None:
            self._bundle = replace(self._bundle, filled=self._bundle.filled + self._gathering)
        self._done, self._gathering = self._done + self._gathering, 0


def _no_rows() -> PartRows:
    return PartRows(np.zeros(0, np.int64), np.zeros(0, np.int64))


_NO_ROWS = Rows(*_no_rows(), None)


@dataclass(frozen=True, slots=True)
class _OpenBundle:
    """The bundle that is being filled."""

    total: int
    """Samples that it will hold."""
    filled: int = 0
    """Samples that it holds."""


class _Lookahead:
    """The runs that come next, and the parts that they open, in the order in which they are needed.

    It reaches at least one run beyond the next one, and `ahead` parts.
    """

    def __init__(self, runs: Iterator[tuple[int, RowRun]], ahead: int) -> None:
        self.wanted: deque[tuple[int, int]] = deque()
        """(epoch, part): without a slot so far."""
        self._runs = runs
        self._ahead = ahead
        self._coming: deque[tuple[int, RowRun]] = deque()
        self._opens = 0
        """Parts that the coming runs open."""

    @property
    def epoch(self) -> int | None:
        """The epoch of the next run; None if no run is known."""
        return self._coming[0][0] if self._coming else None

    def fill(self) -> None:
        """Look as far ahead as allowed."""
        while self._opens <= self._ahead or len(self._coming) < 2:
            following = next(self._runs, None)
            if following is None:
                return
            epoch, run = following
            self.wanted.extend((epoch, part) for part in run.opens)
            self._opens += len(run.opens)
            self._coming.append(following)

    def pop(self) -> tuple[int, RowRun]:
        """Return epoch and rows of the next run."""
        if not self._coming:
            raise AssertionError("the batches hold more samples than the loader was told")
        epoch, run = self._coming.popleft()
        self._opens -= len(run.opens)
        return epoch, run


class _BundleMemory:
    """Counts the bundles that have memory of the loader: those being filled, waiting, in use or not yet freed.

    A consumer that keeps a batch keeps its memory. The loader goes on with new memory in its place, once a further
    bundle has been taken.
    """

    def __init__(self, permits: int) -> None:
        self._permits = permits
        self._last = -1
        self._lent: set[int] = set()
        """Bundles whose memory has neither come back nor been abandoned."""
        self._taken: deque[int] = deque()
        """Those of them whose batches have all been taken, oldest first."""

    def take(self) -> int | None:
        """Return the number of a new bundle; None if too many have memory."""
        if not self._permits:
            return None
        self._permits -= 1
        self._last += 1
        self._lent.add(self._last)
        return self._last

    def taken(self, bundle: int) -> list[Instruction]:
        """Note that all batches of a bundle have been taken."""
        if bundle in self._lent:
            self._taken.append(bundle)
        if len(self._taken) < 2:
            return []
        oldest = self._taken.popleft()
        self._give_back(oldest)
        return [Abandon(oldest)]

    def freed(self, bundle: int) -> list[Instruction]:
        """Note that nobody refers to the memory of a bundle any more."""
        if bundle not in self._lent:
            return []
        if bundle in self._taken:
            self._taken.remove(bundle)
        self._give_back(bundle)
        return [Recycle(bundle)]

    def _give_back(self, bundle: int) -> None:
        self._lent.remove(bundle)
        self._permits += 1


def row_runs(
    partition: Partition, cursor: Cursor, replica: int, shuffle: bool, total: int | None
) -> Iterator[tuple[int, RowRun]]:
    """Yield epoch and run, from the cursor on, pass after pass, until the runs hold `total` samples."""
    plan = partition.plan
    epoch, position, count = cursor.epoch, cursor.position, 0
    while True:
        for run in epoch_order(
            partition.part_sizes,
            mixed_units=plan.window,
            shuffle=shuffle,
            seed=plan.seed,
            replica=replica,
            epoch=epoch,
            position=position,
        ):
            if total is not None and count >= total:
                return
            yield epoch, run
            count += run.size
        epoch, position = epoch + 1, 0
