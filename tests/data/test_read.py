from __future__ import annotations

import functools
import itertools
import tempfile
import weakref
from dataclasses import replace
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from dtrain.data.partition import eval_partitions, plan_data, train_partitions
from dtrain.data.read import UnitReader, read_batches
from dtrain.data.samples import model_dtype
from dtrain.data.source import open_samples
from dtrain.errors import ChunkMissing, ChunkUndecodable, NonFiniteData
from dtrain.types import Cursor

START = Cursor(0, 0)


def batches(reader, partition, sizes, *, cursor=START, replica=0, shuffle=True):
    return list(read_batches(reader, partition, cursor, sizes, replica=replica, shuffle=shuffle))


def index_of(found):
    """The samples that batches hold: the target named index says it."""
    return np.concatenate([batch.targets[-1] for batch in found]).tolist() if found else []


def one_pass(partition, batch=7):
    """Sizes of the batches of one pass."""
    full, rest = divmod(partition.num_samples, batch)
    return [batch] * full + [rest] * (rest > 0)


DTYPES = ["float32", "float64", "float16", "uint8", "int16", "int32", "int64", "bool"]


@st.composite
def stores(draw, max_samples=50):
    """Draw (zarr format, arrays): one to three variables, stored in different ways, and the index of each sample."""
    count = draw(st.integers(1, max_samples))
    zarr_format = draw(st.sampled_from([2, 3]))
    arrays = {}
    for name, dtype in [*((f"v{i}", None) for i in range(draw(st.integers(1, 3)))), ("index", "int32")]:
        dtype = dtype or draw(st.sampled_from(DTYPES))
        others = tuple(draw(st.lists(st.integers(1, 3), max_size=2))) if name != "index" else ()
        axis = draw(st.integers(0, len(others)))
        places = int(np.prod(others, dtype=int))
        values = np.arange(count * places).reshape(count, *others)
        values = (values * 37 % 251 + (values if dtype in ("float64", "int32", "int64") else 0)).astype(dtype)
        values = np.arange(count, dtype=dtype) if name == "index" else np.moveaxis(values, 0, axis)
        rows = draw(st.integers(1, 20))
        chunks = tuple(rows if dim == axis else draw(st.integers(1, size)) for dim, size in enumerate(values.shape))
        dims = [f"{name}_{dim}" for dim in range(values.ndim)]
        dims[axis] = "n"
        arrays[name] = {"dims": tuple(dims), "values": values, "chunks": chunks}
        if zarr_format == 3 and draw(st.booleans()):
            arrays[name]["shards"] = tuple(size * draw(st.integers(1, 3)) for size in chunks)
    return zarr_format, arrays


def by_sample(arrays, name):
    """The values of a variable with the sample axis first."""
    return np.moveaxis(arrays[name]["values"], arrays[name]["dims"].index("n"), 0)


def open_all(path, arrays, **data):
    names = [name for name in arrays if name != "index"]
    options = {"split": {"val": 0.0, "test": 0.0}, "sample_dim": "n", **data}
    return open_samples(path, inputs=names, targets=[names[0], "index"], **options)


def opened(write_store, folder, store, replicas, window, **data):
    """Write a drawn store and return (arrays, samples, plan)."""
    zarr_format, arrays = store
    path = write_store(Path(folder, "s.zarr"), arrays, zarr_format=zarr_format)
    samples = open_all(path, arrays, **data)
    plan = plan_data(samples, replicas=min(replicas, samples.num_samples), seed=3)
    return arrays, samples, replace(plan, window=window)


def remembering(samples, plan):
    """A reader that decodes each unit once and hands it out again: for tests of many streams over one store."""
    reader = UnitReader(samples, plan)
    reader.read = functools.cache(reader.read)
    return reader


# A pass -----------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(stores(), st.integers(1, 9), st.integers(1, 10), st.integers(1, 13), st.booleans())
def test_each_sample_comes_exactly_once_a_pass_with_its_values(write_store, store, replicas, window, batch, shuffle):
    with tempfile.TemporaryDirectory() as folder:
        arrays, samples, plan = opened(write_store, folder, store, replicas, window)
        seen = []
        for replica, partition in enumerate(train_partitions(plan)):
            reader = UnitReader(samples, plan)
            found = batches(reader, partition, one_pass(partition, batch), replica=replica, shuffle=shuffle)
            assert [b.size for b in found] == one_pass(partition, batch)
            assert reader.units_decoded == len(partition.units)
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


