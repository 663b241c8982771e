"""`data.dims` names the dimensions of arrays that have no names, and contradicts no store."""

from __future__ import annotations

import numpy as np
import pytest

from dtrain.data.coordinate import find_gaps
from dtrain.data.plan.units import Box
from dtrain.data.read.presence import check_presence
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import Coordinate
from dtrain.data.source import open_samples
from dtrain.errors import InvalidConfig
from tests.data.helpers import WHOLE

FORMATS = pytest.mark.parametrize("zarr_format", [2, 3])
X = np.arange(20, dtype="float32").reshape(10, 2)


@pytest.fixture
def store(write_store, tmp_path):
    """A function that writes x and y without names, or other arrays, and returns the path."""

    def write(zarr_format=3, name="s.zarr", group="", **arrays):
        usual = {
            "x": {"dims": None, "values": X, "chunks": (4, 2)},
            "y": {"dims": None, "values": np.arange(10), "chunks": (3,)},
        }
        return write_store(tmp_path / name, {**usual, **arrays}, zarr_format=zarr_format, group=group)

    return write


def opened(path, inputs=("x",), targets=("y",), **data):
    return open_samples(path, inputs=list(inputs), targets=list(targets), **{"split": WHOLE, **data})


@FORMATS
@pytest.mark.parametrize("group", ["", "a/b"])
def test_arrays_without_names_are_named(store, zarr_format, group):
    samples = opened(store(zarr_format, group=group), group=group, dims={"x": ["cell", "gene"], "y": ["cell"]})
    assert [v.dims for v in samples.variables] == [("cell", "gene"), ("cell",)]
    assert samples.sample_dim == "cell"
    check_presence(samples)
    np.testing.assert_array_equal(UnitReader(samples).read(Box(0, 10))["x"][1], X)


@FORMATS
def test_names_choose_the_dimension_of_the_samples(store, zarr_format):
    path = store(zarr_format, y={"dims": None, "values": np.arange(2), "chunks": (2,)})
    samples = opened(path, dims={"x": ["gene", "cell"], "y": ["cell"]})
    assert (samples.sample_dim, samples.num_samples) == ("cell", 2)
    np.testing.assert_array_equal(UnitReader(samples).read(Box(0, 2))["x"][1], X.T)


def test_a_store_with_names_has_the_same_fingerprint(store, write_store, tmp_path):
    named = {
        "x": {"dims": ("n", "k"), "values": X, "chunks": (4, 2)},
        "y": {"dims": ("n",), "values": np.arange(10), "chunks": (3,)},
    }
    path = write_store(tmp_path / "n.zarr", named)
    silent = opened(store(), dims={"x": ["n", "k"], "y": ["n"]})
    assert opened(path).fingerprint == silent.fingerprint == opened(path, dims={"x": ["n", "k"]}).fingerprint


def test_an_array_of_which_some_dimensions_have_names_is_completed(store, write_store, tmp_path):
    path = write_store(tmp_path / "n.zarr", {"x": {"dims": ("n", None), "values": X, "chunks": (4, 2)}})
    assert opened(path, targets=["x"], dims={"x": ["n", "k"]}).variable("x").dims == ("n", "k")
    with pytest.raises(InvalidConfig, match=r'the store names the dimensions of x \["n", null\]'):
        opened(path, targets=["x"], dims={"x": ["k", "n"]})


@FORMATS
@pytest.mark.parametrize("given", [["k", "n"], ["n", "j"]])
def test_names_that_the_store_contradicts_are_refused_with_both(store, zarr_format, given):
    path = store(zarr_format, x={"dims": ("n", "k"), "values": X, "chunks": (4, 2)})
    with pytest.raises(InvalidConfig) as caught:
        opened(path, dims={"x": given, "y": ["n"]})
    text = '", "'.join(given)
    assert caught.value.message == f'data.dims.x = ["{text}"]: the store names the dimensions of x ["n", "k"].'
    assert caught.value.hint.startswith("Leave x out of data.dims")


@pytest.mark.parametrize("given", [["n"], ["n", "k", "j"], []])
def test_another_number_of_names_is_refused(store, given):
    with pytest.raises(InvalidConfig, match=r"data\.dims\.x = .*: x has the shape \[10, 2\]") as caught:
        opened(store(), dims={"x": given, "y": ["n"]})
    assert caught.value.hint == "Name each of its 2 dimensions, in order."


def test_names_of_an_array_that_is_not_used_are_refused(store):
    with pytest.raises(InvalidConfig, match='data.dims names "xx", .*; did you mean "x"'):
        opened(store(), dims={"xx": ["n", "k"]})


def test_an_array_without_names_says_how_to_name_it(store):
    with pytest.raises(Exception, match="x has no dimension names") as caught:
        opened(store(group="a b"), inputs=["a b/x"], targets=["a b/y"])
    assert 'data.dims = { "a b/x" = ["sample", "dim1"] }' in caught.value.hint


# Nested arrays ----------------------------------------------------------------------------------------------


@FORMATS
def test_the_coordinate_lies_in_the_group_of_the_variables(store, write_store, tmp_path, zarr_format):
    time = {"dims": ("time",), "values": np.array([0, 1, 2, 3, 9, 10, 11, 12, 13, 14]), "chunks": (10,)}
    arrays = {"x": {"dims": ("time", "k"), "values": X, "chunks": (4, 2)}, "time": time}
    path = write_store(tmp_path / "t.zarr", arrays, zarr_format=zarr_format, group="a/b")
    windows = {"input_offsets": [-1, 0], "gaps": "drop"}
    for prefix, group in (("a/b/", ""), ("b/", "a"), ("", "a/b")):
        samples = opened(path, [f"{prefix}x"], [f"{prefix}x"], group=group, **windows)
        assert isinstance(samples.coordinate, Coordinate)
        assert samples.coordinate.variable.name == f"{prefix}time"
        assert find_gaps(samples).jumps == "4"


@FORMATS
def test_the_nearest_coordinate_counts(write_store, tmp_path, zarr_format):
    near = {"dims": ("time",), "values": np.arange(10), "chunks": (10,)}
    arrays = {"x": {"dims": ("time", "k"), "values": X, "chunks": (4, 2)}, "time": near}
    path = write_store(tmp_path / "t.zarr", arrays, zarr_format=zarr_format, group="a")
    far = {"time": {"dims": ("time",), "values": np.arange(10)[::-1].copy(), "chunks": (10,)}}
    write_store(tmp_path / "far.zarr", far, zarr_format=zarr_format)
    (tmp_path / "far.zarr" / "time").rename(path / "time")
    samples = opened(path, ["a/x"], ["a/x"], input_offsets=[-1, 0])
    assert find_gaps(samples).jumps == ""
    assert samples.coordinate.variable.name == "a/time"
