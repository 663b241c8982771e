"""The read threads of a store: shared by its loaders, few at first, each loader in turn, and none left at the end."""

from __future__ import annotations

import gc
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dtrain.data.load.loader import Loader, growing_bundles
from dtrain.data.load.messages import Read
from dtrain.data.load.pool import WIDER_REMOTE, Lane
from dtrain.data.plan.memory import BUNDLE_BATCHES, Limits, bundles_of
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.plan.units import Box
from dtrain.data.read.units import UnitReader
from tests.data.helpers import START, WHOLE, make_samples, open_all, threads, vector


class Store:
    """Stands for the reader of a store, of which the pool wants to know only how long requests take."""

    def __init__(self, read_ahead: bool = False) -> None:
        self.samples = SimpleNamespace(store=SimpleNamespace(read_ahead=read_ahead))


def read_number(number: int) -> Read:
    return Read(number, Box(number, number + 1))


@pytest.fixture(autouse=True)
def _none_left() -> Iterator[None]:
    before = threads()
    yield
    gc.collect()
    assert threads() <= before


def readers() -> set[str]:
    return {thread.name for thread in threads() if thread.name.startswith("dtrain-read")}


class Gate:
    """Reads that wait until they are let through; notes which loader's began, in order."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.changed = threading.Condition()
        self.let_through = 0

    def of(self, name: str) -> Callable[[Read], None]:
        def perform(read: Read) -> None:
            with self.changed:
                number = len(self.begun)
                self.begun.append((name, read.slot))
                self.changed.notify_all()
                assert self.changed.wait_for(lambda: self.let_through > number, 10)

        return perform

    def wait_for(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= count, 10)

    def open(self, count: int) -> None:
        with self.changed:
            self.let_through = count
            self.changed.notify_all()


def test_threads_are_started_when_there_is_something_to_read() -> None:
    gate, store = Gate(), Store()
    lane = Lane(store, gate.of("a"), 3)  # type: ignore[arg-type]
    assert readers() == set()
    for count in (1, 2, 3, 4, 5):
        lane.put(read_number(count))
        gate.wait_for(min(count, 3))
        assert len(readers()) == min(count, 3)
    gate.open(9)
    gate.wait_for(5)
    lane.close()
    assert sorted(slot for _, slot in gate.begun) == [1, 2, 3, 4, 5]
    assert readers() == set()


@pytest.mark.parametrize(("read_ahead", "most"), [(False, 2), (True, 2 * WIDER_REMOTE)])
def test_many_loaders_have_few_threads(read_ahead: bool, most: int) -> None:
    gate, store = Gate(), Store(read_ahead)
    lanes = [Lane(store, gate.of(str(k)), 2) for k in range(20)]  # type: ignore[arg-type]
    for lane, number in itertools.product(lanes, range(3)):
        lane.put(read_number(number))
    gate.wait_for(most)
    assert len(readers()) == most
    gate.open(99)
    gate.wait_for(60)
    for lane in lanes:
        lane.close()
    assert Counter(name for name, _ in gate.begun) == dict.fromkeys(map(str, range(20)), 3)


def test_loaders_are_served_in_turn_and_the_reads_of_each_in_order() -> None:
    gate, store = Gate(), Store()
    first, second, third = (Lane(store, gate.of(name), 1) for name in "abc")  # type: ignore[arg-type]
    for number in range(6):
        first.put(read_number(number))
    gate.wait_for(1)
    for number in range(2):
        second.put(read_number(number))
        third.put(read_number(number))
    gate.open(99)
    gate.wait_for(10)
    assert "".join(name for name, _ in gate.begun) == "abcabcaaaa"
    for lane, count in ((first, 6), (second, 2), (third, 2)):
        name = "abc"[[first, second, third].index(lane)]
        assert [slot for own, slot in gate.begun if own == name] == list(range(count))
        lane.close()


def test_closing_one_loader_waits_for_its_own_reads_only() -> None:
    gate, store = Gate(), Store()
    slow, other = Lane(store, gate.of("slow"), 1), Lane(store, gate.of("other"), 1)  # type: ignore[arg-type]
    slow.put(read_number(0))
    gate.wait_for(1)
    other.put(read_number(0))
    other.close()  # it has no read under way
    assert other.take() is None
    slow.put(read_number(1))
    closer = threading.Thread(target=slow.close)
    closer.start()
    assert slow._closed.wait(10)
    assert closer.is_alive()
    gate.open(9)
    closer.join(10)
    assert not closer.is_alive()
    assert gate.begun == [("slow", 0)]
    slow.close()  # again does no harm


def test_after_the_last_loader_another_one_begins_anew() -> None:
    gate, store = Gate(), Store()
    gate.open(9)
    for number in range(3):
        lane = Lane(store, gate.of("a"), 1)  # type: ignore[arg-type]
        lane.put(read_number(number))
        gate.wait_for(number + 1)
        lane.close()
        assert readers() == set()


def test_a_loader_may_be_closed_within_one_of_its_own_reads() -> None:
    closed, store = threading.Event(), Store()
    lanes: list[Lane] = []

    def perform(read: Read) -> None:
        lanes[0].close()  # as garbage collection may
        closed.set()

    lanes.append(Lane(store, perform, 2))  # type: ignore[arg-type]
    lanes[0].put(read_number(0))
    assert closed.wait(10)
    for thread in list(threads()):
        thread.join(10)


def test_loaders_that_come_and_go_in_many_threads() -> None:
    done: Counter[int] = Counter()
    store = Store()

    def use(number: int) -> None:
        for round in range(20):
            got = threading.Semaphore(0)

            def perform(read: Read, got: threading.Semaphore = got) -> None:
                done[number] += 1
                got.release()

            lane = Lane(store, perform, 1 + round % 3)  # type: ignore[arg-type]
            for read in range(5):
                lane.put(read_number(read))
            for _ in range(5):
                assert got.acquire(timeout=10)
            lane.close()

    users = [threading.Thread(target=use, args=(number,)) for number in range(6)]
    for user in users:
        user.start()
    for user in users:
        user.join(60)
    assert done == dict.fromkeys(range(6), 100)


# Loaders --------------------------------------------------------------------------------------------------------


def test_the_loaders_of_many_replicas_share_threads_and_give_the_same_bits(
    write_store: Callable[..., Path], tmp_path: Path
) -> None:
    count, replicas = 960, 24
    arrays = {
        "v0": {"dims": ("n", "k"), "values": np.arange(2.0 * count).reshape(-1, 2), "chunks": (4, 2)},
        "index": vector(np.arange(count), 4),
    }
    samples = open_all(write_store(tmp_path / "s", arrays), arrays)
    partitions = train_partitions(plan_data(samples, replicas=replicas, seed=3))
    alone: list[list[int]] = []
    for replica, partition in enumerate(partitions):
        loader = Loader(
            UnitReader(samples), partition, START, itertools.repeat(3), replica=replica, shuffle=True, limits=Limits()
        )
        alone.append([n for _ in range(9) for n in loader.take().targets[-1].tolist()])
        loader.close()
    reader, limits = UnitReader(samples), Limits(threads=2)
    loaders = [
        Loader(reader, partition, START, itertools.repeat(3), replica=replica, shuffle=True, limits=limits)
        for replica, partition in enumerate(partitions)
    ]
    together = [[n for _ in range(9) for n in loader.take().targets[-1].tolist()] for loader in loaders]
    assert together == alone
    names = Counter(thread.name for thread in threads())
    assert names["dtrain-assemble"] == replicas
    assert names.keys() - {"dtrain-assemble"} <= {"dtrain-read_0", "dtrain-read_1"}
    for loader in loaders:
        loader.close()


# Bundles --------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("row", [(1,), (50_000,), (2_000_000,)])
def test_the_first_bundles_are_small(row: tuple[int, ...]) -> None:
    samples: Any = make_samples(100, 5, row=row)
    grown = list(itertools.islice(growing_bundles(itertools.repeat(2), samples), 40))
    usual = next(bundles_of(itertools.repeat(2), samples))
    lengths = [len(bundle) for bundle in grown]
    assert lengths[0] == 1
    assert max(lengths) == len(usual) <= BUNDLE_BATCHES
    assert lengths[-1] == len(usual)
    if row == (1,):
        assert lengths[:7] == [1, 2, 4, 8, 16, 32, 32]
    sizes = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    assert [size for bundle in growing_bundles(sizes, samples) for size in bundle] == sizes
    assert list(growing_bundles([], samples)) == []


def test_the_first_batch_does_not_wait_for_many(write_store: Callable[..., Path], tmp_path: Path) -> None:
    arrays = {"v0": vector(np.arange(400.0), 4), "index": vector(np.arange(400), 4)}
    samples = open_all(write_store(tmp_path / "s", arrays), arrays, split=WHOLE)
    (partition,) = train_partitions(plan_data(samples, replicas=1, seed=3))
    reader = UnitReader(samples)
    original, begun, go = reader.read_into, list[int](), threading.Event()

    def read_into(box: Box, out: Any) -> int:
        begun.append(box.start)
        if len(begun) > 4:  # those of the first batch are let through
            assert go.wait(10)
        return original(box, out)

    reader.read_into = read_into  # type: ignore[method-assign]
    loader = Loader(reader, partition, START, itertools.repeat(8), replica=0, shuffle=False, limits=Limits(threads=1))
    assert loader.take().targets[-1].tolist() == list(range(8))
    go.set()
    loader.close()
