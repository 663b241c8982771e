"""``data.normalize``: which means a variable has, and what the model sees of it, against exact arithmetic."""

from __future__ import annotations

import math
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dtrain.data.encoding import Scaling
from dtrain.data.load.gather import target_scalings
from dtrain.data.load.statistics import merge_moments, partition_moments, scalings_of
from dtrain.data.plan.footprint import slot_bytes
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.plan.units import Box
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import InvalidConfig, LengthsDiffer, NonFiniteData
from tests.data.helpers import WHOLE, batches, index_of, one_pass, only_partition, vector
from tests.sampling import examples

SIZES = {"n": 24, "level": 4, "lat": 6, "lon": 5}


def write(write_store, folder, values, dims, **options):
    """Write x, a static variable of the dimensions beside n, and index(n)."""
    values = np.asarray(values)
    row = tuple(dim for dim in dims if dim != "n")
    one = np.take(values, 0, axis=dims.index("n"))
    arrays = {
        "x": {
            "dims": dims,
            "values": values,
            "chunks": tuple(5 if d == "n" else n for d, n in zip(dims, values.shape, strict=True)),
            **options,
        },
        "place": {"dims": row, "values": one, "chunks": one.shape, **options},
        "index": vector(np.arange(values.shape[dims.index("n")]), 5),
    }
    return write_store(Path(folder, "s"), arrays)


def opened(path, normalize, inputs=("x",), targets=("index",), **data):
    return open_samples(
        path, inputs=inputs, targets=targets, sample_dim="n", normalize=normalize, **{"split": WHOLE, **data}
    )


def field(dims=("n", "level", "lat", "lon"), dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(280, 3, tuple(SIZES[dim] for dim in dims)).astype(dtype)


def scalings_in(samples, replicas=2):
    """The scalings of a run, from one pass by each replica."""
    reader = UnitReader(samples)
    parts = train_partitions(plan_data(samples, replicas=replicas, seed=0))
    names = tuple(samples.config.mean_dims)
    return scalings_of(merge_moments([partition_moments(reader, part, names) for part in parts]), samples.variables)


def rows_seen(samples, scalings, size=7, **options):
    """The input x and the static one as the model sees them, in the order of the rows."""
    _, partition = only_partition(samples)
    sizes = one_pass(partition, size)
    found = batches(UnitReader(samples), partition, sizes, scalings=scalings, **options)
    order = np.argsort(index_of(found))
    return [np.concatenate([batch.inputs[i] for batch in found])[order] for i in range(len(samples.config.inputs))]


# Which means -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dims", "normalize", "axes", "said"),
    [
        (("n", "level", "lat", "lon"), ["x"], (), "one mean of all values"),
        (("n", "level", "lat", "lon"), {"x": []}, (), "one mean of all values"),
        (("n", "level"), ["x"], (), "one mean of all values"),
        (("n",), ["x"], (), "one mean of all values"),
        (("n", "level"), {"x": ["level"]}, (0,), "one mean for each of the 4 places of level"),
        (("level", "n", "lat"), {"x": ["lat"]}, (1,), "one mean for each of the 6 places of lat"),
        (
            ("n", "level", "lat", "lon"),
            {"x": ["lon", "level"]},
            (0, 2),
            "one mean for each of the 20 places of level x lon",
        ),
    ],
)
def test_a_variable_has_one_mean_unless_dimensions_are_named(write_store, tmp_path, dims, normalize, axes, said):
    samples = opened(write(write_store, tmp_path, field(dims), dims), normalize)
    assert samples.variable("x").mean_axes == axes
    assert f"x: {said}\n" in repr(samples)
    assert samples.variable("index").mean_axes is None
    scaling = scalings_in(samples)["x"]
    assert scaling.axes == axes
    values = np.moveaxis(field(dims).astype("float64"), dims.index("n"), 0)
    other = tuple(axis for axis in range(values.ndim) if axis - 1 not in axes)
    np.testing.assert_allclose(scaling.mean, values.mean(axis=other).ravel(), rtol=1e-13)
    np.testing.assert_allclose(scaling.std, values.std(axis=other).ravel(), rtol=1e-12)


