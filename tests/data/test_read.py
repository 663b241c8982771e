"""A unit as it is read: rows, dtypes, values that are not finite, and who reads it."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import TransposeCodec

from dtrain.data.plan.units import Box
from dtrain.data.read.units import UnitReader, choose_readers
from dtrain.data.source import open_samples
from dtrain.errors import InvalidConfig, NonFiniteData
from tests.data.helpers import (
    WHOLE,
    batches,
    by_sample,
    only_partition,
    open_all,
    reader_of,
    readers,
    stores,
    vector,
)


@settings(max_examples=40)
@given(
    stores(),
    readers,
    st.sampled_from([0, 2, [-2, 1]]),
    st.sampled_from([0, [3, 1]]),
    st.data(),
)
def test_a_unit_holds_the_rows_that_its_anchors_need(write_store, store, which, inputs, targets, data):
    with tempfile.TemporaryDirectory() as folder:
        zarr_format, arrays = store
        path = write_store(Path(folder, "s"), arrays, zarr_format=zarr_format)
        samples = open_all(path, arrays, input_offsets=inputs, target_offsets=targets)
        reader = reader_of(samples, which)
        low, high = samples.reach()
        if samples.num_samples <= high - low:
            return
        first = data.draw(st.integers(max(0, -low), samples.num_samples - 1 - max(0, high)))
        stop = data.draw(st.integers(first + 1, samples.num_samples - max(0, high)))
        unit = reader.read(Box(first, stop))
        assert set(unit) == set(arrays)
        decoded = 0
        for variable in samples.variables:
            start, rows = unit[variable.name]
            low, high = samples.reach(variable.name)
            expected = by_sample(arrays, variable.name)[first + low : stop + high]
            assert start == first + low
            assert rows.dtype == ("float32" if expected.dtype == "float64" else expected.dtype)
            np.testing.assert_array_equal(rows, expected)
            decoded += rows.nbytes * (variable not in samples.kept_whole)
            np.testing.assert_array_equal(
                reader.read_rows(variable, first, stop), by_sample(arrays, variable.name)[first:stop]
            )
        out = {v.name: np.full((stop - first + 40, *v.row_shape), 7, v.kept_dtype) for v in samples.variables}
        reader.read_into(Box(first, stop), out)
        for name, (_, rows) in unit.items():
            np.testing.assert_array_equal(out[name][: len(rows)], rows)
            assert (out[name][len(rows) :] == np.asarray(7, rows.dtype)).all()  # what is beyond is left alone
        assert reader.units_decoded == 2
        assert reader.bytes_decoded == 2 * decoded


# Dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "kept", "seen"),
    [
        *((dtype, "float32", "float32") for dtype in ("float32", "float64", ">f4", ">f8")),
        ("float16", "float16", "float32"),
        *((d, d, "int64") for d in ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")),
        (">i4", "int32", "int64"),
    ],
)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_floats_become_float32_and_integers_int64(write_store, tmp_path, zarr_format, stored, kept, seen):
    values = np.array([0, 1, 1, 0, 1, 100], stored)
    arrays = {"v0": vector(values, 4), "index": vector(np.arange(6), 3)}
    path = write_store(tmp_path / "s", arrays, zarr_format=zarr_format)
    samples = open_all(path, ["v0"])
    assert samples.variable("v0").model_dtype == np.dtype(seen)
    reader = UnitReader(samples)
    assert reader.read(Box(0, 6))["v0"][1].dtype == np.dtype(kept)
    _, partition = only_partition(samples)
    (batch,) = batches(reader, partition, [6], shuffle=False)
    assert batch.inputs[0].dtype == np.dtype(seen)
    assert batch.inputs[0].tolist() == [0, 1, 1, 0, 1, 1 if stored == "bool" else 100]


@pytest.mark.parametrize("dtype", ["uint64", "int64", "uint32"])
def test_large_integers_keep_their_value(write_store, tmp_path, dtype):
    values = np.array([0, np.iinfo("int64").max if dtype != "uint32" else 2**32 - 1], dtype)
    path = write_store(tmp_path / "s", {"v0": vector(values, 2), "index": vector(np.arange(2), 2)})
    samples = open_all(path, ["v0"])
    (batch,) = batches(UnitReader(samples), only_partition(samples)[1], [2], shuffle=False)
    assert batch.inputs[0].tolist() == values.tolist()


def test_float64_is_rounded_to_float32(write_store, tmp_path):
    values = np.array([1 / 3, 1e-50, -1e30])
    path = write_store(tmp_path / "s", {"v0": vector(values, 2), "index": vector(np.arange(3), 2)})
    samples = open_all(path, ["v0"])
    (batch,) = batches(UnitReader(samples), only_partition(samples)[1], [3], shuffle=False)
    assert batch.inputs[0].tolist() == [0.3333333432674408, 0.0, -1.0000000150474662e30]


def test_a_reader_counts_what_it_decodes(write_store, tmp_path):
    arrays = {
        "v0": {"dims": ("k", "n"), "values": np.zeros((3, 10), "float64"), "chunks": (2, 4)},
        "index": vector(np.arange(10, dtype="int32"), 4),
    }
    samples = open_all(write_store(tmp_path / "s", arrays), arrays)
    reader = UnitReader(samples)
    unit = reader.read(Box(8, 10))  # the last one of 4 rows: samples 8 and 9
    assert {name: (base, array.shape, str(array.dtype)) for name, (base, array) in unit.items()} == {
        "v0": (8, (2, 3), "float32"),
        "index": (8, (2,), "int32"),
    }
    assert (reader.units_decoded, reader.bytes_decoded) == (1, 2 * (3 * 4 + 4))


# Values that are not finite ---------------------------------------------------------------------------------

NON_FINITE = {
    "v2": (2, "float64", ("n", "k"), {}, r"v0\[7, 3\] in chunk v0/2.1"),
    "v3": (3, "float32", ("n", "k"), {}, r"v0\[7, 3\] in chunk v0/c/2/1"),
    "half": (3, "float16", ("n", "k"), {}, r"v0\[7, 3\] in chunk v0/c/2/1"),
    "sharded": (3, "float32", ("n", "k"), {"chunks": (1, 1), "shards": (3, 4)}, r"v0\[7, 3\] in chunk v0/c/2/0"),
    "other axis": (3, "float32", ("k", "n"), {"chunks": (2, 3)}, r"v0\[3, 7\] in chunk v0/c/1/2"),
    "nested": (3, "float32", ("n", "k"), {"group": "a/b"}, r"v0\[7, 3\] in chunk a/b/v0/c/2/1"),
}


def pair_of(write_store, folder, *, zarr_format=3, group="", values=None, **options):
    """Write v0(n, k) of 12 x 4 floats in chunks of 3 x 2, or as told, and index(n)."""
    v0 = {"dims": ("n", "k"), "values": values, "chunks": (3, 2), **options}
    index = vector(np.arange(values.shape[v0["dims"].index("n")]), 12)
    return write_store(Path(folder, "s.zarr"), {"v0": v0, "index": index}, zarr_format=zarr_format, group=group)


def read_all(path, unit_rows=3, **data):
    """Read unit by unit, and return v0 with the sample axis first."""
    samples = open_all(path, ["v0"], **data)
    reader = UnitReader(samples)
    starts = range(0, samples.num_samples, unit_rows)
    return np.concatenate([reader.read(Box(a, min(a + unit_rows, samples.num_samples)))["v0"][1] for a in starts])


@pytest.mark.parametrize(("value", "text"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf")])
@pytest.mark.parametrize("kind", NON_FINITE)
def test_a_value_that_is_not_finite_stops_reading_by_name(write_store, tmp_path, kind, value, text):
    zarr_format, dtype, dims, options, said = NON_FINITE[kind]
    values = np.ones((12, 4), dtype)
    values[7, 3] = value
    stored = values if dims == ("n", "k") else values.T
    path = pair_of(write_store, tmp_path, zarr_format=zarr_format, values=stored, dims=dims, **options)
    group = options.get("group", "")
    with pytest.raises(NonFiniteData, match=rf"{said} is {text}\.") as caught:
        read_all(path, group=group)
    assert caught.value.code == 5
    assert 'non_finite = "allow"' in caught.value.hint
    np.testing.assert_array_equal(read_all(path, non_finite="allow", group=group), values)


def test_a_value_that_is_not_selected_does_not_matter(write_store, tmp_path):
    values = np.ones((12, 4))
    values[7, 3] = np.nan
    path = pair_of(write_store, tmp_path, values=values)
    assert read_all(path, isel={"k": {"stop": 3}}).sum() == 36
    with pytest.raises(NonFiniteData, match=r"v0\[7, 3\] in chunk v0/c/2/1 is nan"):
        read_all(path, isel={"k": {"start": 1, "stop": 4, "step": 2}})
    with pytest.raises(NonFiniteData, match=r"v0\[7, 3\] in chunk v0/c/2/1 is nan"):
        read_all(path, isel={"k": 3})


def test_a_float64_beyond_float32_is_not_finite(write_store, tmp_path):
    values = np.array([[1.0, 2.0], [3.0, -1e300]])
    path = pair_of(write_store, tmp_path, values=values, chunks=(1, 2))
    with pytest.raises(NonFiniteData, match=r"v0\[1, 1\] in chunk v0/c/1/0 is -1e\+300, which float32 cannot hold"):
        read_all(path, 1)
    samples = open_all(path, ["v0"], non_finite="allow")
    (batch,) = batches(UnitReader(samples), only_partition(samples)[1], [2], shuffle=False)
    assert batch.inputs[0].tolist() == [[1.0, 2.0], [3.0, -np.inf]]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_large_numbers_whose_sum_overflows_are_finite(write_store, tmp_path, dtype):
    values = np.full((12, 4), np.finfo(dtype).max if dtype != "float64" else 3e38, dtype)
    values[::2] *= -1
    values[0] *= -1
    path = pair_of(write_store, tmp_path, values=values)
    np.testing.assert_array_equal(read_all(path), values.astype("float32"))


def test_a_number_that_is_not_a_number_of_another_kind_raises_no_warning(write_store, tmp_path):
    # a signalling NaN, as a flipped bit makes it
    values = np.ones((12, 4))
    values.view("uint64")[7, 3] = 0x7FF0000000000001
    path = pair_of(write_store, tmp_path, values=values, compressors=None)
    with pytest.raises(NonFiniteData, match=r"v0\[7, 3\] in chunk v0/c/2/1 is nan"):
        read_all(path)


def test_a_static_variable_is_checked_and_named(write_store, tmp_path):
    height = np.ones((5, 4), "float32")
    height[3, 1] = np.inf
    arrays = {
        "v0": vector(np.arange(4.0), 4),
        "height": {"dims": ("y", "x"), "values": height, "chunks": (2, 2)},
        "index": vector(np.arange(4), 4),
    }
    path = write_store(tmp_path / "s", arrays)
    with pytest.raises(NonFiniteData, match=r"height\[3, 1\] in chunk height/c/1/0 is inf"):
        UnitReader(open_all(path, arrays)).statics  # noqa: B018
    statics = UnitReader(open_all(path, arrays, non_finite="allow", isel={"y": {"start": 2, "stop": 4}})).statics
    assert set(statics) == {"height"}
    np.testing.assert_array_equal(statics["height"], height[2:4])


@pytest.mark.parametrize("which", ["zarr", "auto"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "int16"])
def test_a_variable_without_dimensions_is_read(write_store, tmp_path, dtype, which):
    arrays = {
        "v0": vector(np.arange(4.0), 4),
        "place": {"dims": (), "values": np.array(7, dtype), "chunks": ()},
        "index": vector(np.arange(4), 4),
    }
    samples = open_all(write_store(tmp_path / "s", arrays), arrays)
    reader, place = UnitReader(samples, which), samples.variable("place")
    out = np.full((), 99, place.kept_dtype)
    reader._fill(place, place.select, out)
    assert out[()] == 7


# Who reads --------------------------------------------------------------------------------------------------


def two(write_store, folder, zarr_format=3, **options):
    """Write v0 as told, and an index that zarrs reads."""
    index = vector(np.arange(8), 4)
    if zarr_format == 2:
        index["fill_value"] = 0
    v0 = {"dims": ("n", "k"), "values": np.arange(24.0, dtype="float32").reshape(8, 3), "chunks": (4, 2), **options}
    return write_store(Path(folder, "s"), {"v0": v0, "index": index}, zarr_format=zarr_format)


USUAL = "the store is local and its codecs are the usual ones"
ODD = {
    "byte order": (2, {"values": np.zeros((8, 3), ">f4"), "fill_value": 0}, "its byte order is >"),
    "order": (2, {"order": "F", "fill_value": 0}, "its order is F"),
    "fill value": (2, {}, "it has no fill value"),
    "codec": (2, {"compressors": numcodecs.LZ4(), "fill_value": 0}, "codec lz4"),
    "filter": (2, {"filters": [numcodecs.Delta("<f4")], "fill_value": 0}, "codec delta"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_what_zarrs_does_not_read_is_read_by_zarr(write_store, tmp_path, kind):
    zarr_format, options, why = ODD[kind]
    path = two(write_store, tmp_path, zarr_format, **options)
    samples = open_all(path, ["v0"])
    readers = choose_readers(samples, "auto")
    assert readers["v0"] == (("numcodecs", USUAL) if kind == "fill value" else ("zarr", why))
    assert readers["index"][0] == "numcodecs"
    stored = zarr.open_group(path, mode="r")["v0"][...]
    np.testing.assert_array_equal(UnitReader(samples).read(Box(0, 8))["v0"][1], stored)
    with pytest.raises(InvalidConfig, match=f'data.reader = "zarrs" does not read v0: {why}') as caught:
        UnitReader(samples, "zarrs")
    assert caught.value.code == 3


def test_a_reader_is_taken_that_is_asked_for_and_reads_the_store(write_store, tmp_path):
    samples = open_all(two(write_store, tmp_path), ["v0"])
    assert set(choose_readers(samples, "auto").values()) == {("numcodecs", USUAL)}
    for asked in ("numcodecs", "zarrs", "zarr"):
        assert set(choose_readers(samples, asked).values()) == {(asked, "asked for")}
    with pytest.raises(InvalidConfig, match='data.reader = "numcodecs" does not read v0: its order is F'):
        UnitReader(open_all(two(write_store, tmp_path / "f", 2, order="F"), ["v0"]), "numcodecs")


def test_what_numcodecs_does_not_read_is_read_by_zarrs(write_store, tmp_path):
    transposed = {"filters": [TransposeCodec(order=(1, 0))], "compressors": None}
    path = two(write_store, tmp_path, 3, **transposed)
    samples = open_all(path, ["v0"])
    assert choose_readers(samples, "auto")["v0"] == ("zarrs", "codec transpose")
    for which in ("auto", "zarr"):
        np.testing.assert_array_equal(UnitReader(samples, which).read(Box(2, 7))["v0"][1], read_zarr(path)[2:7])
    samples = open_all(path, ["v0"], isel={"k": {"start": 0, "stop": 3, "step": 2}})
    assert choose_readers(samples, "auto")["v0"] == ("zarr", "codec transpose")


def read_zarr(path):
    return zarr.open_group(path, mode="r")["v0"][...]


@pytest.mark.parametrize(
    ("chunk", "shard", "which"), [(2, 512, "zarrs"), (2, 256, "numcodecs"), (4000, 8000, "numcodecs")]
)
def test_many_small_chunks_in_shards_are_read_by_zarrs(write_store, tmp_path, chunk, shard, which):
    v0 = {"dims": ("n", "k"), "values": np.ones((8000, 3)), "chunks": (chunk, 3), "shards": (shard, 3)}
    path = write_store(tmp_path / "s", {"v0": v0, "index": vector(np.arange(8000), 8000)})
    samples = open_all(path, ["v0"])
    assert choose_readers(samples, "auto")["v0"][0] == which
    assert UnitReader(samples).read(Box(2000, 4000))["v0"][1].sum() == 6000


def test_many_small_chunks_that_zarrs_does_not_read_are_read_by_numcodecs(write_store, tmp_path, monkeypatch):
    v0 = {"dims": ("n", "k"), "values": np.arange(6144.0).reshape(2048, 3), "chunks": (2, 3), "shards": (1024, 3)}
    path = write_store(tmp_path / "s", {"v0": v0, "index": vector(np.arange(2048), 2048)})
    with_step = open_all(path, ["v0"], isel={"k": {"start": 0, "stop": 3, "step": 2}})
    assert choose_readers(with_step, "auto")["v0"] == ("numcodecs", USUAL)
    assert UnitReader(with_step).read(Box(1, 3))["v0"][1].tolist() == [[3, 5], [6, 8]]
    samples = open_all(path, ["v0"])
    assert choose_readers(samples, "auto")["v0"] == ("zarrs", "its shards hold many small chunks")
    monkeypatch.setitem(sys.modules, "zarrs", None)
    assert choose_readers(samples, "auto")["v0"] == ("numcodecs", USUAL)


@pytest.mark.parametrize(
    ("chunk", "width", "count", "which"),
    [
        (1, 4, 256, "zarrs"),
        (1, 4, 255, "numcodecs"),
        (1, 8191, 256, "zarrs"),  # just less than 32 KiB a chunk, and than 8 MiB a shard
        (1, 8192, 256, "numcodecs"),
        (1, 7000, 299, "zarrs"),
        (1, 7000, 300, "numcodecs"),  # more than 8 MiB: parts are read
    ],
)
def test_shards_of_many_small_chunks_are_left_to_zarrs_up_to_8_mib(write_store, tmp_path, chunk, width, count, which):
    root = zarr.create_group(tmp_path / "s")
    for name, row in (("v0", (width,)), ("index", ())):
        shape = (count, *row)
        root.create_array(
            name,
            shape=shape,
            dtype="float32",
            chunks=(chunk, *row) if row else (count,),
            shards=shape if row else None,
            dimension_names=("n", "k")[: len(shape)],
        )
    samples = open_all(tmp_path / "s", ["v0"])
    assert choose_readers(samples, "auto")["v0"][0] == which


def test_a_step_is_not_read_by_zarrs(write_store, tmp_path):
    path = two(write_store, tmp_path)
    samples = open_all(path, ["v0"], isel={"k": {"start": 0, "stop": 3, "step": 2}})
    assert choose_readers(samples, "auto")["v0"] == ("numcodecs", USUAL)
    with pytest.raises(InvalidConfig, match="it is read with a step"):
        choose_readers(samples, "zarrs")
    static = open_samples(path, inputs=["v0"], targets=["index"], sample_dim="n", split=WHOLE)
    assert choose_readers(static, "zarrs")["v0"][0] == "zarrs"


def test_a_small_variable_is_read_by_zarr_although_another_reader_is_asked_for(write_store, tmp_path):
    height = np.arange(6.0, dtype="float32").reshape(2, 3)
    arrays = {
        "v0": vector(np.arange(4.0), 4),
        "height": {"dims": ("y", "x"), "values": height, "chunks": (2, 2)},
        "index": vector(np.arange(4), 4),
    }
    samples = open_all(write_store(tmp_path / "s", arrays), arrays)
    assert choose_readers(samples, "zarrs") == {
        "v0": ("zarrs", "asked for"),
        "height": ("zarr", "it is small"),
        "index": ("zarrs", "asked for"),
    }
    assert choose_readers(samples, "auto")["height"] == ("numcodecs", USUAL)
    for which in ("zarrs", "zarr", "numcodecs", "auto"):
        np.testing.assert_array_equal(UnitReader(samples, which).statics["height"], height)


def test_without_zarrs_zarr_reads(write_store, tmp_path, monkeypatch):
    samples = open_all(two(write_store, tmp_path), ["v0"])
    monkeypatch.setitem(sys.modules, "zarrs", None)
    assert set(choose_readers(samples, "auto").values()) == {("numcodecs", USUAL)}
    with pytest.raises(InvalidConfig, match="zarrs is not installed"):
        UnitReader(samples, "zarrs")


def test_opening_with_zarrs_leaves_the_settings_of_the_process_alone(write_store, tmp_path):
    before = zarr.config.get("codec_pipeline")
    UnitReader(open_all(two(write_store, tmp_path), ["v0"]), "zarrs").read(Box(0, 8))
    assert zarr.config.get("codec_pipeline") == before
