"""The named arrays of a group are opened, and no other one: what is odd there matters only where it is used."""

from __future__ import annotations

import base64
import json
import re
import shutil
import struct
from collections import Counter

import numpy as np
import pytest
import xarray as xr
import zarr

from dtrain.data.plan.units import Box
from dtrain.data.read.documents import NAMES
from dtrain.data.read.local import DirectoryStore
from dtrain.data.read.presence import check_presence
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import InvalidConfig, LengthsDiffer, NotZarr, UnknownVariable, UnsuitableVariable
from tests.data.helpers import list_variables
from tests.data.servers import FileServer

pytestmark = pytest.mark.filterwarnings("ignore:Consolidated metadata is")
FORMATS = pytest.mark.parametrize("zarr_format", [2, 3])
X = np.arange(20, dtype="float32").reshape(10, 2)


@pytest.fixture
def store(write_store, tmp_path):
    """A function that writes x(n, k), y(n) and z(n), or other arrays, and returns the path."""

    def write(zarr_format=3, name="s.zarr", group="", consolidated=False, **arrays):
        usual = {
            "x": {"dims": ("n", "k"), "values": X, "chunks": (4, 2)},
            "y": {"dims": ("n",), "values": np.arange(10, dtype="int32"), "chunks": (3,)},
            "z": {"dims": ("n",), "values": np.arange(10, dtype="float32"), "chunks": (3,)},
        }
        options = {"zarr_format": zarr_format, "group": group, "consolidated": consolidated}
        return write_store(tmp_path / name, {**usual, **arrays}, **options)

    return write


def document(path, name):
    """The metadata document of an array."""
    return next(file for file in (path / name / "zarr.json", path / name / ".zarray") if file.exists())


def edit(file, change):
    described = json.loads(file.read_text())
    change(described)
    file.write_text(json.dumps(described))


def set_attributes(path, name, **attributes):
    file = document(path, name)
    if file.name == ".zarray":
        edit(file.with_name(".zattrs"), lambda described: described.update(attributes))
    else:
        edit(file, lambda described: described["attributes"].update(attributes))


def open_xy(path, **data):
    return open_samples(path, **{"inputs": ["x"], "targets": ["y"], **data})


def values_of(path, name, **data):
    samples = open_xy(path, inputs=[name], **data)
    return UnitReader(samples).read(Box(0, samples.num_samples))[name][1]


def does_no_harm(path):
    """Whether x and y can be opened, read and listed, whatever z is."""
    np.testing.assert_array_equal(values_of(path, "x"), X)
    assert {"x", "y"} <= set(list_variables(path))


# Marks of missing values ------------------------------------------------------------------------------------

BASE64_ONE = base64.standard_b64encode(struct.pack("<d", 1.0)).decode()


@pytest.mark.sampled(22)
@FORMATS
@pytest.mark.parametrize("key", ["_FillValue", "missing_value"])
@pytest.mark.parametrize(
    ("mark", "missing"),
    [
        (1.0, [1]),
        (1, [1]),
        ([1.0], [1]),
        ([1, 5.0], [1, 5]),
        ("1", [1]),
        ("-7.5", []),
        ("NaN", []),
        (float("nan"), []),
        ([float("nan")], []),
        ("Infinity", []),
        (None, []),
        ([None], []),
        ([], []),
        (BASE64_ONE, [1]),
        ([BASE64_ONE, "NaN", None], [1]),
    ],
)
def test_marks_are_understood_as_numbers_words_lists_null_or_base64(store, zarr_format, key, mark, missing):
    path = store(zarr_format)
    set_attributes(path, "z", **{key: mark})
    does_no_harm(path)
    samples = open_samples(path, inputs=["z"], targets=["y"], non_finite="allow")
    marks = samples.variable("z").encoding
    assert [v for v in (marks.missing if marks else ()) if np.isfinite(v) and v >= 0] == missing


@pytest.mark.parametrize("dtype", ["int16", "uint8", "bool", "float64"])
@pytest.mark.parametrize("mark", [None, [], "NaN", [None], float("nan")])
def test_marks_that_mark_nothing_change_nothing(store, dtype, mark):
    path = store(z={"dims": ("n",), "values": np.arange(10).astype(dtype), "chunks": (3,)})
    plain = open_xy(path, inputs=["z"]).fingerprint
    set_attributes(path, "z", _FillValue=mark)
    assert open_xy(path, inputs=["z"]).variable("z").encoding is None
    assert open_xy(path, inputs=["z"]).fingerprint == plain