@settings(max_examples=20)
@given(stores(), st.integers(1, 9), st.integers(1, 5))
def test_without_shuffle_samples_come_in_stored_order(write_store, store, replicas, window):
    with tempfile.TemporaryDirectory() as folder:
        _, samples, plan = opened(write_store, folder, store, replicas, window, partition="contiguous")
        reader = UnitReader(samples, plan)
        seen = []
        for partition in train_partitions(plan):
            seen += index_of(batches(reader, partition, one_pass(partition), shuffle=False))
        assert seen == list(range(samples.num_samples))


@settings(max_examples=20)
@given(stores(), st.integers(1, 3))
def test_train_val_and_test_together_hold_each_sample_once(write_store, store, replicas):
    with tempfile.TemporaryDirectory() as folder:
        zarr_format, arrays = store
        path = write_store(Path(folder, "s.zarr"), arrays, zarr_format=zarr_format)
        samples = open_all(path, arrays, split={"val": 0.3, "test": 0.2})
        if samples.num_samples < 10:
            return
        plan = plan_data(samples, replicas=replicas, seed=1)
        reader = UnitReader(samples, plan)
        seen = []
        for partition in (*train_partitions(plan), *eval_partitions(plan, "val"), *eval_partitions(plan, "test")):
            seen += index_of(batches(reader, partition, one_pass(partition), shuffle=False))
        assert sorted(seen) == list(range(samples.num_samples))