@pytest.mark.parametrize("name", ["band", "channel", "feature", "level", "rgb"])
def test_a_name_of_a_dimension_means_nothing(write_store, tmp_path, name):
    arrays = {
        "x": {"dims": ("sample", "row", "col", name), "values": np.zeros((6, 2, 3, 4)), "chunks": (3, 2, 3, 4)},
        "y": {"dims": ("sample",), "values": np.arange(6), "chunks": (3,)},
    }
    path = write_store(tmp_path / "s", arrays)
    one, each = (
        open_samples(path, inputs=["x"], targets=["y"], normalize=normalize) for normalize in (["x"], {"x": [name]})
    )
    assert (one.variable("x").mean_axes, each.variable("x").mean_axes) == ((), (2,))


@pytest.mark.parametrize(
    ("normalize", "data", "said", "cure"),
    [
        ({"x": ["levle"]}, {}, 'x has no such dimension; did you mean "level"?', "level, lat, lon"),
        ({"place": ["n"]}, {}, 'data.normalize.place names "n": place has no such dimension', "level, lat, lon"),
        ({"x": ["lat", "n"]}, {}, 'data.normalize.x names "n": that is the dimension of the samples', "one mean"),
        ({"index": ["lat"]}, {}, "index has no such dimension", "data.normalize.index = []"),
        ({"x": ["lat"]}, {"patch": {"lat": 3}}, "data.patch cuts lat", "Leave lat out of data.patch"),
        ({"x": ["lat", "lat"]}, {}, 'data.normalize.x names the dimension "lat" twice', "once"),
        ({"y": ["lat"]}, {}, 'data.normalize names "y", which is neither an input nor a target', ""),
    ],
)
def test_dimensions_that_can_have_no_means_are_refused(write_store, tmp_path, normalize, data, said, cure):
    dims = ("n", "level", "lat", "lon")
    path = write(write_store, tmp_path, field(dims), dims)
    with pytest.raises(InvalidConfig) as caught:
        opened(path, normalize, ("x", "place"), **data)
    assert said in caught.value.message
    assert cure in caught.value.hint
    assert caught.value.code == 3


def test_selected_places_have_their_own_means(write_store, tmp_path):
    dims = ("n", "level", "lat", "lon")
    path = write(write_store, tmp_path, field(dims), dims)
    isel = {"level": {"start": 1, "stop": 4, "step": 2}, "lat": 3}
    scaling = scalings_in(opened(path, {"x": ["level", "lat"]}, isel=isel))["x"]
    assert scaling.axes == (0,)  # a single place of lat is no axis
    np.testing.assert_allclose(scaling.mean, field(dims)[:, 1:4:2, 3].astype("float64").mean(axis=(0, 2)), rtol=1e-13)


def test_means_that_do_not_fit_other_data_are_refused_by_name():
    scaling = Scaling((1.0, 2.0), (1.0, 1.0), (1,))
    for shape in ((2, 3), (2,), ()):
        with pytest.raises(LengthsDiffer, match="x: data.normalize has 2 means, which do not fit a row of shape"):
            scaling.against("x", shape)
    assert scaling.against("x", (3, 2)).mean.tolist() == [[1.0, 2.0]]


# What the model sees ---------------------------------------------------------------------------------------------

KINDS = {
    "float64 near 0": (lambda rng, shape: rng.normal(0.3, 1, shape), "float64"),
    "float64 mean 1e7": (lambda rng, shape: 1e7 + rng.normal(size=shape), "float64"),
    "float64 mean 1e9": (lambda rng, shape: 1e9 + rng.normal(size=shape), "float64"),
    "float64 mean -3e11": (lambda rng, shape: -3e11 + rng.normal(size=shape), "float64"),
    "float64 small": (lambda rng, shape: 1e-100 * (5 + rng.normal(size=shape)), "float64"),
    "float32 mean 1e7": (lambda rng, shape: 1e7 + 3 * rng.normal(size=shape), "float32"),
    "float32 mean 280": (lambda rng, shape: 280 + 3 * rng.normal(size=shape), "float32"),
    "big-endian float64": (lambda rng, shape: 1e9 + rng.normal(size=shape), ">f8"),
    "big-endian int64": (lambda rng, shape: 2**62 + rng.integers(0, 999, shape), ">i8"),
    "float16": (lambda rng, shape: 300 + 2 * rng.normal(size=shape), "float16"),
    "int64 nanoseconds": (lambda rng, shape: 1_600_000_000_000_000_000 + rng.integers(0, 10**6, shape), "int64"),
    "int64 steps of 1": (lambda rng, shape: -(2**63) + rng.integers(0, 5, shape), "int64"),
    "int64 all": (lambda rng, shape: rng.integers(-(2**63), 2**63 - 1, shape), "int64"),
    "uint64 top": (lambda rng, shape: np.uint64(2**64 - 1) - rng.integers(0, 99, shape).astype("uint64"), "uint64"),
    "uint32": (lambda rng, shape: 2**32 - 1 - rng.integers(0, 99, shape), "uint32"),
    "int16": (lambda rng, shape: rng.integers(30000, 30003, shape), "int16"),
    "uint8": (lambda rng, shape: rng.integers(0, 256, shape), "uint8"),
    "bool": (lambda rng, shape: rng.random(shape) < 0.2, "bool"),
}


