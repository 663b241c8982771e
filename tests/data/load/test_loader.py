"""Loaders with real threads over real stores: the same bits however they are read, in bounded memory, to any end."""

from __future__ import annotations

import gc
import itertools
import math
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.encoding import Scaling
from dtrain.data.load.loader import Loader, read_batches
from dtrain.data.plan import memory
from dtrain.data.plan.memory import Limits, Reading, plan_memory
from dtrain.data.plan.partition import eval_partitions, plan_data, train_partitions
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import ChunkMissing, ChunkUndecodable
from dtrain.types import Cursor
from tests.data.helpers import (
    START,
    WHOLE,
    Spy,
    batches,
    by_sample,
    index_of,
    one_pass,
    only_partition,
    open_all,
    opened,
    reader_of,
    readers,
    remembering,
    same_bits,
    stores,
    threads,
    vector,
)
from tests.data.load.simulation import Simulation, stream_of
from tests.sampling import examples

some_limits = st.builds(
    Limits,
    ahead=st.integers(0, 6),
    cached=st.integers(0, 12),
    threads=st.integers(1, 4),
    buffers=st.integers(2, 5),
)


@pytest.fixture(autouse=True)
def started():
    """A function that returns the threads of loaders that a test has started; none may be left at its end."""
    before = threads()
    yield lambda: threads() - before
    if threads() - before:
        gc.collect()
    assert threads() <= before


@pytest.fixture
def numbers(write_store, tmp_path):
    """Write v0(n, 2) whose rows hold their number and its negative, and index(n), in chunks of `rows`."""

    def write(count, rows, name="s", **options):
        n = np.arange(count, dtype="float32")
        v0 = {"dims": ("n", "k"), "values": np.stack([n, -n], 1), "chunks": (rows, 2), **options}
        return write_store(tmp_path / name, {"v0": v0, "index": vector(np.arange(count), rows)})

    return write


@pytest.fixture
def one_batch_a_bundle(monkeypatch):
    """Batches are assembled one by one."""
    monkeypatch.setattr(memory, "BUNDLE_BATCHES", 1)


def wait_until(true, seconds=10.0):
    limit = time.monotonic() + seconds
    while not true() and time.monotonic() < limit:
        time.sleep(0.002)
    assert true()


def held_back(reader, gates=None):
    """Make reads wait for an event: that of their thread, or one for all; return it and the threads that read."""
    original, begun, go = reader.read_into, [], threading.Event()

    def read_into(box, out):
        name = threading.current_thread().name
        begun.append(name)
        assert (gates[name] if gates else go).wait(10)
        return original(box, out)

    reader.read_into = read_into
    return go, begun


# A pass -----------------------------------------------------------------------------------------------------


@examples(20)
@given(
    stores(),
    st.integers(1, 9),
    st.integers(1, 10),
    st.integers(1, 13),
    st.booleans(),
    readers,
)
def test_each_sample_comes_exactly_once_a_pass_with_its_values(
    write_store, store, replicas, window, batch, shuffle, which
):
    with tempfile.TemporaryDirectory() as folder:
        arrays, samples, plan = opened(write_store, folder, store, replicas, window)
        seen = []
        for replica, partition in enumerate(train_partitions(plan)):
            reader = reader_of(samples, which)
            spy = Spy(reader)
            found = batches(reader, partition, one_pass(partition, batch), replica=replica, shuffle=shuffle)
            assert [b.size for b in found] == one_pass(partition, batch)
            assert len(spy.reads) == len(partition.units)
            seen += index_of(found)
            for b in found:
                where = b.targets[-1]
                for name, values in zip(samples.config.inputs, b.inputs, strict=True):
                    stored = by_sample(arrays, name)
                    kind = np.float32 if stored.dtype.kind == "f" else np.int64
                    assert values.dtype == kind
                    np.testing.assert_array_equal(values, stored[where].astype(kind))
                np.testing.assert_array_equal(b.targets[0], b.inputs[0])
        assert sorted(seen) == list(range(samples.num_samples))


@examples(20)
@given(stores(), st.integers(1, 4), st.integers(1, 9), st.booleans(), some_limits, st.data())
def test_batches_are_the_stream_that_the_schedule_is_tested_for(
    write_store, store, replicas, window, shuffle, limits, data
):
    with tempfile.TemporaryDirectory() as folder:
        _, samples, plan = opened(write_store, folder, store, replicas, window)
        reader, partition = remembering(samples), data.draw(st.sampled_from(train_partitions(plan)))
        count = partition.num_samples
        cursor = Cursor(*divmod(data.draw(st.integers(0, 3 * count)), count))
        sizes = data.draw(st.lists(st.integers(0, 40), max_size=12) | st.just([count] * 3))
        options = {"cursor": cursor, "replica": 2, "shuffle": shuffle, "limits": limits}
        found = batches(reader, partition, sizes, **options)
        assert [batch.size for batch in found] == sizes
        stream = stream_of(partition, sum(sizes), cursor, replica=2, shuffle=shuffle)
        assert index_of(found) == [anchor for anchor, _ in stream]
        endless = batches(reader, partition, itertools.chain(sizes, [1] * 100), **options)
        assert same_bits(found, endless[: len(sizes)])


