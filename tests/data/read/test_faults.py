"""Stored objects that are missing, damaged or modified: each is named, none becomes a silent number."""

from __future__ import annotations

import os
import threading
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec

from dtrain.data.load.loader import read_batches
from dtrain.data.plan import memory
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.plan.units import Box
from dtrain.data.read import codecs
from dtrain.data.read import zarr as through_zarr
from dtrain.data.read.files import FilesReader
from dtrain.data.read.presence import check_presence
from dtrain.data.read.units import UnitReader
from dtrain.errors import ChunkMissing, ChunkUndecodable, DataChanged, DtrainError, NonFiniteData, OutOfMemory
from tests.data.helpers import (
    START,
    batches,
    index_of,
    only_partition,
    open_all,
    reader_of,
    vector,
)

READERS = pytest.mark.parametrize("which", ["zarr", "zarrs", "auto"])

# Unsharded codecs; `sharded ...` are the same of v3 inside shards of 2 x 2 chunks
CODECS = {
    "v2 none": (2, {"compressors": None}),
    "v2 blosc": (2, {"compressors": numcodecs.Blosc("lz4")}),
    "v2 zstd": (2, {"compressors": numcodecs.Zstd()}),
    "v2 zstd checksum": (2, {"compressors": numcodecs.Zstd(checksum=True)}),
    "v2 gzip": (2, {"compressors": numcodecs.GZip()}),
    "v2 lz4": (2, {"compressors": numcodecs.LZ4()}),
    "v3 none": (3, {"compressors": None}),
    "v3 blosc": (3, {"compressors": BloscCodec()}),
    "v3 zstd": (3, {"compressors": ZstdCodec()}),
    "v3 zstd checksum": (3, {"compressors": ZstdCodec(checksum=True)}),
    "v3 gzip": (3, {"compressors": GzipCodec()}),
    "v3 crc32c": (3, {"compressors": [ZstdCodec(), Crc32cCodec()]}),
}
SHARDED = {
    name.replace("v3", "sharded"): (3, {**options, "chunks": (3, 2), "shards": (6, 4)})
    for name, (zarr_format, options) in CODECS.items()
    if zarr_format == 3
}
AT_START = {
    f"index first {name}": (
        3,
        {"compressors": codec, "chunks": (3, 2), "shards": {"shape": (6, 4), "index_location": "start"}},
    )
    for name, codec in {"none": None, "blosc": BloscCodec(), "zstd": ZstdCodec()}.items()
}
ALL = {**CODECS, **SHARDED, **AT_START}
NOT_ZARRS = ("v2 zstd checksum", "v2 lz4")


def write(write_store, folder, kind, *, values=None, dims=("n", "k"), group="", missing="error", **options):
    """Write v0(n, k) of 18 x 4 floats in objects of 6 x 4, and index(n); return path and key of rows 6 to 11."""
    zarr_format, of = ALL[kind]
    values = np.random.default_rng(1).normal(size=(18, 4)) if values is None else values
    v0 = {"dims": dims, "values": values, "chunks": (6, 4), **of, **options}
    index = vector(np.arange(values.shape[dims.index("n")]), 6)
    if zarr_format == 2:  # zarrs asks for a fill value
        v0["fill_value"], index["fill_value"] = 0.0, 0
    path = write_store(Path(folder, "s"), {"v0": v0, "index": index}, zarr_format=zarr_format, group=group)
    return path, "v0/1.0" if zarr_format == 2 else "v0/c/1/0"


def read_all(path, which="zarr", unit_rows=6, **data):
    """Read unit by unit, and return v0 with the sample axis first."""
    samples = open_all(path, ["v0"], non_finite="allow", **data)
    reader = reader_of(samples, which)
    starts = range(0, samples.num_samples, unit_rows)
    units = [reader.read(Box(start, min(start + unit_rows, samples.num_samples))) for start in starts]
    return np.concatenate([unit["v0"][1] for unit in units])


# Damaged ----------------------------------------------------------------------------------------------------------

