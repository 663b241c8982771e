"""What is read, counted: objects, indices and bytes, exactly."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import ZstdCodec

from dtrain.data.load.loader import read_batches
from dtrain.data.plan import cuts
from dtrain.data.plan.memory import Limits
from dtrain.data.plan.partition import eval_partitions, plan_data, train_partitions
from dtrain.data.plan.summary import describe_plan
from dtrain.data.plan.units import Box
from dtrain.data.read.local import DirectoryStore
from dtrain.data.read.shards import shard_layout
from dtrain.data.read.store import ReadStore
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import TooFewSamples
from tests.data.helpers import (
    START,
    WHOLE,
    Spy,
    make_samples,
    only_partition,
    open_all,
    reader_of,
    vector,
)
from tests.sampling import examples


class Counted:
    """What a reader asked of its store since it was made or last looked at."""

    def __init__(self, reader):
        self.store = reader.store
        self.reset()

    def reset(self):
        store = self.store
        self._before = store.requests, store.index_requests, store.bytes_read

    def get(self):
        """(requests of objects, requests of indices, bytes)."""
        store = self.store
        requests, indices, read = (
            now - then
            for now, then in zip((store.requests, store.index_requests, store.bytes_read), self._before, strict=True)
        )
        return requests - indices, indices, read


def passes(samples, part, count, *, limits=None, replica=0, shuffle=True, which="zarr"):
    """Run whole passes, and return (spy on the reads, counts of all but opening the store)."""
    reader = reader_of(samples, which)
    counted, spy = Counted(reader), Spy(reader)
    stream = read_batches(
        reader, part, START, [part.num_samples] * count, replica=replica, shuffle=shuffle, limits=limits or Limits()
    )
    assert sum(batch.size for batch in stream) == part.num_samples * count
    return spy, counted.get()


# Objects --------------------------------------------------------------------------------------------------------

STORED = {
    "v2": (2, {"chunks": (6, 2)}, {"chunks": (4,)}),
    "v2 blocks": (2, {"chunks": (6, 1)}, {"chunks": (12,)}),
    "v3": (3, {"chunks": (6, 2)}, {"chunks": (4,)}),
    "sharded": (3, {"chunks": (2, 1), "shards": (6, 2)}, {"chunks": (3,), "shards": (12,)}),
    "sharded blocks": (3, {"chunks": (3, 1), "shards": (12, 1)}, {"chunks": (4,)}),
    "one chunk a shard": (3, {"chunks": (6, 2), "shards": (6, 2)}, {"chunks": (4,), "shards": (4,)}),
}


@pytest.mark.sampled(12)
@pytest.mark.parametrize("which", ["zarr", "numcodecs"])
@pytest.mark.parametrize("rows", [96, 100, 97, 11])
@pytest.mark.parametrize("kind", STORED)
def test_every_object_is_asked_for_once_a_pass_and_no_index(write_store, tmp_path, chunk_files, kind, rows, which):
    zarr_format, v0, index = STORED[kind]
    values = np.arange(rows * 2.0).reshape(rows, 2)
    arrays = {
        "v0": {"dims": ("n", "k"), "values": values, **v0},
        "index": {"dims": ("n",), "values": np.arange(rows), **index},
    }
    path = write_store(tmp_path / "s", arrays, zarr_format=zarr_format)
    objects = chunk_files(path)
    size = sum((path / key).stat().st_size for key in objects)
    samples = open_all(path, arrays)
    plan, part = only_partition(samples)
    assert plan.unit_rows == min(12, rows)
    for count, threads in ((1, 1), (1, 4), (3, 2)):
        limits = Limits(threads=threads, ahead=5)
        spy, (requests, indices, read) = passes(samples, part, count, limits=limits, which=which)
        assert len(spy.reads) == count * plan.num_units
        assert spy.bytes_decoded == count * rows * samples.row_bytes
        assert requests / len(objects) == count
        assert indices == 0
        assert read == count * size


@pytest.mark.parametrize("ragged", [0, 13])
def test_of_a_large_shard_the_chunks_of_a_unit_are_read_in_one_request(small_shards, ragged):
    samples = small_shards(6, rows=6 * 24 - ragged)
    plan, part = only_partition(samples, unit_rows=4, cell_rows=4)
    _, (requests, indices, read) = passes(samples, part, 2, limits=Limits(threads=1), which="numcodecs")
    assert (requests, indices) == (2 * 2 * plan.num_units, 2 * 6)  # x and index, twice; one index a shard of each
    stored = sum(file.stat().st_size for file in Path(samples.path).rglob("c/**/*") if file.is_file())
    indices_of_shards = 6 * 2 * (12 * 16 + 4)
    assert read == 2 * (stored - indices_of_shards) + indices_of_shards


@pytest.mark.parametrize("kind", ["v2", "sharded"])
def test_replicas_and_evaluations_together_ask_for_every_object_once(write_store, tmp_path, chunk_files, kind):
    zarr_format, v0, index = STORED[kind]
    arrays = {
        "v0": {"dims": ("n", "k"), "values": np.zeros((12 * 100 - 5, 2)), **v0},
        "index": {"dims": ("n",), "values": np.arange(12 * 100 - 5), **index},
    }
    path = write_store(tmp_path / "s", arrays, zarr_format=zarr_format)
    samples = open_all(path, arrays, split={"val": 0.2, "test": 0.1})
    plan = plan_data(samples, replicas=3, seed=0)
    assert describe_plan(samples, plan)["decodes_per_unit"] == 1
    parts = [*train_partitions(plan), *eval_partitions(plan, "val"), *eval_partitions(plan, "test")]
    counts = [passes(samples, part, 1)[1] for part in parts]
    assert sum(requests for requests, _, _ in counts) == len(chunk_files(path))
    assert sum(indices for _, indices, _ in counts) == 0


# Parts of shards --------------------------------------------------------------------------------------------------


def big_shards(write_store, path, shards, chunks, rows, width=2048):
    """Write x(n, k) of mostly zeros, which compress well, numbered in its first place; and index(n)."""
    values = np.zeros((rows, width), "float32")
    values[:, 0] = np.arange(rows)
    x = {"dims": ("n", "k"), "values": values, "chunks": (chunks, width), "shards": (shards, width)}
    arrays = {"x": {**x, "compressors": ZstdCodec(level=1)}, "index": vector(np.arange(rows), shards)}
    samples = open_all(write_store(path, arrays), arrays)
    return samples


def test_a_shard_larger_than_8_mib_is_read_in_units_of_whole_inner_chunks(write_store, tmp_path, chunk_files):
    # a row is 8 KiB: shards of 1152 rows are 9 MiB, their inner chunks of 96 rows 0.75 MiB
    samples = big_shards(write_store, tmp_path / "s", shards=1152, chunks=96, rows=2 * 1152 + 500)
    plan, part = only_partition(samples)
    assert (plan.unit_rows, plan.group) == (384, 1)  # four of twelve chunks: 3 MiB; three shards are few
    shards = [key for key in chunk_files(Path(samples.path)) if key.startswith("x/")]
    assert len(shards) == 3
    size = sum((Path(samples.path) / key).stat().st_size for key in shards)
    for count, which in ((1, "zarr"), (2, "zarr"), (1, "auto")):
        reader = reader_of(samples, which)
        counted, spy = Counted(reader), Spy(reader)
        stream = read_batches(
            reader, part, START, [part.num_samples] * count, replica=0, shuffle=True, limits=Limits(threads=1)
        )
        for batch in stream:
            np.testing.assert_array_equal(batch.inputs[0][:, 0], batch.targets[1])
            assert not batch.inputs[0][:, 1:].any()
        assert len(spy.reads) == count * plan.num_units == count * 8
        requests, indices, read = counted.get()
        assert indices == 3  # one a shard, in all passes together
        if which == "zarr":
            assert requests == count * 8 + 3  # index(n) has three objects; it is small, so it is kept
            assert read <= count * size + 3 * (index_size(samples) + 16 * 12 + 4)


def index_size(samples):
    return max(path.stat().st_size for path in Path(samples.path, "index/c").iterdir())


@pytest.fixture
def small_shards(write_store, tmp_path, monkeypatch):
    """What counts as large is scaled down by 1024, so that small stores have many large shards."""
    monkeypatch.setattr(cuts, "WHOLE_OBJECT_BYTES", 8 << 10)
    monkeypatch.setattr(cuts, "PART_BYTES", 2 << 10)
    monkeypatch.setattr(cuts, "GROWN_BYTES", 32 << 10)

    def write(shards, shard_rows=24, chunk_rows=2, rows=None, blocks=1, **data):
        rows = shards * shard_rows if rows is None else rows
        values = np.arange(rows * 120, dtype="float32").reshape(rows, 120)  # 480 bytes a row, and 4 of the index
        x = {"values": values, "chunks": (chunk_rows, 120 // blocks), "shards": (shard_rows, 120), "dims": ("n", "k")}
        arrays = {"x": x, "index": vector(np.arange(rows, dtype="float32"), chunk_rows, shards=(shard_rows,))}
        return open_all(write_store(tmp_path / "s", arrays), arrays, **data)

    return write


@pytest.mark.sampled(1)
@pytest.mark.parametrize("ragged", [0, 1, 13])
@pytest.mark.parametrize("blocks", [1, 2])
def test_units_of_a_shard_have_one_owner_where_there_are_enough_shards(small_shards, blocks, ragged):
    samples = small_shards(64, rows=64 * 24 - ragged, blocks=blocks)
    plan = plan_data(samples, replicas=3, seed=0)
    assert (plan.unit_rows, plan.group, plan.cell_rows) == (4, 6, 4)  # of 2 KiB: 4 of the 24 rows of a shard
    parts = train_partitions(plan)
    owners = [set((part.units // 6).tolist()) for part in parts]
    assert sum(map(len, owners)) == len(set().union(*owners)) == 64
    total = Counter()
    for replica, part in enumerate(parts):
        spy, (requests, indices, _) = passes(samples, part, 2, limits=Limits(threads=1), replica=replica)
        assert len(spy.reads) == 2 * len(part.units)
        total.update(requests=requests, indices=indices, units=len(part.units))
    assert total["indices"] == 64 * 2  # x and index: one a shard
    assert total["requests"] == 2 * 2 * total["units"]


def test_units_of_few_shards_are_dealt_one_by_one(small_shards):
    samples = small_shards(10)
    plan = plan_data(samples, replicas=2, seed=0)
    assert (plan.unit_rows, plan.group) == (4, 1)
    assert describe_plan(samples, plan)["decodes_per_unit"] == 1


def test_a_shard_of_8_mib_is_read_whole(small_shards):
    samples = small_shards(40, shard_rows=15, chunk_rows=3)  # of 484 bytes
    plan = plan_data(samples, replicas=1, seed=0)
    assert plan.unit_rows == 15
    assert passes(samples, train_partitions(plan)[0], 2)[1][:2] == (2 * 2 * 40, 0)


@pytest.mark.parametrize("threads", [2, 4])
def test_the_index_of_a_shard_is_asked_for_once_also_by_several_threads(small_shards, threads, monkeypatch):
    samples = small_shards(8)
    plan, part = only_partition(samples, unit_rows=4, cell_rows=4)
    get = DirectoryStore.get

    async def slowly(self, key, prototype, byte_range=None):
        await asyncio.sleep(0.002)
        return await get(self, key, prototype, byte_range)

    monkeypatch.setattr(DirectoryStore, "get", slowly)
    _, (requests, indices, _) = passes(samples, part, 1, limits=Limits(threads=threads, ahead=8), shuffle=False)
    assert requests == 2 * plan.num_units
    assert indices == 2 * 8


def test_what_was_held_of_a_shard_is_let_go_of(small_shards):
    samples = small_shards(20)
    _, part = only_partition(samples, unit_rows=4, cell_rows=4)
    spy, _ = passes(samples, part, 2, limits=Limits(threads=4, ahead=8))
    reader = spy.reader
    assert not any(reader.store._held.values())
    # many threads at once, switching as often as they can
    layout = shard_layout(reader.arrays["x"])
    failed = []

    def hold():
        try:
            for shard in range(150):
                with reader.store.holding({f"x/c/{shard % 2}/0": (0, 10), "x/c/2/0": (0, layout.index_bytes)}):
                    pass
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    workers = [threading.Thread(target=hold) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.setswitchinterval(interval)
    assert not failed
    assert not any(reader.store._held.values())


def test_inner_chunks_that_lie_apart_are_not_read_together_with_what_is_between(write_store, tmp_path):
    # of a shard of 4 x 8 chunks one column is selected: a range over all of it would read 8 times too much
    values = np.random.default_rng(0).normal(size=(64, 64))
    arrays = {
        "v0": {"dims": ("n", "k"), "values": values, "chunks": (4, 8), "shards": (64, 64), "compressors": None},
        "index": vector(np.arange(64), 64),
    }
    samples = open_all(write_store(tmp_path / "s", arrays), arrays, isel={"k": {"start": 8, "stop": 16}})
    _, part = only_partition(samples)
    spy, (_, indices, read) = passes(samples, part, 1)
    assert indices == 1
    assert read - index_size(samples) - (16 * 128 + 4) == 64 * 8 * 8  # just what is selected
    rows = spy.reader.read(Box(0, 64))["v0"][1]
    np.testing.assert_array_equal(rows, values[:, 8:16].astype("float32"))


@pytest.mark.parametrize(("step", "requests"), [(8, 1), (16, 1), (24, 2), (32, 2)])
def test_chunks_of_a_shard_that_are_dense_are_read_together_without_zarr(write_store, tmp_path, step, requests):
    # of eight chunks that lie one behind the other all, 0 2 4 6, 0 3 | 6 or 0 | 4
    values = np.random.default_rng(0).normal(size=(4, 64)).astype("float32")
    arrays = {
        "v0": {"dims": ("n", "k"), "values": values, "chunks": (4, 8), "shards": (4, 64), "compressors": None},
        "index": vector(np.arange(4), 4),
    }
    isel = {"k": {"start": 0, "stop": 64, "step": step}}
    samples = open_all(write_store(tmp_path / "s", arrays), arrays, isel=isel)
    reader = UnitReader(samples, "numcodecs")
    variable = samples.variable("v0")
    ask = Counted(reader)
    np.testing.assert_array_equal(reader.read_rows(variable, Box(0, 4)), values[:, ::step])
    assert ask.get()[:2] == (requests, 0 if step == 8 else 1)


# Windows ----------------------------------------------------------------------------------------------------------


@examples(18)
@given(
    st.integers(150, 400),
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.sampled_from([[-3, 0], {"start": 0, "stop": 8}, [0, 24], [-1, 5, 7]]),
    st.sampled_from([0, 1, 3, [1, 2]]),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.2]),
    st.sampled_from(["auto", "random"]),
)
def test_decoded_bytes_are_those_that_the_plan_says(
    write_store, rows, chunks, inputs, targets, stride, replicas, val, order
):
    # without compression an object has as many bytes as are decoded of it, also the last one
    arrays = {
        name: {"dims": ("n", "k"), "values": np.zeros((rows, 2), "f4"), "chunks": (chunk, 2), "compressors": None}
        for name, chunk in zip(("v0", "v1"), chunks, strict=True)
    }
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        seen, noted = [], ReadStore._noted

        def logged(self, key, byte_range, value):
            seen.append((key, len(value) if value is not None else 0))
            return noted(self, key, byte_range, value)

        path = write_store(Path(folder, "s"), arrays)
        samples = open_samples(
            path,
            inputs=["v0"],
            targets=["v1", "v0"],
            input_offsets=inputs,
            target_offsets=targets,
            stride=stride,
            split_order=order,
            split={"val": val, "test": 0.0},
        )
        try:
            plan = plan_data(samples, replicas=replicas, seed=0)
        except TooFewSamples:
            return
        parts = train_partitions(plan)
        readers = [UnitReader(samples, "zarr") for _ in parts]
        spies = [Spy(reader) for reader in readers]
        patch.setattr(ReadStore, "_noted", logged)
        for replica, (reader, part) in enumerate(zip(readers, parts, strict=True)):
            for _ in read_batches(reader, part, START, [part.num_samples], replica=replica, shuffle=True):
                pass
        said = describe_plan(samples, plan)
        decoded, unique = sum(size for _, size in seen), sum(dict(seen).values())
        assert decoded / unique == pytest.approx(said["read_amplification"], rel=1e-12)
        assert sum(len(spy.reads) for spy in spies) == sum(len(part.units) for part in parts)


@pytest.mark.parametrize(
    ("rows", "chunk", "width", "span"),
    [(200_000, 10, 8, 24), (100_000, 100, 4, 99), (50_000, 1, 64, 12), (400_000, 500, 1, 1000), (20_000, 50, 1, 90)],
)
def test_units_grow_until_little_is_read_twice(rows, chunk, width, span):
    samples = make_samples(
        rows, chunk, row=(width,), input_offsets={"start": 0, "stop": span}, target_offsets=span, split=WHOLE
    )
    for replicas in (1, 4):
        plan = plan_data(samples, replicas=replicas, seed=0)
        said = describe_plan(samples, plan)
        assert plan.unit_rows % chunk == 0
        # where 20 units a replica of that length remain
        needed = -(-span // chunk) * chunk * 10
        if needed * 20 * replicas <= rows:
            assert said["read_amplification"] <= 1.10 + 1e-9
            assert plan.num_units >= 20 * replicas
        without = plan_data(
            replace(samples, config=samples.config.model_copy(update={"input_offsets": 0, "target_offsets": 0})),
            replicas=replicas,
            seed=0,
        )
        assert plan.unit_rows >= without.unit_rows


def test_units_do_not_grow_beyond_32_mib_nor_below_20_a_replica():
    wide = make_samples(1_000_000, 10, row=(50_000,), input_offsets=[0, 300], split=WHOLE)  # 200 kB a row
    plan = plan_data(wide, replicas=1, seed=0)
    assert plan.unit_rows == 160  # 32 MiB // 200 kB = 167 rows, of whole chunks
    few = make_samples(1_000, 10, row=(1,), input_offsets=[0, 300], split=WHOLE)
    assert plan_data(few, replicas=1, seed=0).unit_rows == 50
    assert plan_data(few, replicas=5, seed=0).unit_rows == 10


# Cache ------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kept", [0, 5, 10, 15, 20])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("kind", ["v2", "sharded"])
def test_a_second_pass_reads_what_is_not_kept(write_store, tmp_path, kept, shuffle, kind):
    zarr_format, v0, index = STORED[kind]
    values = np.random.default_rng(0).normal(size=(240, 2))
    arrays = {
        "v0": {"dims": ("n", "k"), "values": values, "compressors": None, **v0},
        "index": {"dims": ("n",), "values": np.arange(240), "compressors": None, **index},
    }
    samples = open_all(write_store(tmp_path / "s", arrays, zarr_format=zarr_format), arrays)
    _, part = only_partition(samples, window=3, unit_rows=12, cell_rows=12)
    assert len(part.units) == 20
    limits = Limits(cached=kept)
    _, (once, _, first) = passes(samples, part, 1, limits=limits, shuffle=shuffle)
    for count in (2, 5):
        spy, (requests, indices, read) = passes(samples, part, count, limits=limits, shuffle=shuffle)
        later = (read - first) / (count - 1)
        assert later / first == pytest.approx(1 - kept / 20, abs=0.01)
        assert (requests - once) / (count - 1) == once * (20 - kept) / 20
        assert len(spy.reads) == 20 + (count - 1) * (20 - kept)
        assert indices == 0