@examples(10)
@given(stores(), st.integers(1, 3))
def test_train_val_and_test_together_hold_each_sample_once(write_store, store, replicas):
    with tempfile.TemporaryDirectory() as folder:
        zarr_format, arrays = store
        path = write_store(Path(folder, "s.zarr"), arrays, zarr_format=zarr_format)
        samples = open_all(path, arrays, split={"val": 0.3, "test": 0.2})
        if samples.num_samples < 10:
            return
        plan = plan_data(samples, replicas=replicas, seed=1)
        reader = UnitReader(samples)
        seen = []
        for partition in (*train_partitions(plan), *eval_partitions(plan, "val"), *eval_partitions(plan, "test")):
            seen += index_of(batches(reader, partition, one_pass(partition), shuffle=False))
        assert sorted(seen) == list(range(samples.num_samples))


@pytest.mark.parametrize("shuffle", [False, True])
def test_the_cursor_of_a_loader_is_that_of_the_batch_it_gives_next(numbers, shuffle):
    samples = open_all(numbers(60, 5), ["v0"])
    _, partition = only_partition(samples)
    reader = remembering(samples)
    whole = index_of(batches(reader, partition, [180], shuffle=shuffle))
    sizes = [7, 1, 50, 2, 60, 13, 30]
    loader = Loader(reader, partition, START, iter(sizes), replica=0, shuffle=shuffle, limits=Limits())
    done = 0
    for size in sizes:
        assert loader.cursor == Cursor(*divmod(done, 60))
        assert loader.take().targets[-1].tolist() == whole[done : done + size]
        done += size
    assert loader.cursor == Cursor(*divmod(done, 60))
    for _ in range(2):  # not once only
        with pytest.raises(StopIteration):
            loader.take()
    loader.close()


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_may_be_made_anew_at_each_cursor(numbers, shuffle):
    samples = open_all(numbers(60, 5), ["v0"])
    _, partition = only_partition(samples)
    reader = remembering(samples)
    whole = batches(reader, partition, [7] * 20, shuffle=shuffle)
    cursor = START
    for expected in whole:
        loader = Loader(reader, partition, cursor, [7] * 3, replica=0, shuffle=shuffle, limits=Limits())
        assert same_bits([expected], [loader.take()])
        cursor = loader.cursor
        loader.close()


def test_a_batch_of_another_size_than_asked_for_is_a_bug(numbers):
    samples = open_all(numbers(20, 5), ["v0"])
    _, partition = only_partition(samples)
    loader = Loader(UnitReader(samples), partition, START, [3, 4], replica=0, shuffle=True, limits=Limits())
    stream = loader.batches([3, 5])
    assert next(stream).size == 3
    with pytest.raises(AssertionError, match="the next batch of the loader has 4 samples, 5 were requested"):
        next(stream)
    loader.close()


# The same bits, whatever it may use ---------------------------------------------------------------------------