@FORMATS
@pytest.mark.parametrize("key", ["_FillValue", "missing_value"])
@pytest.mark.parametrize("mark", ["none", "hello", {"a": 1}, [[1]], ["1", "x"], "AAAA"])
def test_marks_that_are_no_numbers_are_refused_where_they_are_used(store, zarr_format, key, mark):
    path = store(zarr_format)
    set_attributes(path, "z", **{key: mark})
    does_no_harm(path)
    with pytest.raises(UnsuitableVariable, match=f"z: its CF attributes cannot be understood: {key} = ") as caught:
        open_xy(path, inputs=["z"])
    assert caught.value.code == 3
    assert "as numbers" in caught.value.hint
    assert str(path) in caught.value.message


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("fill", [-999.0, np.nan, 2.5])
def test_marks_that_xarray_writes_into_v3_are_those_that_it_reads(tmp_path, dtype, fill):
    values = np.array([1.0, np.nan, 3.0], dtype)
    data = xr.Dataset({"z": ("n", values), "y": ("n", np.arange(3))})
    data.to_zarr(tmp_path / "s", zarr_format=3, consolidated=False, encoding={"z": {"_FillValue": fill}})
    encoding = open_xy(tmp_path / "s", inputs=["z"]).variable("z").encoding
    assert (encoding and encoding.missing) == (None if np.isnan(fill) else (fill,))


# Arrays that nobody uses ------------------------------------------------------------------------------------

NO_LENGTH = {"chunk_grid": {"configuration": {"chunk_shape": [0]}}}
VERY_MANY = {"shape": [10**12], "chunk_grid": {"configuration": {"chunk_shape": [1]}}}
ODD = [
    (2, "chunks of no length", {"chunks": [0]}),
    (3, "chunks of no length", NO_LENGTH),
    (3, "chunks of other dimensions", {"chunk_grid": {"configuration": {"chunk_shape": [3, 3]}}}),
    (3, "a chunk grid of the future", {"chunk_grid": {"name": "rectilinear"}}),
    (2, "a negative shape", {"shape": [-5]}),
    (3, "a negative shape", {"shape": [-5]}),
    (2, "a shape that is text", {"shape": "abc"}),
    (3, "a shape that is text", {"shape": "abc"}),
    (2, "very many chunks", {"shape": [10**12], "chunks": [1]}),
    (3, "very many chunks", VERY_MANY),
    (2, "an odd fill value", {"fill_value": "hello"}),
    (3, "an odd fill value", {"fill_value": "hello"}),
    (2, "an unknown dtype", {"dtype": "|Q9"}),
    (3, "an unknown dtype", {"data_type": "a_cat"}),
    (2, "objects", {"dtype": "|O"}),
    (2, "a structured dtype", {"dtype": [["a", "<f4"]]}),
    (3, "a structured dtype", {"data_type": {"name": "structured"}}),
    (2, "an unknown codec", {"filters": [{"id": "nothere"}]}),
    (3, "an unknown codec", {"codecs": [{"name": "nothere"}]}),
    (3, "no codecs", {"codecs": []}),
    (2, "an odd order", {"order": "Q"}),
    (3, "fields of the future", {"new": {"must_understand": True}}),
    (3, "attributes that are a list", {"attributes": [1]}),
    (3, "dimension names of another length", {"dimension_names": ["n", "k"]}),
    (3, "dimension names that are numbers", {"dimension_names": [3]}),
]


def merged(described, changes):
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(described.get(key), dict):
            merged(described[key], value)
        else:
            described[key] = value


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize(("zarr_format", "fault", "changes"), ODD)
def test_an_odd_array_does_no_harm_and_is_named_where_it_is_used(store, zarr_format, fault, changes, consolidated):
    path = store(zarr_format, consolidated=consolidated)
    edit(document(path, "z"), lambda described: merged(described, changes))
    does_no_harm(path)
    with pytest.raises((UnsuitableVariable, NotZarr, LengthsDiffer), match=r"\bz\b") as caught:
        values_of(path, "z", sample_dim="n")
    assert str(path) in caught.value.message
    assert caught.value.hint


@FORMATS
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7"])
def test_damaged_attributes_do_no_harm(store, zarr_format, text):
    path = store(zarr_format)
    (path / "z" / (".zattrs" if zarr_format == 2 else "zarr.json")).write_text(text)
    does_no_harm(path)
    with pytest.raises((NotZarr, UnsuitableVariable), match=r"\bz\b"):
        open_xy(path, inputs=["z"])


