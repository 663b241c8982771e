"""The index of a shard: how it is encoded, which bytes are read by it, and how long it is kept."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from dtrain.data.plan.grid import Chunk
from dtrain.data.read import shards as module
from dtrain.data.read.open import open_store
from dtrain.data.read.shards import NO_CHUNK, entries_of, runs_of, shard_layout
from tests.data.read.helpers import Scratch, numbers, sharded

# Indices of shards --------------------------------------------------------------------------------------------------

INDICES = [
    (location, endian, checked) for location in ("start", "end") for endian in ("little", "big") for checked in (0, 1)
]


@pytest.mark.parametrize(("location", "endian", "checked"), INDICES)
def test_the_index_of_a_shard_is_read_as_it_is_written(location, endian, checked):
    array = sharded(index=[BytesCodec(endian=endian), Crc32cCodec()][: 1 + checked], location=location)
    with zarr.config.set({"array.write_empty_chunks": False}):
        array[...] = np.pad(numbers((3, 4)) + 1, ((0, 3), (0, 0)))  # two chunks of four are there
    (stored,) = (value.to_bytes() for key, value in array.store._store_dict.items() if key.startswith("c"))
    layout = shard_layout(array)
    assert (layout.counts, layout.at_end, layout.has_checksum) == ((2, 2), location == "end", bool(checked))
    assert layout.index_bytes == 4 * 16 + 4 * checked
    assert len(stored) == 2 * 24 + layout.index_bytes
    part = stored[-layout.index_bytes :] if location == "end" else stored[: layout.index_bytes]
    index = layout.checked(memoryview(part))
    assert index.dtype == np.uint64
    assert (index[1] == NO_CHUNK).all()
    first = 0 if location == "end" else layout.index_bytes
    assert sorted(index[0].tolist()) == [[first, 24], [first + 24, 24]]
    for i, (start, length) in enumerate(index[0].tolist()):
        values = np.frombuffer(stored[start : start + length], "float32").reshape(3, 2)
        np.testing.assert_array_equal(values, numbers((3, 4))[:, 2 * i : 2 * i + 2] + 1)
    for size in range(len(part)):
        assert layout.checked(memoryview(part[:size])) is None
    for place in range(len(part)) if checked else ():
        flipped = bytearray(part)
        flipped[place] ^= 4
        assert layout.checked(memoryview(flipped)) is None
    buffer = zarr.core.buffer.default_buffer_prototype().buffer
    assert layout.end(buffer.from_bytes(part)) == first + 48
    nothing = np.full(8, NO_CHUNK).tobytes() + bytes(4 * checked)
    assert layout.end(buffer.from_bytes(nothing)) == 0


# Which bytes of a shard -------------------------------------------------------------------------------------------


def one(place):
    """A chunk of which nothing but the place matters."""
    return Chunk((place,), (slice(0, 1),), (slice(0, 1),), True)


def runs(entries, density):
    """What `runs_of` finds of chunks at (offset, length), with the places of the chunks."""
    stored = [(start, length, one(i)) for i, (start, length) in enumerate(entries)]
    return [(begin, end, [chunk.place[0] for _, _, chunk in chunks]) for begin, end, chunks in runs_of(stored, density)]


@pytest.mark.parametrize(
    ("entries", "density", "expected"),
    [
        ([], 0.5, []),
        ([(7, 3)], 0.5, [(7, 10, [0])]),
        ([(0, 10), (10, 10), (20, 10)], 1.0, [(0, 30, [0, 1, 2])]),
        ([(20, 10), (0, 10), (10, 10)], 1.0, [(0, 30, [1, 2, 0])]),  # in the order of the file
        ([(0, 10), (11, 10)], 1.0, [(0, 10, [0]), (11, 21, [1])]),
        ([(0, 10), (30, 10)], 0.5, [(0, 40, [0, 1])]),  # just dense enough
        ([(0, 10), (31, 10)], 0.5, [(0, 10, [0]), (31, 41, [1])]),
        ([(100, 10), (130, 10)], 0.5, [(100, 140, [0, 1])]),
        ([(0, 10), (100, 10), (110, 10), (140, 10)], 0.5, [(0, 10, [0]), (100, 150, [1, 2, 3])]),
        ([(0, 10), (30, 10), (61, 10), (70, 10)], 0.5, [(0, 40, [0, 1]), (61, 80, [2, 3])]),  # greedy
        ([(0, 10), (10, 0), (12, 0)], 0.5, [(0, 12, [0, 1, 2])]),
        ([(0, 30), (5, 10), (12, 4)], 0.5, [(0, 30, [0, 1, 2])]),  # one within the other
        ([(5, 10), (5, 10)], 1.0, [(5, 15, [0, 1])]),  # the same for two
    ],
)
def test_chunks_of_a_shard_that_lie_close_together_are_read_together(entries, density, expected):
    assert runs(np.reshape(entries, (-1, 2)).tolist(), density) == expected


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=8), st.sampled_from([0.3, 0.5, 1.0]))
def test_each_chunk_lies_in_the_run_that_is_read_for_it_and_runs_are_dense(entries, density):
    found = runs(np.reshape(entries, (-1, 2)).tolist(), density)
    assert sorted(i for _, _, chunks in found for i in chunks) == list(range(len(entries)))
    for begin, end, chunks in found:
        assert begin == min(entries[i][0] for i in chunks)
        assert end == max(sum(entries[i]) for i in chunks)
        assert sum(entries[i][1] for i in chunks) >= density * (end - begin)
    offsets = [entries[i][0] for _, _, chunks in found for i in chunks]
    assert offsets == sorted(offsets)


def test_entries_count_from_the_first_chunk_of_the_shard():
    index = np.arange(24, dtype=np.uint64).reshape(2, 3, 2, 2)
    index[0, 1, 1] = NO_CHUNK
    chunks = [Chunk(place, (), (), False) for place in ((5, 8, 2), (4, 7, 3))]
    found = entries_of(index, chunks, (4, 6, 2))
    assert found == [tuple(index[1, 2, 0].tolist()), (NO_CHUNK, NO_CHUNK)]
    assert all(type(number) is int for entry in found for number in entry)


# Indices that are kept --------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """A function that writes x(n) in three shards of three chunks, the second of each missing; (store, layout)."""

    def write(location="end", checksum=True, endian="little"):
        index_codecs = [BytesCodec(endian=endian), Crc32cCodec()]
        codec = ShardingCodec(
            chunk_shape=(2,),
            codecs=[BytesCodec()],
            index_codecs=index_codecs[: 1 + checksum],
            index_location=location,
        )
        with zarr.config.set({"array.write_empty_chunks": False}):
            array = zarr.create(
                store=tmp_path / "x",
                shape=(18,),
                chunk_shape=(6,),
                dtype="int32",
                codecs=[codec],
                fill_value=0,
                zarr_format=3,
            )
            array[...] = np.repeat([1, 0, 2] * 3, 2)
        store = open_store(str(tmp_path / "x"))
        store.watch(array)
        return store, shard_layout(array)

    return write


@pytest.mark.parametrize("checksum", [False, True])
@pytest.mark.parametrize("endian", ["little", "big"])
@pytest.mark.parametrize("location", ["start", "end"])
def test_an_index_is_the_same_asked_for_alone_or_out_of_the_shard(shards, location, endian, checksum):
    store, layout = shards(location, checksum, endian)
    first = 0 if location == "end" else layout.index_bytes
    expected = [[first, 8], [NO_CHUNK, NO_CHUNK], [first + 8, 8]]
    assert store.index("c/0", layout).tolist() == expected
    shard, _ = store.read_file("c/1", Scratch())
    assert len(shard) == layout.index_bytes + 16
    assert store.index_in("c/1", layout, shard).tolist() == expected


@pytest.mark.parametrize("location", ["start", "end"])
def test_an_index_is_asked_for_once_or_not_at_all_where_the_shard_was_read(shards, location):
    store, layout = shards(location)
    store.index("c/0", layout)
    assert (store.requests, store.bytes_read) == (1, layout.index_bytes)
    scratch = Scratch()
    first = store.index_in("c/1", layout, store.read_file("c/1", scratch)[0]).tolist()
    scratch(10_000)[:] = bytes(10_000)  # the memory is used for something else
    asked = store.requests
    for _ in range(2):
        assert store.index("c/0", layout).tolist() == store.index("c/1", layout).tolist() == first
    assert store.requests == asked == 2


@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize("checksum", [False, True])
def test_a_cut_index_is_no_index_and_is_not_kept(shards, tmp_path, location, checksum):
    store, layout = shards(location, checksum)
    stored = (tmp_path / "x/c/0").read_bytes()
    for size in (0, 1, layout.index_bytes - 1):
        (tmp_path / "x/c/0").write_bytes(stored[:size])
        assert store.index("c/0", layout) is None
        assert store.index_in("c/0", layout, memoryview(stored[:size])) is None
    (tmp_path / "x/c/0").write_bytes(stored)
    assert store.index("c/0", layout) is not None
    (tmp_path / "x/c/1").unlink()
    assert store.index("c/1", layout) is None


def test_a_damaged_index_is_no_index_and_is_not_kept(shards, tmp_path):
    store, layout = shards()
    stored = bytearray((tmp_path / "x/c/0").read_bytes())
    stored[-20] ^= 1
    (tmp_path / "x/c/0").write_bytes(stored)
    for _ in range(2):
        assert store.index("c/0", layout) is None
        assert store.index_in("c/0", layout, memoryview(stored)) is None
    assert store.requests == 2
    stored[-20] ^= 1
    (tmp_path / "x/c/0").write_bytes(stored)
    assert store.index("c/0", layout).shape == (3, 2)


def test_the_oldest_indices_are_let_go_of_first(shards, monkeypatch):
    store, layout = shards()
    monkeypatch.setattr(module, "INDEX_CACHE_BYTES", 2 * layout.index_bytes)
    for key in ("c/0", "c/1", "c/2"):
        store.index_in(key, layout, store.read_file(key, Scratch())[0])
    asked = store.requests
    store.index("c/2", layout)
    store.index("c/1", layout)
    assert store.requests == asked
    store.index("c/0", layout)
    assert store.requests == asked + 1
