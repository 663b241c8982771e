"""Which chunks and shards a selection touches, and which part of each."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.plan.grid import Chunk, chunks_of, shards_of, touched
from tests.data.helpers import variable


@st.composite
def selected(draw):
    """Draw (shape, sizes of chunks, selection) of up to three dimensions; no selection is empty."""
    shape, sizes, select = [], [], []
    for _ in range(draw(st.integers(0, 3))):
        n = draw(st.integers(1, 11))
        start = draw(st.integers(0, n - 1))
        shape.append(n)
        sizes.append(draw(st.integers(1, n + 2)))
        select.append((start, draw(st.integers(start + 1, n)), draw(st.integers(1, n + 1))))
    return tuple(shape), tuple(sizes), tuple(select)


@given(selected())
def test_chunks_put_together_are_the_selection(drawn):
    shape, sizes, select = drawn
    array = np.arange(math.prod(shape)).reshape(shape)
    grid = tuple(-(-n // size) for n, size in zip(shape, sizes, strict=True))
    padded = np.full(tuple(count * size for count, size in zip(grid, sizes, strict=True)), -1)
    padded[tuple(slice(n) for n in shape)] = array
    taken = np.zeros(padded.shape, bool)
    taken[tuple(slice(*part) for part in select)] = True
    expected = array[tuple(slice(*part) for part in select)]
    out, written = np.full(expected.shape, -1), np.zeros(expected.shape, int)
    places = []
    for chunk in chunks_of(sizes, select):
        where = tuple(slice(p * size, (p + 1) * size) for p, size in zip(chunk.place, sizes, strict=True))
        out[chunk.target] = padded[where][chunk.source]
        written[chunk.target] += 1
        assert written[chunk.target].size
        assert chunk.whole == taken[where].all()
        places.append(chunk.place)
    np.testing.assert_array_equal(out, expected)
    assert (written == 1).all()
    assert places == sorted(set(places))


def test_a_chunk_says_which_part_of_it_goes_where():
    assert list(chunks_of((4, 3), ((3, 9, 1), (1, 6, 2)))) == [
        Chunk((0, 0), (slice(3, 4, 1), slice(1, 3, 2)), (slice(0, 1), slice(0, 1)), False),
        Chunk((0, 1), (slice(3, 4, 1), slice(0, 3, 2)), (slice(0, 1), slice(1, 3)), False),
        Chunk((1, 0), (slice(0, 4, 1), slice(1, 3, 2)), (slice(1, 5), slice(0, 1)), False),
        Chunk((1, 1), (slice(0, 4, 1), slice(0, 3, 2)), (slice(1, 5), slice(1, 3)), False),
        Chunk((2, 0), (slice(0, 1, 1), slice(1, 3, 2)), (slice(5, 6), slice(0, 1)), False),
        Chunk((2, 1), (slice(0, 1, 1), slice(0, 3, 2)), (slice(5, 6), slice(1, 3)), False),
    ]


# Which shards -----------------------------------------------------------------------------------------------


@given(selected())
def test_the_chunks_that_hold_values_are_touched_and_a_step_may_touch_one_more(drawn):
    _, sizes, select = drawn
    numbers = touched(sizes, select)
    assert {chunk.place for chunk in chunks_of(sizes, select)} <= set(itertools.product(*numbers))
    for size, (start, stop, step), along in zip(sizes, select, numbers, strict=True):
        held = sorted({place // size for place in range(start, stop, step)})
        under = sorted({place // size for place in range(start, stop)})
        assert list(along) == (under if step <= size else held)
        assert list(along)[: len(held)] == held


def test_the_last_chunk_counts_although_a_step_leads_over_it():
    # places 0, 2, 4, 6 and 8 of ten; digests of stored objects that runs have kept count the chunk of place 9
    assert [list(along) for along in touched((3,), ((0, 10, 2),))] == [[0, 1, 2, 3]]
    assert [chunk.place for chunk in chunks_of((3,), ((0, 10, 2),))] == [(0,), (1,), (2,)]
    assert [list(along) for along in touched((3,), ((0, 10, 4),))] == [[0, 1, 2]]


@given(selected(), st.data())
def test_shards_divide_the_touched_chunks(drawn, data):
    shape, sizes, select = drawn
    counts = [data.draw(st.integers(1, 4)) for _ in shape]
    shards = tuple(size * count for size, count in zip(sizes, counts, strict=True))
    v = replace(variable("v", 1, 1), shape=shape, chunks=sizes, objects=shards, select=select)
    grid = [range(-(-n // size)) for n, size in zip(shape, sizes, strict=True)]
    seen = []
    for part in shards_of(v, select):
        chunks = list(part.chunks())
        assert part.origin == tuple(p * count for p, count in zip(part.place, counts, strict=True))
        shard_of = {chunk: tuple(c // count for c, count in zip(chunk, counts, strict=True)) for chunk in chunks}
        assert set(shard_of.values()) <= {part.place}  # none, where a step leads over the last shard
        inside = [range(p * count, (p + 1) * count) for p, count in zip(part.place, counts, strict=True)]
        own = [place for place in itertools.product(*grid) if all(c in r for c, r in zip(place, inside, strict=True))]
        assert part.is_whole == (chunks == own)
        seen += chunks
    assert len(seen) == len(set(seen))
    assert sorted(seen) == list(itertools.product(*touched(sizes, select)))