ATTRIBUTES = {
    "units": ["days since", 3],
    "calendar": {"a": 1},
    "coordinates": 7,
    "grid_mapping": None,
    "bounds": [[]],
    "scale_factor": "3.0",
    "dtype": "bool",
    "flag_values": "1b, 2b",
    "valid_range": [None],
    "_Unsigned": 5,
}


@FORMATS
@pytest.mark.parametrize("key", ATTRIBUTES)
def test_odd_attributes_do_no_harm(store, zarr_format, key):
    path = store(zarr_format)
    set_attributes(path, "z", **{key: ATTRIBUTES[key]})
    does_no_harm(path)
    if key == "scale_factor":
        with pytest.raises(UnsuitableVariable, match=f"{re.escape(str(path))}: z: .*scale_factor = '3.0' is not a"):
            open_xy(path, inputs=["z"])
    else:
        assert values_of(path, "z").tolist() == list(range(10))


@pytest.mark.filterwarnings("ignore")  # zarr's own, that v3 has no specification for these dtypes
@FORMATS
def test_every_other_kind_of_array_does_no_harm(store, zarr_format):
    others = {
        "text": np.array(list("abc")),
        "strings": np.array(["a", "bc"], np.dtypes.StringDType()),
        "time": np.arange(7).astype("datetime64[s]"),
        "fields": np.zeros(4, [("a", "f4"), ("b", "i4")]),
        "complex": np.zeros(5, "complex64"),
        "empty": np.zeros((0, 3)),
        "scalar": np.array(1.0),
        "a name with spaces": np.zeros(6),
    }
    arrays = {
        name: {
            "dims": tuple(f"{name}{axis}" for axis in range(values.ndim)),
            "values": values,
            "chunks": (2,) * values.ndim,
        }
        for name, values in others.items()
    }
    path = store(zarr_format, **arrays)
    zarr.open_group(path, mode="r+").create_group("more").create_array("x", shape=3, dtype="f4")
    does_no_harm(path)


@FORMATS
def test_arrays_that_nobody_uses_are_not_opened(store, zarr_format, monkeypatch):
    def documents(path):
        counts = Counter()
        get = DirectoryStore.get

        async def counted(self, key, prototype=None, byte_range=None):
            counts[key] += key.rpartition("/")[2] in NAMES
            return await get(self, key, prototype, byte_range)

        with monkeypatch.context() as patched:
            patched.setattr(DirectoryStore, "get", counted)
            open_xy(path)
        return +counts

    few = documents(store(zarr_format))
    others = {f"v{i}": {"dims": ("n",), "values": np.arange(10), "chunks": (10,)} for i in range(30)}
    many = documents(store(zarr_format, name="many.zarr", **others))
    assert many == few
    assert {key.rpartition("/")[0] for key in few} == {"", "x", "y"}


# Consolidated metadata --------------------------------------------------------------------------------------


@FORMATS
def test_old_consolidated_metadata_of_a_directory_do_no_harm(store, zarr_format):
    path = store(zarr_format, consolidated=True)
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    named = {"dimension_names": ["n"]} if zarr_format == 3 else {"attributes": {"_ARRAY_DIMENSIONS": ["n"]}}
    group.create_array("late", data=np.arange(12.0), chunks=(4,), **named)
    for name in ("x", "y"):
        array = group[name]
        array.resize((12, *array.shape[1:]))
        array[10:] = 1
    shutil.rmtree(path / "z")
    samples = open_xy(path, inputs=["x", "late"])
    assert samples.num_samples == 12
    check_presence(samples)
    assert set(list_variables(path)) == {"x", "y", "late"}
    with pytest.raises(UnknownVariable, match='"z" not found'):
        open_xy(path, inputs=["z"])


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"metadata": 3}'])
def test_damaged_consolidated_metadata_of_a_directory_do_no_harm(store, text):
    path = store(2, consolidated=True)
    (path / ".zmetadata").write_text(text)
    does_no_harm(path)


@FORMATS
def test_an_array_of_a_server_that_consolidated_metadata_do_not_list(store, zarr_format):
    path = store(zarr_format, consolidated=True)
    named = {"dimension_names": ["n"]} if zarr_format == 3 else {"attributes": {"_ARRAY_DIMENSIONS": ["n"]}}
    group = zarr.open_group(path, mode="r+", use_consolidated=False)
    group.create_array("late", data=np.arange(1.0, 11.0), chunks=(4,), **named)
    server = FileServer(path)
    try:
        assert values_of(server.url, "late").tolist() == list(range(1, 11))
        check_presence(open_xy(server.url, inputs=["late"]))
        with pytest.raises(UnknownVariable, match="It has x, y, z"):
            open_xy(server.url, inputs=["q"])
    finally:
        server.stop()


