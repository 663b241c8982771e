from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numcodecs
import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec

from dtrain.config.schema import TrainConfig
from dtrain.data.plan.units import Box
from dtrain.data.read.presence import check_presence, content_digest
from dtrain.data.read.units import UnitReader
from dtrain.data.source import describe, open_samples
from dtrain.errors import DataNotFound, InvalidConfig, LengthsDiffer, NotZarr, UnknownVariable, UnsuitableVariable
from tests.data.helpers import list_variables

FORMATS = pytest.mark.parametrize("zarr_format", [2, 3])


@pytest.fixture
def small(write_store, tmp_path):
    """Write x(n, k) and y(n) of 10 samples, or other arrays, and return the path."""
    x = {"dims": ("n", "k"), "values": np.arange(20.0).reshape(10, 2), "chunks": (4, 2)}
    y = {"dims": ("n",), "values": np.arange(10, dtype="int32"), "chunks": (3,)}

    def write(zarr_format=3, name="store.zarr", group="", consolidated=False, **arrays):
        arrays = {"x": x, "y": y, **arrays}
        options = {"zarr_format": zarr_format, "group": group, "consolidated": consolidated}
        return write_store(tmp_path / name, arrays, **options)

    return write


def open_xy(path, **data):
    return open_samples(path, **{"inputs": ["x"], "targets": ["y"], **data})


# What the metadata says ------------------------------------------------------------------------------------


@pytest.mark.parametrize("consolidated", [False, True])
@FORMATS
def test_every_variable_is_described_as_it_is_stored(write_store, tmp_path, zarr_format, consolidated):
    arrays = {
        "image": {"dims": ("n", "h", "w"), "values": np.zeros((30, 4, 6), "float32"), "chunks": (7, 4, 3)},
        "wide": {"dims": ("n", "f"), "values": np.zeros((30, 5), "float64"), "chunks": (10, 2)},
        "half": {"dims": ("n",), "values": np.zeros(30, "float16"), "chunks": (30,)},
        "raw": {"dims": ("h", "n"), "values": np.zeros((4, 30), "uint8"), "chunks": (1, 8)},
        "label": {"dims": ("n",), "values": np.zeros(30, "int32"), "chunks": (11,)},
        "mask": {"dims": ("n", "h"), "values": np.zeros((30, 4), "bool"), "chunks": (6, 4)},
    }
    path = write_store(tmp_path / "all.zarr", arrays, zarr_format=zarr_format, consolidated=consolidated)
    samples = open_samples(path, inputs=["image", "wide", "half", "raw"], targets=["label", "mask"])
    assert (samples.num_samples, samples.sample_dim, samples.path) == (30, "n", str(path))
    assert [v.name for v in samples.variables] == ["image", "wide", "half", "raw", "label", "mask"]
    assert [v.dtype for v in samples.variables] == ["float32", "float64", "float16", "uint8", "int32", "bool"]
    assert [v.shape for v in samples.variables] == [(30, 4, 6), (30, 5), (30,), (4, 30), (30,), (30, 4)]
    assert [v.chunks for v in samples.variables] == [(7, 4, 3), (10, 2), (30,), (1, 8), (11,), (6, 4)]
    assert [v.objects for v in samples.variables] == [v.chunks for v in samples.variables]
    assert [v.dims for v in samples.variables] == [array["dims"] for array in arrays.values()]
    assert [v.sample_axis for v in samples.variables] == [0, 0, 0, 1, 0, 0]
    assert [v.row_shape for v in samples.variables] == [(4, 6), (5,), (), (4,), (), (4,)]
    assert [v.row_bytes for v in samples.variables] == [96, 20, 2, 4, 4, 4]  # as kept: float64 as float32
    assert [v.object_rows for v in samples.variables] == [7, 10, 30, 8, 11, 6]
    assert [v.chunk_bytes for v in samples.variables] == [336, 160, 60, 8, 44, 24]
    assert [v.num_objects for v in samples.variables] == [10, 9, 1, 16, 3, 5]
    assert samples.row_bytes == 130


