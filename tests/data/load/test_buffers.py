"""The memory of batches: aligned, and never written to while anybody can see it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.load.buffers import ALIGNMENT, Buffers, FieldSpec, aligned_copy, layout_of

SPECS = (FieldSpec((3,), np.dtype("float32")), FieldSpec((), np.dtype("int64")), FieldSpec((2, 5), np.dtype("int64")))

specs = st.lists(
    st.builds(
        FieldSpec,
        st.lists(st.integers(0, 9), max_size=2).map(tuple),
        st.sampled_from([np.dtype("float32"), np.dtype("int64")]),
    ),
    min_size=1,
    max_size=4,
).map(tuple)
batches = st.lists(st.integers(0, 30), min_size=1, max_size=8).map(tuple)


@pytest.fixture
def freed():
    return []


@pytest.fixture
def buffers(freed):
    return Buffers(SPECS, np.empty, freed.append)


def lent(buffers, number=0, sizes=(4, 2), value=0):
    """A bundle all of whose values are the same."""
    buffers.open(number, sizes)
    for piece in buffers.pieces(0, sum(sizes)):
        piece.out[...] = value
    return buffers.lend()


# Layout -----------------------------------------------------------------------------------------------------


@given(specs, batches, st.data())
def test_pieces_are_the_samples_of_the_batches(specs, sizes, data):
    layout, total = layout_of(specs, sizes), sum(sizes)
    memory = tuple(np.zeros(field.nbytes, np.uint8) for field in layout.fields)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    covered = [[] for _ in specs]
    for piece in layout.pieces(memory, start, stop):
        assert piece.out.shape == (piece.stop - piece.start, *specs[piece.field].shape)
        assert piece.out.flags.c_contiguous
        assert piece.out.base is memory[piece.field]
        covered[piece.field] += range(piece.start, piece.stop)
        ranks = np.arange(piece.start, piece.stop) + 1
        piece.out[...] = ranks.reshape(-1, *[1] * (piece.out.ndim - 1))
    assert covered == [list(range(start, stop))] * len(specs)
    for index, size in enumerate(sizes):
        first = sum(sizes[:index])
        expected = [rank + 1 if start <= rank < stop else 0 for rank in range(first, first + size)]
        for spec, array in zip(specs, layout.batch(memory, index), strict=True):
            assert (array.shape, array.dtype) == ((size, *spec.shape), spec.dtype)
            if array.size:
                assert array.reshape(size, -1)[:, 0].tolist() == expected
                assert (array == array.reshape(size, -1)[:, :1].reshape(size, *[1] * len(spec.shape))).all()


@given(specs, batches)
def test_batches_do_not_overlap_and_lie_at_aligned_addresses(specs, sizes):
    buffers = Buffers(specs, np.empty, lambda bundle: None)
    bundle = lent(buffers, sizes=sizes)
    for spec, field in zip(specs, bundle.layout.fields, strict=True):
        ends = [offset + size * spec.nbytes for offset, size in zip(field.offsets, sizes, strict=True)]
        assert all(end <= after for end, after in zip(ends, field.offsets[1:], strict=False))
        assert ends[-1] <= field.nbytes < ends[-1] + ALIGNMENT
    for index in range(len(sizes)):
        for array in bundle.fields(index):
            if array.size:
                assert array.__array_interface__["data"][0] % ALIGNMENT == 0
            assert array.flags.writeable
            assert array.flags.c_contiguous


@pytest.mark.parametrize("offset", range(0, 64, 7))
def test_memory_that_begins_anywhere_is_aligned(offset, freed):
    def allocate(shape, dtype):
        return np.empty(shape[0] + offset, dtype)[offset:]

    for array in lent(Buffers(SPECS, allocate, freed.append)).fields(1):
        assert array.__array_interface__["data"][0] % ALIGNMENT == 0


def test_a_copy_is_aligned_and_its_own():
    for values in (np.arange(6.0).reshape(2, 3), np.array(7), np.zeros((0, 2), "float32")):
        copy = aligned_copy(values)
        assert (copy.shape, copy.dtype) == (values.shape, values.dtype)
        np.testing.assert_array_equal(copy, values)
        assert copy.__array_interface__["data"][0] % ALIGNMENT == 0
        assert not np.shares_memory(copy, values)


# The end of use ---------------------------------------------------------------------------------------------

HOLDERS = {
    "itself": lambda array: array,
    "a slice": lambda array: array[1:],
    "a view": lambda array: array[::-1],
    "a view of a view": lambda array: array[:1].reshape(-1).view("uint8")[::2],
    "a buffer": lambda array: memoryview(array),
    "an array of a buffer": lambda array: np.frombuffer(memoryview(array).cast("B"), np.uint8),
    "the base of a view": lambda array: array[1:].base,
    "an object array": lambda array: np.array([array[1:], None], dtype=object),
    "a closure": lambda array: lambda: array,
}
try:
    import torch
except ImportError:  # the tests of the data layer run without torch
    pass
else:
    HOLDERS |= {
        "a tensor": torch.from_numpy,
        "a view of a tensor": lambda array: torch.from_numpy(array)[1:],
        "the numpy array of a tensor": lambda array: torch.from_numpy(array)[1:].numpy(),
        "what shares a tensor's storage": lambda array: torch.from_numpy(array).untyped_storage(),
        "a tensor by DLPack": lambda array: torch.from_dlpack(array),
    }


@pytest.mark.parametrize("how", HOLDERS)
@pytest.mark.parametrize("field", range(3))
@pytest.mark.parametrize("index", range(2))
def test_memory_is_free_when_nobody_can_see_it_and_not_before(buffers, freed, how, field, index):
    bundle = lent(buffers)
    held = HOLDERS[how](bundle.fields(index)[field])
    del bundle
    assert not freed
    del held
    assert freed == [0]


def test_it_is_said_once_that_memory_is_free(buffers, freed):
    bundle = lent(buffers)
    fields = [array for index in range(2) for array in bundle.fields(index)]
    del bundle
    while fields:
        assert not freed
        fields.pop()
    gc.collect()
    assert freed == [0]


def test_a_copy_does_not_hold_memory(buffers, freed):
    kept = [array.copy() for array in lent(buffers, value=5).fields(0)]
    assert freed == [0]
    assert all((array == 5).all() for array in kept)


def test_a_batch_in_a_cycle_is_held_until_it_is_collected(buffers, freed):
    cycle = {"batch": lent(buffers).fields(0)}
    cycle["itself"] = cycle
    gc.disable()
    try:
        del cycle
        assert not freed
    finally:
        gc.enable()
    gc.collect()
    assert freed == [0]


def test_memory_may_be_let_go_of_in_any_threads(freed):
    buffers = Buffers(SPECS, np.empty, freed.append)
    for number in range(200):
        bundle = lent(buffers, number)
        holders = [[array] for index in range(2) for array in bundle.fields(index)]
        del bundle
        barrier = threading.Barrier(len(holders))

        def drop(holder, barrier=barrier):
            barrier.wait(10)
            holder.clear()

        workers = [threading.Thread(target=drop, args=(holder,)) for holder in holders]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(10)
        assert freed == [number]
        buffers.recycle(freed.pop())


def test_a_finalizer_needs_no_lock_that_its_thread_may_hold():
    # garbage collection may run a finalizer in the middle of `put` of the same queue, in the same thread
    from queue import SimpleQueue

    events = SimpleQueue()
    buffers = Buffers(SPECS, np.empty, events.put)
    cycles = []
    for number in range(50):
        cycle = [lent(buffers, number)]
        cycle.append(cycle)
        cycles.append(cycle)
    del cycle
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        while cycles:
            cycles.pop()
            events.put([None])  # allocates, so that garbage is collected here and there
    finally:
        gc.set_threshold(*before)
    gc.collect()
    found = [events.get_nowait() for _ in range(100)]
    assert sorted(event for event in found if isinstance(event, int)) == list(range(50))
    assert events.empty()


def test_the_interpreter_ends_quietly_while_batches_are_held():
    code = """