@pytest.mark.parametrize("changes", [{"data_type": "a_cat"}, {"codecs": []}, {"attributes": {"_FillValue": "hello"}}])
def test_odd_arrays_in_the_consolidated_metadata_of_a_server_do_no_harm(store, changes):
    path = store(consolidated=True)
    edit(path / "zarr.json", lambda found: merged(found["consolidated_metadata"]["metadata"]["z"], changes))
    edit(document(path, "z"), lambda described: merged(described, changes))
    server = FileServer(path)
    try:
        does_no_harm(server.url)
        with pytest.raises(
            UnknownVariable,
            match='"w" not found',
        ) as caught:
            open_xy(server.url, inputs=["w"])
        assert caught.value.hint == "It has x, y, z."
    finally:
        server.stop()


# Dimensions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["n", "k"], [], "n", 7, {"n": 1}])
def test_dimension_names_of_another_number_are_refused_where_they_are_used(store, names):
    path = store(2)
    set_attributes(path, "z", _ARRAY_DIMENSIONS=names)
    does_no_harm(path)
    with pytest.raises(UnsuitableVariable, match=r"z of shape \[10\] has the dimension names ") as caught:
        open_xy(path, inputs=["z"])
    assert caught.value.code == 3


@FORMATS
@pytest.mark.parametrize("group", ["", "a/b"])
@pytest.mark.parametrize("consolidated", [False, True])
def test_dimension_names_can_be_added_as_the_message_says(store, zarr_format, group, consolidated):
    odd = {"dims": None, "values": X, "chunks": (4, 2)}
    path = store(zarr_format, group=group, consolidated=consolidated, x=odd)
    with pytest.raises(UnsuitableVariable, match="x has no dimension names") as caught:
        open_xy(path, group=group)
    line = re.search(r"zarr\.open_group\(.*\] = \[.*?\]", caught.value.hint)[0]
    exec(line.replace('"sample", "dim1"', '"n", "k"'), {"zarr": zarr})
    assert open_xy(path, group=group).variable("x").dims == ("n", "k")


def test_some_dimensions_may_have_no_name(store):
    path = store()
    edit(document(path, "x"), lambda described: described.update(dimension_names=["n", None]))
    samples = open_xy(path)
    assert (samples.sample_dim, samples.variable("x").dims) == ("n", ("n", "x axis 1"))


@pytest.mark.parametrize("where", ["document", "attribute", "new attribute"])
def test_dimension_names_of_the_netcdf_library(store, where):
    path = store(2)
    for name, dims in (("x", ["/n", "/k"]), ("y", ["/n"])):
        (path / name / ".zattrs").write_text("{}")
        if where == "document":
            edit(
                path / name / ".zarray", lambda described, dims=dims: described.update(_NCZARR_ARRAY={"dimrefs": dims})
            )
        elif where == "attribute":
            set_attributes(path, name, _NCZARR_ARRAY={"dimrefs": dims})
        else:
            set_attributes(path, name, _nczarr_array={"dimension_references": dims})
    assert open_xy(path).variable("x").dims == ("n", "k")


@pytest.mark.parametrize(
    ("shape", "said"),
    [((10, 10), "the dimension of the samples, n, more than once: n, n"), ((10, 7), "has the dimension n twice")],
)
def test_samples_along_two_dimensions_are_refused(store, shape, said):
    path = store(x={"dims": ("n", "n"), "values": np.ones(shape), "chunks": (5, 5)})
    with pytest.raises(UnsuitableVariable, match=said):
        open_xy(path)


@pytest.mark.parametrize("shape", [(10, 0), (10, 0, 3), (0,), (0, 4)])
def test_rows_without_values_are_refused_by_name(store, shape):
    dims = ("n", "a", "b")[: len(shape)] if shape[0] else ("a", "b")[: len(shape)]
    path = store(w={"dims": dims, "values": np.zeros(shape), "chunks": tuple(max(1, n) for n in shape)})
    with pytest.raises(UnsuitableVariable, match="w holds no values: its dimension a has length 0") as caught:
        open_xy(path, inputs=["x", "w"], sample_dim="n")
    assert caught.value.code == 3


