"""A loader without threads: carries out the instructions of a schedule in any order that threads could."""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque

import numpy as np

from dtrain.data.load.messages import (
    Abandon,
    Emit,
    Fail,
    Finish,
    Freed,
    Gather,
    Gathered,
    Open,
    Read,
    ReadDone,
    ReadFailed,
    Recycle,
    Started,
    Taken,
)
from dtrain.data.load.schedule import Schedule
from dtrain.data.plan.memory import Limits
from dtrain.data.plan.order import epoch_order
from dtrain.data.plan.partition import Partition, train_partitions
from dtrain.data.plan.units import DataPlan
from dtrain.types import Cursor

START = Cursor(0, 0)


def plan_of(num_samples, unit_rows, *, mixed_units=4, **changes):
    """A plan made by hand: units of so many rows, each one cell."""
    plain = {
        "cell_rows": unit_rows,
        "patches": 1,
        "stride": 1,
        "first_offset": 0,
        "last_offset": 0,
        "window": mixed_units,
        "replicas": 1,
        "eval_pieces": 1,
        "val": 0.0,
        "test": 0.0,
        "sequential": False,
        "contiguous": False,
        "shuffle": True,
        "seed": 0,
        "source": "",
    }
    return DataPlan(num_samples=num_samples, unit_rows=unit_rows, **{**plain, **changes})


def whole_partition(num_samples, unit_rows, **changes) -> Partition:
    (partition,) = train_partitions(plan_of(num_samples, unit_rows, **changes))
    return partition