def test_objects_of_a_sharded_array_are_its_shards(write_store, tmp_path):
    arrays = {
        "x": {"dims": ("k", "n"), "values": np.zeros((4, 30)), "chunks": (2, 3), "shards": (4, 12)},
        "y": {"dims": ("n",), "values": np.zeros(30), "chunks": (5,), "shards": (10,)},
    }
    samples = open_xy(write_store(tmp_path / "s.zarr", arrays))
    x, y = samples.variables
    assert (x.chunks, x.objects, x.object_rows, x.num_objects) == ((2, 3), (4, 12), 12, 3)
    assert (y.chunks, y.objects, y.object_rows, y.num_objects) == ((5,), (10,), 10, 3)
    assert "chunks 2x3 in shards of 4x12" in repr(samples)


@FORMATS
def test_big_endian_arrays_can_be_opened(small, zarr_format):
    y = {"dims": ("n",), "values": np.arange(10, dtype=">f4"), "chunks": (4,)}
    variable = open_xy(small(zarr_format, y=y)).variable("y")
    assert (np.dtype(variable.dtype).kind, np.dtype(variable.dtype).itemsize) == ("f", 4)


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("consolidated", [False, True])
@FORMATS
def test_a_store_that_xarray_wrote(tmp_path, zarr_format, consolidated):
    data = xr.Dataset(
        {"x": (("time", "lat"), np.ones((6, 3), "float32")), "y": ("time", np.arange(6))},
        coords={"time": np.arange(6).astype("datetime64[D]"), "lat": [1.0, 2.0, 3.0]},
    )
    data.to_zarr(tmp_path / "x.zarr", zarr_format=zarr_format, consolidated=consolidated)
    samples = open_xy(tmp_path / "x.zarr")
    assert (samples.sample_dim, samples.num_samples) == ("time", 6)
    assert samples.variable("x").dims == ("time", "lat")


@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("group", ["a", "a/b", "/a/b/"])
@FORMATS
def test_variables_of_a_nested_group(small, zarr_format, group, consolidated):
    samples = open_xy(small(zarr_format, group=group.strip("/"), consolidated=consolidated), group=group)
    assert samples.num_samples == 10
    check_presence(samples)


def test_a_variable_that_is_input_and_target_stands_once(small):
    samples = open_samples(small(), inputs=["y", "x"], targets=["x"])
    assert [v.name for v in samples.variables] == ["y", "x"]


@FORMATS
def test_data_variables_are_listed_without_coordinates(tmp_path, zarr_format):
    data = xr.Dataset({"x": (("n", "k"), np.zeros((3, 2))), "y": ("n", np.zeros(3))}, coords={"n": [1, 2, 3]})
    data.to_zarr(tmp_path / "s.zarr", zarr_format=zarr_format, consolidated=False)
    assert list_variables(tmp_path / "s.zarr") == {"x": ("n", "k"), "y": ("n",)}


def test_opening_reads_no_chunk(small, chunk_files):
    path = small()
    for name in chunk_files(path):
        (path / name).write_bytes(b"not a chunk")
    assert open_xy(path).num_samples == 10


def test_a_relative_path_is_relative_to_the_working_directory_or_the_base(small, monkeypatch, tmp_path):
    path = small()
    monkeypatch.chdir(tmp_path)
    assert open_xy("store.zarr").path == str(path)
    monkeypatch.chdir("/")
    config = TrainConfig(data={"path": "store.zarr", "inputs": ["x"], "targets": ["y"]}).data
    assert describe(config, tmp_path).path == str(path)


@pytest.mark.parametrize(
    ("dims", "auto"), [((("t", "n"), ("n", "t")), "t"), ((("k", "n"), ("n",)), "n"), ((("n", "k"), ("k", "n")), "n")]
)
def test_the_sample_dimension_is_the_first_shared_one_of_the_first_variable(write_store, tmp_path, dims, auto):
    lengths = {"n": 6, "t": 4, "k": 3}
    arrays = {
        name: {"dims": of, "values": np.zeros([lengths[dim] for dim in of]), "chunks": (2,) * len(of)}
        for name, of in zip("xy", dims, strict=True)
    }
    samples = open_xy(write_store(tmp_path / "s.zarr", arrays))
    assert (samples.sample_dim, samples.num_samples) == (auto, lengths[auto])


