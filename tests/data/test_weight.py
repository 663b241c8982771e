"""The weight of samples as a field: aligned with each target, cut and read as the target is, checked as it is read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from dtrain.data.plan.footprint import sample_bytes
from dtrain.data.plan.partition import eval_partitions, plan_data
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.data.weight import weight_text
from dtrain.errors import DtrainError, InvalidConfig, NonFiniteData, UnknownVariable, UnsuitableVariable
from tests.data.helpers import WHOLE, batches

ROWS, LEVELS, LATS, LONS = 20, 2, 4, 6
RNG = np.random.default_rng(0)
T = np.arange(ROWS * LEVELS * LATS * LONS, dtype="float32").reshape(ROWS, LEVELS, LATS, LONS)
AREA = RNG.random((LONS, LATS))
BY_SAMPLE = np.arange(ROWS) % 3
BY_PIXEL = RNG.random((LATS, ROWS, LONS))
LAT = np.linspace(88.5, -60, LATS)


@pytest.fixture(scope="module")
def path(tmp_path_factory, write_store):
    arrays = {
        "t": {"dims": ("time", "level", "lat", "lon"), "values": T, "chunks": (3, 1, 4, 3)},
        "u": {"dims": ("lon", "time", "lat"), "values": T[:, 0].transpose(2, 0, 1), "chunks": (6, 5, 2)},
        "area": {"dims": ("lon", "lat"), "values": AREA, "chunks": (6, 4)},
        "by_sample": {"dims": ("time",), "values": BY_SAMPLE, "chunks": (20,)},
        "by_pixel": {"dims": ("lat", "time", "lon"), "values": BY_PIXEL, "chunks": (4, 4, 6)},
        "valid": {"dims": ("time",), "values": BY_SAMPLE > 0, "chunks": (7,)},
        "level_weight": {"dims": ("level",), "values": np.array([1, 3], "int32"), "chunks": (2,)},
        "member": {"dims": ("member",), "values": np.ones(3), "chunks": (3,)},
        "lat": {"dims": ("lat",), "values": LAT, "chunks": (4,), "attributes": {"units": "degrees_north"}},
        "angle": {"dims": ("lat",), "values": np.deg2rad(LAT), "chunks": (4,), "attributes": {"units": "radians"}},
        "lat2": {"dims": ("lat", "lon"), "values": np.tile(LAT[:, None], 6), "chunks": (4, 6)},
        "time": {"dims": ("time",), "values": np.arange(ROWS), "chunks": (20,)},
        "far": {"dims": ("lat",), "values": LAT + 2, "chunks": (4,)},
        "negative": {"dims": ("time",), "values": BY_SAMPLE - 1.0, "chunks": (8,)},
        "missing": {"dims": ("time",), "values": np.where(np.arange(ROWS) == 13, np.nan, 1), "chunks": (8,)},
        "huge": {"dims": ("time",), "values": np.full(ROWS, 1e39), "chunks": (8,)},
        "zero": {"dims": ("lat",), "values": np.zeros(LATS, "uint8"), "chunks": (4,)},
    }
    return write_store(tmp_path_factory.mktemp("weight") / "s.zarr", arrays)


def opened(path, weight, targets=("t",), **data):
    return open_samples(path, inputs=["t"], targets=list(targets), weight=weight, split=WHOLE, **data)


def whole(samples):
    """All samples in stored order, as one batch."""
    plan = plan_data(samples, replicas=1, seed=0)
    (part,) = eval_partitions(plan, "all")
    (batch,) = batches(UnitReader(samples), part, [part.num_samples], shuffle=False)
    return batch


def weights(samples):
    """The weights of all samples, broadcast to each target."""
    batch = whole(samples)
    assert all(w.dtype == np.float32 and w.ndim == t.ndim for w, t in zip(batch.weights, batch.targets, strict=True))
    return [np.broadcast_to(w, t.shape) for w, t in zip(batch.weights, batch.targets, strict=True)]


# Axes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("by_sample", BY_SAMPLE[:, None, None, None]),
        ("valid", (BY_SAMPLE > 0)[:, None, None, None]),
        ("by_pixel", BY_PIXEL.transpose(1, 0, 2)[:, None]),
        ("area", AREA.T[None, None]),
        ("level_weight", np.array([1, 3])[None, :, None, None]),
        ("cos(lat)", np.cos(np.deg2rad(LAT))[None, None, :, None]),
        ("cos(angle)", np.cos(np.deg2rad(LAT))[None, None, :, None]),
        ("cos(lat2)", np.cos(np.deg2rad(LAT))[None, None, :, None]),
    ],
)
def test_a_weight_broadcasts_to_the_target_by_the_names_of_dimensions(path, name, expected):
    (found,) = weights(opened(path, name))
    if name == "cos(angle)":
        np.testing.assert_allclose(found, np.broadcast_to(expected, T.shape), rtol=1e-6)
    else:
        np.testing.assert_array_equal(found, np.broadcast_to(expected, T.shape).astype("float32"))


@pytest.mark.parametrize("name", ["by_sample", "by_pixel", "area", "cos(lat)"])
def test_each_of_several_targets_has_its_weights(path, name):
    by_dim = {"by_sample": BY_SAMPLE[:, None, None], "by_pixel": BY_PIXEL.transpose(1, 0, 2), "area": AREA.T[None]}
    expected = by_dim.get(name, np.cos(np.deg2rad(LAT))[None, :, None]).astype("float32")  # time, lat, lon
    first, second = weights(opened(path, name, targets=("t", "u"), sample_dim="time"))
    np.testing.assert_array_equal(first, np.broadcast_to(expected[:, None], first.shape))
    np.testing.assert_array_equal(second, np.broadcast_to(expected.transpose(0, 2, 1), second.shape))


@pytest.mark.parametrize("name", ["by_sample", "by_pixel", "cos(lat)"])
def test_weights_are_those_of_the_rows_of_the_target(path, name):
    """The offsets are the target's; the inputs are read at others."""
    samples = opened(path, name, input_offsets=[-1, 0], target_offsets=[1, 3], gaps="allow")
    batch, (found,) = whole(samples), weights(samples)
    anchors = np.arange(1, ROWS - 3)
    rows = anchors[:, None] + np.array([1, 3])
    np.testing.assert_array_equal(batch.targets[0], T[rows])
    expected = {
        "by_sample": BY_SAMPLE[rows][..., None, None, None],
        "by_pixel": BY_PIXEL.transpose(1, 0, 2)[rows, None],
    }
    expected = expected.get(name, np.cos(np.deg2rad(LAT))[:, None])
    np.testing.assert_array_equal(found, np.broadcast_to(expected, found.shape).astype("float32"))


