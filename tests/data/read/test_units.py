"""A unit as it is read: rows, dtypes, and values that are not finite."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.plan.units import Box
from dtrain.data.read.units import UnitReader
from dtrain.errors import ChunkMissing, NonFiniteData
from tests.data.helpers import (
    batches,
    by_sample,
    only_partition,
    open_all,
    reader_of,
    readers,
    stores,
    vector,
)
from tests.sampling import examples


@examples(40)
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
            decoded += rows.nbytes * (variable not in samples.preloaded)
            np.testing.assert_array_equal(
                reader.read_rows(variable, Box(first, stop)), by_sample(arrays, variable.name)[first:stop]
            )
        out = {v.name: np.full((stop - first + 40, *v.row_shape), 7, v.kept_dtype) for v in samples.variables}
        assert reader.read_into(Box(first, stop), out) == decoded
        for name, (_, rows) in unit.items():
            np.testing.assert_array_equal(out[name][: len(rows)], rows)
            assert (out[name][len(rows) :] == np.asarray(7, rows.dtype)).all()  # what is beyond is left alone


# Boxes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def volume(write_store, tmp_path):
    """A function that writes v0(n, y, x) of 12 x 9 x 10, v1(n, x) and index(n); returns (path, values)."""

    def write(**options):
        values = np.arange(12 * 9 * 10, dtype="float32").reshape(12, 9, 10)
        arrays = {
            "v0": {"dims": ("n", "y", "x"), "values": values, "chunks": (3, 4, 5), **options},
            "v1": {"dims": ("n", "x"), "values": values[:, 0], "chunks": (4, 10)},
            "index": {"dims": ("n",), "values": np.arange(12), "chunks": (3,)},
        }
        return write_store(tmp_path / "s", arrays), values

    return write


@pytest.mark.parametrize("which", ["numcodecs", "zarrs", "zarr"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_block_of_a_box_is_read_by_every_reader(volume, sharded, which):
    path, values = volume(**({"shards": (6, 12, 10)} if sharded else {}))
    samples = open_all(path, ["v0", "v1"])
    reader = UnitReader(samples, which)
    assert {chosen for chosen, _ in reader.readers.values()} == {which}
    for box in (Box(3, 7, (("y", 1, 3), ("x", 2, 9))), Box(0, 12, (("x", 5, 10),)), Box(5, 6, (("y", 8, 9),))):
        cut = {dim: slice(start, stop) for dim, start, stop in box.block}
        y, x = cut.get("y", slice(None)), cut.get("x", slice(None))
        read = reader.read(box)
        np.testing.assert_array_equal(read["v0"][1], values[box.start : box.stop, y, x])
        np.testing.assert_array_equal(read["v1"][1], values[box.start : box.stop, 0, x])
    np.testing.assert_array_equal(reader.read(Box(0, 5))["v0"][1], values[:5])


@pytest.mark.parametrize("which", ["numcodecs", "zarr"])
def test_a_block_is_counted_in_what_is_selected(volume, which):
    path, values = volume()
    samples = open_all(path, ["v0", "v1"], isel={"y": {"start": 1, "stop": 8, "step": 2}})
    read = UnitReader(samples, which).read(Box(3, 7, (("y", 1, 3), ("x", 2, 9))))
    np.testing.assert_array_equal(read["v0"][1], values[3:7, 1:8:2][:, 1:3, 2:9])


@pytest.mark.parametrize("which", ["numcodecs", "zarrs", "zarr"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_missing_chunk_matters_to_the_boxes_that_touch_it(volume, sharded, which):
    options = {"shards": (3, 8, 5)} if sharded else {}
    path, values = volume(**options)
    (path / "v0/c/1/0/1").unlink()  # rows 3 to 5, the first four (or eight) of y, the last five of x
    reader = UnitReader(open_all(path, ["v0", "v1"]), which)
    for block in ((("x", 0, 5),), (("y", 8, 9), ("x", 5, 10))):
        cut = {dim: slice(start, stop) for dim, start, stop in block}
        rows = reader.read(Box(3, 6, block))["v0"][1]
        np.testing.assert_array_equal(rows, values[3:6, cut.get("y", slice(None)), cut["x"]])
    with pytest.raises(ChunkMissing, match="chunk v0/c/1/0/1 of v0 is missing"):
        reader.read(Box(5, 6, (("y", 3, 4), ("x", 9, 10))))


@pytest.mark.parametrize("which", ["numcodecs", "zarrs", "zarr"])
def test_a_missing_inner_chunk_matters_to_the_boxes_that_touch_it(tmp_path, which):
    values = np.ones((6, 8), "float32")
    values[2:4, 4:6] = 0  # the fill value: zarr leaves this chunk out
    root = zarr.create_group(tmp_path / "s")
    layouts = {"v0": {"chunks": (2, 2), "shards": (6, 8)}, "index": {"chunks": (6,)}}
    with zarr.config.set({"array.write_empty_chunks": False}):
        for name, array in {"v0": values, "index": np.arange(1, 7, dtype="float32")}.items():
            options = {"dimension_names": ("n", "k")[: array.ndim], "fill_value": 0, **layouts[name]}
            root.create_array(name, shape=array.shape, dtype="float32", **options)[...] = array
    reader = UnitReader(open_all(tmp_path / "s", ["v0"]), which)
    assert reader.read(Box(2, 4, (("k", 0, 4),)))["v0"][1].sum() == 8
    assert reader.read(Box(4, 6, (("k", 4, 8),)))["v0"][1].sum() == 8
    with pytest.raises(ChunkMissing, match=r"chunk \(1, 2\) of v0, in shard v0/c/0/0, is missing"):
        reader.read(Box(3, 4, (("k", 5, 6),)))


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


def test_a_reader_returns_how_many_bytes_it_decodes(write_store, tmp_path):
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
    assert reader.read_into(Box(8, 10), {name: rows for name, (_, rows) in unit.items()}) == 2 * (3 * 4 + 4)


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