@examples(15)
@given(
    stores(),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 13),
    st.booleans(),
    some_limits,
    readers,
    st.data(),
)
def test_limits_and_readers_do_not_change_a_bit(
    write_store, store, replicas, window, batch, shuffle, limits, which, data
):
    with tempfile.TemporaryDirectory() as folder:
        _, samples, plan = opened(write_store, folder, store, replicas, window)
        partition = train_partitions(plan)[-1]
        start = data.draw(st.integers(0, 2 * partition.num_samples))
        cursor = Cursor(*divmod(start, partition.num_samples))
        sizes = [batch] * (3 * partition.num_samples // batch + 1)
        options = {"cursor": cursor, "replica": 1, "shuffle": shuffle}
        least = Limits(ahead=0, cached=0, threads=1, buffers=2)
        plain = batches(UnitReader(samples, "zarr"), partition, sizes, limits=least, **options)
        other = batches(reader_of(samples, which, threads=2), partition, sizes, limits=limits, **options)
        assert same_bits(plain, other)


@examples(12)
@given(st.floats(0, 2.99), st.integers(1, 9), st.booleans(), st.integers(1, 9), readers)
def test_a_stream_cut_at_random_goes_on_bit_by_bit(cut_store, share, batch, shuffle, window, which):
    samples, plan = cut_store
    part = train_partitions(replace(plan, window=window))[1]
    count = part.num_samples
    done = int(share * count)
    steps = min(30, (3 * count - done) // batch)
    whole = batches(UnitReader(samples), part, [done, *[batch] * steps], replica=1, shuffle=shuffle)
    rest = batches(
        reader_of(samples, which),
        part,
        [batch] * steps,
        cursor=Cursor(*divmod(done, count)),
        replica=1,
        shuffle=shuffle,
    )
    assert same_bits(whole[1:], rest)


@pytest.fixture(scope="module")
def cut_store(write_store, tmp_path_factory):
    values = np.random.default_rng(0).normal(size=(3, 150)).astype("float16")
    arrays = {
        "v0": {"dims": ("k", "n"), "values": values, "chunks": (2, 7)},
        "index": vector(np.arange(150), 10, shards=(20,)),
    }
    path = write_store(tmp_path_factory.mktemp("cut") / "s", arrays)
    samples = open_samples(
        path,
        inputs=["v0"],
        targets=["v0", "index"],
        input_offsets=[-1, 0],
        target_offsets=1,
        sample_dim="n",
        split=WHOLE,
    )
    return samples, plan_data(samples, replicas=2, seed=0)


def test_the_memory_of_a_worker_changes_what_is_kept_but_not_a_bit(cut_store):
    samples, plan = cut_store
    parts = train_partitions(plan)
    units = max(len(part.units) for part in parts)
    reading = Reading(samples=samples, plan=plan, loaders=1, units=units, batch_size=7, shuffle=True)
    found, kept = [], set()
    for limit in (139_000, 142_000, 250_000, 10_000_000):
        budget = plan_memory(reading, replace(reading, shuffle=False), limit, "the limit")
        kept.add(budget.train.limits)
        found.append(batches(UnitReader(samples), parts[0], [7] * 60, limits=budget.train.limits))
    assert len(kept) > 1
    assert all(same_bits(found[0], other) for other in found[1:])
    assert math.isfinite(sum(batch.inputs[0].sum() for batch in found[0]))


# Memory: slots ------------------------------------------------------------------------------------------------


@examples(12)
@given(stores(), st.integers(1, 3), st.integers(1, 6), st.booleans(), some_limits, st.integers(1, 4))
def test_the_arena_has_the_slots_of_the_schedule_and_no_more_threads_read_than_allowed(
    write_store, store, replicas, window, shuffle, limits, passes
):
    with tempfile.TemporaryDirectory() as folder:
        _, samples, plan = opened(write_store, folder, store, replicas, window)
        partition = train_partitions(plan)[0]
        cached = min(limits.cached, len(partition.units))
        reader = remembering(samples)
        spy = Spy(reader)
        sizes = [partition.num_samples] * passes
        loader = Loader(reader, partition, START, sizes, replica=0, shuffle=shuffle, limits=limits)
        slots, arena = limits.slots(partition, shuffle), loader._threads.arena
        assert {name: len(array) for name, array in arena.items()} == {v.name: slots for v in samples.moving}
        assert all(
            array[0].nbytes == plan.unit_rows * samples.variable(name).row_bytes for name, array in arena.items()
        )
        for _ in sizes:
            loader.take()
        loader.close()
        assert not arena
        counts = sorted(spy.units(plan).values())
        assert counts == sorted([1] * cached + [passes] * (len(partition.units) - cached))
        assert spy.most <= limits.threads + 1  # the assembler reads while it would wait


@pytest.mark.parametrize("shuffle", [False, True])
def test_without_a_consumer_as_much_is_read_as_the_schedule_says(numbers, one_batch_a_bundle, shuffle):
    samples = open_all(numbers(320, 4), ["v0"])
    _, partition = only_partition(samples, unit_rows=4, cell_rows=4, window=6)
    limits = Limits(ahead=3, buffers=2)
    expected = Simulation(partition, itertools.repeat((4,)), shuffle=shuffle, limits=limits)
    expected.settle()
    reader = UnitReader(samples)
    spy = Spy(reader)
    loader = Loader(reader, partition, START, itertools.repeat(4), replica=0, shuffle=shuffle, limits=limits)
    wait_until(lambda: len(spy.reads) >= len(expected.reads) and not spy.now)
    for step in range(1, 40):
        loader.take()
        expected.take()
        expected.settle()
        wait_until(lambda: len(spy.reads) >= len(expected.reads) and not spy.now)
        assert len(spy.reads) == len(expected.reads), step
    loader.close()
    assert sorted(start for start, _ in spy.reads) == sorted(read.box.start for read in expected.reads)


@pytest.mark.parametrize("count", [1, 3])
def test_a_slow_store_is_read_by_as_many_threads_as_allowed(numbers, count):
    samples = open_all(numbers(200, 5), ["v0"])
    _, partition = only_partition(samples, unit_rows=5, cell_rows=5)
    reader = UnitReader(samples)
    original, together = reader.read_into, threading.Barrier(count + 1)  # the assembler reads while it would wait

    def read_into(box, out):
        if len(spy.reads) <= count + 1:
            together.wait(10)  # fails unless so many reads are under way at once
        return original(box, out)

    reader.read_into = read_into
    spy = Spy(reader)
    limits = Limits(ahead=8, threads=count)
    assert len(index_of(batches(reader, partition, [200], limits=limits))) == 200
    assert spy.most == count + 1


def test_a_loader_counts_what_it_reads_itself(numbers):
    samples = open_all(numbers(60, 5), ["v0"])
    _, partition = only_partition(samples, unit_rows=5, cell_rows=5)
    reader = UnitReader(samples)
    loaders = [
        Loader(reader, partition, START, [120], replica=r, shuffle=True, limits=Limits(cached=c))
        for r, c in enumerate((0, 4))
    ]
    for loader in loaders:
        loader.take()
    counted = [loader.counted() for loader in loaders]
    assert [(c.units, c.bytes) for c in counted] == [(24, 120 * (8 + 8)), (20, 100 * (8 + 8))]
    for loader in loaders:
        loader.close()


def test_what_has_been_counted_is_told_once(numbers):
    samples = open_all(numbers(60, 5), ["v0"])
    _, partition = only_partition(samples, unit_rows=5, cell_rows=5)
    reader = UnitReader(samples)
    go, _ = held_back(reader)
    loader = Loader(reader, partition, START, iter([60, 60]), replica=0, shuffle=False, limits=Limits(), total=120)
    threading.Timer(0.01, go.set).start()
    loader.take()
    first = loader.counted()
    loader.take()
    second, third = loader.counted(), loader.counted()
    loader.close()
    assert 12 <= first.units <= 24
    assert first.units + second.units == 24
    assert first.bytes + second.bytes == 120 * 16
    assert first.waited > 0
    assert (third.units, third.bytes, third.waited) == (0, 0, 0)


def test_of_an_iterator_whose_sum_is_known_nothing_more_is_read(numbers):
    samples = open_all(numbers(400, 4), ["v0"])
    _, partition = only_partition(samples, unit_rows=4, cell_rows=4)
    for options in ({"total": 50}, {}):
        reader = UnitReader(samples)
        spy = Spy(reader)
        limits = Limits(ahead=9)
        loader = Loader(reader, partition, START, iter([20, 30]), replica=0, shuffle=False, limits=limits, **options)
        assert [loader.take().size for _ in range(2)] == [20, 30]
        loader.close()
        if options:
            assert len(spy.reads) == 13
        else:
            assert 13 <= len(spy.reads) <= 13 + 9


# Memory: batches ----------------------------------------------------------------------------------------------


def test_batches_may_be_written_to_and_are_contiguous(numbers):
    samples = open_all(numbers(6, 6), ["v0"])
    _, partition = only_partition(samples)
    found = []
    for batch in read_batches(UnitReader(samples), partition, START, [3] * 40, replica=0, shuffle=False):
        assert all(array.flags.writeable and array.flags.c_contiguous for array in (*batch.inputs, *batch.targets))
        found += batch.inputs[0][:, 0].tolist()
        batch.inputs[0][:] = -1  # as a model may, in place
        batch.targets[1][:] = -1
    assert found == [0, 1, 2, 3, 4, 5] * 20


HOW_KEPT = {
    "not at all": lambda array: None,
    "itself": lambda array: array,
    "a view": lambda array: array[1:, ::-1],
    "a view of a view": lambda array: array[::2].reshape(-1).view("uint8"),
    "a buffer": lambda array: memoryview(array),
    "in a cycle": lambda array: in_a_cycle(array),
}
try:
    import torch
except ImportError:  # the tests of the data layer run without torch
    pass
else:
    HOW_KEPT["a tensor"] = lambda array: torch.from_numpy(array)[1:]


def in_a_cycle(array):
    """What refers to itself, and is let go of by garbage collection alone."""
    cycle = {"array": array}
    cycle["itself"] = cycle
    return cycle


def bits_of(kept):
    if kept is None:
        return None
    return np.asarray(kept["array"] if isinstance(kept, dict) else kept).tobytes()


@examples(15)
@given(
    st.lists(st.sampled_from(list(HOW_KEPT)), min_size=150, max_size=150),
    st.sampled_from([1, 2, 8, 32]),
    st.integers(2, 5),
    st.integers(1, 20),
    st.lists(st.booleans(), min_size=150, max_size=150),
)
def test_what_is_kept_of_a_batch_stays_as_it_is(numbers_of_60, kinds, bundle, buffers, batch, writes):
    _, reader, partition = numbers_of_60
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "BUNDLE_BATCHES", bundle)
        stream = read_batches(
            reader, partition, START, [batch] * 150, replica=0, shuffle=True, limits=Limits(buffers=buffers)
        )
        whole = np.array(index_of(batches(reader, partition, [150 * batch])))
        kept = []
        for step, (found, kind, write) in enumerate(zip(stream, kinds, writes, strict=True)):
            expected = whole[step * batch : (step + 1) * batch]
            assert found.targets[-1].tolist() == expected.tolist()
            np.testing.assert_array_equal(found.inputs[0], np.stack([expected, -expected], 1))
            if write:  # what a model does to its batch is its own business
                found.inputs[0][:] += step * 1000
                found.targets[-1][:] = -step
            part = HOW_KEPT[kind](found.inputs[0] if step % 2 else found.targets[0])
            kept.append((part, bits_of(part)))
            del found, part
            if step > 20 and step % 7 == 0:
                kept[step - 20] = (None, None)  # let go of later
        assert all(bits_of(part) == bits for part, bits in kept)


@pytest.fixture(scope="module")
def numbers_of_60(write_store, tmp_path_factory):
    n = np.arange(60, dtype="float32")
    v0 = {"dims": ("n", "k"), "values": np.stack([n, -n], 1), "chunks": (5, 2)}
    path = write_store(tmp_path_factory.mktemp("kept") / "s", {"v0": v0, "index": vector(np.arange(60), 5)})
    samples = open_all(path, ["v0"])
    _, partition = only_partition(samples)
    return samples, remembering(samples), partition


def watched_loader(reader, partition, buffers):
    """A loader of batches of 6, and weak references to the memory that it allocates."""
    made = []

    def allocate(shape, dtype):
        made.append(weakref.ref(array := np.empty(shape, dtype)))
        return array

    limits, sizes = Limits(buffers=buffers), itertools.repeat(6)
    loader = Loader(reader, partition, START, sizes, replica=0, shuffle=True, limits=limits, allocate=allocate)
    return loader, made


@pytest.mark.sampled(2)
@pytest.mark.parametrize("buffers", [2, 4])
@pytest.mark.parametrize("bundle", [1, 32])
def test_buffers_are_used_again_once_nobody_refers_to_them(numbers_of_60, monkeypatch, buffers, bundle):
    _, reader, partition = numbers_of_60
    monkeypatch.setattr(memory, "BUNDLE_BATCHES", bundle)
    loader, made = watched_loader(reader, partition, buffers)
    for batch in loader.batches([6] * 1500):
        assert batch.size == 6
    assert len(made) <= 3 * buffers  # v0, v0 as a target, and index
    del batch
    loader.close()
    del loader
    gc.collect()
    assert not any(ref() is not None for ref in made)


def test_a_batch_that_is_kept_keeps_its_memory_alone(numbers_of_60, monkeypatch):
    _, reader, partition = numbers_of_60
    monkeypatch.setattr(memory, "BUNDLE_BATCHES", 1)
    loader, made = watched_loader(reader, partition, 2)
    kept = [loader.take() for _ in range(200)]
    alive = [ref for ref in made if ref() is not None]
    assert 3 * 200 <= len(alive) <= 3 * (200 + 2)
    del kept[5:]
    gc.collect()
    for _ in range(200):
        loader.take()
    gc.collect()
    assert sum(ref() is not None for ref in made) <= 3 * (5 + 3)
    loader.close()


def test_batches_that_are_kept_in_cycles_do_not_stop_the_loader(numbers_of_60, one_batch_a_bundle):
    _, reader, partition = numbers_of_60
    loader, made = watched_loader(reader, partition, 2)
    whole = index_of(batches(reader, partition, [6] * 200))
    gc.disable()  # nothing is let go of
    try:
        for step in range(200):
            cycle = in_a_cycle(loader.take().targets[-1])
            assert cycle["array"].tolist() == whole[step * 6 : step * 6 + 6]
    finally:
        gc.enable()
    assert 3 * 199 <= len(made) <= 3 * (200 + 2)
    assert loader.alive
    del cycle
    gc.collect()
    for _ in range(200):
        loader.take()
    assert sum(ref() is not None for ref in made) <= 3 * 3
    loader.close()


@pytest.mark.parametrize("depth", [1, 3])
def test_a_consumer_may_pass_batches_on_to_another_thread(numbers_of_60, one_batch_a_bundle, depth):
    # as a prefetching data loader does: one thread takes, another one lets go
    _, reader, partition = numbers_of_60
    whole = index_of(batches(reader, partition, [6] * 400))
    loader, made = watched_loader(reader, partition, 4)
    passed, seen = queue.Queue(depth), []

    def feed():
        for batch in loader.batches([6] * 400):
            passed.put(memoryview(batch.targets[-1]))
            del batch
        passed.put(None)

    feeder = threading.Thread(target=feed)
    feeder.start()
    while (kept := passed.get(timeout=10)) is not None:
        before = kept.tolist()
        seen += before
        assert kept.tolist() == before
        del kept
    feeder.join(10)
    assert seen == whole
    if depth == 1:
        assert len(made) < 3 * 100  # some are used again, whoever lets go of them
    loader.close()


@pytest.mark.parametrize("kind", ["a batch", "a view"])
def test_a_batch_outlives_its_loader(started, numbers_of_60, kind):
    _, reader, partition = numbers_of_60
    loader, made = watched_loader(reader, partition, 2)
    batch = loader.take()
    kept = batch.targets[-1] if kind == "a batch" else batch.targets[-1][::2]
    before = kept.tolist()
    loader.close()
    del loader, batch
    gc.collect()
    assert not started()
    assert kept.tolist() == before
    assert sum(ref() is not None for ref in made) == 1  # of a field of one bundle
    del kept
    assert not any(ref() is not None for ref in made)


def test_a_kept_batch_does_not_keep_the_arena(numbers_of_60):
    _, reader, partition = numbers_of_60
    loader = Loader(reader, partition, START, [6] * 9, replica=0, shuffle=True, limits=Limits())
    arena = weakref.ref(loader._threads.arena["v0"])
    kept = loader.take()
    loader.close()
    gc.collect()
    assert arena() is None
    assert kept.size == 6


@pytest.mark.parametrize("kind", ["a view", "a part"])
def test_memory_that_is_a_view_of_other_memory_is_not_used_again_too_early(numbers_of_60, monkeypatch, kind):
    # pinned memory comes as a view of what torch gives; views of it refer to that alone, never to the view
    _, reader, partition = numbers_of_60
    monkeypatch.setattr(memory, "BUNDLE_BATCHES", 1)

    def allocate(shape, dtype):
        size = int(np.prod(shape)) * dtype.itemsize
        block = np.empty(size if kind == "a view" else size + 64, "uint8")
        return block[-size:].view(dtype).reshape(shape)

    limits = Limits(buffers=2)
    loader = Loader(reader, partition, START, [6] * 50, replica=0, shuffle=True, limits=limits, allocate=allocate)
    kept = []
    for _ in range(50):
        batch = loader.take()
        kept.append((batch.targets[-1], batch.targets[-1].copy()))
    loader.close()
    for now, before in kept:
        np.testing.assert_array_equal(now, before)


@pytest.mark.parametrize("bundle", [1, 7, 32])
def test_batches_lie_at_aligned_addresses(write_store, tmp_path, monkeypatch, bundle):
    # the last bits of a vectorised sum depend on where in memory it begins
    monkeypatch.setattr(memory, "BUNDLE_BATCHES", bundle)
    arrays = {
        "v0": {"dims": ("n", "k"), "values": np.zeros((40, 3)), "chunks": (5, 3)},
        "static": {"dims": ("k",), "values": np.zeros(3), "chunks": (3,)},
        "index": vector(np.arange(40), 5),
    }
    samples = open_all(write_store(tmp_path / "s", arrays), arrays)
    _, partition = only_partition(samples)
    for sizes in ([1, 2, 3, 5, 7, 11] * 5, [16] * 20, [1] * 50):
        for batch in read_batches(UnitReader(samples), partition, START, sizes, replica=0, shuffle=True):
            arrays = (*batch.inputs, *batch.targets)
            assert [array.__array_interface__["data"][0] % 64 for array in arrays] == [0] * len(arrays)


def test_batches_of_growing_size_get_buffers_of_their_size(numbers_of_60, monkeypatch):
    _, reader, partition = numbers_of_60
    monkeypatch.setattr(memory, "BUNDLE_BATCHES", 1)
    sizes = [1, 50, 2, 51, 200, 3, 1000, 1, 1] * 3
    whole = index_of(batches(reader, partition, [sum(sizes)]))
    done = 0
    for size, batch in zip(
        sizes,
        read_batches(reader, partition, START, sizes, replica=0, shuffle=True, limits=Limits(buffers=2)),
        strict=True,
    ):
        assert batch.targets[-1].tolist() == whole[done : done + size]
        done += size


# Variables that are the same for all samples --------------------------------------------------------------------


@pytest.fixture
def with_static(write_store, tmp_path):
    arrays = {
        "v0": {"dims": ("n", "y"), "values": np.arange(40.0).reshape(20, 2), "chunks": (4, 2)},
        "height": {"dims": ("y", "x"), "values": np.arange(6.0).reshape(2, 3), "chunks": (1, 2)},
        "place": {"dims": (), "values": np.array(7, "int16"), "chunks": ()},
        "index": vector(np.arange(20), 4),
    }
    path = write_store(tmp_path / "s", arrays)

    def opened(inputs=("v0", "height", "place"), targets=("index",), **data):
        return open_samples(path, inputs=inputs, targets=targets, **{"split": WHOLE, "sample_dim": "n", **data})

    return opened


def test_a_static_variable_is_read_once_and_repeated_without_copying(with_static):
    samples = with_static()
    _, partition = only_partition(samples)
    reader = UnitReader(samples)
    before = reader.store.requests
    for size, batch in zip(
        [1, 5, 20, 3],
        read_batches(reader, partition, START, [1, 5, 20, 3], replica=0, shuffle=True),
        strict=True,
    ):
        _, height, place = batch.inputs
        assert (height.shape, height.dtype, place.shape, place.dtype) == ((size, 2, 3), "float32", (size,), "int64")
        np.testing.assert_array_equal(height, np.broadcast_to(np.arange(6.0).reshape(2, 3), (size, 2, 3)))
        assert place.tolist() == [7] * size
        assert height.strides[0] == place.strides[0] == 0
    keys = 2 * 2 + 1 + 2 * (5 + 2) * 2  # height, place; v0 and index: a pass, and 9 samples of the next
    assert reader.store.requests - before <= keys
    requests = reader.store.requests
    batches(reader, partition, [3])
    assert reader.store.requests - requests <= 10  # of v0 and index


def test_a_static_variable_has_no_windows_and_may_be_the_only_input(with_static):
    samples = with_static(inputs=["height"], targets=["index"], input_offsets=[-1, 0], target_offsets=[0, 1])
    assert [samples.field_shape(field) for field in samples.fields] == [(2, 3), (2,)]
    _, partition = only_partition(samples)
    (batch,) = batches(UnitReader(samples), partition, [partition.num_samples], shuffle=False)
    assert batch.targets[0].tolist() == [[i, i + 1] for i in range(19)]  # only what is read decides
    assert batch.inputs[0].shape == (19, 2, 3)


@pytest.mark.parametrize("size", [1, 4])
def test_what_a_model_writes_into_a_static_input_does_not_reach_other_batches(with_static, size):
    samples = with_static()
    _, partition = only_partition(samples)
    seen = []
    for batch in read_batches(UnitReader(samples), partition, START, [size] * 3, replica=0, shuffle=False):
        seen.append(batch.inputs[1][0].tolist())
        batch.inputs[1][...] = -1  # torch lets zero_() and x[...] = 0 through, although samples share their memory
    assert seen == [[[0, 1, 2], [3, 4, 5]]] * 3


# Standardised -------------------------------------------------------------------------------------------------


@examples(8)
@given(st.data())
def test_variables_are_standardised_on_the_way(write_store, data):
    draw = data.draw
    axes = draw(st.sampled_from([(), (0,), (1,), (0, 1)]))
    window = draw(st.sampled_from([0, [0, 1], {"start": -1, "stop": 2}, [0, 2, 1]]))
    dtype = draw(st.sampled_from(["float32", "float64", "int16"]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    values = rng.integers(-50, 50, (20, 3, 4)).astype(dtype)
    arrays = {
        "v0": {"dims": ("n", "c", "x"), "values": values, "chunks": (4, 2, 4)},
        "static": {"dims": ("c", "x"), "values": values[0], "chunks": (3, 4)},
        "index": vector(np.arange(20), 4),
    }
    if dtype == "int16":  # packed
        for name in ("v0", "static"):
            arrays[name]["attributes"] = {"scale_factor": 0.5, "add_offset": 1.0}
    decoded = values * (0.5 if dtype == "int16" else 1.0) + (1.0 if dtype == "int16" else 0.0)
    shape = tuple(size if axis in axes else 1 for axis, size in enumerate((3, 4)))
    mean, std = rng.normal(size=shape), rng.uniform(0.5, 2, shape)
    expected = ((decoded - mean) / std).astype("f4")
    scaling = Scaling(tuple(mean.ravel().tolist()), tuple(std.ravel().tolist()), axes)
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder, "s"), arrays)
        samples = open_samples(
            path, inputs=["v0", "static"], targets=["v0", "index"], sample_dim="n", split=WHOLE, input_offsets=window
        )
        _, partition = only_partition(samples)
        scalings = {"v0": scaling, "static": scaling}
        for batch in batches(UnitReader(samples), partition, [3, 6, 5], scalings=scalings):
            anchors = batch.targets[1]
            offsets = np.array(range(-1, 2) if isinstance(window, dict) else window)
            np.testing.assert_array_equal(batch.inputs[0], expected[np.add.outer(anchors, offsets)])
            np.testing.assert_array_equal(batch.targets[0], expected[anchors])
            np.testing.assert_array_equal(batch.inputs[1], np.broadcast_to(expected[0], (len(anchors), 3, 4)))


# Ends: closed, abandoned, failed --------------------------------------------------------------------------------


@examples(25)
@given(st.integers(0, 12), st.integers(1, 40), some_limits, st.booleans())
def test_a_loader_can_be_closed_at_any_time(numbers_of_60, steps, batch, limits, shuffle):
    samples, _, partition = numbers_of_60
    reader = UnitReader(samples)
    before = threads()
    loader = Loader(reader, partition, START, itertools.repeat(batch), replica=0, shuffle=shuffle, limits=limits)
    assert loader.alive
    for _ in range(steps):
        loader.take()
    loader.close()
    assert threads() <= before
    assert not loader.alive
    loader.close()  # again does no harm
    assert not loader._threads.arena


@pytest.mark.parametrize("count", [1, 2])
def test_closing_waits_for_reads_that_are_under_way_but_begins_no_other(numbers, count):
    samples = open_all(numbers(400, 4), ["v0"])
    _, partition = only_partition(samples, unit_rows=4, cell_rows=4, window=20)
    reader = UnitReader(samples)
    go, begun = held_back(reader)
    limits = Limits(threads=count)
    loader = Loader(reader, partition, START, itertools.repeat(4), replica=0, shuffle=True, limits=limits)
    wait_until(lambda: len(begun) == count + 1)  # the threads, and the assembler
    closer = threading.Thread(target=loader.close)
    closer.start()
    assert loader._threads._closed.wait(10)
    assert closer.is_alive()
    go.set()
    closer.join(10)
    assert not closer.is_alive()
    assert len(begun) == count + 1


def test_an_assembler_that_reads_while_it_waits_begins_no_other_read_once_it_is_closed(numbers):
    samples = open_all(numbers(400, 4), ["v0"])
    _, partition = only_partition(samples, unit_rows=4, cell_rows=4, window=20)
    reader = UnitReader(samples)
    gates = {"dtrain-assemble": threading.Event(), "dtrain-read_0": threading.Event()}
    _, begun = held_back(reader, gates)
    loader = Loader(reader, partition, START, itertools.repeat(4), replica=0, shuffle=True, limits=Limits(threads=1))
    wait_until(lambda: set(begun) == set(gates))
    closer = threading.Thread(target=loader.close)
    closer.start()
    assert loader._threads._closed.wait(10)
    gates["dtrain-assemble"].set()
    wait_until(lambda: not loader.alive)
    assert closer.is_alive()  # it waits for the other one
    gates["dtrain-read_0"].set()
    closer.join(10)
    assert not closer.is_alive()
    assert sorted(begun) == sorted(gates)


def test_a_loader_that_waits_for_its_consumer_is_closed_at_once(numbers_of_60):
    _, reader, partition = numbers_of_60
    spy = Spy(reader := remembering(reader.samples))
    loader = Loader(reader, partition, START, itertools.repeat(60), replica=0, shuffle=True, limits=Limits(buffers=2))
    wait_until(lambda: loader._threads.bundles.qsize() == 2 and not spy.now)
    loader.close()
    assert not loader.alive


def test_an_iterator_that_is_abandoned_closes_its_loader(started, numbers_of_60):
    _, reader, partition = numbers_of_60
    stream = read_batches(reader, partition, START, itertools.repeat(5), replica=0, shuffle=True)
    next(stream)
    assert started()
    del stream
    gc.collect()
    assert not started()
    for batch in read_batches(reader, partition, START, itertools.repeat(5), replica=0, shuffle=True):
        assert batch.size == 5
        break
    gc.collect()
    assert not started()


def test_a_stream_that_is_not_begun_begins_nothing(started, numbers_of_60):
    _, reader, partition = numbers_of_60
    stream = read_batches(reader, partition, START, [5], replica=0, shuffle=True)
    assert not started()
    stream.close()


@pytest.mark.parametrize("late", [False, True], ids=["taken after", "waiting"])
def test_taking_from_a_loader_that_is_closed_does_not_hang(numbers, one_batch_a_bundle, late):
    samples = open_all(numbers(40, 4), ["v0"])
    _, partition = only_partition(samples, unit_rows=4, cell_rows=4)
    reader = UnitReader(samples)
    go, begun = held_back(reader)
    loader = Loader(reader, partition, START, itertools.repeat(4), replica=0, shuffle=True, limits=Limits())
    raised = []

    def take():
        try:
            for _ in range(100):
                loader.take()
        except BaseException as error:
            raised.append(error)

    taker, closer = threading.Thread(target=take, daemon=True), threading.Thread(target=loader.close)
    wait_until(lambda: begun)
    if late:
        taker.start()
    closer.start()
    assert loader._threads._closed.wait(10)
    go.set()
    closer.join(10)
    if not late:
        taker.start()
    taker.join(5)
    hangs = taker.is_alive()
    if hangs:
        loader._threads.bundles.put(RuntimeError("the test ends"))
        taker.join(5)
    assert not hangs
    assert [type(error) for error in raised] == [StopIteration]


class Failing(Exception):
    pass


def failing_reader(samples, where, error):
    reader = UnitReader(samples)
    original = reader.read_into

    def read_into(box, out):
        if box.start <= where < box.stop:
            raise error
        return original(box, out)

    reader.read_into = read_into
    return reader


@pytest.mark.parametrize("error", [Failing("no luck"), MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("shuffle", [False, True])
def test_an_error_in_a_read_thread_reaches_the_consumer_each_time_it_asks(
    started, numbers, one_batch_a_bundle, shuffle, error
):
    samples = open_all(numbers(400, 4), ["v0"])
    _, partition = only_partition(samples, unit_rows=4, cell_rows=4, window=5)
    reader = failing_reader(samples, 250, error)
    loader = Loader(reader, partition, START, itertools.repeat(4), replica=0, shuffle=shuffle, limits=Limits(threads=3))
    whole = index_of(batches(UnitReader(samples), partition, [400], shuffle=shuffle))
    got = []

    def take_all():
        while True:
            got.extend(loader.take().targets[-1].tolist())

    with pytest.raises(type(error)) as caught:
        take_all()
    assert caught.value is error
    assert got == whole[: len(got)]  # what came before it is as it should be
    assert 250 not in got
    if not shuffle:
        assert got == list(range(248))
    for _ in range(2):
        with pytest.raises(type(error)):
            loader.take()
    wait_until(lambda: not loader.alive)
    assert loader.cursor == Cursor(0, len(got))
    loader.close()
    assert not started()


def test_an_error_in_a_unit_that_is_kept_is_raised_as_well(numbers):
    samples = open_all(numbers(40, 4), ["v0"])
    _, partition = only_partition(samples, unit_rows=4, cell_rows=4)
    reader = failing_reader(samples, 20, Failing())
    with pytest.raises(Failing):
        batches(reader, partition, [40], limits=Limits(cached=10))


def test_an_error_in_the_sizes_or_the_allocator_reaches_the_consumer(numbers_of_60):
    _, reader, partition = numbers_of_60

    def sizes():
        raise Failing
        yield 3

    loader = Loader(reader, partition, START, sizes(), replica=0, shuffle=True, limits=Limits())
    with pytest.raises(Failing):
        loader.take()
    loader.close()

    def allocate(shape, dtype):
        raise MemoryError

    loader = Loader(reader, partition, START, [3], replica=0, shuffle=True, limits=Limits(), allocate=allocate)
    with pytest.raises(MemoryError):
        loader.take()
    loader.close()


def test_faults_come_out_of_the_stream_of_batches(started, numbers, one_batch_a_bundle):
    path = numbers(12, 3)
    samples = open_all(path, ["v0"])
    _, partition = only_partition(samples, unit_rows=3, cell_rows=3)
    (path / "v0/c/2/0").unlink()
    stream = read_batches(UnitReader(samples), partition, START, [3] * 4, replica=0, shuffle=False)
    assert [len(next(stream).inputs[0]) for _ in range(2)] == [3, 3]
    with pytest.raises(ChunkMissing, match="v0/c/2/0"):
        next(stream)
    assert not started()


def test_a_static_variable_that_cannot_be_read_leaves_no_thread(with_static):
    samples = with_static()
    Path(samples.path, "height/c/0/0").write_bytes(b"garbage")
    with pytest.raises(ChunkUndecodable, match="chunk height/c/0/0 of height"):
        batches(UnitReader(samples), only_partition(samples)[1], [3])


def test_two_loaders_of_one_reader_do_not_disturb_each_other(numbers_of_60):
    samples, _, partition = numbers_of_60
    reader = UnitReader(samples)
    expected = [index_of(batches(reader, partition, [10] * 30, replica=r)) for r in range(2)]
    streams = [read_batches(reader, partition, START, [10] * 30, replica=r, shuffle=True) for r in range(2)]
    found = [[], []]
    turns = [0] * 30 + [1] * 30
    random.Random(0).shuffle(turns)
    for turn in turns:
        found[turn] += next(streams[turn]).targets[-1].tolist()
    assert found == expected
    for stream in streams:
        stream.close()


def test_many_loaders_used_by_as_many_threads(numbers_of_60):
    samples, _, partition = numbers_of_60
    reader = UnitReader(samples)
    expected = [index_of(batches(reader, partition, [7] * 40, replica=r)) for r in range(4)]
    found = [[] for _ in range(4)]

    def consume(replica):
        limits = Limits(ahead=replica, cached=3 * replica, threads=1 + replica % 2)
        stream = read_batches(reader, partition, START, [7] * 40, replica=replica, shuffle=True, limits=limits)
        for batch in stream:
            found[replica] += batch.targets[-1].tolist()

    workers = [threading.Thread(target=consume, args=(r,)) for r in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert found == expected


def test_reading_single_threaded_stores_of_one_unit_does_not_hang(numbers):
    samples = open_all(numbers(5, 5), ["v0"])
    _, partition = only_partition(samples)
    for ahead, cached, count in itertools.product((0, 1, 9), (0, 1, 5), (1, 3)):
        limits = Limits(ahead=ahead, cached=cached, threads=count, buffers=2)
        kept = list(
            read_batches(UnitReader(samples), partition, START, [3] * 50, replica=0, shuffle=True, limits=limits)
        )
        assert np.bincount(index_of(kept)).tolist() == [30] * 5


@pytest.mark.parametrize("how", ["with batches", "in a cycle"])
def test_the_interpreter_ends_while_a_loader_reads(numbers, how):
    path = numbers(4000, 5)
    code = f"""
import itertools
from dtrain.data.load.loader import Loader
from dtrain.data.plan.memory import Limits, Reading, plan_memory
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.types import Cursor
samples = open_samples({str(path)!r}, inputs=["v0"], targets=["index"], sample_dim="n")
(partition,) = train_partitions(plan_data(samples, replicas=1, seed=0))
sizes = itertools.repeat(5)
loader = Loader(UnitReader(samples), partition, Cursor(0, 0), sizes, replica=0, shuffle=True, limits=Limits())
kept = [loader.take() for _ in range(40)]
if {how!r} == "in a cycle":
    cycle = [loader]
    cycle.append(cycle)
    del loader, cycle, kept
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