def test_a_target_at_one_offset(path):
    (found,) = weights(opened(path, "by_sample", target_offsets=2, gaps="allow"))
    np.testing.assert_array_equal(found[:, 0, 0, 0], BY_SAMPLE[2:])


@pytest.mark.parametrize("name", ["by_sample", "by_pixel", "area", "cos(lat)"])
@pytest.mark.parametrize("offsets", [0, [0, 1]])
def test_patches_cut_the_weight_with_the_target(path, name, offsets):
    """Each patch has the weights of its place: seen in a store whose weight is the target itself."""
    data = {"target_offsets": offsets, "gaps": "allow"}
    (rows,) = weights(opened(path, name, **data))
    (cut,) = weights(opened(path, name, patch={"lat": 3, "lon": 2}, **data))
    starts = [(lat, lon) for lat in (0, 1) for lon in (0, 2, 4)]
    expected = np.stack([rows[..., lat : lat + 3, lon : lon + 2] for lat, lon in starts], 1)
    np.testing.assert_array_equal(cut, expected.reshape(cut.shape))


def test_a_variable_may_be_input_target_and_weight(path):
    samples = open_samples(path, inputs=["t", "by_sample"], targets=["by_sample"], weight="by_sample", split=WHOLE)
    batch = whole(samples)
    assert [v.name for v in samples.variables] == ["t", "by_sample"]
    assert batch.targets[0].dtype == batch.inputs[1].dtype == np.int64
    np.testing.assert_array_equal(batch.weights[0], BY_SAMPLE.astype("float32"))


