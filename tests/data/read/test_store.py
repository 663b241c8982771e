"""Files of a local store, as they are read without zarr."""

from __future__ import annotations

import io
import os

import pytest

from dtrain.data.read import local as module
from dtrain.data.read.open import open_store
from tests.data.read.helpers import Scratch

BYTES = bytes(range(1, 101))


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
    scratch = Scratch()
    value, version = store.read_file("a/b/c", scratch, start, stop)
    assert bytes(value) == BYTES[start:stop]
    facts = os.stat(tmp_path / "a/b/c")
    assert version == (100, facts.st_mtime_ns)
    assert scratch.sizes == [len(BYTES[start:stop])]
    assert (store.requests, store.index_requests, store.bytes_read) == (1, 0, len(value))
    store.read_file("a/b/c", scratch, start, stop)
    assert (store.requests, store.bytes_read) == (2, 2 * len(value))


def test_a_version_is_size_and_time(store, tmp_path):
    scratch = Scratch()
    _, first = store.read_file("a/b/c", scratch, 3, 5)
    os.utime(tmp_path / "a/b/c", ns=(first[1], first[1] + 1))
    _, later = store.read_file("a/b/c", scratch)
    (tmp_path / "a/b/c").write_bytes(BYTES + b"more")
    os.utime(tmp_path / "a/b/c", ns=first[1:] * 2)
    _, longer = store.read_file("a/b/c", scratch, 3, 5)
    assert (later, longer) == ((100, first[1] + 1), (104, first[1]))


@pytest.mark.parametrize("key", ["a/b/d", "a/x/c", "a/b/c/d", "a/b", ""])
def test_what_is_no_file_is_not_there_and_counts_as_a_request(store, key):
    assert store.read_file(key, Scratch()) is None
    assert (store.requests, store.bytes_read) == (1, 0)


def test_an_empty_file_is_there(store):
    value, version = store.read_file("empty", Scratch())
    assert (bytes(value), version[0]) == (b"", 0)


@pytest.mark.parametrize("most", [1, 7, 100])
def test_a_system_that_reads_less_than_requested_is_called_again(store, monkeypatch, most):
    class Slow(io.FileIO):
        def readinto(self, memory):
            return super().readinto(memoryview(memory)[:most])

    monkeypatch.setattr(module, "open", lambda path, mode, buffering, opener: Slow(path, mode), raising=False)
    for start, stop in ((0, None), (5, 90)):
        value, _ = store.read_file("a/b/c", Scratch(), start, stop)
        assert bytes(value) == BYTES[start:stop]


def test_of_a_file_that_is_truncated_while_it_is_read_the_rest_is_returned(store, tmp_path, monkeypatch):
    def scratch(size):
        os.truncate(tmp_path / "a/b/c", 30)
        return Scratch()(size)

    value, version = store.read_file("a/b/c", scratch, 10)
    assert (bytes(value), version[0]) == (BYTES[10:30], 100)
    assert store.bytes_read == 20
