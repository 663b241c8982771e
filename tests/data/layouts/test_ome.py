"""OME-Zarr as its specifications say: axes of the group, any level of a pyramid, label images beside the images."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import zarr

from dtrain.data.plan.units import Box
from dtrain.data.read.presence import check_presence
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import ChunkMissing, LengthsDiffer, UnknownVariable, UnsuitableVariable
from tests.data.helpers import WHOLE, batches, only_partition
from tests.data.layouts.fixtures import write_ome
from tests.data.servers import FileServer

VERSIONS = pytest.mark.parametrize("version", ["0.3", "0.4", "0.5"])
IMAGE = np.random.default_rng(0).integers(1, 60_000, (10, 2, 3, 8, 12)).astype("uint16")  # t, c, z, y, x
LABELS = np.random.default_rng(1).integers(0, 4, (10, 3, 8, 12)).astype("uint8")
NUCLEI = "labels/nuclei"


@pytest.fixture
def store(tmp_path: Path):
    """A function that writes an image of all five axes with label images of four, and returns the path."""

    def write(version="0.5", name="image.zarr", labels=None, **options):
        labels = labels or {"nuclei": (LABELS, "tzyx")}
        return write_ome(tmp_path / name, IMAGE, "tczyx", version=version, labels=labels, **options)

    return write


def opened(path, level="0", label=f"{NUCLEI}/0", **data):
    return open_samples(path, inputs=[level], targets=[label], **{"split": WHOLE, **data})


def rows(samples, reader="auto"):
    return {name: values for name, (_, values) in UnitReader(samples, reader).read(Box(0, samples.num_samples)).items()}


# Dimensions -------------------------------------------------------------------------------------------------


@pytest.mark.sampled(11)
@VERSIONS
@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("level", ["0", "1"])
@pytest.mark.parametrize("reader", ["numcodecs", "zarrs", "zarr"])
def test_every_level_is_read_by_its_path_with_the_axes_of_its_group(store, version, consolidated, level, reader):
    samples = opened(store(version, consolidated=consolidated), level, f"{NUCLEI}/{level}")
    image, label = samples.variables
    assert (image.dims, label.dims) == (("t", "c", "z", "y", "x"), ("t", "z", "y", "x"))
    assert (samples.sample_dim, samples.num_samples) == ("t", 10)
    check_presence(samples)
    step = 2 ** int(level)
    found = rows(samples, reader)
    np.testing.assert_array_equal(found[level], IMAGE[..., ::step, ::step])
    np.testing.assert_array_equal(found[f"{NUCLEI}/{level}"], LABELS[..., ::step, ::step])


@pytest.mark.parametrize("version", ["0.1", "0.2"])
def test_versions_that_name_no_axes_have_all_five(store, version):
    labels = {"nuclei": (LABELS[:, None], "tczyx")}
    samples = opened(store(version, labels=labels))
    assert samples.variable("0").dims == ("t", "c", "z", "y", "x")
    np.testing.assert_array_equal(rows(samples)[f"{NUCLEI}/0"], LABELS)


def test_without_names_in_the_arrays_those_of_the_group_count(store):
    named, silent = opened(store("0.5")), opened(store("0.5", name="silent.zarr", named=False))
    assert [v.dims for v in named.variables] == [v.dims for v in silent.variables]
    assert named.fingerprint == silent.fingerprint


@pytest.mark.sampled(19)
@pytest.mark.parametrize("axes", ["".join(axes) for n in (2, 3, 4, 5) for axes in itertools.combinations("tczyx", n)])
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_an_image_may_have_any_of_the_axes(tmp_path, version, axes):
    shape = [10 if axis == axes[0] else 4 for axis in axes]
    image = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    path = write_ome(tmp_path / "i.zarr", image, axes, version=version, named=False)
    samples = open_samples(path, inputs=["0"], targets=["0"], split=WHOLE)
    assert (samples.sample_dim, samples.variable("0").dims) == (axes[0], tuple(axes))
    np.testing.assert_array_equal(rows(samples)["0"], image)


@VERSIONS
@pytest.mark.parametrize("levels", [("s0", "s1"), ("scale/0", "scale/1"), ("full", "half")])
def test_levels_may_have_any_path(store, version, levels):
    samples = opened(store(version, levels=levels), levels[1], f"{NUCLEI}/{levels[1]}")
    np.testing.assert_array_equal(rows(samples)[levels[1]], IMAGE[..., ::2, ::2])


@VERSIONS
@pytest.mark.parametrize("group", ["A/1/0", "A/1/0/"])
def test_an_image_of_a_plate_is_named_by_its_group_or_by_its_path(store, version, group):
    path = store(version, group=group.strip("/"))
    inside = opened(path, group=group)
    outside = opened(path, "A/1/0/0", f"A/1/0/{NUCLEI}/0")
    level = open_samples(path, inputs=["1"], targets=["1"], group=f"{group.strip('/')}/{NUCLEI}", split=WHOLE)
    assert [v.dims for v in inside.variables] == [v.dims for v in outside.variables]
    assert level.variable("1").dims == ("t", "z", "y", "x")
    np.testing.assert_array_equal(rows(outside)["A/1/0/0"], IMAGE)


def test_the_nearest_group_that_names_the_array_says_its_axes(store):
    path = store("0.4")
    root = zarr.open_group(path, mode="r+")
    other = {"axes": [{"name": name} for name in "abdef"], "datasets": [{"path": f"{NUCLEI}/0"}, {"path": "9"}]}
    root.attrs["multiscales"] = [other, *root.attrs["multiscales"]]
    root["labels"].attrs["multiscales"] = [{**other, "datasets": [{"path": "0"}]}]
    assert [v.dims for v in opened(path).variables] == [("t", "c", "z", "y", "x"), ("t", "z", "y", "x")]


@pytest.mark.parametrize(
    "multiscales",
    [None, 7, [], [3], [{}], [{"datasets": 3}], [{"datasets": [3, {"path": 0}]}], [{"datasets": [{"path": "9"}]}]],
)
def test_a_group_that_says_nothing_of_the_array_is_no_image(store, multiscales):
    path = store("0.4")
    zarr.open_group(path, mode="r+").attrs["multiscales"] = multiscales
    with pytest.raises(UnsuitableVariable, match="0 has no dimension names") as caught:
        opened(path)
    assert 'data.dims = { 0 = ["sample", "dim1", "dim2", "dim3", "dim4"] }' in caught.value.hint


@pytest.mark.parametrize("axes", [["t", "y"], [{"name": name} for name in "tczyxw"], []])
def test_axes_of_another_number_are_refused_by_name(store, axes):
    path = store("0.4")
    root = zarr.open_group(path, mode="r+")
    root.attrs["multiscales"] = [{**root.attrs["multiscales"][0], "axes": axes}]
    with pytest.raises(UnsuitableVariable, match=r"0 (of shape \[10, 2, 3, 8, 12\] has the|has no) dimension names"):
        opened(path)


# Label images -----------------------------------------------------------------------------------------------


@VERSIONS
def test_the_channel_of_a_label_image_is_no_axis_of_its_rows(store, version):
    samples = opened(store(version, labels={"nuclei": (LABELS[:, None], "tczyx")}), normalize={"0": ["c"]})
    image, label = samples.variables
    assert label.dims == ("t", f"{NUCLEI}/0 c", "z", "y", "x")
    assert (image.row_shape, label.row_shape, label.shape) == ((2, 3, 8, 12), (3, 8, 12), (10, 1, 3, 8, 12))
    check_presence(samples)
    _, partition = only_partition(samples)
    (batch,) = batches(UnitReader(samples), partition, [10], shuffle=False)
    np.testing.assert_array_equal(batch.targets[0], LABELS)


def test_a_channel_that_image_and_labels_share_stays(tmp_path):
    labels = {"nuclei": (LABELS[:, None], "tczyx")}
    path = write_ome(tmp_path / "i.zarr", IMAGE[:, :1], "tczyx", labels=labels)
    assert [v.row_shape for v in opened(path).variables] == [(1, 3, 8, 12)] * 2
    assert [v.row_shape for v in opened(path, isel={"c": 0}).variables] == [(3, 8, 12)] * 2


def test_other_axes_of_one_place_are_not_left_out(tmp_path):
    labels = {"nuclei": (LABELS[:, :1], "tzyx")}
    path = write_ome(tmp_path / "i.zarr", IMAGE, "tczyx", labels=labels)
    with pytest.raises(LengthsDiffer, match=f"along z: 0 has 3, {NUCLEI}/0 has 1"):
        opened(path)


def test_levels_of_different_size_do_not_go_together(store):
    with pytest.raises(LengthsDiffer, match=f"along y: 0 has 8, {NUCLEI}/1 has 4"):
        opened(store(), "0", f"{NUCLEI}/1")


def test_patches_and_selected_places_of_image_and_labels(store):
    samples = opened(store("0.4"), isel={"c": 1, "z": {"start": 1, "stop": 3}}, patch={"y": 4, "x": 4})
    _, partition = only_partition(samples)
    (batch,) = batches(UnitReader(samples), partition, [60], shuffle=False)
    seen = {(image.tobytes(), label.tobytes()) for image, label in zip(batch.inputs[0], batch.targets[0], strict=True)}
    cut = itertools.product(range(10), (0, 4), (0, 4, 8))
    expected = {
        (
            np.ascontiguousarray(IMAGE[t, 1, 1:3, y : y + 4, x : x + 4]).astype("int64").tobytes(),
            np.ascontiguousarray(LABELS[t, 1:3, y : y + 4, x : x + 4]).astype("int64").tobytes(),
        )
        for t, y, x in cut
    }
    assert seen == expected


# Names and faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "meant"), [("labels/nuclie/0", "labels/nuclei/0"), ("label/nuclei/1", "labels/nuclei/1")]
)
def test_a_misspelt_path_is_named_with_the_closest_one(store, wrong, meant):
    with pytest.raises(UnknownVariable, match=f'variable "{wrong}" not found; did you mean "{meant}"') as caught:
        opened(store(), label=wrong)
    assert caught.value.hint == "It has 0, 1, labels/nuclei/0, labels/nuclei/1."


def test_an_image_is_a_group_of_levels(store):
    with pytest.raises(UnknownVariable, match=f'"{NUCLEI}" is a group, not a variable') as caught:
        opened(store(), label=NUCLEI)
    assert caught.value.hint == f"It holds {NUCLEI}/0, {NUCLEI}/1."


@VERSIONS
def test_faults_name_the_array_by_its_path(store, version):
    path = store(version)
    key = f"{NUCLEI}/0/{'c/' if version == '0.5' else ''}1/0/1/1"
    (path / key).unlink()
    with pytest.raises(ChunkMissing, match=f"chunk {key} of {NUCLEI}/0 is missing"):
        check_presence(opened(path, missing="error"))
    assert list(check_presence(opened(path))) == [f"{NUCLEI}/0"]  # a label image leaves out empty chunks
    (path / re.sub(f"^{NUCLEI}/", "", key).replace("/1/0/1/1", "/1/0/0/1/1")).unlink()
    with pytest.raises(ChunkMissing, match=r"of 0 is missing"):
        check_presence(opened(path))


# Servers ----------------------------------------------------------------------------------------------------


@VERSIONS
@pytest.mark.parametrize("consolidated", [False, True])
def test_over_http_nothing_is_listed(store, version, consolidated):
    path = store(version, consolidated=consolidated)
    server = FileServer(path)
    try:
        samples = opened(server.url)
        assert samples.fingerprint == opened(path).fingerprint
        assert not [request for request in server.log if request.key.endswith("/") or not request.key]
        np.testing.assert_array_equal(rows(samples)[f"{NUCLEI}/0"], LABELS)
        if consolidated:
            documents = ("/zarr.json", "/.zattrs", "/.zgroup")
            asked = {request.key for request in server.log if request.key.endswith(documents)}
            assert not asked  # the documents of arrays and groups are those of the root
    finally:
        server.stop()