DAMAGE = {
    "last byte lost": lambda stored: stored[:-1],
    "half lost": lambda stored: stored[: len(stored) // 2],
    "first bytes only": lambda stored: stored[:3],
    "a header only": lambda stored: stored[:20],
    "empty": lambda stored: b"",
    "garbage": lambda stored: np.random.default_rng(2).bytes(len(stored)),
    "other garbage": lambda stored: np.random.default_rng(3).bytes(len(stored) // 2 + 5),
    "zeros": lambda stored: bytes(len(stored)),
    "bytes too many": lambda stored: stored + bytes(5),
}
HARMLESS = ("garbage", "zeros")  # without a codec any bytes of that length are numbers


@pytest.mark.sampled(6)
@READERS
@pytest.mark.parametrize("kind", ALL)
def test_a_damaged_object_stops_reading_by_name(write_store, tmp_path, kind, which):
    values = np.random.default_rng(1).normal(size=(18, 4))
    values[:, 1] = 3  # something to compress
    path, key = write(write_store, tmp_path, kind, values=values)
    stored = (path / key).read_bytes()
    expected = values.astype("float32")
    np.testing.assert_array_equal(read_all(path, which), expected)
    for name, damage in DAMAGE.items():
        (path / key).write_bytes(damage(stored))
        for missing, lengths in (("error", (3, 6, 18)), ("fill", (6,))):
            for unit_rows in lengths:
                try:
                    found = read_all(path, which, unit_rows, missing=missing)
                except DtrainError as error:
                    said = f"chunk {key} of v0 cannot be decoded: "
                    assert isinstance(error, ChunkUndecodable), (name, missing, unit_rows)  # noqa: PT017
                    assert said in error.message  # noqa: PT017
                    assert len(error.message.partition(said)[2]) > 3  # noqa: PT017
                    assert error.code == 5  # noqa: PT017
                else:
                    harmless = name in HARMLESS and kind in ("v2 none", "v3 none")
                    assert harmless or np.array_equal(found, expected), (name, missing, unit_rows)
                    assert harmless or name == "bytes too many", (name, missing, unit_rows)


@pytest.mark.parametrize("kind", AT_START)
@pytest.mark.parametrize("unit_rows", [3, 6])
def test_a_shard_that_ends_before_its_chunks_is_said_to_be_truncated(write_store, tmp_path, kind, unit_rows):
    path, key = write(write_store, tmp_path, kind)
    stored = (path / key).read_bytes()
    for size in (len(stored) - 1, 4 * 16 + 4):
        (path / key).write_bytes(stored[:size])
        with pytest.raises(ChunkUndecodable, match=f"chunk {key} of v0 cannot be decoded: the file is truncated"):
            read_all(path, "numcodecs", unit_rows)


def test_each_reader_reads_what_it_is_said_to_read(write_store, tmp_path):
    for number, kind in enumerate(ALL):
        (tmp_path / str(number)).mkdir()
        path, _ = write(write_store, tmp_path / str(number), kind)
        samples = open_all(path, ["v0"])
        assert UnitReader(samples).readers["v0"][0] == ("zarr" if kind == "v2 lz4" else "numcodecs"), kind
        assert (reader_of(samples, "zarrs").readers["v0"][0] == "zarrs") == (kind not in NOT_ZARRS), kind


@pytest.mark.sampled(15)
@READERS
@pytest.mark.parametrize("kind", ALL)
def test_a_flipped_bit_is_found_where_there_is_a_checksum_and_never_crashes(write_store, tmp_path, kind, which):
    values = np.random.default_rng(1).normal(size=(18, 4))
    values[:, 1] = 3
    path, key = write(write_store, tmp_path, kind, values=values)
    expected = values.astype("float32")
    stored = (path / key).read_bytes()
    samples = open_all(path, ["v0"], non_finite="allow")
    checksums = samples.variable("v0").checksums
    assert checksums == ("checksum" in kind or "gzip" in kind or "crc32c" in kind)
    rng = np.random.default_rng(4)
    silent = 0
    places = rng.permutation(len(stored))[:25] if checksums else rng.permutation(len(stored))[:12]
    for place in sorted({0, 1, len(stored) - 1, *places.tolist()}):
        flipped = bytearray(stored)
        flipped[place] ^= 1 << int(rng.integers(8))
        (path / key).write_bytes(flipped)
        try:
            found = reader_of(samples, which).read(Box(6, 12))["v0"][1]
        except ChunkUndecodable as error:
            assert f"chunk {key} of v0" in error.message  # noqa: PT017
        except ChunkMissing:
            assert "shard" in kind or "index" in kind  # in the index, a place that says: not there
        else:
            silent += not np.array_equal(found, expected[6:12])
    assert not checksums or not silent


@pytest.mark.sampled(6)
@READERS
@pytest.mark.parametrize("dims", [("n", "k"), ("k", "n")])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_damaged_object_is_named_among_many(write_store, tmp_path, chunk_files, dims, sharded, which):
    values = np.ones((12, 5)) if dims == ("n", "k") else np.ones((5, 12))
    options = {"chunks": (2, 1), "shards": (2, 2)} if sharded else {"chunks": (2, 2)}
    path, _ = write(write_store, tmp_path, "v3 zstd", values=values, dims=dims, group="g", **options)
    for key in chunk_files(path, "g/v0"):
        stored = (path / key).read_bytes()
        (path / key).write_bytes(stored[:-2])
        with pytest.raises(ChunkUndecodable, match=rf"chunk {key} of v0 cannot"):
            read_all(path, which, 4, group="g")
        (path / key).write_bytes(stored)
    assert read_all(path, which, 4, group="g").sum() == 60


@READERS
def test_other_units_of_a_damaged_store_can_be_read(write_store, tmp_path, which):
    path, key = write(write_store, tmp_path, "v3 zstd")
    reader = reader_of(open_all(path, ["v0"]), which)
    (path / key).write_bytes(b"garbage")
    for _ in range(2):
        assert [len(reader.read(Box(start, start + 6))["v0"][1]) for start in (0, 12)] == [6, 6]
        with pytest.raises(ChunkUndecodable, match=key):
            reader.read(Box(6, 12))
    (path / key).unlink()
    for _ in range(2):
        with pytest.raises(ChunkMissing, match=key):
            reader.read(Box(6, 12))
    assert [len(reader.read(Box(start, start + 6))["v0"][1]) for start in (0, 12)] == [6, 6]


@READERS
@pytest.mark.parametrize("kind", ["v3 blosc", "sharded blosc"])
def test_what_is_repaired_can_be_read_by_the_same_reader(write_store, tmp_path, kind, which):
    path, key = write(write_store, tmp_path, kind)
    stored = (path / key).read_bytes()
    reader = reader_of(open_all(path, ["v0"]), which)
    (path / key).unlink()
    with pytest.raises(ChunkMissing, match=key):
        reader.read(Box(6, 12))
    for damage in (b"", stored[:-1]) if kind == "v3 blosc" else (b"",):
        (path / key).write_bytes(damage)
        with pytest.raises(ChunkUndecodable, match=key):
            reader.read(Box(6, 12))
    (path / key).write_bytes(stored)
    assert reader.read(Box(6, 12))["v0"][1].shape == (6, 4)


def test_a_read_that_fails_once_blames_the_storage(write_store, tmp_path):
    samples = open_all(write(write_store, tmp_path, "v3 zstd")[0], ["v0"])
    reader = UnitReader(samples, "zarr")
    array, failures = reader.arrays["v0"], iter([OSError("stale file handle")])

    class Flaky:
        def __getattr__(self, name):
            return getattr(array, name)

        def __getitem__(self, selection):
            for error in failures:
                raise error
            return array[selection]

        def get_basic_selection(self, *args, **options):
            for error in failures:
                raise error
            return array.get_basic_selection(*args, **options)

    reader.arrays["v0"] = Flaky()
    with pytest.raises(ChunkUndecodable, match=r"v0\[0:6\] could not be read: stale file handle") as caught:
        reader.read(Box(0, 6))
    assert "storage is unreliable" in caught.value.hint
    assert reader.read(Box(0, 6))["v0"][1].shape == (6, 4)


def test_no_memory_is_said_with_its_own_code(write_store, tmp_path, monkeypatch):
    reader = UnitReader(open_all(write(write_store, tmp_path, "v3 zstd")[0], ["v0"]), "zarr")

    def decode(*args):
        raise MemoryError

    monkeypatch.setattr(through_zarr, "decode", decode)
    with pytest.raises(OutOfMemory, match=r"no memory for v0\[0:6\]") as caught:
        reader.read(Box(0, 6))
    assert caught.value.code == 8


@pytest.mark.parametrize("kind", ["v2 gzip", "v3 zstd"])
def test_no_memory_is_not_taken_for_a_damaged_chunk(write_store, tmp_path, monkeypatch, kind):
    reader = UnitReader(open_all(write(write_store, tmp_path, kind)[0], ["v0"]), "numcodecs")

    def no_memory(*args):
        raise MemoryError

    monkeypatch.setattr(codecs, "_ZSTD", SimpleNamespace(decode=no_memory))
    monkeypatch.setattr(zlib, "decompressobj", no_memory)
    with pytest.raises(OutOfMemory, match=r"no memory for v0\[0:6\]") as caught:
        reader.read(Box(0, 6))
    assert caught.value.code == 8


def test_no_memory_to_read_into_is_said_with_its_own_code(write_store, tmp_path, monkeypatch):
    reader = UnitReader(open_all(write(write_store, tmp_path, "v3 zstd")[0], ["v0"]), "numcodecs")

    def no_memory(size):
        raise MemoryError

    monkeypatch.setattr(FilesReader, "_scratch", lambda self, name, most=0: no_memory)
    with pytest.raises(OutOfMemory, match=r"no memory for v0\[0:6\]"):
        reader.read(Box(0, 6))


@pytest.mark.parametrize("kind", ["v3 zstd", "sharded zstd"])
def test_a_file_that_the_system_does_not_open_is_named(write_store, tmp_path, kind):
    path, key = write(write_store, tmp_path, kind)
    (path / key).unlink()
    (path / key).symlink_to(path / key)
    with pytest.raises(ChunkUndecodable, match=rf"chunk {key} of v0 cannot be decoded: it cannot be read: Too many"):
        read_all(path, "numcodecs")


def test_a_shard_of_which_the_system_does_not_give_the_index_is_named(write_store, tmp_path):
    path, key = write(write_store, tmp_path, "sharded zstd")
    (path / key).unlink()
    (path / key).symlink_to(path / key)
    with pytest.raises(ChunkUndecodable, match=rf"chunk {key} of v0 cannot be decoded: it cannot be read: Too many"):
        read_all(path, "numcodecs", unit_rows=3)


def test_a_folder_in_the_place_of_a_file_is_a_missing_chunk(write_store, tmp_path):
    path, key = write(write_store, tmp_path, "v3 zstd")
    (path / key).unlink()
    (path / key).mkdir()
    with pytest.raises(ChunkMissing, match=rf"chunk {key} of v0"):
        read_all(path, "numcodecs")
    (path / key).rmdir()
    (path / key).parent.rmdir()
    (path / key).parent.write_bytes(b"a file in the place of the folder")
    with pytest.raises(ChunkMissing, match=rf"chunk {key} of v0"):
        read_all(path, "numcodecs")


# Missing ----------------------------------------------------------------------------------------------------------

MISSING = {
    "v2": (2, {}, "v0/2.1"),
    "v3": (3, {}, "v0/c/2/1"),
    "sharded": (3, {"chunks": (1, 1), "shards": (3, 2)}, "v0/c/2/1"),
    "other axis": (3, {"dims": ("k", "n"), "chunks": (2, 2), "values": np.ones((4, 12))}, "v0/c/1/5"),
    "nested": (3, {"group": "a/b"}, "a/b/v0/c/2/1"),
}


def pair_of(write_store, folder, *, zarr_format=3, group="", values=None, **options):
    """Write v0(n, k) of 12 x 4 floats in chunks of 3 x 2, or as told, and index(n)."""
    values = np.random.default_rng(1).normal(size=(12, 4)) if values is None else values
    v0 = {"dims": ("n", "k"), "values": values, "chunks": (3, 2), **options}
    index = vector(np.arange(values.shape[v0["dims"].index("n")]), 12)
    if zarr_format == 2:
        v0, index = {"fill_value": 0.0, **v0}, {**index, "fill_value": 0}
    return write_store(Path(folder, "s.zarr"), {"v0": v0, "index": index}, zarr_format=zarr_format, group=group)


@pytest.mark.sampled(8)
@READERS
@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_object_stops_reading_by_name(write_store, tmp_path, kind, which):
    zarr_format, options, key = MISSING[kind]
    path = pair_of(write_store, tmp_path, zarr_format=zarr_format, **options)
    (path / key).unlink()
    for unit_rows in (1, 3, 12):
        with pytest.raises(ChunkMissing, match=rf"chunk {key} of v0 is missing") as caught:
            read_all(path, which, unit_rows, group=options.get("group", ""))
        assert caught.value.code == 5
    with pytest.raises(ChunkMissing, match=rf"chunk {key} of v0 is missing"):
        check_presence(open_all(path, ["v0"], group=options.get("group", "")))


@READERS
@pytest.mark.parametrize("kind", ["v2", "v3", "sharded"])
def test_a_missing_object_can_be_read_as_the_fill_value(write_store, tmp_path, kind, which):
    zarr_format, options, key = MISSING[kind]
    fill = 0.0 if kind == "v2" else -7.0  # another fill value of a v2 array marks missing values
    path = pair_of(write_store, tmp_path, zarr_format=zarr_format, fill_value=fill, **options)
    expected = zarr.open_group(path, mode="r")["v0"][...].astype("float32")
    expected[6:9, 2:4] = fill
    (path / key).unlink()
    for unit_rows in (1, 3, 12):
        np.testing.assert_array_equal(read_all(path, which, unit_rows, missing="fill"), expected)


@pytest.mark.parametrize("which", ["zarr", "auto"])
@pytest.mark.parametrize("kind", ["v3", "sharded"])
def test_a_fill_value_beyond_float32_warns_of_nothing(write_store, tmp_path, kind, which):
    zarr_format, options, key = MISSING[kind]
    path = pair_of(write_store, tmp_path, zarr_format=zarr_format, fill_value=1e300, **options)
    (path / key).unlink()
    with pytest.raises(NonFiniteData, match=r"v0\[6, 2\] in chunk .* is 1e\+300, which float32 cannot hold"):
        reader_of(open_all(path, ["v0"], missing="fill"), which).read(Box(6, 9))
    assert np.isinf(read_all(path, which, missing="fill")[6:9, 2:4]).all()


@pytest.mark.sampled(8)
@READERS
@pytest.mark.parametrize("location", ["start", "end"])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_missing_inner_chunk_is_named(tmp_path, location, codec, which):
    # two shards of 6 x 4 and a ragged one; the chunk of rows 8, 9 and columns 2, 3 holds only the fill value
    values = np.random.default_rng(1).normal(size=(14, 4)).astype("float32")
    values[8:10, 2:4] = 5
    root = zarr.create_group(tmp_path / "s")
    options = {"compressors": None if codec == "none" else ZstdCodec()}
    with zarr.config.set({"array.write_empty_chunks": False}):
        v0 = root.create_array(
            "v0",
            shape=(14, 4),
            dtype="float32",
            chunks=(2, 2),
            shards={"shape": (6, 4), "index_location": location},
            dimension_names=("n", "k"),
            fill_value=5,
            **options,
        )
        v0[...] = values
        index = root.create_array(
            "index", shape=(14,), dtype="int32", chunks=(6,), dimension_names=("n",), fill_value=-1
        )
        index[...] = np.arange(14)
    said = r"chunk \(4, 1\) of v0, in shard v0/c/1/0, is missing"
    for unit_rows in (2, 6, 14):
        with pytest.raises(ChunkMissing, match=said) as caught:
            read_all(tmp_path / "s", which, unit_rows)
        assert caught.value.code == 5
        np.testing.assert_array_equal(read_all(tmp_path / "s", which, unit_rows, missing="fill"), values)
    samples = open_all(tmp_path / "s", ["v0"])
    with pytest.raises(ChunkMissing, match=said):
        check_presence(samples)
    reader = reader_of(samples, which)
    for start, stop in ((0, 6), (6, 8), (10, 12), (12, 14)):  # what is there can be read
        np.testing.assert_array_equal(reader.read(Box(start, stop))["v0"][1], values[start:stop])
    elsewhere = open_all(tmp_path / "s", ["v0"], isel={"k": {"stop": 2}})
    check_presence(elsewhere)
    np.testing.assert_array_equal(UnitReader(elsewhere, which).read(Box(0, 14))["v0"][1], values[:, :2])


def write_one_shard(folder, values, *index_codecs):
    """Write v0(n, k) of 12 x 4 floats, without chunks of zeros, in one shard of chunks of 3 rows; and index(n)."""
    root = zarr.create_group(folder / "s")
    codec = ShardingCodec(chunk_shape=(3, 4), codecs=[BytesCodec()], index_codecs=index_codecs)
    with zarr.config.set({"array.write_empty_chunks": False}):
        v0 = zarr.create(
            store=root.store,
            path="v0",
            shape=(12, 4),
            chunk_shape=(12, 4),
            dtype="float32",
            codecs=[codec],
            dimension_names=("n", "k"),
            fill_value=0,
            zarr_format=3,
        )
        v0[...] = values
        index = root.create_array(
            "index", shape=(12,), dtype="int32", chunks=(6,), dimension_names=("n",), fill_value=-1
        )
        index[...] = np.arange(12)


@READERS
def test_a_missing_inner_chunk_is_named_also_where_the_index_is_written_in_another_way(tmp_path, which):
    values = np.ones((12, 4), "float32")
    values[3:6] = 0
    write_one_shard(tmp_path, values, BytesCodec(endian="big"), Crc32cCodec())
    with pytest.raises(ChunkMissing, match="v0"):
        read_all(tmp_path / "s", which, 12)


@pytest.mark.parametrize("fault", ["missing", "truncated"])
@READERS
def test_threads_that_read_the_same_bad_object_at_once_all_say_so(write_store, tmp_path, which, fault):
    # two units of 3 rows share the chunk of 6: neither must take the other's report for its own
    path, key = write(write_store, tmp_path, "v3 blosc")
    samples = open_all(path, ["v0"])
    reader = reader_of(samples, which)
    if fault == "missing":
        (path / key).unlink()
    else:
        (path / key).write_bytes((path / key).read_bytes()[:-1])
    check, barrier = reader.faults.check, threading.Barrier(2, timeout=10)

    def together(variable, observations):
        if variable.name == "v0":
            barrier.wait()
        return check(variable, observations)

    reader.faults.check = together
    raised = []

    def read(start):
        try:
            reader.read(Box(start, start + 3))
        except DtrainError as error:
            raised.append(type(error))

    workers = [threading.Thread(target=read, args=(start,)) for start in (6, 9)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(20)
    assert raised == [ChunkMissing if fault == "missing" else ChunkUndecodable] * 2


def test_a_place_in_a_shard_that_no_file_reaches_stops_reading_by_name(tmp_path):
    # without a checksum nothing tells that the index is damaged; bit 63 of an offset is flipped
    write_one_shard(tmp_path, np.ones((12, 4)), BytesCodec())
    file = tmp_path / "s/v0/c/0/0"
    stored = bytearray(file.read_bytes())
    stored[-4 * 16 + 7] ^= 1 << 7
    file.write_bytes(stored)
    for unit_rows in (12, 3, 6):
        with pytest.raises(ChunkUndecodable, match="chunk v0/c/0/0 of v0 cannot be decoded"):
            read_all(tmp_path / "s", "numcodecs", unit_rows)


# Modified ----------------------------------------------------------------------------------------------------


@pytest.fixture
def batch_by_batch(monkeypatch):
    monkeypatch.setattr(memory, "BUNDLE_BATCHES", 1)


def read_twice(samples, which, between):
    reader = reader_of(samples, which)
    reader.read(Box(6, 12))
    between()
    return reader.read(Box(6, 12))["v0"][1]


@READERS
@pytest.mark.parametrize("kind", ["v2 zstd", "v3 none", "v3 blosc", "sharded zstd"])
def test_an_object_that_is_modified_between_two_reads_is_found(write_store, tmp_path, kind, which):
    path, key = write(write_store, tmp_path, kind)
    samples = open_all(path, ["v0"])

    def change():
        zarr.open_group(path, mode="r+")["v0"][7, 1] = 99.0

    def touch():
        status = os.stat(path / key)
        os.utime(path / key, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))

    for between in (change, touch):
        with pytest.raises(DataChanged, match=rf"chunk {key} of v0 has been modified") as caught:
            read_twice(samples, which, between)
        assert caught.value.code == 5
    assert read_twice(samples, which, lambda: None).shape == (6, 4)


@READERS
@pytest.mark.parametrize("kind", ["v3 zstd", "sharded zstd"])
def test_a_damage_that_comes_between_two_reads_is_found(write_store, tmp_path, kind, which):
    path, key = write(write_store, tmp_path, kind)
    samples, stored = open_all(path, ["v0"]), (path / key).read_bytes()
    for damage in (stored[:-1], b"", b"garbage", stored + stored):
        with pytest.raises((DataChanged, ChunkUndecodable), match=key):
            read_twice(samples, which, lambda damage=damage: (path / key).write_bytes(damage))
        (path / key).write_bytes(stored)
    with pytest.raises(ChunkMissing, match=key):
        read_twice(samples, which, (path / key).unlink)


@READERS
@pytest.mark.parametrize("missing", ["fill", "skip"])
@pytest.mark.parametrize("kind", ["v3 zstd", "sharded zstd"])
def test_an_object_that_comes_or_goes_between_two_reads_is_found(write_store, tmp_path, kind, missing, which):
    path, key = write(write_store, tmp_path, kind)
    stored = (path / key).read_bytes()
    samples = open_all(path, ["v0"], missing=missing)
    with pytest.raises((DataChanged, ChunkMissing), match=key):
        read_twice(samples, which, (path / key).unlink)
    if missing == "fill":
        with pytest.raises(DataChanged, match=key):
            read_twice(samples, which, lambda: (path / key).write_bytes(stored))


@pytest.mark.parametrize("which", ["zarr", "auto"])
def test_a_shard_that_is_modified_is_found_although_no_chunk_of_it_was_read(tmp_path, which):
    values = np.arange(48.0, dtype="float32").reshape(12, 4) + 1
    values[:3] = 0  # the fill value: this chunk is not stored
    root = zarr.create_group(tmp_path / "s")
    with zarr.config.set({"array.write_empty_chunks": False}):
        v0 = root.create_array(
            "v0",
            shape=(12, 4),
            chunks=(3, 4),
            shards=(12, 4),
            dtype="float32",
            compressors=None,
            dimension_names=("n", "k"),
            fill_value=0,
        )
        v0[...] = values
        index = root.create_array(
            "index", shape=(12,), dtype="int32", chunks=(6,), dimension_names=("n",), fill_value=-1
        )
        index[...] = np.arange(12)
        reader = reader_of(open_all(tmp_path / "s", ["v0"], missing="fill"), which)
        assert not reader.read(Box(0, 3))["v0"][1].any()
        v0[...] = values + 100
    with pytest.raises(DataChanged, match="chunk v0/c/0/0 of v0 has been modified"):
        reader.read(Box(3, 6))


@READERS
def test_a_stream_finds_what_is_modified_between_two_passes(write_store, tmp_path, batch_by_batch, which):
    path, key = write(write_store, tmp_path, "v3 zstd")
    samples = open_all(path, ["v0"])
    _, partition = only_partition(samples, unit_rows=6, cell_rows=6)
    reader = reader_of(samples, which)
    stream = read_batches(
        reader, partition, START, [6] * 100, replica=0, shuffle=False, limits=memory.Limits(ahead=0, buffers=2)
    )
    assert [next(stream).size for _ in range(3)] == [6] * 3
    zarr.open_group(path, mode="r+")["v0"][7, 1] = 99.0
    with pytest.raises(DataChanged, match=f"chunk {key} of v0"):
        list(stream)


# Through the loader -----------------------------------------------------------------------------------------------


@READERS
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("fault", ["missing", "garbage", "not finite"])
def test_every_fault_reaches_the_consumer(write_store, tmp_path, batch_by_batch, fault, shuffle, which):
    values = np.arange(72.0).reshape(18, 4)
    if fault == "not finite":
        values[7, 2] = np.nan
    path, key = write(write_store, tmp_path, "v3 zstd", values=values)
    if fault == "missing":
        (path / key).unlink()
    elif fault == "garbage":
        (path / key).write_bytes(b"garbage")
    samples = open_all(path, ["v0"])
    _, partition = only_partition(samples, unit_rows=6, cell_rows=6, window=2)
    kinds = {"missing": ChunkMissing, "garbage": ChunkUndecodable, "not finite": NonFiniteData}
    stream = read_batches(reader_of(samples, which), partition, START, [2] * 100, replica=0, shuffle=shuffle)
    got = []
    with pytest.raises(kinds[fault], match=key):  # noqa: PT012
        for batch in stream:
            got += index_of([batch])
            np.testing.assert_array_equal(batch.inputs[0], values[batch.targets[-1]])
    assert not set(got) & set(range(6, 12))


@READERS
def test_a_small_variable_that_is_preloaded_is_checked_as_well(write_store, tmp_path, which):
    # the labels lie in one chunk, beside which the images are large: they are read once
    images = np.zeros((60, 200), "float32")
    arrays = {
        "v0": {"dims": ("n", "k"), "values": images, "chunks": (5, 200)},
        "index": vector(np.arange(60, dtype="int32"), 60),
    }
    path = write_store(tmp_path / "s", arrays)
    samples = open_all(path, arrays, missing="error")
    assert [v.name for v in samples.preloaded] == ["index"]
    _, partition = only_partition(samples)
    found = batches(reader_of(samples, which), partition, [25] * 5)
    assert np.bincount(index_of(found)[:120]).tolist() == [2] * 60
    stored = (path / "index/c/0").read_bytes()
    for damage, kind in ((stored[:-3], ChunkUndecodable), (None, ChunkMissing)):
        if damage is None:
            (path / "index/c/0").unlink()
        else:
            (path / "index/c/0").write_bytes(damage)
        with pytest.raises(kind, match="chunk index/c/0 of index"):
            batches(reader_of(samples, which), partition, [25])


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_variable_that_is_preloaded_is_checked_for_values_that_are_not_finite(write_store, tmp_path, value):
    labels = np.arange(60, dtype="float32")
    labels[33] = value
    arrays = {
        "v0": {"dims": ("n", "k"), "values": np.zeros((60, 200), "float32"), "chunks": (5, 200)},
        "label": vector(labels, 60),
        "index": vector(np.arange(60, dtype="int32"), 60),
    }
    samples = open_all(write_store(tmp_path / "s", arrays), arrays)
    plan = replace(plan_data(samples, replicas=1, seed=0), unit_rows=5, cell_rows=5)
    (partition,) = train_partitions(plan)
    with pytest.raises(NonFiniteData, match=r"label\[33\] in chunk label/c/0 is "):
        batches(UnitReader(samples), partition, [60])
    UnitReader(samples).read(Box(0, 33))  # not a row of these


@READERS
def test_a_file_that_is_read_by_somebody_else_is_not_modified(write_store, tmp_path, which):
    # reading changes the time of access alone
    path, key = write(write_store, tmp_path, "v3 zstd")
    reader = reader_of(open_all(path, ["v0"]), which)
    first = reader.read(Box(0, 18))["v0"][1]
    status = os.stat(path / key)
    os.utime(path / key, ns=(status.st_atime_ns + 1_000_000_000, status.st_mtime_ns))
    np.testing.assert_array_equal(reader.read(Box(0, 18))["v0"][1], first)