import numpy as np
from dtrain.data.load.buffers import Buffers, FieldSpec
buffers = Buffers((FieldSpec((), np.dtype("int64")),), np.empty, lambda bundle: print("freed", bundle))
bundles = []
for number in range(2):
    buffers.open(number, (3,))
    bundles.append(buffers.lend())
bundles.pop()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("freed 1\n", "")


# Used again -------------------------------------------------------------------------------------------------


def addresses(bundle):
    return [base.__array_interface__["data"][0] for base in bundle.bases]


def test_recycled_memory_is_used_again(buffers, freed):
    first = lent(buffers, 0)
    there = addresses(first)
    del first
    buffers.recycle(0)
    again = lent(buffers, 1, sizes=(1, 1))  # smaller ones fit
    assert addresses(again) == there
    del again
    assert freed == [0, 1]


def test_memory_that_is_too_small_is_let_go_of(freed):
    made = []

    def allocate(shape, dtype):
        made.append(weakref.ref(array := np.empty(shape, dtype)))
        return array

    buffers = Buffers(SPECS, allocate, freed.append)
    lent(buffers, 0, sizes=(2,))
    buffers.recycle(0)
    lent(buffers, 1, sizes=(1000,))
    assert [ref() is None for ref in made] == [True] * 3 + [False] * 3


def test_recycled_memory_is_used_only_if_every_field_fits(freed):
    # one sample of the first field is padded to as many bytes as 16 samples have
    specs = (FieldSpec((), np.dtype("float32")), FieldSpec((100,), np.dtype("float32")))
    for order in (specs, specs[::-1]):
        buffers = Buffers(order, np.empty, freed.append)
        lent(buffers, 0, sizes=(1,))
        buffers.recycle(0)
        bundle = lent(buffers, 1, sizes=(16,), value=3)
        assert all((array == 3).all() for array in bundle.fields(0))


def test_abandoned_memory_lives_as_long_as_its_batches_field_by_field(freed):
    made = []

    def allocate(shape, dtype):
        made.append(weakref.ref(array := np.empty(shape, dtype)))
        return array

    buffers = Buffers(SPECS, allocate, freed.append)
    label = lent(buffers, value=7).fields(1)[1]
    buffers.abandon(0)
    assert [ref() is None for ref in made] == [True, False, True]
    other = lent(buffers, 1, value=9)
    assert label.tolist() == [7, 7]
    assert set(addresses(other)).isdisjoint([label.__array_interface__["data"][0]])
    del label
    assert [ref() is None for ref in made[:3]] == [True] * 3


def test_cleared_buffers_keep_nothing(freed):
    made = []

    def allocate(shape, dtype):
        made.append(weakref.ref(array := np.empty(shape, dtype)))
        return array

    buffers = Buffers(SPECS, allocate, freed.append)
    kept = lent(buffers, 0)
    lent(buffers, 1)
    buffers.recycle(1)
    buffers.clear()
    assert [ref() is not None for ref in made] == [True] * 3 + [False] * 3
    del kept
    assert all(ref() is None for ref in made)