def test_the_sample_dimension_can_be_named(write_store, tmp_path):
    arrays = {
        "x": {"dims": ("a", "b"), "values": np.zeros((4, 6)), "chunks": (4, 3)},
        "y": {"dims": ("a", "b"), "values": np.zeros((4, 6)), "chunks": (2, 6)},
    }
    samples = open_xy(write_store(tmp_path / "s.zarr", arrays), sample_dim="b")
    assert [(v.sample_axis, v.row_shape, v.object_rows) for v in samples.variables] == [(1, (4,), 3), (1, (4,), 6)]
    assert samples.num_samples == 6


# What is refused -------------------------------------------------------------------------------------------


def test_a_path_where_nothing_is(tmp_path):
    with pytest.raises(DataNotFound, match=r"nowhere\.zarr: no such file") as caught:
        open_xy(tmp_path / "nowhere.zarr")
    assert caught.value.code == 5


def test_a_plain_folder_and_a_file_are_not_zarr(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("{}")
    for name in ("folder", "file"):
        with pytest.raises(NotZarr, match=name) as caught:
            open_xy(tmp_path / name)
        assert caught.value.code == 5


@FORMATS
def test_a_single_array_is_not_a_group(tmp_path, zarr_format):
    zarr.create_array(tmp_path / "a.zarr", data=np.zeros(4), zarr_format=zarr_format)
    with pytest.raises(NotZarr, match="single Zarr array") as caught:
        open_xy(tmp_path / "a.zarr")
    assert caught.value.code == 5


BROKEN = ["", "{", "[]", "null", "7", '{"zarr_format": 4, "node_type": "group"}', "\x00\xff"]


@pytest.mark.parametrize("group", ["", "a"])
@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("name", ["zarr.json", ".zgroup", ".zmetadata"])
def test_broken_group_metadata_is_not_zarr(tmp_path, name, text, group):
    (tmp_path / name).write_text(text)
    with pytest.raises(NotZarr) as caught:
        open_xy(tmp_path, group=group)
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize("text", [*BROKEN, "{}", '{"zarr_format": 3, "node_type": "array"}', '{"shape": [-1]}'])
@pytest.mark.parametrize(("zarr_format", "name"), [(2, ".zarray"), (2, ".zattrs"), (3, "zarr.json")])
def test_broken_array_metadata_is_an_error_of_dtrain(small, zarr_format, name, text):
    path = small(zarr_format)
    (path / "x" / name).write_text(text)
    with pytest.raises((NotZarr, UnknownVariable, UnsuitableVariable)):
        open_xy(path)


@FORMATS
def test_an_unknown_variable_is_named_with_the_closest_one(small, zarr_format):
    path = small(zarr_format, temperature={"dims": ("n",), "values": np.zeros(10), "chunks": (5,)})
    with pytest.raises(UnknownVariable, match='"temprature" not found; did you mean "temperature"') as caught:
        open_xy(path, targets=["temprature"])
    assert caught.value.code == 3
    assert {*caught.value.hint.removeprefix("It has ").rstrip(".").split(", ")} == {"x", "y", "temperature"}
    nested = small(zarr_format, name="nested", group="a")
    with pytest.raises(UnknownVariable, match="It has a/x, a/y"):
        open_xy(nested, inputs=["z"])


@pytest.mark.parametrize("sample_dim", ["auto", "n"])
@FORMATS
def test_variables_of_different_length(small, zarr_format, sample_dim):
    path = small(zarr_format, y={"dims": ("n",), "values": np.zeros(7), "chunks": (3,)})
    with pytest.raises(LengthsDiffer, match="differ in length along n: x has 10, y has 7") as caught:
        open_xy(path, sample_dim=sample_dim)
    assert caught.value.code == 3


def test_variables_that_grew_apart_behind_stale_consolidated_metadata(small):
    path = small(2, group="a", consolidated=True)
    array = zarr.open_group(path, path="a", mode="r+", use_consolidated=False)["y"]
    array.resize((7,))
    with pytest.raises(LengthsDiffer) as caught:
        open_xy(path, group="a")
    assert "x has 10, y has 7" in caught.value.message


@FORMATS
def test_variables_without_a_shared_dimension(small, zarr_format):
    path = small(zarr_format, y={"dims": ("station",), "values": np.zeros(10), "chunks": (3,)})
    with pytest.raises(LengthsDiffer, match=r"x\(n, k\), y\(station\)") as caught:
        open_xy(path)
    assert caught.value.code == 3


@pytest.mark.parametrize(("sample_dim", "said"), [("m", "of any variable"), ("k", "of y, a target")])
def test_a_sample_dimension_that_the_targets_do_not_have(small, sample_dim, said):
    with pytest.raises(InvalidConfig, match=f'data.sample_dim = "{sample_dim}": not a dimension {said}') as caught:
        open_xy(small(), sample_dim=sample_dim)
    assert (caught.value.code, caught.value.hint) == (3, "Dimensions are n, k.")


@pytest.mark.parametrize("group", ["b", "a/b", "train/x", "trian"])
@FORMATS
def test_a_group_that_is_not_there(small, zarr_format, group):
    path = small(zarr_format, group="train")
    with pytest.raises(InvalidConfig, match=f'data.group = "{group}": no such group') as caught:
        open_xy(path, group=group)
    assert (caught.value.code, caught.value.hint) == (3, "It has train.")
    assert ('did you mean "train"?' in caught.value.message) == (group in ("trian", "train/x"))


@pytest.mark.filterwarnings("ignore")  # zarr's own, that v3 has no specification for these dtypes
@pytest.mark.parametrize(
    "values",
    [
        np.array(list("abcdefghij")),
        np.array([b"ab"] * 10),
        np.array(["ab"] * 10, np.dtypes.StringDType()),
        np.arange(10).astype("datetime64[s]"),
        np.arange(10).astype("timedelta64[s]"),
        np.zeros(10, "complex64"),
        np.zeros(10, [("a", "f4"), ("b", "i4")]),
    ],
    ids=lambda values: str(values.dtype),
)
@FORMATS
def test_dtypes_that_cannot_be_trained_on(small, zarr_format, values):
    path = small(zarr_format, y={"dims": ("n",), "values": values, "chunks": (5,)})
    with pytest.raises(UnsuitableVariable, match="y has dtype") as caught:
        open_xy(path)
    assert caught.value.code == 3


@FORMATS
def test_strings_that_xarray_wrote_as_objects(tmp_path, zarr_format):
    data = xr.Dataset({"x": ("n", np.zeros(3)), "y": ("n", np.array(["a", "bb", "c"], object))})
    data.to_zarr(tmp_path / "s.zarr", zarr_format=zarr_format, consolidated=False)
    with pytest.raises(UnsuitableVariable, match="y has dtype"):
        open_xy(tmp_path / "s.zarr")


@FORMATS
def test_an_array_without_dimension_names(small, zarr_format):
    path = small(zarr_format, y={"dims": None, "values": np.zeros(10), "chunks": (5,)})
    with pytest.raises(UnsuitableVariable, match="y has no dimension names") as caught:
        open_xy(path)
    assert caught.value.code == 3


@pytest.mark.parametrize("consolidated", [False, True])
@FORMATS
def test_an_array_without_dimension_names_that_is_not_used_does_no_harm(small, zarr_format, consolidated):
    # also one whose length would not fit, and a scalar, which needs no names
    odd = {"dims": None, "values": np.zeros((3, 7)), "chunks": (3, 7)}
    scalar = {"dims": None, "values": np.array(1.0), "chunks": ()}
    path = small(zarr_format, odd=odd, scalar=scalar, consolidated=consolidated)
    samples = open_xy(path)
    assert samples.num_samples == 10
    check_presence(samples)
    assert set(list_variables(path)) >= {"x", "y"}
    with pytest.raises(UnsuitableVariable, match="odd has no dimension names"):
        open_xy(path, inputs=["odd"])


@pytest.mark.parametrize("names", [{"inputs": "x"}, {"targets": "y"}, {"inputs": []}, {"targets": ()}, {"inputs": [1]}])
def test_names_that_are_not_lists_of_names(small, names):
    with pytest.raises(InvalidConfig) as caught:
        open_xy(small(), **names)
    assert caught.value.code == 3


def test_a_misspelt_key_of_data(small):
    with pytest.raises(InvalidConfig, match=r'data.sample_dims: no such key; did you mean "sample_dim"'):
        open_xy(small(), sample_dims="n")


# What is not used -----------------------------------------------------------------------------------------


@FORMATS
def test_what_is_not_used_may_have_any_shape(small, zarr_format):
    path = small(zarr_format, z={"dims": ("n", "k"), "values": np.zeros((7, 3)), "chunks": (7, 3)})
    assert open_xy(path).num_samples == 10
    with pytest.raises(LengthsDiffer, match="variables differ in length"):
        open_samples(path, inputs=["x", "z"], targets=["y"], sample_dim="n")


def test_a_codec_that_is_not_installed_is_no_damage(small):
    path = small(3)
    described = json.loads((path / "x" / "zarr.json").read_text())
    described["codecs"][-1] = {"name": "supercodec", "configuration": {}}
    (path / "x" / "zarr.json").write_text(json.dumps(described))
    with pytest.raises(UnsuitableVariable, match="supercodec") as caught:
        open_xy(path)
    assert caught.value.code == 3
    assert "install the package that has it" in caught.value.hint


@FORMATS
def test_damaged_metadata_are_named_and_only_matter_where_they_are_used(small, zarr_format):
    many = {f"v{i}": {"dims": ("n",), "values": np.arange(10), "chunks": (5,)} for i in range(20)}
    path = small(zarr_format, **many)
    (path / "v7" / (".zarray" if zarr_format == 2 else "zarr.json")).write_text("{bad")
    assert open_xy(path).num_samples == 10
    ask = "from dtrain.data.source import *\nopen_samples(sys.argv[1], inputs=['v7'], targets=['y'])"
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys\n{ask}", path], capture_output=True, text=True, check=False
    )
    assert "NotZarr" in ran.stderr
    assert f"{path}: the metadata of v7 cannot be read" in ran.stderr
    assert "Task" not in ran.stderr  # of requests that are left behind asyncio speaks when Python exits
    assert set(list_variables(path)) == {"x", "y", *many} - {"v7"}


