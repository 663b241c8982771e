"""Packed variables and missing values: decoded as xarray decodes them."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import assume, example, given
from hypothesis import strategies as st
from xarray.backends.zarr import FillValueCoder

from dtrain.data.encoding import Scaling
from dtrain.data.plan.units import Box
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import InvalidConfig, NonFiniteData, UnsuitableVariable
from tests.data.helpers import (
    WHOLE,
    batches,
    only_partition,
    reader_of,
    vector,
)
from tests.sampling import examples

INTEGERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
FLOATS = ["float16", "float32", "float64"]


def numbers_of(dtype):
    """Numbers that a dtype holds exactly, special ones among them."""
    kind = np.dtype(dtype)
    if kind.kind == "f":
        few = [0.0, -0.0, 1.5, -2.25, 1e4, float(np.finfo(dtype).max), float(np.finfo(dtype).min), np.nan, np.inf]
        return st.sampled_from([*few, float(np.dtype(dtype).type(-999.9))])
    info = np.iinfo(dtype)
    few = {info.min, info.max, info.min + 2, info.max - 1, 0, 1, 7, 100, 126}
    return st.sampled_from(sorted(few)) | st.integers(info.min, info.max)


@st.composite
def packed(draw, dtypes=(*INTEGERS, *FLOATS)):
    """Draw (zarr format, values, attributes): CF attributes in any combination."""
    dtype = draw(st.sampled_from(dtypes))
    numbers = numbers_of(dtype)
    attributes = {}
    if draw(st.booleans()):
        attributes["scale_factor"] = draw(st.sampled_from([0.1, 2.0, -0.5, 1e-3, 1 / 3]))
    if draw(st.booleans()):
        attributes["add_offset"] = draw(st.sampled_from([0.0, 273.15, -1e4, 1e-7]))
    marks = draw(st.lists(numbers, max_size=2))
    for name, mark in zip(draw(st.permutations(["_FillValue", "missing_value"])), marks, strict=False):
        attributes[name] = mark
    if np.dtype(dtype).kind in "iu" and draw(st.booleans()):
        attributes["_Unsigned"] = draw(st.sampled_from(["true", "false"]))
    values = draw(st.lists(numbers | st.sampled_from(marks) if marks else numbers, min_size=1, max_size=12))
    return draw(st.sampled_from([2, 3])), np.array(values, dtype), attributes


def write(write_store, folder, zarr_format, values, attributes):
    """Write x(n) with its attributes as xarray writes them, and index(n)."""
    attributes = dict(attributes)
    options = {}
    fill = attributes.pop("_FillValue", None)
    if fill is not None and zarr_format == 2:  # there the fill value of Zarr is the one of CF
        options["fill_value"] = values.dtype.type(fill)
    elif fill is not None:
        attributes["_FillValue"] = FillValueCoder.encode(fill, values.dtype)
    arrays = {
        "x": vector(values, 5, attributes=attributes, **options),
        "index": vector(np.arange(len(values)), 5),
    }
    return write_store(Path(folder, "s"), arrays, zarr_format=zarr_format)


def as_xarray_decodes(path):
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of several fill values, and of casts of what is masked
        dataset = xr.open_dataset(path, engine="zarr", chunks=None, decode_times=False, consolidated=False)
        found = dataset["x"].values
        return found.astype("float32") if found.dtype.kind == "f" else found


def opened(path, **data):
    return open_samples(path, inputs=["x"], targets=["index"], sample_dim="n", split=WHOLE, **data)


def as_dtrain_decodes(path, **options):
    samples = opened(path, non_finite="allow")
    _, partition = only_partition(samples)
    (batch,) = batches(reader_of(samples, **options), partition, [samples.num_samples], shuffle=False)
    return batch.inputs[0]


def is_packed(attributes):
    return "scale_factor" in attributes or "add_offset" in attributes


@pytest.mark.filterwarnings("error")  # numpy warns of casts that differ from processor to processor
@examples(200)
@given(packed())
@example((3, np.array([-1, 0, 5], "int8"), {"_FillValue": -1, "_Unsigned": "true"}))
@example((2, np.array([200, 0, 255], "uint8"), {"missing_value": 255, "_Unsigned": "false"}))
@example((3, np.array([-9223372036854775806, 5], "int64"), {"_FillValue": -9223372036854775806}))
@example((3, np.array([2**63 - 1, 2**63 - 2, 5], "int64"), {"missing_value": 2**63 - 1}))
@example((2, np.array([2**64 - 2, 7], "uint64"), {"_FillValue": 2**64 - 2, "scale_factor": 0.5}))
@example((3, np.array([np.nan, 1.0], "float32"), {"scale_factor": 0.5, "_FillValue": np.nan}))
def test_values_are_those_of_xarray(write_store, drawn):
    zarr_format, values, attributes = drawn
    # of a v2 array, 0 is what zarr writes by itself: without packing it says nothing of missing values
    assume(zarr_format == 3 or is_packed(attributes) or attributes.get("_FillValue") != 0)
    with tempfile.TemporaryDirectory() as folder:
        path = write(write_store, folder, zarr_format, values, attributes)
        try:
            expected = as_xarray_decodes(path)
        except (OverflowError, ValueError, TypeError):  # xarray does not understand them either
            return
        if expected.dtype.kind in "iu" and expected.max() > 2**63 - 1:
            with pytest.raises(UnsuitableVariable, match=r"x\[\d+\] in chunk x/.* is .*; the model sees int64"):
                as_dtrain_decodes(path)
            return
        found = as_dtrain_decodes(path)
        assert found.dtype == ("float32" if expected.dtype.kind == "f" else "int64")
        if values.dtype == "float16" and is_packed(attributes):  # xarray rounds to float16, beyond which is infinity
            kept = np.isfinite(expected)
            np.testing.assert_allclose(found[kept], expected[kept], rtol=2e-3, atol=1e-3)
        else:
            np.testing.assert_array_equal(found, expected)


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("dtype", "mark"),
    [
        ("int8", -999),
        ("uint8", -9999),
        ("int16", 1e20),
        ("uint8", 256),
        ("int16", 32768),
        ("uint16", -1),
        ("int8", 0.5),
    ],
)
@pytest.mark.parametrize("more", [{}, {"scale_factor": 0.5}])
@pytest.mark.filterwarnings("error")
def test_a_mark_that_the_dtype_cannot_hold_marks_nothing(write_store, tmp_path, dtype, mark, more):
    info = np.iinfo(dtype)
    values = np.arange(info.min, info.max + 1, max(1, info.max // 500)).astype(dtype)
    path = write(write_store, tmp_path, 3, values, {"missing_value": mark, **more})
    found = as_dtrain_decodes(path)
    np.testing.assert_array_equal(found, as_xarray_decodes(path))
    assert np.isfinite(found).all()


@examples(80)
@given(packed())
def test_a_missing_value_is_refused_by_name_unless_it_is_allowed(write_store, drawn):
    zarr_format, values, attributes = drawn
    assume(zarr_format == 3 or is_packed(attributes) or attributes.get("_FillValue") != 0)
    assume(values.dtype.kind != "u" and "_Unsigned" not in attributes)
    marks = [v for name, v in attributes.items() if name in ("_FillValue", "missing_value")]
    assume(all(abs(mark) < 2**31 for mark in marks if mark == mark))  # not what a float64 rounds
    missing = np.isin(values, [mark for mark in marks if mark == mark])
    scale, offset = attributes.get("scale_factor", 1.0), attributes.get("add_offset", 0.0)
    with np.errstate(over="ignore"):
        unpacked = (values.astype("float64") * scale + offset).astype("float32")
        bad = missing | ~np.isfinite(unpacked) | ~np.isfinite(values.astype("float32"))
    with tempfile.TemporaryDirectory() as folder:
        path = write(write_store, folder, zarr_format, values, attributes)
        samples = opened(path)
        reader = UnitReader(samples)
        if not bad.any():
            reader.read(Box(0, len(values)))
            return
        place = int(np.flatnonzero(bad)[0])
        with pytest.raises(NonFiniteData, match=rf"x\[{place}\] in chunk x/.*{place // 5} is ") as caught:
            reader.read(Box(0, len(values)))
        if not np.isnan(values[place]):  # NaN is named either way, whether or not it is a mark too
            marked = bool(missing[place] and np.isfinite(values[place]))
            assert ("which marks a missing value" in caught.value.message) == marked


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_the_place_and_the_stored_value_of_a_missing_one_are_named(write_store, tmp_path, zarr_format):
    values = np.arange(24, dtype="int16").reshape(12, 2)
    values[7, 1] = -32768
    options = {"fill_value": -32768} if zarr_format == 2 else {"attributes": {"_FillValue": -32768}}
    x = {"dims": ("n", "k"), "values": values, "chunks": (3, 1), **options}
    arrays = {"x": x, "index": vector(np.arange(12), 3)}
    path = write_store(tmp_path / "s", arrays, zarr_format=zarr_format)
    key = "x/2.1" if zarr_format == 2 else "x/c/2/1"
    with pytest.raises(NonFiniteData) as caught:
        UnitReader(opened(path)).read(Box(6, 9))
    assert f"x[7, 1] in chunk {key} is -32768, which marks a missing value." in caught.value.message
    assert caught.value.code == 5
    assert np.isnan(as_dtrain_decodes(path)[7, 1])


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32", "bool"])
def test_the_zero_that_zarr_fills_v2_arrays_with_marks_nothing(write_store, tmp_path, dtype):
    values = np.array([0, 1, 0, 1], dtype)
    arrays = {"x": vector(values, 2, fill_value=values.dtype.type(0)), "index": vector(np.arange(4), 2)}
    path = write_store(tmp_path / "s", arrays, zarr_format=2)
    samples = opened(path)
    assert samples.variable("x").encoding is None
    assert as_dtrain_decodes(path).tolist() == [0, 1, 0, 1]
    UnitReader(samples).read(Box(0, 4))


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_nan_as_fill_value_costs_nothing(tmp_path, zarr_format):
    data = xr.Dataset({"x": ("n", np.arange(4.0)), "index": ("n", np.arange(4))})
    data.to_zarr(tmp_path / "s", zarr_format=zarr_format, consolidated=False)  # xarray marks floats with NaN
    assert opened(tmp_path / "s").variable("x").encoding is None


@pytest.mark.parametrize("which", ["zarr", "zarrs", "auto"])
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_a_store_that_xarray_packed(tmp_path, zarr_format, which):
    rng = np.random.default_rng(0)
    values = rng.normal(280, 10, (30, 4))
    values[3, 2] = np.nan
    data = xr.Dataset({"x": (("n", "k"), values), "index": ("n", np.arange(30))})
    encoding = {"dtype": "int16", "scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -32768, "chunks": (7, 2)}
    data.to_zarr(tmp_path / "s", zarr_format=zarr_format, consolidated=False, encoding={"x": encoding})
    variable = opened(tmp_path / "s").variable("x")
    assert (variable.dtype, variable.kept_dtype, variable.model_dtype) == ("int16", np.int16, np.float32)
    assert variable.row_bytes == 8  # units are kept packed
    found = as_dtrain_decodes(tmp_path / "s", reader=which)
    np.testing.assert_array_equal(found, as_xarray_decodes(tmp_path / "s"))
    assert np.nanmax(np.abs(found - values)) < 0.006
    with pytest.raises(NonFiniteData, match=r"x\[3, 2\]"):
        reader_of(opened(tmp_path / "s"), which).read(Box(0, 30))


def test_a_packed_variable_in_windows_and_as_a_static_one(write_store, tmp_path):
    values = np.arange(40, dtype="int16").reshape(20, 2)
    attributes = {"scale_factor": 0.25, "add_offset": -3.0}
    arrays = {
        "x": {"dims": ("n", "k"), "values": values, "chunks": (4, 2), "attributes": attributes},
        "mask": {"dims": ("k",), "values": values[5], "chunks": (2,), "attributes": attributes},
        "index": vector(np.arange(20), 4),
    }
    samples = open_samples(
        write_store(tmp_path / "s", arrays),
        inputs=["x", "mask"],
        targets=["x", "index"],
        sample_dim="n",
        split=WHOLE,
        input_offsets=[-2, 0],
        target_offsets=1,
    )
    _, partition = only_partition(samples)
    decoded = (values * 0.25 - 3.0).astype("float32")
    for batch in batches(UnitReader(samples), partition, [5, 6, 6]):
        anchors = batch.targets[1] - 1
        np.testing.assert_array_equal(batch.inputs[0], decoded[anchors[:, None] + [-2, 0]])
        np.testing.assert_array_equal(batch.targets[0], decoded[anchors + 1])
        np.testing.assert_array_equal(batch.inputs[1], np.broadcast_to(decoded[5], (len(anchors), 2)))


@pytest.mark.parametrize("attributes", [{"scale_factor": "two"}, {"missing_value": "none"}, {"add_offset": [1, [2]]}])
def test_attributes_that_make_no_sense_are_refused(write_store, tmp_path, attributes):
    path = write(write_store, tmp_path, 3, np.zeros(4, "int16"), attributes)
    with pytest.raises(UnsuitableVariable, match="x: its CF attributes cannot be understood") as caught:
        opened(path)
    assert caught.value.code == 3


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_nan_among_the_attributes_is_not_read_by_zarrs(write_store, tmp_path, zarr_format):
    # Python writes it into JSON as NaN, which zarrs refuses
    path = write(write_store, tmp_path, zarr_format, np.arange(4.0), {"missing_value": np.nan, "valid_max": np.inf})
    for which in ("auto", "zarrs", "zarr"):
        reader = reader_of(opened(path), which)
        assert reader.read(Box(0, 4))["x"][1].tolist() == [0, 1, 2, 3]
        assert reader.readers["x"][0] == ("zarr" if which == "zarr" else "numcodecs")
    with pytest.raises(InvalidConfig, match='data.reader = "zarrs" does not read x'):
        UnitReader(opened(path), "zarrs")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32"])
@pytest.mark.parametrize("attributes", [{"scale_factor": 2}, {"add_offset": -3}, {"scale_factor": -5, "add_offset": 7}])
@pytest.mark.parametrize("more", [{}, {"_Unsigned": "true"}])
def test_integers_that_are_packed_by_integers(write_store, tmp_path, dtype, attributes, more):
    info = np.iinfo(dtype)
    path = write(write_store, tmp_path, 3, np.array([info.min, info.max, 4, 5], dtype), {**attributes, **more})
    expected, found = as_xarray_decodes(path), as_dtrain_decodes(path)
    assert found.dtype == ("int64" if "add_offset" not in attributes else "float32") == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_integers_that_are_packed_by_integers_with_missing_ones_are_floats(write_store, tmp_path):
    # xarray fails
    path = write(write_store, tmp_path, 3, np.array([3, 4], "int16"), {"scale_factor": 2, "missing_value": 4})
    np.testing.assert_array_equal(as_dtrain_decodes(path), np.array([6, np.nan], "float32"))


@pytest.mark.parametrize("attributes", [{"scale_factor": 100.0}, {"scale_factor": 100.0, "missing_value": np.nan}])
def test_float16_is_unpacked_beyond_float16(write_store, tmp_path, attributes):
    path = write(write_store, tmp_path, 3, np.array([60000, 0.1], "float16"), attributes)
    UnitReader(opened(path)).read(Box(0, 2))
    np.testing.assert_allclose(as_dtrain_decodes(path), [6e6, 9.9976], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_floats_that_are_packed_by_integers_stay_floats(write_store, tmp_path, dtype):
    # xarray makes integers of them, and loses what is behind the point
    path = write(write_store, tmp_path, 3, np.array([1.5, -2.25, np.inf], dtype), {"scale_factor": 2, "add_offset": 1})
    assert as_dtrain_decodes(path).tolist() == [4.0, -3.5, np.inf]


def test_integers_that_unpacking_may_make_too_large_are_refused(write_store, tmp_path):
    path = write(write_store, tmp_path, 3, np.arange(4), {"scale_factor": 10})
    with pytest.raises(UnsuitableVariable, match="unpacked int64 may reach -92233720368547758080, .* as floats"):
        opened(path)


@pytest.mark.parametrize("number", [0.25, [0.25], np.array(0.25).tolist()])
def test_a_list_of_one_number_is_that_number(write_store, tmp_path, number):
    # as netCDF's attributes come through some writers; xarray decodes them to objects
    path = write(write_store, tmp_path, 3, np.array([1, -3], "int16"), {"scale_factor": number, "add_offset": number})
    found = as_dtrain_decodes(path)
    assert (found.dtype, found.tolist()) == ("float32", [0.5, -0.5])


@pytest.mark.parametrize("number", [[0.1, 0.2], [], "0.1", True, np.nan, np.inf, None])
@pytest.mark.parametrize("key", ["scale_factor", "add_offset"])
def test_packing_that_is_no_number_is_refused(write_store, tmp_path, key, number):
    path = write(write_store, tmp_path, 3, np.arange(4, dtype="int16"), {key: number})
    with pytest.raises(UnsuitableVariable, match=f"x: its CF attributes cannot be understood: {key} = ") as caught:
        opened(path)
    assert caught.value.code == 3


@pytest.mark.parametrize("word", ["true", "True", "TRUE", True])
@pytest.mark.parametrize(("more", "decoded"), [({}, 255), ({"scale_factor": 0.5}, 127.5), ({"missing_value": 7}, 255)])
def test_unsigned_may_be_written_in_capitals_or_as_a_boolean(write_store, tmp_path, word, more, decoded):
    path = write(write_store, tmp_path, 3, np.array([-1], "int8"), {"_Unsigned": word, **more})
    assert as_dtrain_decodes(path).tolist() == [decoded]


@pytest.mark.parametrize("mark", [False, 1])
def test_bools_of_which_some_are_missing_are_floats(write_store, tmp_path, mark):
    path = write(write_store, tmp_path, 3, np.array([True, False]), {"missing_value": mark})
    found = as_dtrain_decodes(path)
    assert found.dtype == "float32"
    np.testing.assert_array_equal(found, [np.nan, 0] if mark else [1, np.nan])
    with pytest.raises(NonFiniteData, match="which marks a missing value"):
        UnitReader(opened(path)).read(Box(0, 2))


@pytest.mark.parametrize(("dtype", "mark"), [("float16", 1e20), ("float32", 1e40), ("float32", -1e300)])
@pytest.mark.filterwarnings("error")
def test_a_mark_beyond_a_float_dtype_marks_no_infinity(write_store, tmp_path, dtype, mark):
    path = write(write_store, tmp_path, 3, np.array([1, np.inf, -np.inf], dtype), {"missing_value": mark})
    np.testing.assert_array_equal(as_dtrain_decodes(path), [1, np.inf, -np.inf])


@pytest.mark.parametrize(
    ("values", "attributes", "said"),
    [
        (
            np.array([1, 2_000_000_000], "int32"),
            {"scale_factor": 1e30},
            "is 2000000000, unpacked 2e[+]39, which float32",
        ),
        (np.array([1, 2e9], "float32"), {"scale_factor": 1e30}, r"is 2000000000\.0, unpacked 2e[+]39, which float32"),
        (np.array([1, -2], "float64"), {"add_offset": -1e39}, "is 1[.]0, unpacked -1e[+]39, which float32"),
    ],
)
def test_what_unpacking_makes_infinite_is_refused_by_name(write_store, tmp_path, values, attributes, said):
    path = write(write_store, tmp_path, 3, values, attributes)
    with pytest.raises(NonFiniteData, match=said) as caught:
        UnitReader(opened(path)).read(Box(0, 2))
    assert caught.value.code == 5


@pytest.mark.parametrize("which", ["zarr", "zarrs", "auto"])
@pytest.mark.parametrize("dims", [("n", "k"), ("k", "n")])
def test_an_unsigned_integer_beyond_int64_is_refused_by_name(write_store, tmp_path, dims, which):
    values = np.arange(24, dtype="uint64").reshape(12, 2)
    values[7, 1] = 2**63
    x = {"dims": dims, "values": values if dims[0] == "n" else values.T, "chunks": (3, 1) if dims[0] == "n" else (1, 3)}
    path = write_store(tmp_path / "s", {"x": x, "index": vector(np.arange(12, dtype="uint64"), 3)})
    place, key = (r"\[7, 1\]", "2/1") if dims[0] == "n" else (r"\[1, 7\]", "1/2")
    for data in ({}, {"non_finite": "allow"}, {"isel": {"k": 1}}):
        reader = reader_of(opened(path, **data), which)
        reader.read(Box(0, 6))
        with pytest.raises(
            UnsuitableVariable, match=rf"x{place} in chunk x/c/{key} is 9223372036854775808; .* int64"
        ) as e:
            reader.read(Box(6, 9))
        assert e.value.code == 3
    reader_of(opened(path, isel={"k": 0}), which).read(Box(0, 12))
    samples = opened(path, normalize=["x"], shuffle=False)  # as floats they fit
    _, partition = only_partition(samples)
    scaling = Scaling((2.0**63,), (1.0,))
    (batch,) = batches(reader_of(samples, which), partition, [12], shuffle=False, scalings={"x": scaling})
    assert batch.inputs[0].ravel()[[14, 15]].tolist() == [float(np.float32(14 - 2.0**63)), 0.0]


def test_an_unsigned_integer_that_a_missing_chunk_would_make_is_refused(write_store, tmp_path, chunk_files):
    index = vector(np.arange(12, dtype="uint64"), 3, fill_value=2**64 - 1)
    path = write_store(tmp_path / "s", {"x": vector(np.arange(12.0), 3), "index": index})
    (path / "index" / "c" / "1").unlink()
    with pytest.raises(UnsuitableVariable, match=r"index\[3\] in chunk index/c/1 is 18446744073709551615"):
        UnitReader(opened(path, missing="fill")).read(Box(0, 12))
    samples = opened(path, missing="skip")
    UnitReader(samples, absent=((3, 6),)).read(Box(0, 12))


def test_other_attributes_change_nothing(write_store, tmp_path):
    attributes = {"units": "days since 1970-01-01", "calendar": "noleap", "valid_range": [0, 1], "dtype": "bool"}
    path = write(write_store, tmp_path, 3, np.arange(4, dtype="int16"), attributes)
    assert opened(path).variable("x").encoding is None
    assert as_dtrain_decodes(path).tolist() == [0, 1, 2, 3]


def test_the_encoding_is_part_of_the_fingerprint(write_store, tmp_path):
    prints = set()
    for number, attributes in enumerate([{}, {"scale_factor": 0.5}, {"scale_factor": 0.25}, {"missing_value": 1}]):
        (tmp_path / str(number)).mkdir()
        path = write(write_store, tmp_path / str(number), 3, np.zeros(4, "int16"), attributes)
        prints.add(opened(path).fingerprint)
    assert len(prints) == 4