@pytest.mark.parametrize("sharded", [False, True])
def test_more_chunks_than_can_be_looked_for_are_refused_by_name(store, sharded):
    path = store()
    for name in ("x", "y"):
        described = json.loads(document(path, name).read_text())
        rank = len(described["shape"])
        described["shape"][0] = 10**12
        described["chunk_grid"]["configuration"]["chunk_shape"][0] = 10**12 if sharded else 1
        if sharded:
            inner = {"chunk_shape": [1, 2][:rank], "codecs": described["codecs"], "index_codecs": [{"name": "bytes"}]}
            inner["index_codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}]
            described["codecs"] = [{"name": "sharding_indexed", "configuration": inner}]
        document(path, name).write_text(json.dumps(described))
    text = "chunks in each shard" if sharded else "stored objects"
    with pytest.raises(UnsuitableVariable, match=f"x .* has 1,000,000,000,000 {text}; at most 100,000,000") as caught:
        open_xy(path)
    assert caught.value.code == 3


# Names ------------------------------------------------------------------------------------------------------


@FORMATS
@pytest.mark.parametrize("name", ["a b", "a:b", "größe", "a.b", "c"])
def test_names_may_be_any_text(store, zarr_format, name):
    array = {"dims": ("n",), "values": np.arange(1.0, 11.0, dtype="float32"), "chunks": (3,)}
    path = store(zarr_format, **{name: array})
    assert values_of(path, name).tolist() == list(range(1, 11))
    check_presence(open_xy(path, inputs=[name]))


@FORMATS
@pytest.mark.parametrize("consolidated", [False, True])
def test_a_name_may_be_a_path_below_the_group(store, zarr_format, consolidated):
    path = store(zarr_format, group="images/raw", consolidated=consolidated)
    for group, prefix in (("", "images/raw/"), ("images", "raw/")):
        samples = open_samples(path, inputs=[f"{prefix}x"], targets=[f"{prefix}y"], group=group)
        check_presence(samples)
        np.testing.assert_array_equal(UnitReader(samples).read(Box(0, 10))[f"{prefix}x"][1], X)


@pytest.mark.parametrize("name", ["/x", "x/", "../x", "./x", "x//", "", "..", "."])
def test_a_path_that_leaves_the_group_is_no_name(store, name):
    with pytest.raises(UnknownVariable, match=f'variable "{re.escape(name)}" not found'):
        open_xy(store(), inputs=[name])


@FORMATS
def test_variables_of_two_groups_are_named_as_the_message_says(store, zarr_format):
    path = store(zarr_format, group="a/images")
    named = {"dimension_names": ["n"]} if zarr_format == 3 else {"attributes": {"_ARRAY_DIMENSIONS": ["n"]}}
    zarr.open_group(path, path="a/labels", mode="a", zarr_format=zarr_format).create_array(
        "seg", data=np.arange(10), **named
    )
    with pytest.raises(UnknownVariable, match='variable "seg" not found') as caught:
        open_samples(path, inputs=["x"], targets=["seg"], group="a/images")
    assert caught.value.hint == (
        'a/labels/seg has that name: set data.group = "a" and write "labels/seg", and "images/x" in place of x.'
    )
    assert open_samples(path, inputs=["images/x"], targets=["labels/seg"], group="a").num_samples == 10
    with pytest.raises(UnknownVariable) as caught:
        open_samples(path, inputs=["images/x"], targets=["seg"], group="a")
    assert caught.value.hint == 'a/labels/seg has that name: write "labels/seg".'
    with pytest.raises(UnknownVariable) as caught:
        open_samples(path, inputs=["x"], targets=["y"])
    assert (
        caught.value.hint
        == 'a/images/x has that name: write "a/images/x", or set data.group = "a/images" if all variables are there.'
    )


def test_a_group_is_no_variable(store):
    path = store(group="a")
    with pytest.raises(UnknownVariable, match='"a" is a group, not a variable') as caught:
        open_xy(path, inputs=["a"])
    assert caught.value.hint == "It holds a/x, a/y, a/z."


def test_of_many_names_a_message_lists_some(store):
    many = {f"v{i:02}": {"dims": ("n",), "values": np.arange(10), "chunks": (10,)} for i in range(40)}
    with pytest.raises(UnknownVariable, match='did you mean "v31"') as caught:
        open_xy(store(**many), inputs=["w31"])
    assert caught.value.hint.endswith("v19 and 23 more.")
    with pytest.raises(InvalidConfig, match=r"no such group in .*"):
        open_xy(store(name="t.zarr"), group="b")
