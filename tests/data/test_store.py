"""Files of a local store as they are read without zarr, and the indices of shards that are kept."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from dtrain.data.read import store as module
from dtrain.data.read.store import NO_CHUNK, open_store, shard_layout

BYTES = bytes(range(1, 101))


class Memory:
    """Gives the same memory again, filled with what was in it before."""

    def __init__(self):
        self.asked = []
        self._memory = bytearray(b"\xff" * 10_000)

    def __call__(self, size):
        assert size >= 0
        self.asked.append(size)
        return memoryview(self._memory)[:size]


@pytest.fixture
def store(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_bytes(BYTES)
    (tmp_path / "empty").write_bytes(b"")
    return open_store(str(tmp_path))


# Files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "stop"), [(0, None), (7, None), (0, 40), (7, 40), (99, 100), (90, 400), (100, 120), (300, 400), (40, 40)]
)
def test_a_file_or_a_part_of_it_is_read_as_far_as_it_goes(store, tmp_path, start, stop):
    room = Memory()
    value, version = store.read_file("a/b/c", room, start, stop)
    assert bytes(value) == BYTES[start:stop]
    facts = os.stat(tmp_path / "a/b/c")
    assert version == (100, facts.st_mtime_ns)
    assert room.asked == [len(BYTES[start:stop])]
    assert (store.requests, store.index_requests, store.bytes_read) == (1, 0, len(value))
    store.read_file("a/b/c", room, start, stop)
    assert (store.requests, store.bytes_read) == (2, 2 * len(value))


def test_a_version_is_size_and_time(store, tmp_path):
    room = Memory()
    _, first = store.read_file("a/b/c", room, 3, 5)
    os.utime(tmp_path / "a/b/c", ns=(first[1], first[1] + 1))
    _, later = store.read_file("a/b/c", room)
    (tmp_path / "a/b/c").write_bytes(BYTES + b"more")
    os.utime(tmp_path / "a/b/c", ns=first[1:] * 2)
    _, longer = store.read_file("a/b/c", room, 3, 5)
    assert (later, longer) == ((100, first[1] + 1), (104, first[1]))


@pytest.mark.parametrize("key", ["a/b/d", "a/x/c", "a/b/c/d", "a/b", ""])
def test_what_is_no_file_is_not_there_and_counts_as_a_request(store, key):
    assert store.read_file(key, Memory()) is None
    assert (store.requests, store.bytes_read) == (1, 0)


def test_an_empty_file_is_there(store):
    value, version = store.read_file("empty", Memory())
    assert (bytes(value), version[0]) == (b"", 0)


@pytest.mark.parametrize("most", [1, 7, 100])
def test_a_system_that_gives_less_than_it_is_asked_for_is_asked_again(store, monkeypatch, most):
    class Slow(io.FileIO):
        def readinto(self, memory):
            return super().readinto(memoryview(memory)[:most])

    monkeypatch.setattr(module, "open", lambda path, mode, buffering: Slow(path, mode), raising=False)
    for start, stop in ((0, None), (5, 90)):
        value, _ = store.read_file("a/b/c", Memory(), start, stop)
        assert bytes(value) == BYTES[start:stop]


def test_of_a_file_that_is_cut_while_it_is_read_what_was_left_is_returned(store, tmp_path, monkeypatch):
    def room(size):
        os.truncate(tmp_path / "a/b/c", 30)
        return Memory()(size)

    value, version = store.read_file("a/b/c", room, 10)
    assert (bytes(value), version[0]) == (BYTES[10:30], 100)
    assert store.bytes_read == 20


# Indices ----------------------------------------------------------------------------------------------------------


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
    shard, _ = store.read_file("c/1", Memory())
    assert len(shard) == layout.index_bytes + 16
    assert store.index_in("c/1", layout, shard).tolist() == expected


@pytest.mark.parametrize("location", ["start", "end"])
def test_an_index_is_asked_for_once_or_not_at_all_where_the_shard_was_read(shards, location):
    store, layout = shards(location)
    store.index("c/0", layout)
    assert (store.requests, store.bytes_read) == (1, layout.index_bytes)
    room = Memory()
    first = store.index_in("c/1", layout, store.read_file("c/1", room)[0]).tolist()
    room(10_000)[:] = bytes(10_000)  # the memory is used for something else
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
        store.index_in(key, layout, store.read_file(key, Memory())[0])
    asked = store.requests
    store.index("c/2", layout)
    store.index("c/1", layout)
    assert store.requests == asked
    store.index("c/0", layout)
    assert store.requests == asked + 1