def samples_of(partition, epoch=0, *, position=0, replica=0, shuffle=True):
    """(anchor, patch) of each sample of a pass from a position on, by the order's definition alone."""
    plan = partition.plan
    anchors = [partition.part_anchors(part).tolist() for part in range(len(partition.units))]
    runs = epoch_order(
        partition.part_sizes, mixed_units=plan.window, shuffle=shuffle, seed=plan.seed, replica=replica, epoch=epoch
    )
    rows = [pair for run in runs for pair in zip(run.part.tolist(), run.row.tolist(), strict=True)]
    return [(anchors[part][row // plan.patches], row % plan.patches) for part, row in rows[position:]]


def stream_of(partition, count, cursor=START, **options):
    """The first samples of the cyclic stream from a cursor on."""
    stream = samples_of(partition, cursor.epoch, position=cursor.position, **options)
    epoch = cursor.epoch
    while len(stream) < count:
        epoch += 1
        stream += samples_of(partition, epoch, **options)
    return stream[:count]


def in_bundles(sizes, most):
    """Batches of these sizes in bundles of so many."""
    sizes = iter(sizes)
    while bundle := tuple(itertools.islice(sizes, most)):
        yield bundle


class Simulation:
    """Threads, arena, buffers and consumer of a loader, played by one thread.

    It holds against the schedule what real memory would not survive: a slot that is written to while it is read, a
    bundle that is filled while somebody holds it, more of either than allowed.
    """

    def __init__(self, partition, bundles, *, cursor=START, replica=0, shuffle=True, limits=None, total=None):
        self.limits = limits or Limits()
        self.partition = partition
        self.schedule = Schedule(
            partition, cursor, iter(bundles), replica=replica, shuffle=shuffle, limits=self.limits, total=total
        )
        self.reading: list[Read] = []
        self.reads: list[Read] = []
        self.gathering: Gather | None = None
        self.arena: dict[int, int] = {}
        """By slot that holds a part: the part's first anchor."""
        self.open: Open | None = None
        self.filled: list[tuple[int, int]] = []
        self.ready: deque[tuple[Open, list[tuple[int, int]]]] = deque()
        self.current: int | None = None
        self.kept: set[int] = set()
        """Bundles that the consumer refers to although it has gone on."""
        self.own: set[int] = set()
        """Bundles whose memory is the loader's."""
        self.abandoned: list[int] = []
        self.recycled = 0
        self.taken: list[list[tuple[int, int]]] = []
        self.end: BaseException | str | None = None
        self.tell(Started())

    def tell(self, event):
        for instruction in self.schedule.handle(event):
            self.carry_out(instruction)

    def carry_out(self, instruction):
        assert self.end is None or isinstance(instruction, Recycle | Abandon)
        match instruction:
            case Read(slot=slot):
                assert 0 <= slot < self.schedule.slots.count
                assert slot not in [read.slot for read in self.reading]
                assert self.gathering is None or slot not in self.gathering.rows.slot
                self.arena.pop(slot, None)
                self.reading.append(instruction)
                self.reads.append(instruction)
            case Open(bundle=bundle):
                assert self.open is None
                assert bundle not in self.own | self.kept
                self.own.add(bundle)
                assert len(self.own) <= self.limits.buffers
                self.open, self.filled = instruction, []
            case Gather(start=start, rows=rows):
                assert self.gathering is None
                assert start == len(self.filled)
                assert set(rows.slot.tolist()) <= set(self.arena)
                self.gathering = instruction
            case Emit():
                assert len(self.filled) == sum(self.open.sizes)
                self.ready.append((self.open, self.filled))
                self.open = None
            case Recycle(bundle=bundle):
                assert bundle not in self.kept
                assert bundle != self.current
                self.own.remove(bundle)
                self.recycled += 1
            case Abandon(bundle=bundle):
                self.own.remove(bundle)
                self.abandoned.append(bundle)
            case Fail(error=error):
                self.end = error
            case Finish():
                self.end = "finished"

    # What can happen next -----------------------------------------------------------------------------------

    def finish_read(self, index=0, error=None):
        read = self.reading.pop(index)
        if error is not None:
            self.tell(ReadFailed(read.slot, error))
            return
        self.arena[read.slot] = read.box.start
        self.tell(ReadDone(read.slot, 0))

    def finish_gather(self):
        rows, self.gathering = self.gathering.rows, None
        tiles = np.zeros(len(rows), int) if rows.tile is None else rows.tile
        starts = [self.arena[slot] for slot in rows.slot.tolist()]
        self.filled += list(zip((np.array(starts, int) + rows.row).tolist(), tiles.tolist(), strict=True))
        self.tell(Gathered())

    def advance(self, keeps=False):
        """Be done with a bundle: keep it, or leave it to the loader."""
        bundle, self.current = self.current, None
        if keeps:
            self.kept.add(bundle)
        else:
            self.tell(Freed(bundle))
        self.tell(Taken(bundle))

    def receive(self):
        assert self.current is None
        bundle, samples = self.ready.popleft()
        self.current = bundle.bundle
        self.taken.append(samples)

    def take(self, keeps=False):
        """Take a bundle; the one before it is kept, or nobody refers to it any more."""
        if self.current is not None:
            self.advance(keeps)
        self.settle()
        self.receive()

    def let_go(self, bundle):
        self.kept.remove(bundle)
        self.tell(Freed(bundle))

    def settle(self):
        """Let everything happen that needs no consumer."""
        while self.reading or self.gathering:
            if self.gathering:
                self.finish_gather()
            else:
                self.finish_read()

    def run(self, rng: random.Random, bundles=10**9, keeps=0.0):
        """Let things happen in random order until so many bundles have been taken, or the schedule is over.

        The consumer keeps a share of the bundles, and lets go of some of them later.
        """
        while len(self.taken) < bundles:
            chances = []
            if self.reading:
                chances += [self.finish_read, self.finish_read]
            if self.gathering:
                chances += [self.finish_gather, self.finish_gather]
            if self.current is not None:
                chances.append(self.advance)
            elif self.ready:
                chances.append(self.receive)
            elif self.end is not None and not self.reading:
                return
            assert chances, "nothing can happen any more"
            chosen = rng.choice(chances)
            if chosen == self.finish_read:
                self.finish_read(rng.randrange(len(self.reading)))
            elif chosen == self.advance:
                self.advance(rng.random() < keeps)
                if self.kept and rng.random() < keeps / 2:
                    self.let_go(rng.choice(sorted(self.kept)))
            else:
                chosen()

    @property
    def samples(self):
        return [sample for bundle in self.taken for sample in bundle]

    def reads_of(self):
        """How often each part was read, by its first anchor."""
        return Counter(read.box.start for read in self.reads)