def spy_on_units(reader):
    """Record (units read, most units of which an array was alive at once)."""
    refs, record, read = [], {"units": [], "most": 0}, reader.read

    def spied(first, stop):
        arrays = read(first, stop)
        record["units"].append(first // reader.plan.unit_rows)
        refs.append([weakref.ref(array) for _, array in arrays.values()])
        record["most"] = max(record["most"], sum(any(ref() is not None for ref in unit) for unit in refs))
        return arrays

    reader.read = spied
    return record


@settings(max_examples=30)
@given(stores(), st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.booleans(), st.floats(0, 1))
def test_no_more_than_the_window_is_held_and_no_unit_is_decoded_twice_a_pass(
    write_store, store, replicas, window, passes, shuffle, share
):
    with tempfile.TemporaryDirectory() as folder:
        _, samples, plan = opened(write_store, folder, store, replicas, window)
        for partition in train_partitions(plan):
            reader = UnitReader(samples, plan)
            record = spy_on_units(reader)
            for _ in read_batches(
                reader, partition, START, [partition.num_samples] * passes, replica=0, shuffle=shuffle
            ):
                pass
            assert sorted(record["units"]) == sorted(partition.units.tolist() * passes)
            assert record["most"] <= (window if shuffle else 1)
            record = spy_on_units(reader)
            cursor = Cursor(0, int(share * partition.num_samples))
            batches(reader, partition, [partition.num_samples], cursor=cursor, shuffle=shuffle)
            assert record["most"] <= (window if shuffle else 1)


def test_units_are_read_when_their_first_sample_is_due(write_store, tmp_path):
    path = write_store(tmp_path / "s", {"v0": vector(np.arange(40.0), 4), "index": vector(np.arange(40), 4)})
    samples = open_all(path, ["v0"])
    plan = replace(plan_data(samples, replicas=1, seed=0), unit_rows=4, cell_rows=4, window=3)
    (partition,) = train_partitions(plan)
    reader = UnitReader(samples, plan)
    record = spy_on_units(reader)
    stream = read_batches(reader, partition, START, itertools.repeat(1), replica=0, shuffle=True)
    counts = []
    for _ in range(40):
        next(stream)
        counts.append(len(record["units"]))
    assert counts[0] <= 3
    assert counts[-1] == 10
    assert all(read * 4 <= n + 1 + 3 * 4 for n, read in enumerate(counts))


# The cyclic stream ------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(stores(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 90), st.booleans())
def test_batches_go_on_with_the_next_pass(write_store, store, replicas, window, batch, shuffle):
    with tempfile.TemporaryDirectory() as folder:
        _, samples, plan = opened(write_store, folder, store, replicas, window)
        reader = remembering(samples, plan)
        partition = train_partitions(plan)[0]
        count = partition.num_samples
        steps = 2 * count // batch + 3
        stream = index_of(batches(reader, partition, [batch] * steps, shuffle=shuffle))
        assert len(stream) == steps * batch
        owned = sorted(stream[:count])
        assert len(set(owned)) == count
        for epoch in range(steps * batch // count):
            alone = index_of(batches(reader, partition, [count], cursor=Cursor(epoch, 0), shuffle=shuffle))
            assert stream[epoch * count : (epoch + 1) * count] == alone
            assert sorted(alone) == owned


@settings(max_examples=30)
@given(stores(), st.integers(1, 4), st.integers(1, 5), st.integers(1, 17), st.booleans(), st.data())
def test_a_stream_resumed_at_a_cursor_is_the_rest_of_the_stream(
    write_store, store, replicas, window, batch, shuffle, data
):
    with tempfile.TemporaryDirectory() as folder:
        _, samples, plan = opened(write_store, folder, store, replicas, window)
        reader = remembering(samples, plan)
        partition = train_partitions(plan)[-1]
        count = partition.num_samples
        whole = index_of(batches(reader, partition, [1] * (3 * count), shuffle=shuffle))
        for _ in range(4):
            done = data.draw(st.integers(0, 3 * count - 1))
            steps = (3 * count - done) // batch
            cursor = Cursor(*divmod(done, count))
            rest = batches(reader, partition, [batch] * steps, cursor=cursor, shuffle=shuffle)
            assert index_of(rest) == whole[done : done + steps * batch]
        at_end = batches(reader, partition, [count], cursor=Cursor(0, count), shuffle=shuffle)
        assert index_of(at_end) == whole[count : 2 * count]


def test_the_order_depends_on_replica_epoch_and_seed_alone(write_store, tmp_path):
    path = write_store(tmp_path / "s", {"v0": vector(np.arange(60.0), 5), "index": vector(np.arange(60), 7)})
    samples = open_all(path, ["v0"])
    plan = plan_data(samples, replicas=1, seed=0)
    (partition,) = train_partitions(plan)

    def order(plan=plan, **options):
        return tuple(index_of(batches(UnitReader(samples, plan), partition, [60], **options)))

    assert order() == order()
    different = {order(), order(replica=1), order(cursor=Cursor(1, 0)), order(replace(plan, seed=1))}
    assert len(different) == 4


def test_batches_own_their_memory(write_store, tmp_path):
    path = write_store(tmp_path / "s", {"v0": vector(np.arange(6.0), 6), "index": vector(np.arange(6), 6)})
    samples = open_all(path, ["v0"])
    plan = plan_data(samples, replicas=1, seed=0)
    found = []
    for batch in read_batches(
        UnitReader(samples, plan), *train_partitions(plan), START, [3] * 4, replica=0, shuffle=False
    ):
        assert all(array.flags.writeable and array.flags.c_contiguous for array in (*batch.inputs, *batch.targets))
        found.append(batch.inputs[0].copy())
        batch.inputs[0][:] = -1  # as a model may, in place
    assert np.concatenate(found).tolist() == [0, 1, 2, 3, 4, 5] * 2


# Dtypes -----------------------------------------------------------------------------------------------------


def vector(values, chunk, **options):
    return {"dims": ("n",), "values": values, "chunks": (chunk,), **options}


@pytest.mark.parametrize(
    ("stored", "seen"),
    [
        *((dtype, "float32") for dtype in ("float16", "float32", "float64", ">f4", ">f8")),
        *(
            (dtype, "int64")
            for dtype in ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", ">i4")
        ),
    ],
)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_floats_become_float32_and_integers_int64(write_store, tmp_path, zarr_format, stored, seen):
    values = np.array([0, 1, 1, 0, 1, 100], stored)
    arrays = {"v0": vector(values, 4), "index": vector(np.arange(6), 3)}
    path = write_store(tmp_path / "s", arrays, zarr_format=zarr_format)
    samples = open_all(path, ["v0"])
    plan = plan_data(samples, replicas=1, seed=0)
    (batch,) = batches(UnitReader(samples, plan), *train_partitions(plan), [6], shuffle=False)
    assert model_dtype(stored) == batch.inputs[0].dtype == np.dtype(seen)
    assert batch.inputs[0].tolist() == [0, 1, 1, 0, 1, 1 if stored == "bool" else 100]


def test_float64_is_rounded_to_float32(write_store, tmp_path):
    values = np.array([1 / 3, 1e-50, -1e30])
    path = write_store(tmp_path / "s", {"v0": vector(values, 2), "index": vector(np.arange(3), 2)})
    samples = open_all(path, ["v0"])
    plan = plan_data(samples, replicas=1, seed=0)
    (batch,) = batches(UnitReader(samples, plan), *train_partitions(plan), [3], shuffle=False)
    assert batch.inputs[0].tolist() == [0.3333333432674408, 0.0, -1.0000000150474662e30]


def test_a_reader_counts_what_it_decodes(write_store, tmp_path):
    arrays = {
        "v0": {"dims": ("k", "n"), "values": np.zeros((3, 10), "float64"), "chunks": (2, 4)},
        "index": vector(np.arange(10, dtype="int32"), 4),
    }
    samples = open_all(write_store(tmp_path / "s", arrays), arrays)
    plan = replace(plan_data(samples, replicas=1, seed=0), unit_rows=4, cell_rows=4)
    reader = UnitReader(samples, plan)
    unit = reader.read(*plan.unit_range(2))  # the last one: samples 8 and 9
    assert {name: (base, array.shape, str(array.dtype)) for name, (base, array) in unit.items()} == {
        "v0": (8, (2, 3), "float64"),
        "index": (8, (2,), "int32"),
    }
    assert (reader.units_decoded, reader.bytes_read) == (1, 2 * (3 * 8 + 4))


# Faults of the store ----------------------------------------------------------------------------------------


def pair_of(write_store, folder, *, zarr_format=3, group="", values=None, **options):
    """Write v0(n, k) of 12 x 4 floats in chunks of 3 x 2, or as told, and index(n)."""
    values = np.random.default_rng(1).normal(size=(12, 4)) if values is None else values
    v0 = {"dims": ("n", "k"), "values": values, "chunks": (3, 2), **options}
    index = vector(np.arange(values.shape[v0["dims"].index("n")]), 12)
    return write_store(Path(folder, "s.zarr"), {"v0": v0, "index": index}, zarr_format=zarr_format, group=group)


def read_all(path, unit_rows=3, **data):
    """Read unit by unit, and return v0 with the sample axis first."""
    samples = open_all(path, ["v0"], **data)
    plan = replace(plan_data(samples, replicas=1, seed=0), unit_rows=unit_rows, cell_rows=unit_rows)
    reader = UnitReader(samples, plan)
    return np.concatenate([reader.read(*plan.unit_range(unit))["v0"][1] for unit in range(plan.num_units)])


MISSING = {
    "v2": (2, {}, "v0/2.1"),
    "v3": (3, {}, "v0/c/2/1"),
    "sharded": (3, {"chunks": (1, 1), "shards": (3, 2)}, "v0/c/2/1"),
    "other axis": (3, {"dims": ("k", "n"), "chunks": (2, 2), "values": np.ones((4, 12))}, "v0/c/1/5"),
    "nested": (3, {"group": "a/b"}, "a/b/v0/c/2/1"),
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_missing_chunk_stops_reading_by_name(write_store, tmp_path, kind):
    zarr_format, options, key = MISSING[kind]
    path = pair_of(write_store, tmp_path, zarr_format=zarr_format, **options)
    (path / key).unlink()
    with pytest.raises(ChunkMissing, match=rf"chunk {key} of v0 is missing") as caught:
        read_all(path, group=options.get("group", ""))
    assert caught.value.code == 5


@pytest.mark.parametrize("kind", ["v2", "v3", "sharded"])
def test_a_missing_chunk_can_be_read_as_the_fill_value(write_store, tmp_path, kind):
    zarr_format, options, key = MISSING[kind]
    fill = 0.0 if kind == "v2" else -7.0  # another fill value of a v2 array marks missing values
    path = pair_of(write_store, tmp_path, zarr_format=zarr_format, fill_value=fill, **options)
    expected = zarr.open_group(path, mode="r")["v0"][...]
    expected[6:9, 2:4] = fill
    (path / key).unlink()
    np.testing.assert_array_equal(read_all(path, missing="fill"), expected)


def test_other_units_of_a_damaged_store_can_be_read(write_store, tmp_path):
    path = pair_of(write_store, tmp_path)
    (path / "v0/c/2/1").unlink()
    samples = open_all(path, ["v0"])
    plan = replace(plan_data(samples, replicas=1, seed=0), unit_rows=3, cell_rows=3)
    reader = UnitReader(samples, plan)
    assert [len(reader.read(*plan.unit_range(unit))["v0"][1]) for unit in (0, 1, 3)] == [3, 3, 3]
    with pytest.raises(ChunkMissing):
        reader.read(*plan.unit_range(2))
    assert reader.units_decoded == 3


CODECS = {
    "v2 none": (2, {"compressors": None}),
    "v2 blosc": (2, {"compressors": numcodecs.Blosc("lz4")}),
    "v2 zstd": (2, {"compressors": numcodecs.Zstd()}),
    "v2 gzip": (2, {"compressors": numcodecs.GZip()}),
    "v2 lz4": (2, {"compressors": numcodecs.LZ4()}),
    "v3 none": (3, {"compressors": None}),
    "v3 blosc": (3, {"compressors": BloscCodec()}),
    "v3 zstd": (3, {"compressors": ZstdCodec()}),
    "v3 gzip": (3, {"compressors": GzipCodec()}),
    "v3 crc32c": (3, {"compressors": [ZstdCodec(), Crc32cCodec()]}),
    "sharded none": (3, {"chunks": (1, 1), "shards": (3, 2), "compressors": None}),
    "sharded blosc": (3, {"chunks": (3, 1), "shards": (3, 2), "compressors": BloscCodec()}),
    "sharded zstd": (3, {"chunks": (1, 2), "shards": (3, 2), "compressors": ZstdCodec()}),
}
DAMAGE = {
    "last byte lost": lambda stored: stored[:-1],
    "half lost": lambda stored: stored[: len(stored) // 2],
    "first bytes only": lambda stored: stored[:3],
    "empty": lambda stored: b"",
    "garbage": lambda stored: np.random.default_rng(2).bytes(len(stored)),
    "other garbage": lambda stored: np.random.default_rng(3).bytes(len(stored) // 2 + 5),
}
HARMLESS = [("v2 none", "garbage"), ("v3 none", "garbage")]  # without a codec any bytes of that length are numbers


@pytest.mark.parametrize("missing", ["error", "fill"])
@pytest.mark.parametrize(
    ("codec", "damage"), [pair for pair in itertools.product(CODECS, DAMAGE) if pair not in HARMLESS]
)
def test_a_damaged_chunk_stops_reading_by_name(write_store, tmp_path, codec, damage, missing):
    zarr_format, options = CODECS[codec]
    path = pair_of(write_store, tmp_path, zarr_format=zarr_format, **options)
    key = "v0/2.1" if zarr_format == 2 else "v0/c/2/1"
    (path / key).write_bytes(DAMAGE[damage]((path / key).read_bytes()))
    for unit_rows in (3, 12):
        with pytest.raises(ChunkUndecodable, match=rf"chunk {key} of v0 cannot be decoded: .+") as caught:
            read_all(path, unit_rows, missing=missing, non_finite="allow")
        assert caught.value.code == 5


@pytest.mark.parametrize("dims", [("n", "k"), ("k", "n")])
def test_the_damaged_chunk_is_named_among_many(write_store, tmp_path, chunk_files, dims):
    values = np.ones((12, 5)) if dims == ("n", "k") else np.ones((5, 12))
    path = pair_of(write_store, tmp_path, values=values, dims=dims, chunks=(2, 2), group="g")
    for key in chunk_files(path, "g/v0"):
        stored = (path / key).read_bytes()
        (path / key).write_bytes(stored[:-2])
        with pytest.raises(ChunkUndecodable, match=rf"chunk {key} of v0 cannot"):
            read_all(path, 4, group="g")
        (path / key).write_bytes(stored)
    assert read_all(path, 4, group="g").sum() == 60


def test_a_read_that_fails_once_blames_the_storage(write_store, tmp_path):
    samples = open_all(pair_of(write_store, tmp_path), ["v0"])
    reader = UnitReader(samples, plan_data(samples, replicas=1, seed=0))
    array, failures = reader._arrays["v0"], iter([OSError("stale file handle")])

    class Flaky:
        def __getattr__(self, name):
            return getattr(array, name)

        def __getitem__(self, selection):
            for error in failures:
                raise error
            return array[selection]

    reader._arrays["v0"] = Flaky()
    with pytest.raises(ChunkUndecodable, match="could not be read: stale file handle") as caught:
        reader.read(*reader.plan.unit_range(0))
    assert "storage is unreliable" in caught.value.hint


NON_FINITE = {
    "v2": (2, "float64", ("n", "k"), {}, r"v0\[7, 3\] in chunk 2.1"),
    "v3": (3, "float32", ("n", "k"), {}, r"v0\[7, 3\] in chunk c/2/1"),
    "half": (3, "float16", ("n", "k"), {}, r"v0\[7, 3\] in chunk c/2/1"),
    "sharded": (3, "float32", ("n", "k"), {"chunks": (1, 1), "shards": (3, 4)}, r"v0\[7, 3\] in chunk c/2/0"),
    "other axis": (3, "float32", ("k", "n"), {"chunks": (2, 3)}, r"v0\[3, 7\] in chunk c/1/2"),
}


@pytest.mark.parametrize(("value", "text"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize("kind", NON_FINITE)
def test_a_value_that_is_not_finite_stops_reading_by_name(write_store, tmp_path, kind, value, text):
    zarr_format, dtype, dims, options, said = NON_FINITE[kind]
    values = np.ones((12, 4), dtype)
    values[7, 3] = value
    stored = values if dims == ("n", "k") else values.T
    path = pair_of(write_store, tmp_path, zarr_format=zarr_format, values=stored, dims=dims, **options)
    with pytest.raises(NonFiniteData, match=rf"{said} is {text}\.") as caught:
        read_all(path)
    assert caught.value.code == 5
    assert 'non_finite = "allow"' in caught.value.hint
    np.testing.assert_array_equal(read_all(path, non_finite="allow"), values)


def test_a_float64_beyond_float32_is_not_finite(write_store, tmp_path):
    values = np.array([[1.0, 2.0], [3.0, -1e300]])
    path = pair_of(write_store, tmp_path, values=values, chunks=(1, 2))
    with pytest.raises(NonFiniteData, match=r"v0\[1, 1\] in chunk c/1/0 is -1e\+300, which float32 cannot hold"):
        read_all(path, 1)
    samples = open_all(path, ["v0"], non_finite="allow")
    plan = plan_data(samples, replicas=1, seed=0)
    (batch,) = batches(UnitReader(samples, plan), *train_partitions(plan), [2], shuffle=False)
    assert batch.inputs[0].tolist() == [[1.0, 2.0], [3.0, -np.inf]]


def test_faults_come_out_of_the_stream_of_batches(write_store, tmp_path):
    path = pair_of(write_store, tmp_path)
    samples = open_all(path, ["v0"])
    plan = replace(plan_data(samples, replicas=1, seed=0), unit_rows=3, cell_rows=3)
    (path / "v0/c/2/0").unlink()
    stream = read_batches(UnitReader(samples, plan), *train_partitions(plan), START, [3] * 4, replica=0, shuffle=False)
    assert [len(next(stream).inputs[0]) for _ in range(2)] == [3, 3]
    with pytest.raises(ChunkMissing, match="v0/c/2/0"):
        next(stream)