def make_strange(path, zarr_format, fault, *, consolidated):
    """Add an array z that zarr cannot open."""
    file = ".zarray" if zarr_format == 2 else "zarr.json"
    described = json.loads((path / "y" / file).read_text())
    if fault == "dtype":
        described["dtype" if zarr_format == 2 else "data_type"] = "|O" if zarr_format == 2 else "a_cat"
    elif zarr_format == 2:
        described["compressor"] = {"id": "supercodec"}
    else:
        described["codecs"][1:] = [{"name": "supercodec", "configuration": {}}]
    shutil.copytree(path / "y", path / "z")
    (path / "z" / file).write_text(json.dumps(described))
    if consolidated:  # by hand: zarr refuses
        found = {str(f.relative_to(path)): json.loads(f.read_text()) for f in path.rglob("*") if is_metadata(f, path)}
        if zarr_format == 2:
            text = {"zarr_consolidated_format": 1, "metadata": found}
            (path / ".zmetadata").write_text(json.dumps(text))
        else:
            root = json.loads((path / "zarr.json").read_text())
            arrays = {name.rpartition("/")[0]: value for name, value in found.items()}
            root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": arrays}
            (path / "zarr.json").write_text(json.dumps(root))


def is_metadata(file, path):
    return file.name in (".zarray", ".zattrs", ".zgroup") or (file.name == "zarr.json" and file.parent != path)