def test_shuffled_batches_carry_the_weights_of_their_samples(path):
    samples = open_samples(path, inputs=["t"], targets=["time"], weight="by_sample", split=WHOLE)
    (part,) = eval_partitions(plan_data(samples, replicas=1, seed=0), "all")
    found = batches(UnitReader(samples), part, [7, 7, 6])
    order = np.concatenate([batch.targets[0] for batch in found])
    assert order.tolist() != sorted(order.tolist())
    np.testing.assert_array_equal(np.concatenate([batch.weights[0] for batch in found]), BY_SAMPLE[order])


# Cosines of a coordinate ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize("descends", [False, True])
@pytest.mark.parametrize(
    "encoding", [{}, {"dtype": "int16", "scale_factor": 0.25, "_FillValue": -32768}, {"dtype": "float32"}]
)
def test_cosines_of_a_coordinate_as_xarray_reads_it(tmp_path, encoding, descends):
    lat = np.linspace(-90, 90, 9)[:: -1 if descends else 1]
    values = RNG.random((10, 9, 4)).astype("float32")
    data = xr.Dataset(
        {"t2m": (("time", "latitude", "longitude"), values)},
        coords={"latitude": ("latitude", lat, {"units": "degrees_north"}), "time": np.arange(10)},
    )
    data.to_zarr(tmp_path / "s.zarr", encoding={"latitude": encoding, "t2m": {"chunks": (5, 9, 4)}})
    table = {"isel": {"latitude": {"start": 1, "stop": 9, "step": 2}}, "sel": {"time": {"start": 2, "stop": 8}}}
    samples = open_samples(
        tmp_path / "s.zarr", inputs=["t2m"], targets=["t2m"], weight="cos(latitude)", split=WHOLE, **table
    )
    (found,) = weights(samples)
    read = xr.open_zarr(tmp_path / "s.zarr").isel(latitude=slice(1, 9, 2)).latitude
    expected = np.cos(np.deg2rad(read.values.astype("float64"))).astype("float32")
    np.testing.assert_array_equal(found, np.broadcast_to(expected[:, None], (7, 4, 4)))
    assert weight_text(samples) == f"{expected.min():.6g} to {expected.max():.6g}"


def test_the_poles_have_weight_0_at_least(tmp_path, write_store):
    lat = np.array([90.0004, 45, -90.0004], "float32")  # as a grid computed in float32 has them
    arrays = {
        "t": {"dims": ("n", "lat"), "values": np.ones((4, 3), "float32"), "chunks": (2, 3)},
        "lat": {"dims": ("lat",), "values": lat, "chunks": (3,)},
    }
    (found,) = weights(opened(write_store(tmp_path / "s", arrays), "cos(lat)"))
    np.testing.assert_allclose(found[0], [0, np.sqrt(0.5), 0], atol=1e-7)
    assert found.min() == 0


def test_a_coordinate_beside_nested_targets(tmp_path, write_store):
    field = {"dims": ("n", "lat"), "values": np.ones((4, 3), "float32"), "chunks": (2, 3)}
    lat = {"dims": ("lat",), "values": np.array([0.0, 60, 60]), "chunks": (3,)}
    path = write_store(tmp_path / "s", {"t": field, "lat": lat}, group="era5")
    samples = open_samples(path, inputs=["era5/t"], targets=["era5/t"], weight="cos(lat)", split=WHOLE)
    np.testing.assert_allclose(weights(samples)[0][0], [1, 0.5, 0.5], rtol=1e-6)


# Facts ----------------------------------------------------------------------------------------------------------


def test_the_fingerprint_knows_the_weight(path):
    plain = opened(path, "")
    assert plain.fingerprint == open_samples(path, inputs=["t"], targets=["t"], split=WHOLE).fingerprint
    found = {opened(path, name).fingerprint for name in ("", "by_sample", "area", "cos(lat)", "cos(angle)")}
    assert len(found) == 5
    cosine = opened(path, "cos(lat)")
    other = replace(cosine, variables=tuple(replace(v, angle=v.angle and "radians") for v in cosine.variables))
    assert other.fingerprint != cosine.fingerprint


def test_memory_counts_the_weight(path):
    plain = sample_bytes(opened(path, ""))
    assert sample_bytes(opened(path, "by_sample")) == plain + 4
    assert sample_bytes(opened(path, "by_pixel")) == plain + 4 * LATS * LONS
    assert sample_bytes(opened(path, "area")) == plain  # one array for all samples
    patch = {"lat": 2}
    assert sample_bytes(opened(path, "area", patch=patch)) == sample_bytes(opened(path, "", patch=patch)) + 4 * 2 * LONS