def exactly(values, axes):
    """(x - mean) / std of rows, computed in fractions, rounded to float64 and then once to float32."""
    groups = np.moveaxis(values, [axis + 1 for axis in axes], range(len(axes)))
    flat = groups.reshape(math.prod(values.shape[axis + 1] for axis in axes), -1)
    found = np.empty(flat.shape)
    for i, row in enumerate(flat.tolist()):
        numbers = [Fraction(value) for value in row]
        mean = sum(numbers) / len(numbers)
        variance = sum((number - mean) ** 2 for number in numbers) / len(numbers)
        # the root of a fraction, without leaving the range of floats
        digits = math.isqrt(variance.numerator * variance.denominator << 400)
        std = Fraction(digits, variance.denominator << 200) or Fraction(1)
        found[i] = [float((number - mean) / std) for number in numbers]
    return np.moveaxis(found.reshape(groups.shape), range(len(axes)), [axis + 1 for axis in axes]).astype("float32")


def assert_close(found, expected):
    """Within one unit in the last place of float32, but very near 0: float64 itself ends at 1e-16."""
    assert found.dtype == expected.dtype == np.float32
    difference = np.abs(found.astype("float64") - expected)
    assert (difference <= np.spacing(np.abs(expected)) + 6e-14).all(), difference.max()


def native(values):
    return values.astype(values.dtype.newbyteorder("="))


@examples(60)
@given(
    st.sampled_from(list(KINDS)),
    st.sampled_from([(), ("level",), ("lat",), ("level", "lat")]),
    st.sampled_from([("n", "level", "lat"), ("lat", "n", "level")]),
    st.integers(1, 4),
    st.integers(0, 99),
)
@example("int64 nanoseconds", ("level",), ("n", "level", "lat"), 3, 0)
@example("float64 mean 1e9", (), ("n", "level", "lat"), 2, 0)
def test_values_are_those_of_exact_arithmetic_rounded_once(write_store, kind, by, dims, replicas, seed):
    make, dtype = KINDS[kind]
    values = make(np.random.default_rng(seed), tuple(SIZES[dim] for dim in dims)).astype(dtype)
    row_dims = [dim for dim in dims if dim != "n"]
    axes = tuple(axis for axis, dim in enumerate(row_dims) if dim in by)
    with tempfile.TemporaryDirectory() as folder:
        path = write(write_store, folder, values, dims)
        samples = opened(path, {"x": by, "place": by}, ("x", "place"))
        seen, place = rows_seen(samples, scalings_in(samples, replicas))
        rows = native(np.moveaxis(values, dims.index("n"), 0))
        assert_close(seen, exactly(rows, axes))
        assert_close(place[:1], exactly(rows[:1], axes))


