"""Integer labels with a fill value stay integers: a missing one is the ignored class."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import example, given
from hypothesis import strategies as st

from dtrain.config.names import IGNORED_CLASS
from dtrain.data.plan.units import Box
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import NonFiniteData, UnsuitableVariable
from tests.data.helpers import WHOLE, batches, only_partition, reader_of, vector
from tests.sampling import examples

DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "bool"]
FORMATS = pytest.mark.parametrize("zarr_format", [2, 3])


def write(write_store, folder, values, attributes, zarr_format=3, dims=("n",)):
    """Write label(n, ...) with its attributes, x(n) and index(n)."""
    values, options = np.asarray(values), {}
    if zarr_format == 2 and "_FillValue" in attributes:  # there the fill value of Zarr is the one of CF
        attributes = dict(attributes)
        options["fill_value"] = values.dtype.type(attributes.pop("_FillValue"))
    arrays = {
        "label": {
            "dims": dims,
            "values": values,
            "chunks": (5, *values.shape[1:]),
            "attributes": attributes,
            **options,
        },
        "x": vector(np.arange(len(values), dtype="float32"), 5),
        "index": vector(np.arange(len(values)), 5),
    }
    return write_store(Path(folder, "s"), arrays, zarr_format=zarr_format)


def opened(path, **data):
    tables = {"inputs": ["x"], "targets": ["label", "index"], "sample_dim": "n", "split": WHOLE, **data}
    return open_samples(path, **tables)


def labels_of(samples, **options):
    _, partition = only_partition(samples)
    (batch,) = batches(reader_of(samples, **options), partition, [samples.num_samples], shuffle=False)
    return batch.targets[0]


def expected(values, marks, unsigned=""):
    """Labels by plain Python, number by number."""
    seen = values.view(unsigned) if unsigned else values
    return [IGNORED_CLASS if int(v) in marks else int(v) for v in seen.ravel().tolist()]


@st.composite
def labelled(draw):
    """Draw (zarr format, values, attributes, marks as numbers, dtype with other signs)."""
    dtype = draw(st.sampled_from(DTYPES))
    low, high = (0, 1) if dtype == "bool" else (np.iinfo(dtype).min, min(np.iinfo(dtype).max, 2**63 - 1))
    numbers = st.integers(low, high) | st.sampled_from([low, high, max(low, -1), 0, 1, max(low, -100)])
    fill = draw(st.none() | numbers)
    others = draw(st.none() | numbers | st.lists(numbers | st.just(1e20) | st.just(-99999), min_size=1, max_size=3))
    attributes = {}
    zarr_format = draw(st.sampled_from([2, 3]))
    if fill is not None and not (zarr_format == 2 and fill == 0):  # a zero of v2 says nothing
        attributes["_FillValue"] = bool(fill) if dtype == "bool" else fill
    else:
        fill = None
    if others is not None:
        attributes["missing_value"] = others
    values = np.array(draw(st.lists(numbers, min_size=1, max_size=12)), dtype)
    marks = {m for m in [fill, *(others if isinstance(others, list) else [others])] if m is not None}
    return zarr_format, values, attributes, marks


@examples(150)
@given(labelled())
@example((3, np.array([0, 255, 7], "uint8"), {"_FillValue": 255}, {255}))
@example((2, np.array([0, -1, 7], "int16"), {"_FillValue": -1}, {-1}))
@example((3, np.array([2**62, 2**62 + 1], "int64"), {"_FillValue": 2**62}, {2**62}))  # one float64
@example((3, np.array([2**64 - 1, 5], "uint64"), {"_FillValue": 2**64 - 1}, {2**64 - 1}))  # beyond int64
@example((3, np.array([-100, 3, -5], "int16"), {"_FillValue": -5}, {-5}))  # a label that is the ignored class already
@example((3, np.array([True, False]), {"missing_value": 255}, set()))
def test_labels_stay_integers_and_missing_ones_are_the_ignored_class(write_store, drawn):
    zarr_format, values, attributes, marks = drawn
    with tempfile.TemporaryDirectory() as folder:
        path = write(write_store, folder, values, attributes, zarr_format)
        samples = opened(path)
        assert samples.variable("label").model_dtype == np.int64
        found = labels_of(samples)
        assert found.dtype == np.int64
        assert found.tolist() == expected(values, marks)
        # as an input too they are decoded as xarray does
        both = opened(path, inputs=["x", "label"])
        assert both.variable("label").encoding is None or both.variable("label").encoding.ignored is None
        assert both.fingerprint == opened(path, inputs=["x", "label"]).labelled("nan").fingerprint


@FORMATS
@pytest.mark.parametrize("which", ["zarr", "zarrs", "auto"])
def test_a_mask_that_xarray_wrote_with_a_fill_value(tmp_path, zarr_format, which):
    values = np.random.default_rng(0).integers(0, 3, (23, 4, 4))
    values[5:12, 1] = -1
    data = xr.Dataset({"label": (("n", "a", "b"), values), "x": ("n", np.arange(23.0)), "index": ("n", np.arange(23))})
    encoding = {"label": {"dtype": "int8", "_FillValue": -1, "chunks": (6, 4, 2)}}
    data.to_zarr(tmp_path / "s", zarr_format=zarr_format, consolidated=False, encoding=encoding)
    samples = opened(tmp_path / "s")
    assert labels_of(samples, reader=which).tolist() == np.where(values < 0, -100, values).tolist()
    assert (
        "labels label",
        "-1 marks a missing label: it is class -100, losses and metrics leave it out",
    ) in samples.rows()


@pytest.mark.parametrize(("word", "dtype", "other"), [("true", "int8", "uint8"), ("false", "uint16", "int16")])
def test_labels_with_other_signs(write_store, tmp_path, word, dtype, other):
    values = np.array([0, 1, -1 % 256 if dtype == "uint16" else -1, 100], dtype)
    fill = values[2].item()
    path = write(write_store, tmp_path, values, {"_FillValue": fill, "_Unsigned": word})
    mark = int(np.array(fill, dtype).view(other))
    assert labels_of(opened(path)).tolist() == expected(values, {mark}, other)


def test_windows_and_patches_of_labels(write_store, tmp_path):
    values = np.arange(20 * 6).reshape(20, 6) % 7
    path = write(write_store, tmp_path, values.astype("uint8"), {"_FillValue": 3}, dims=("n", "k"))
    samples = opened(path, targets=["label", "index"], target_offsets=[0, 1], patch={"k": 3})
    decoded = np.where(values == 3, -100, values)
    _, partition = only_partition(samples)
    for batch in batches(UnitReader(samples), partition, [7, 7]):
        for label, index in zip(*batch.targets, strict=True):
            rows = decoded[index]
            assert label.tolist() in (rows[:, :3].tolist(), rows[:, 3:].tolist())


@pytest.mark.parametrize(
    ("values", "attributes", "data"),
    [
        (np.arange(4, dtype="int16"), {"_FillValue": 1, "scale_factor": 0.5}, {}),  # packed
        (np.arange(4, dtype="float32"), {"_FillValue": 1.0}, {}),
        (np.arange(4, dtype="int16"), {"_FillValue": 1}, {"normalize": ["label"]}),
        (np.arange(4, dtype="int16"), {"_FillValue": 1}, {"inputs": ["x", "label"]}),
    ],
)
def test_what_is_no_label_is_missing_as_before(write_store, tmp_path, values, attributes, data):
    samples = opened(write(write_store, tmp_path, values, attributes), **data)
    label = samples.variable("label")
    assert (label.encoding.ignored, label.model_dtype) == (None, np.float32)
    with pytest.raises(NonFiniteData, match=r"label\[1\] in chunk label/c/0 is 1(\.0)?, which marks a missing value"):
        UnitReader(samples).read(Box(0, 4))


def test_a_label_beyond_int64_is_refused_and_a_mark_is_not(write_store, tmp_path):
    values = np.array([1, 2**64 - 1, 2**63, 5], "uint64")
    path = write(write_store, tmp_path, values, {"_FillValue": 2**64 - 1})
    with pytest.raises(
        UnsuitableVariable, match=r"label\[2\] in chunk label/c/0 is 9223372036854775808; the model sees"
    ):
        UnitReader(opened(path)).read(Box(0, 4))
    assert labels_of(opened(path, isel={"n": {"start": 0, "stop": 2}})).tolist() == [1, -100]


def test_labels_may_be_refused_or_nan_instead(write_store, tmp_path):
    path = write(write_store, tmp_path, np.array([0, 9, 2], "uint8"), {"_FillValue": 9})
    samples = opened(path)
    prints = {samples.labelled(missing).fingerprint for missing in ("ignored", "refused", "nan")}
    assert prints == {samples.fingerprint}
    refused = samples.labelled("refused")
    with pytest.raises(NonFiniteData, match=r"label\[1\] .* is 9, which marks a missing value") as caught:
        UnitReader(refused).read(Box(0, 3))
    assert caught.value.hint == (
        'Repair the data. With data.non_finite = "allow" your loss and metrics see class -100 there, and must leave it '
        "out."
    )
    allowed = opened(path, non_finite="allow").labelled("refused")
    assert labels_of(allowed).tolist() == [0, -100, 2]
    nan = labels_of(opened(path, non_finite="allow").labelled("nan"))
    assert nan.dtype == np.float32
    np.testing.assert_array_equal(nan, [0, np.nan, 2])
    assert samples.labelled("nan").labelled("ignored") == samples


@FORMATS
def test_a_missing_chunk_of_labels_is_its_fill_value_decoded(write_store, tmp_path, zarr_format):
    attributes = {"_FillValue": 7}
    path = write(write_store, tmp_path, np.arange(10, dtype="int16"), attributes, zarr_format)
    (path / ("label/1" if zarr_format == 2 else "label/c/1")).unlink()
    fills = [-100] * 5 if zarr_format == 2 else [0] * 5  # the fill value of Zarr v3 is another thing than CF's
    assert labels_of(opened(path)).tolist() == [0, 1, 2, 3, 4, *fills]
