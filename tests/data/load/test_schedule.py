"""The decisions of a loader, without threads: the same samples in the same order, whatever happens when."""

from __future__ import annotations

import ast
import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dtrain.data.load.schedule
from dtrain.data.load.messages import (
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
from dtrain.data.plan.hashing import CACHE, hash64
from dtrain.data.plan.memory import Limits
from dtrain.data.plan.order import epoch_order
from dtrain.data.plan.partition import train_partitions
from dtrain.errors import TooFewSamples
from dtrain.types import Cursor
from tests.data.load.simulation import (
    START,
    Simulation,
    in_bundles,
    plan_of,
    samples_of,
    stream_of,
    whole_partition,
)
from tests.sampling import examples

MANY = examples(250)

limits = st.builds(
    Limits,
    ahead=st.integers(0, 6),
    cached=st.integers(0, 12),
    threads=st.just(1),
    buffers=st.integers(2, 5),
)
seeds = st.integers(0, 2**32)


@st.composite
def partitions(draw):
    """Partitions of all shapes: whole units or cells of them, windows, strides, patches, dealt or contiguous."""
    rows = draw(st.integers(1, 60))
    unit_rows = draw(st.integers(1, 12))
    plan = plan_of(
        rows,
        unit_rows,
        cell_rows=draw(st.integers(1, unit_rows)),
        mixed_units=draw(st.integers(1, 8)),
        patches=draw(st.integers(1, 3)),
        stride=draw(st.integers(1, 3)),
        first_offset=draw(st.integers(-2, 0)),
        last_offset=draw(st.integers(0, 2)),
        replicas=draw(st.integers(1, 4)),
        contiguous=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
    )
    found = [partition for partition in train_partitions(plan) if partition.num_samples]
    return draw(st.sampled_from(found)) if found else whole_partition(rows, unit_rows)


def end_of(partition, passes, cursor=START):
    """Samples from a cursor to the end of so many passes."""
    return passes * partition.num_samples - cursor.epoch * partition.num_samples - cursor.position


# The stream -------------------------------------------------------------------------------------------------


@MANY
@given(partitions(), limits, st.booleans(), st.integers(1, 90), st.integers(1, 5), seeds, st.floats(0, 1))
def test_each_sample_comes_once_a_pass_in_the_order_of_the_plan(partition, limits, shuffle, batch, most, seed, keeps):
    count = partition.num_samples
    steps = 2 * count // batch + 3
    loader = Simulation(partition, in_bundles([batch] * steps, most), shuffle=shuffle, limits=limits)
    loader.run(random.Random(seed), keeps=keeps)
    assert loader.end == "finished"
    assert loader.samples == stream_of(partition, steps * batch, shuffle=shuffle)
    owned = Counter(samples_of(partition, shuffle=False))
    for epoch in range(steps * batch // count):
        assert Counter(loader.samples[epoch * count : (epoch + 1) * count]) == owned


@MANY
@given(partitions(), st.integers(0, 3))
def test_without_shuffle_samples_come_in_stored_order(partition, epoch):
    loader = Simulation(partition, [(partition.num_samples,)], cursor=Cursor(epoch, 0), shuffle=False)
    loader.run(random.Random(0))
    assert loader.samples == sorted(loader.samples)
    assert loader.samples == [
        (anchor, tile)
        for part in range(len(partition.units))
        for anchor in partition.part_anchors(part).tolist()
        for tile in range(partition.plan.patches)
    ]


@MANY
@given(partitions(), limits, st.booleans(), st.integers(1, 17), seeds, st.data())
def test_a_stream_resumed_at_a_cursor_is_the_rest_of_the_stream(partition, limits, shuffle, batch, seed, data):
    count = partition.num_samples
    done = data.draw(st.integers(0, 3 * count))
    cursor = data.draw(st.sampled_from([Cursor(*divmod(done, count)), Cursor(done // count, done % count)]))
    steps = max(1, (4 * count - done) // batch)
    loader = Simulation(partition, in_bundles([batch] * steps, 3), cursor=cursor, shuffle=shuffle, limits=limits)
    loader.run(random.Random(seed))
    assert loader.samples == stream_of(partition, done + steps * batch, shuffle=shuffle)[done:]


@given(partitions(), st.booleans())
def test_a_cursor_at_the_end_of_a_pass_is_the_beginning_of_the_next(partition, shuffle):
    count = partition.num_samples
    loader = Simulation(partition, [(count,)], cursor=Cursor(0, count), shuffle=shuffle)
    loader.run(random.Random(0))
    assert loader.samples == samples_of(partition, 1, shuffle=shuffle)


@MANY
@given(partitions(), st.booleans(), st.lists(st.integers(0, 40), max_size=12), st.integers(1, 5), seeds)
def test_any_sizes_of_batches_cut_the_same_stream(partition, shuffle, sizes, most, seed):
    total = sum(sizes)
    loader = Simulation(partition, in_bundles(sizes, most), shuffle=shuffle, total=total)
    loader.run(random.Random(seed))
    assert loader.end == "finished"
    assert [len(bundle) for bundle in loader.taken] == [sum(bundle) for bundle in in_bundles(sizes, most)]
    assert loader.samples == stream_of(partition, total, shuffle=shuffle)


def test_the_order_depends_on_replica_epoch_and_seed_alone():
    partition = whole_partition(60, 5)

    def order(seed=0, **options):
        loader = Simulation(replace(partition, plan=replace(partition.plan, seed=seed)), [(60,)], **options)
        loader.run(random.Random(0))
        return tuple(loader.samples)

    assert order() == order()
    different = {order(), order(replica=1), order(cursor=Cursor(1, 0)), order(seed=1)}
    assert len(different) == 4
    assert len({order(shuffle=False, replica=r, cursor=Cursor(e, 0)) for r in range(2) for e in range(2)}) == 1


# Slots ------------------------------------------------------------------------------------------------------


@MANY
@given(partitions(), limits, st.booleans(), st.integers(1, 4), seeds)
def test_slots_are_open_units_ahead_and_cached_and_never_more_than_two_passes_need(
    partition, limits, shuffle, passes, seed
):
    units = len(partition.units)
    loader = Simulation(
        partition,
        [(partition.num_samples,)] * passes,
        shuffle=shuffle,
        limits=limits,
        total=end_of(partition, passes),
    )
    cached = min(limits.cached, units)
    opened = min(partition.plan.window if shuffle else 1, units) + limits.ahead
    assert loader.schedule.slots.count == cached + min(opened, 2 * (units - cached))
    loader.run(random.Random(seed))
    by_part = [loader.reads_of()[int(partition.part_anchors(part)[0])] for part in range(units)]
    chosen = np.argsort(hash64(partition.plan.seed, CACHE, partition.units), kind="stable")[:cached].tolist()
    assert by_part == [1 if part in chosen else passes for part in range(units)]


def test_the_parts_that_are_cached_are_chosen_by_the_seed_and_spread():
    cached = {}
    for seed in range(3):
        sets = []
        for count in (20, 40):
            partition = whole_partition(400, 4, seed=seed)
            loader = Simulation(partition, [(400,)] * 3, limits=Limits(cached=count), total=1200)
            loader.run(random.Random(0))
            sets.append({start // 4 for start, reads in loader.reads_of().items() if reads == 1})
        assert [len(parts) for parts in sets] == [20, 40]
        assert sets[0] < sets[1]  # with more memory more of the same
        cached[seed] = sorted(sets[1])
        assert all(np.histogram(cached[seed], 4, (0, 100))[0] >= 4)
    assert len(set(map(tuple, cached.values()))) == 3


@MANY
@given(partitions(), st.booleans(), st.integers(0, 9), st.integers(0, 150), st.integers(1, 130), seeds)
def test_nothing_is_read_that_the_total_does_not_need(partition, shuffle, ahead, done, total, seed):
    count = partition.num_samples
    cursor = Cursor(*divmod(done, count))
    loader = Simulation(partition, [(total,)], cursor=cursor, shuffle=shuffle, limits=Limits(ahead=ahead), total=total)
    loader.run(random.Random(seed))
    needed = 0
    for epoch in itertools.count(cursor.epoch):  # the parts of the runs that hold the samples
        taken = set()
        for run in epoch_order(
            partition.part_sizes,
            mixed_units=partition.plan.window,
            shuffle=shuffle,
            seed=partition.plan.seed,
            replica=0,
            epoch=epoch,
            position=cursor.position if epoch == cursor.epoch else 0,
        ):
            if total <= 0:
                break
            taken |= set(run.opens)
            total -= len(run.part)
        needed += len(taken)
        if total <= 0:
            break
    assert len(loader.reads) == needed


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_units_are_read_ahead_as_far_as_slots_and_buffers_allow(shuffle, ahead):
    partition = whole_partition(320, 4, mixed_units=6)
    limits = Limits(ahead=ahead, buffers=2)
    loader = Simulation(partition, itertools.repeat((4,)), shuffle=shuffle, limits=limits)
    loader.settle()
    for step in range(1, 60):
        loader.take()
        loader.settle()
        assert len(loader.ready) == 1  # besides the bundle that was taken
        # the units of the samples that are out, and those open or ahead
        assert step + 1 + ahead <= len(loader.reads) <= step + 1 + (6 if shuffle else 1) + ahead


@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_at_the_start_the_first_part_and_those_ahead_are_requested(ahead):
    limits = Limits(ahead=ahead, cached=20)
    loader = Simulation(whole_partition(320, 4), itertools.repeat((4,)), shuffle=False, limits=limits)
    assert loader.schedule.slots.count > 2 * ahead  # slots are not what limits it
    assert len(loader.reads) == 1 + ahead


def test_reads_begin_in_the_order_in_which_parts_are_needed():
    partition = whole_partition(80, 4, mixed_units=3)
    loader = Simulation(partition, [(80,)], limits=Limits(ahead=4), total=80)
    first = [read.box.start for read in loader.reads]
    loader.run(random.Random(1))
    assert first == [read.box.start for read in loader.reads][: len(first)]
    opened = []
    for anchor, _ in loader.samples:
        if anchor // 4 * 4 not in opened:
            opened.append(anchor // 4 * 4)
    position = {start: number for number, start in enumerate(read.box.start for read in loader.reads)}
    assert all(abs(position[start] - number) <= 3 for number, start in enumerate(opened))
    assert sorted(position) == list(range(0, 80, 4))


def test_units_until_the_first_batch_do_not_depend_on_the_position():
    partition = whole_partition(4000, 10, mixed_units=16)
    for shuffle, total in itertools.product([False, True], [1, None]):
        counts = []
        for share in (0.0, 0.01, 0.5, 0.99):
            bundles = [(1,)] if total else itertools.repeat((1,))
            loader = Simulation(
                partition,
                bundles,
                cursor=Cursor(2, int(share * 4000)),
                shuffle=shuffle,
                limits=Limits(ahead=3, buffers=2),
                total=total,
            )
            while not loader.ready:
                loader.finish_gather() if loader.gathering else loader.finish_read()
            counts.append(len(loader.reads))
        assert max(counts) <= 16 + 3
        assert max(counts[1:]) <= counts[0] + 16  # at the very beginning fewer are open
        if total and not shuffle:
            assert counts == [1, 1, 1, 1]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("cached", [0, 5])
@pytest.mark.parametrize("cell_rows", [2, 4])
def test_nothing_is_kept_of_passes_that_are_over(shuffle, cached, cell_rows):
    partition = whole_partition(80, 4, mixed_units=3, cell_rows=cell_rows)
    limits = Limits(ahead=2, buffers=2, cached=cached)
    loader = Simulation(partition, itertools.repeat((8,)), shuffle=shuffle, limits=limits)
    slots, rng = loader.schedule.slots, random.Random(3)
    for step in range(1, 200):  # 20 passes
        loader.run(rng, bundles=step)
        assert len(slots._by_part) <= 2
        assert (slots._cached >= 0).sum() <= cached
        assert len(slots.free) <= slots.count
        assert len(loader.schedule._loading) <= slots.count
        assert len(loader.schedule._lookahead.wanted) <= 2 + 2
        assert len(loader.schedule._memory._lent) <= 2
    loader.settle()
    held = {slot for by_part in slots._by_part.values() for slot in by_part.tolist() if slot >= 0}
    assert held | set(slots._cached[slots._cached >= 0].tolist()) | set(slots.free.tolist()) == set(range(slots.count))
    assert not held & set(slots.free.tolist())


def test_a_part_is_waited_for_only_while_a_bundle_needs_it():
    loader = Simulation(whole_partition(40, 4), itertools.repeat((4,)), shuffle=False, limits=Limits(buffers=2))
    assert loader.schedule.waits_for_part
    loader.finish_read()
    assert not loader.schedule.waits_for_part  # it gathers
    loader.finish_gather()
    assert loader.schedule.waits_for_part == (loader.gathering is None)
    loader.settle()
    assert len(loader.ready) == 2
    assert not loader.schedule.waits_for_part  # it waits for memory: all that may be read has been read
    loader.receive()
    loader.advance()
    assert loader.gathering
    assert not loader.schedule.waits_for_part


# The memory of bundles --------------------------------------------------------------------------------------


@pytest.mark.parametrize("buffers", [2, 3, 5])
def test_memory_is_taken_for_as_many_bundles_as_allowed(buffers):
    loader = Simulation(whole_partition(40, 4), itertools.repeat((4, 4)), limits=Limits(buffers=buffers))
    loader.settle()
    assert len(loader.ready) == buffers
    assert loader.open is None
    loader.take()
    loader.settle()
    assert len(loader.ready) == buffers - 1  # one is in use
    for _ in range(20):
        loader.take()
        loader.settle()
        assert len(loader.ready) == buffers - 1
    assert loader.recycled == 20
    assert not loader.abandoned


@pytest.mark.parametrize("buffers", [2, 4])
def test_a_bundle_that_is_kept_is_abandoned_once_another_is_kept_as_well(buffers):
    loader = Simulation(whole_partition(40, 4), itertools.repeat((4,)), limits=Limits(buffers=buffers))
    loader.take()  # 0 is in use
    loader.take(keeps=True)  # 0 is kept
    loader.take()
    loader.take()
    assert not loader.abandoned  # 1 and 2 came back, so one bundle less has memory
    assert len(loader.own) == buffers
    assert loader.recycled == 2
    loader.take(keeps=True)  # 3 is kept as well
    assert loader.abandoned == [0]
    loader.let_go(0)  # too late: its memory is no longer the loader's
    assert loader.recycled == 2
    loader.let_go(3)
    assert loader.recycled == 3


@pytest.mark.parametrize("buffers", [2, 3, 5])
def test_a_consumer_that_keeps_everything_is_served_on(buffers):
    loader = Simulation(whole_partition(40, 4), itertools.repeat((4,)), limits=Limits(buffers=buffers))
    for _ in range(50):
        loader.take(keeps=True)
    assert loader.samples == stream_of(loader.partition, 200)
    assert loader.abandoned == list(range(48))  # the last two are in use and just used
    assert not loader.recycled


def test_a_consumer_that_lets_go_of_a_bundle_after_it_has_the_next_loses_no_memory():
    # the loop variable of a for loop holds the last batch of a bundle until the first one of the next is there
    loader = Simulation(whole_partition(40, 4), itertools.repeat((4,)), limits=Limits(buffers=2))
    loader.take()
    for number in range(50):
        loader.take(keeps=True)
        loader.let_go(number)
    assert loader.recycled == 50
    assert not loader.abandoned


def test_bundles_without_samples_need_no_part():
    loader = Simulation(whole_partition(40, 4), [(0, 0), (0,), (3,)], total=3)
    assert [len(samples) for _, samples in loader.ready] == [0, 0]
    loader.run(random.Random(0))
    assert [len(samples) for samples in loader.taken] == [0, 0, 3]


# Ends -------------------------------------------------------------------------------------------------------


@MANY
@given(partitions(), limits, st.booleans(), st.integers(1, 9), seeds, st.data())
def test_an_error_comes_after_all_bundles_that_do_not_need_the_part(partition, limits, shuffle, batch, seed, data):
    broken = data.draw(st.integers(0, len(partition.units) - 1))
    first = int(partition.part_anchors(broken)[0])
    loader = Simulation(partition, itertools.repeat((batch,)), shuffle=shuffle, limits=limits)
    rng, error = random.Random(seed), OSError()
    while loader.end is None:
        index = next((i for i, read in enumerate(loader.reading) if read.box.start == first), None)
        if index is not None:
            loader.finish_read(index, error)
        elif loader.reading and rng.random() < 0.5:
            loader.finish_read(rng.randrange(len(loader.reading)))
        elif loader.gathering:
            loader.finish_gather()
        elif loader.current is not None:
            loader.advance()
        elif loader.ready:
            loader.receive()
        else:
            loader.finish_read()
    assert loader.end is error
    while loader.ready:
        loader.take()
    stream = stream_of(partition, 2 * partition.num_samples + batch, shuffle=shuffle)
    owned = set(partition.part_anchors(broken).tolist())
    ends = [len(run) for run in _runs_before(partition, broken, shuffle)]
    assert loader.samples == stream[: sum(ends) // batch * batch]
    assert not owned & {anchor for anchor, _ in loader.samples}


def _runs_before(partition, broken, shuffle):
    """The samples of the runs before the one that opens a part."""
    plan = partition.plan
    for run in epoch_order(
        partition.part_sizes, mixed_units=plan.window, shuffle=shuffle, seed=plan.seed, replica=0, epoch=0
    ):
        if broken in run.opens:
            return
        yield run.part


def test_nothing_follows_an_error_or_the_end():
    partition = whole_partition(8, 4)
    failed = Simulation(partition, itertools.repeat((4,)), shuffle=False)
    failed.finish_read(0, OSError())
    assert isinstance(failed.end, OSError)
    assert failed.schedule.is_over
    failed.finish_read()
    ended = Simulation(partition, [(4,)], shuffle=False, total=4)
    ended.run(random.Random(0))
    assert ended.schedule.is_over
    assert ended.schedule.handle(Gathered()) == []


def test_sizes_are_asked_for_one_bundle_ahead():
    asked = []

    def bundles():
        for number in itertools.count():
            asked.append(number)
            yield (4,)

    loader = Simulation(whole_partition(40, 4), bundles(), limits=Limits(buffers=2))
    loader.settle()
    assert asked == [0, 1, 2]
    loader.take()
    loader.take()
    assert asked == [0, 1, 2, 3][: len(asked)]


def test_an_error_of_the_sizes_is_raised_at_once():
    def bundles():
        raise KeyError
        yield (3,)

    schedule = Schedule(whole_partition(40, 4), START, bundles(), replica=0, shuffle=True, limits=Limits())
    with pytest.raises(KeyError):
        schedule.handle(Started())


def test_a_total_that_is_too_small_is_a_bug():
    loader = Simulation(whole_partition(40, 4), [(40,)], shuffle=False, total=10)
    with pytest.raises(AssertionError, match="more samples than"):
        loader.settle()


def test_the_first_instructions_of_a_small_pass():
    # written out once: two parts of two rows, one bundle of both
    schedule = Schedule(
        whole_partition(4, 2), START, iter([(3, 1)]), replica=0, shuffle=False, limits=Limits(ahead=1), total=4
    )
    opened, one, other = schedule.handle(Started())
    assert opened == Open(0, (3, 1))
    assert isinstance(one, Read)
    assert isinstance(other, Read)
    assert [(read.box.start, read.box.stop) for read in (one, other)] == [(0, 2), (2, 4)]
    assert one.slot != other.slot
    assert schedule.handle(ReadDone(other.slot, 0)) == []
    (gather,) = schedule.handle(ReadDone(one.slot, 0))
    assert isinstance(gather, Gather)
    assert (gather.start, gather.rows.slot.tolist(), gather.rows.row.tolist()) == (0, [one.slot] * 2, [0, 1])
    (gather,) = schedule.handle(Gathered())
    assert isinstance(gather, Gather)
    assert (gather.start, gather.rows.slot.tolist(), gather.rows.row.tolist()) == (2, [other.slot] * 2, [0, 1])
    assert schedule.handle(Gathered()) == [Emit(), Finish()]
    assert schedule.handle(Taken(0)) == []
    assert schedule.handle(Freed(0)) == [Recycle(0)]


def test_the_schedule_knows_neither_threads_nor_files_nor_a_clock():
    folder = Path(dtrain.data.load.schedule.__file__).parent
    for name in ("schedule", "messages", "slots"):
        tree = ast.parse((folder / f"{name}.py").read_text())
        used = {
            module
            for node in ast.walk(tree)
            for module in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
        }
        third = {module.partition(".")[0] for module in used if not module.startswith("dtrain")}
        assert third <= {"__future__", "collections", "dataclasses", "typing", "numpy"}
        assert not {module for module in used if module.startswith(("dtrain.data.read", "dtrain.data.load.gather"))}


def test_a_partition_without_samples_is_refused_at_once():
    empty = whole_partition(8, 4).chosen(slice(0, 0))
    with pytest.raises(TooFewSamples, match="gives replica 3 no samples"):
        Schedule(empty, START, itertools.repeat((8,)), replica=3, shuffle=True, limits=Limits())


def test_failures_carry_the_error_itself():
    error = OSError("no luck")
    loader = Simulation(whole_partition(8, 4), [(8,)], shuffle=False)
    assert Fail(error) in loader.schedule.handle(_failed(loader.reading[0], error))


def _failed(read, error):
    return ReadFailed(read.slot, error)