@examples(40)
@given(
    st.sampled_from([kind for kind in KINDS if "all" not in kind]),
    st.sampled_from([0, -1, [-1, 0], [0, 2, 3], {"start": 0, "stop": 3}]),
    st.sampled_from([{}, {"lat": 2}, {"lat": 4}, {"lat": 6}]),
    st.booleans(),
    st.integers(0, 9),
)
def test_windows_and_patches_see_the_same_values(write_store, kind, offsets, patch, has_means, seed):
    make, dtype = KINDS[kind]
    values = make(np.random.default_rng(seed), (24, 4, 6)).astype(dtype)
    arrays = {
        "x": {"dims": ("n", "level", "lat"), "values": values, "chunks": (5, 2, 6)},
        "where": {"dims": ("lat",), "values": np.arange(6), "chunks": (6,)},
        "index": vector(np.arange(24), 5),
    }
    with tempfile.TemporaryDirectory() as folder:
        samples = opened(
            write_store(Path(folder, "s"), arrays),
            {"x": ["level"] if has_means else []},
            ("x", "where"),
            input_offsets=offsets,
            patch=patch,
        )
        scalings = scalings_in(samples, 1)
        standard = scalings["x"].against("x", (4, 6))
        expected = standard.apply(native(values), samples.variable("x").encoding).astype("float32")
        assert len(np.unique(expected)) >= min(len(np.unique(values)), 0.99 * values.size)
        _, partition = only_partition(samples)
        sizes = [5] * (partition.num_samples // 5)
        for batch in batches(UnitReader(samples), partition, sizes, scalings=scalings):
            for x, where, anchor in zip(*batch.inputs, batch.targets[0], strict=True):
                steps = np.array(samples.fields[0].offsets)
                wanted = expected[anchor + steps][..., where]
                np.testing.assert_array_equal(x, wanted if samples.fields[0].window else wanted[0])


@pytest.mark.parametrize("preloaded", [False, True])
def test_a_float64_variable_that_is_standardised_stays_float64_in_memory(write_store, tmp_path, preloaded):
    arrays = {
        "x": {"dims": ("n", "k"), "values": np.zeros((400, 40)), "chunks": (20, 40)},
        "y": vector(1e9 + np.random.default_rng(0).normal(size=400), 400 if preloaded else 20),
    }
    path = write_store(tmp_path / "s", arrays)
    plain, standardised = (
        open_samples(path, inputs=["x"], targets=["y"], split=WHOLE, normalize=names) for names in ([], ["y"])
    )
    assert [v.name for v in standardised.preloaded] == (["y"] if preloaded else [])
    assert (plain.row_bytes, standardised.row_bytes) == (41 * 4, 40 * 4 + 8)
    assert plain.fingerprint == standardised.fingerprint
    plans = [only_partition(samples, unit_rows=20, cell_rows=20)[0] for samples in (plain, standardised)]
    assert slot_bytes(standardised, plans[1]) == slot_bytes(plain, plans[0]) + 20 * 4
    _, partition = only_partition(standardised)
    found = batches(UnitReader(standardised), partition, [400], shuffle=False, scalings=scalings_in(standardised))
    assert_close(found[0].targets[0], exactly(arrays["y"]["values"][:, None], ())[:, 0])


@pytest.mark.parametrize("by", [[], ["level"]])
def test_a_packed_variable_is_unpacked_in_float64_first(write_store, tmp_path, by):
    dims = ("n", "level", "lat")
    stored = np.random.default_rng(0).integers(29990, 30010, (24, 4, 6)).astype("int16")
    stored[3, 2, 1] = -1
    attributes = {"scale_factor": 0.1, "_FillValue": -1}
    path = write(write_store, tmp_path, stored, dims, attributes=attributes)
    samples = opened(path, {"x": by}, non_finite="allow")
    decoded = np.where(stored == -1, np.nan, stored * 0.1)
    axis = (0, 2) if by else None
    expected = (decoded - np.nanmean(decoded, axis=axis, keepdims=True)) / np.nanstd(decoded, axis=axis, keepdims=True)
    (seen,) = rows_seen(samples, scalings_in(samples))
    np.testing.assert_allclose(seen, expected, rtol=1e-6, atol=1e-8)


def test_a_constant_of_training_does_not_blow_up_what_differs_elsewhere(write_store, tmp_path):
    stored = np.full((24, 3, 2), 3, "int16")
    stored[12:, :, 1] = 4
    dims = ("n", "level", "lat")
    path = write(write_store, tmp_path, stored, dims, attributes={"scale_factor": 0.1})
    first = opened(path, {"x": ["lat"]}, isel={"n": {"start": 0, "stop": 12}})
    (seen,) = rows_seen(opened(path, {"x": ["lat"]}), scalings_in(first))
    np.testing.assert_allclose(np.unique(seen), [0, 0.1], atol=1e-7)


def test_missing_and_infinite_values_stay_what_they_are(write_store, tmp_path):
    values = 1e9 + np.arange(24.0)
    values[3] = np.nan
    path = write_store(tmp_path / "s", {"x": vector(values, 5), "index": vector(np.arange(24), 5)})
    with pytest.raises(NonFiniteData, match=r"x\[3\] in chunk x/c/0 is nan"):
        scalings_in(opened(path, ["x"]))
    samples = opened(path, ["x"], non_finite="allow")
    (seen,) = rows_seen(samples, scalings_in(samples))
    kept = np.delete(values, 3)
    np.testing.assert_allclose(np.delete(seen, 3), (kept - kept.mean()) / kept.std(), rtol=1e-6)
    assert np.isnan(seen[3])


# Integers and other runs' data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "int32", "uint64", "bool", "float32"])
def test_data_that_were_opened_without_are_read_as_the_run_says(write_store, tmp_path, dtype):
    values = np.random.default_rng(0).integers(0, 2, (24, 4)).astype(dtype)
    values = values + values.dtype.type(1e9) if dtype == "float64" else values
    path = write(write_store, tmp_path, values, ("n", "level"))
    with_means, without = opened(path, {"x": ["level"]}), opened(path, [])
    scalings = scalings_in(with_means)
    (expected,) = rows_seen(with_means, scalings)
    (seen,) = rows_seen(without.standardised_by(scalings), scalings)
    assert_close(seen, expected)
    # and the other way round: a run that does not standardise sees what is stored
    again = with_means.standardised_by({})
    assert again.variables == without.variables
    assert again.fingerprint == without.fingerprint
    (plain,) = rows_seen(again, {})
    assert plain.dtype == ("float32" if dtype.startswith("float") else "int64")


# Back to decoded values --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_offsets", [1, [0, 1, 2]])
@pytest.mark.parametrize("patch", [{}, {"lat": 2}])
@pytest.mark.parametrize("kind", ["float64", "packed", "int32"])
def test_targets_can_be_turned_back(write_store, tmp_path, target_offsets, patch, kind):
    dims = ("n", "level", "lat", "lon")
    rng = np.random.default_rng(0)
    values = rng.integers(-500, 500, (24, 4, 6, 5)).astype("int16" if kind == "packed" else kind)
    options = {"attributes": {"scale_factor": 0.5, "add_offset": 280.0}} if kind == "packed" else {}
    path = write(write_store, tmp_path, values, dims, **options)
    data = {"target_offsets": target_offsets, "patch": patch}
    samples = opened(path, {"x": ["lon", "level"]}, ("x",), ("index", "x"), **data)
    plain = opened(path, [], ("x",), ("index", "x"), **data)
    scalings = scalings_in(samples)
    none, (mean, std) = target_scalings(samples, scalings)
    assert none is None
    assert mean.dtype == std.dtype == np.float64
    assert mean.shape == std.shape == (*([1] * (1 if target_offsets == 1 else 2)), 4, 1, 5)
    _, partition = only_partition(samples)
    _, same = only_partition(plain, unit_rows=partition.plan.unit_rows, cell_rows=partition.plan.cell_rows)
    sizes = [6] * (partition.num_samples // 6)
    found = batches(UnitReader(samples), partition, sizes, shuffle=False, scalings=scalings)
    decoded = batches(UnitReader(plain), same, sizes, shuffle=False)
    for one, other in zip(found, decoded, strict=True):
        assert one.targets[0].tolist() == other.targets[0].tolist()
        np.testing.assert_allclose(one.targets[1] * std + mean, other.targets[1], rtol=1e-6, atol=1e-3)
    assert target_scalings(plain, {}) == (None, None)


def test_units_of_a_reader_hold_float64(write_store, tmp_path):
    values = 1e9 + np.arange(24.0)
    path = write_store(tmp_path / "s", {"x": vector(values, 5), "index": vector(np.arange(24), 5)})
    for which in ("zarr", "zarrs", "auto"):
        _, rows = UnitReader(opened(path, ["x"]), which).read(Box(5, 15))["x"]
        assert rows.dtype == np.float64
        np.testing.assert_array_equal(rows, values[5:15])