@FORMATS
@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("fault", ["dtype", "codec"])
def test_what_is_not_used_may_be_an_array_that_zarr_cannot_open(small, zarr_format, fault, consolidated):
    path = small(zarr_format)
    make_strange(path, zarr_format, fault, consolidated=consolidated)
    samples = open_xy(path)
    rows = UnitReader(samples, "zarr").read(Box(0, 10))
    np.testing.assert_array_equal(rows["y"][1], zarr.open_array(path, path="y", mode="r")[...])
    assert set(content_digest(samples)) == {"x", "y"}
    assert set(list_variables(path)) == {"x", "y"}
    with pytest.raises(UnsuitableVariable, match=r"store\.zarr: z cannot be read here: "):
        open_samples(path, inputs=["z"], targets=["y"])
    with pytest.raises(UnknownVariable, match="It has x, y"):
        open_samples(path, inputs=["q"], targets=["y"])


# Checksums --------------------------------------------------------------------------------------------------

CODECS = {
    "v2 none": (2, {"compressors": None}, False),
    "v2 blosc": (2, {"compressors": numcodecs.Blosc("lz4")}, False),
    "v2 zstd": (2, {"compressors": numcodecs.Zstd()}, False),
    "v2 zstd checksum": (2, {"compressors": numcodecs.Zstd(checksum=True)}, True),
    "v2 gzip": (2, {"compressors": numcodecs.GZip()}, True),
    "v2 zlib": (2, {"compressors": numcodecs.Zlib()}, True),
    "v2 bz2": (2, {"compressors": numcodecs.BZ2()}, True),
    "v2 crc32 filter": (2, {"compressors": numcodecs.Zstd(), "filters": [numcodecs.CRC32()]}, True),
    "v2 fletcher32 filter": (2, {"compressors": None, "filters": [numcodecs.Fletcher32()]}, True),
    "v3 none": (3, {"compressors": None}, False),
    "v3 blosc": (3, {"compressors": BloscCodec()}, False),
    "v3 zstd": (3, {"compressors": ZstdCodec()}, False),
    "v3 zstd checksum": (3, {"compressors": ZstdCodec(checksum=True)}, True),
    "v3 gzip": (3, {"compressors": GzipCodec()}, True),
    "v3 crc32c": (3, {"compressors": [ZstdCodec(), Crc32cCodec()]}, True),
    "v3 numcodecs crc32c": (3, {"compressors": {"name": "numcodecs.crc32c", "configuration": {}}}, True),
    "sharded": (3, {"shards": (8, 2), "compressors": None}, False),
    "sharded zstd checksum": (3, {"shards": (8, 2), "compressors": ZstdCodec(checksum=True)}, True),
    "sharded crc32c": (3, {"shards": (8, 2), "compressors": [BloscCodec(), Crc32cCodec()]}, True),
}


@pytest.mark.sampled(6)
@pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr version 3 specification")
@pytest.mark.parametrize("codec", CODECS)
def test_checksums_says_whether_a_flipped_bit_is_found(write_store, tmp_path, chunk_files, codec):
    zarr_format, options, checksums = CODECS[codec]
    if "numcodecs" in codec and "crc32c" not in numcodecs.registry.codec_registry:
        pytest.skip("numcodecs lacks its package crc32c")
    values = np.random.default_rng(0).normal(size=(8, 2))
    x = {"dims": ("n", "k"), "values": values, "chunks": (4, 2), **options}
    path = write_store(tmp_path / "s.zarr", {"x": x}, zarr_format=zarr_format)
    variable = open_samples(path, inputs=["x"], targets=["x"]).variable("x")
    assert variable.checksums is checksums
    if not checksums and "none" not in codec:
        return  # a decoder may find a flipped bit by luck
    file = path / chunk_files(path)[0]
    stored = file.read_bytes()
    silent = 0
    for bit in range(0, 8 * len(stored), 7):
        flipped = bytearray(stored)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            silent += not np.array_equal(zarr.open_group(path, mode="r")["x"][...], values)
        except Exception:  # found
            continue
    assert (silent == 0) == checksums