def test_samples_print_the_weight(path):
    rows = dict(opened(path, "cos(lat)").rows())
    assert rows["weight cos(lat)"] == "float64[lat] (4,), chunks 4"
    assert weight_text(opened(path, "area")) == f"{np.float32(AREA).min():.6g} to {np.float32(AREA).max():.6g}"
    assert weight_text(opened(path, "by_sample")) == "checked as it is read: finite, not negative"
    assert weight_text(opened(path, "")) == ""


def test_the_dimension_of_the_samples_does_not_depend_on_the_weight(path):
    assert opened(path, "area").sample_dim == "time"


# Refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "data", "kind", "said"),
    [
        ("nothing", {}, UnknownVariable, '"nothing" not found'),
        ("cos(lit)", {}, InvalidConfig, "has no coordinate lit"),
        ("cos(time)", {}, InvalidConfig, "time lies along time, the dimension of the samples"),
        ("cos(member)", {}, InvalidConfig, "member lies along member, and no variable has member of that length"),
        ("cos(valid)", {}, InvalidConfig, "valid holds no angles (bool)"),
        ("member", {}, InvalidConfig, "has the dimension member that the target t lacks; allowed are those of the"),
        ("level_weight", {"targets": ("t", "u"), "sample_dim": "time"}, InvalidConfig, "level that the target u lacks"),
        ("area", {"dims": {"t": ["time", "level", "lat", "lon"]}, "normalize": ["area"]}, InvalidConfig, "weights are"),
        ("t", {"normalize": {"t": ["level"]}}, InvalidConfig, 'data.normalize names "t", which is data.weight'),
    ],
)
def test_what_does_not_fit_is_refused(path, weight, data, kind, said):
    with pytest.raises(kind) as caught:
        opened(path, weight, **data)
    assert said in caught.value.message


def test_a_dimension_with_one_place_does_not_matter(path):
    (found,) = weights(opened(path, "member", isel={"member": 0}))
    assert (found == 1).all()


@pytest.mark.parametrize("allowed", ["error", "allow"])
@pytest.mark.parametrize(
    ("weight", "kind", "said"),
    [
        (
            "negative",
            UnsuitableVariable,
            'negative[0] in chunk negative/c/0 is -1.0; data.weight = "negative" needs 0 or',
        ),
        ("missing", NonFiniteData, "missing[13] in chunk missing/c/1 is nan; data.weight"),
        ("huge", NonFiniteData, "huge[0] in chunk huge/c/0 is 1e+39; data.weight"),
        ("zero", UnsuitableVariable, 'all values of data.weight = "zero" are 0'),
        ("cos(far)", UnsuitableVariable, 'cos(far)[0] in chunk far/c/0 is 90.5; data.weight = "cos(far)" needs -90 to'),
    ],
)
def test_values_that_are_no_weights_are_refused_as_they_are_read(path, weight, kind, said, allowed):
    samples = opened(path, weight, non_finite=allowed)
    with pytest.raises(kind) as caught:
        whole(samples)
    assert said in caught.value.message
    if weight in ("zero", "cos(far)"):
        with pytest.raises(DtrainError, match=weight.replace("(", r"\(").replace(")", r"\)")):
            weight_text(samples)


def test_packed_weights_are_decoded(tmp_path, write_store):
    stored = np.array([0, 4, 255, 2], "uint8")
    attributes = {"scale_factor": 0.5, "_FillValue": 255}
    arrays = {
        "t": {"dims": ("n",), "values": np.ones(4, "float32"), "chunks": (2,)},
        "w": {"dims": ("n",), "values": stored, "chunks": (2,), "attributes": attributes},
    }
    path = write_store(tmp_path / "s", arrays)
    (found,) = weights(opened(path, "w", isel={"n": {"start": 0, "stop": 2}}))
    assert found.tolist() == [0, 2]
    with pytest.raises(NonFiniteData, match=r"w\[2\] in chunk w/c/1 is 255"):
        whole(opened(path, "w"))
