"""Mean and standard deviation of the training rows: those of numpy, however they are cut into units and replicas."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.encoding import Encoding, Scaling
from dtrain.data.load import moments
from dtrain.data.load.moments import moments_of
from dtrain.data.load.statistics import merge_moments, partition_moments, scalings_of
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.plan.splits import split_cells
from dtrain.data.plan.units import cell_bounds
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import NonFiniteData
from tests.data.helpers import WHOLE, only_partition, open_all, variable, vector
from tests.sampling import examples


def rows_of_train(plan):
    starts, stops = cell_bounds(plan, split_cells(plan, "train"))
    return np.concatenate([np.arange(a, b) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)])


DIMS = [("n",), ("n", "f"), ("n", "y", "x"), ("n", "channel", "y", "x"), ("y", "n", "band")]
SIZES = {"f": 5, "y": 3, "x": 2, "channel": 4, "band": 2}


@examples(40)
@given(st.data(), st.integers(30, 120), st.integers(1, 12), st.integers(1, 4), st.integers(0, 5))
def test_moments_are_those_of_numpy_over_the_training_rows(write_store, data, rows, chunk, replicas, seed):
    dims = data.draw(st.sampled_from(DIMS))
    kind = data.draw(st.sampled_from(["float32", "float64", "float16", "uint8", "packed", "missing"]))
    row_dims = [dim for dim in dims if dim != "n"]
    by = data.draw(st.lists(st.sampled_from(row_dims), unique=True)) if row_dims else []
    rng = np.random.default_rng(seed)
    shape = tuple(rows if dim == "n" else SIZES[dim] for dim in dims)
    values = rng.normal(300, 3, shape)
    options = {}
    if kind == "uint8":
        values = rng.integers(0, 255, shape)
    if kind in ("packed", "missing"):
        values = rng.integers(-3000, 3000, shape).astype("int16")
        options = {"attributes": {"scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -9999}}
    else:
        values = values.astype(kind)
    decoded = values * 0.01 + 280.0 if options else values.astype("float64")
    if kind == "missing":
        gone = rng.random(shape) < 0.2
        values[gone], decoded[gone] = -9999, np.nan
    v0 = {
        "dims": dims,
        "values": values,
        "chunks": tuple(chunk if d == "n" else n for d, n in zip(dims, shape, strict=True)),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder, "s"), {"v0": {**v0, **options}, "index": vector(np.arange(rows), chunk)})
        samples = open_all(
            path, ["v0"], non_finite="allow", split={"val": 0.2, "test": 0.0}, normalize={"v0": by} if by else ["v0"]
        )
        plan = plan_data(samples, replicas=min(replicas, 5), seed=seed)
        reader = UnitReader(samples)
        pieces = [partition_moments(reader, part, ["v0"]) for part in train_partitions(plan)]
        scaling = scalings_of(merge_moments(pieces), samples.variables)["v0"]
        train = np.moveaxis(decoded, dims.index("n"), 0)[rows_of_train(plan)]
        axes = tuple(axis for axis, dim in enumerate(row_dims) if dim in by)
        other = tuple(i for i in range(train.ndim) if i - 1 not in axes)
        np.testing.assert_allclose(scaling.mean, np.nanmean(train, axis=other).ravel(), rtol=1e-12)
        np.testing.assert_allclose(scaling.std, np.nanstd(train, axis=other).ravel(), rtol=1e-9)
        assert scaling.axes == axes
        assert len(scaling.mean) == int(np.prod([train.shape[axis + 1] for axis in axes], dtype=int))


def exactly(values):
    """Mean and variance of numbers, as fractions."""
    numbers = [Fraction(value) for value in np.asarray(values).ravel().tolist()]
    mean = sum(numbers) / len(numbers)
    return mean, sum((number - mean) ** 2 for number in numbers) / len(numbers)


@examples(150)
@given(
    st.sampled_from(
        ["float64 1e7", "float64 1e9", "float32 1e7", "int64 ns", "uint64 top", "int64 all", "float64 0 first"]
    ),
    st.lists(st.integers(1, 400), min_size=1, max_size=5),
    st.sampled_from([7, 128 << 10]),
    st.integers(0, 99),
)
def test_moments_are_exact_also_far_from_zero(kind, lengths, piece_values, seed):
    rng = np.random.default_rng(seed)
    count = sum(lengths)
    dtype, of = kind.split(" ", 1)
    if of == "ns":
        values = 1_600_000_000_000_000_000 + rng.integers(0, 3000, count)
    elif of == "top":
        values = np.uint64(2**64 - 1) - rng.integers(0, 3000, count).astype("uint64")
    elif of == "all":
        values = rng.integers(-(2**63), 2**63 - 1, count, endpoint=True)
    else:
        values = (1e9 if of == "0 first" else float(of)) + rng.normal(size=count)
        values[0] = 0 if of == "0 first" else values[0]
    values = values.astype(dtype)
    with mock.patch.object(moments, "PIECE_VALUES", piece_values):
        parts = [moments_of(part) for part in np.split(values, np.cumsum(lengths)[:-1])]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    mean, variance = exactly(values)
    std = float(variance) ** 0.5
    found = Fraction(float(merged.mean[0])) + Fraction(float(merged.rest[0]))
    assert abs(found - mean) <= 1e-9 * std
    assert abs(float(merged.std[0]) - std) <= 1e-9 * std


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), min_size=1, max_size=6))
def test_merging_is_as_good_as_counting_at_once(parts):
    merged = moments_of(np.array(parts[0]))
    for part in parts[1:]:
        merged = merged + moments_of(np.array(part))
    at_once = moments_of(np.concatenate(parts))
    assert merged.count == at_once.count
    np.testing.assert_allclose(merged.mean, at_once.mean, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(merged.squares, at_once.squares, rtol=1e-9, atol=1e-6)


def test_nothing_merges_with_something():
    nothing = moments_of(np.full((2, 3), np.nan), None, (0,))
    some = moments_of(np.arange(6.0).reshape(2, 3), None, (0,))
    assert nothing.count.tolist() == [0, 0, 0]
    for merged in (nothing + some, some + nothing):
        assert merged.count.tolist() == [2, 2, 2]
        assert merged.mean.tolist() == some.mean.tolist()
        assert merged.squares.tolist() == some.squares.tolist()


def scaling_of(values, encoding=None, dtype=None, parts=1):
    """The scaling of values along n, of which each part is read by another replica."""
    values = np.asarray(values, dtype)
    v = replace(variable("v0", len(values), 5, dtype=str(values.dtype)), encoding=encoding, mean_axes=())
    moments = merge_moments([{"v0": moments_of(part, encoding)} for part in np.array_split(values, parts)])
    return scalings_of(moments, (v,))["v0"]


def test_values_that_never_change_are_divided_by_one():
    v = replace(variable("v0", 10, 5, row=(2,)), mean_axes=(0,))
    found = scalings_of({"v0": moments_of(np.full((4, 2), 7.0), None, (0,))}, (v,))
    assert found == {"v0": Scaling((7.0, 7.0), (1.0, 1.0), (0,))}


@given(st.integers(-32768, 32767), st.sampled_from([0.1, 1 / 3, 1e-7, 123.4]), st.integers(7, 3000), st.integers(1, 7))
def test_a_packed_constant_is_divided_by_one(stored, scale, count, parts):
    packed = Encoding(dtype="float32", scale=scale, offset=0.7)
    assert scaling_of(np.full(count, stored), packed, "int16", parts).std == (1.0,)


def test_what_only_rounding_changes_is_divided_by_one():
    assert scaling_of([0.1 + 0.2, 0.3] * 50).std == (1.0,)
    assert scaling_of([1e9, 1e9 + 1] * 50).std == (0.5,)
    assert scaling_of(np.float32([1e7, 1e7 + 1] * 50)).std == (0.5,)
    assert scaling_of(1_600_000_000_000_000_000 + np.arange(2)).std == (0.5,)  # integers are never rounded


@pytest.mark.parametrize("values", [[np.inf, 1.0, 2.0], [1.0, -np.inf, np.inf], [1e200, -1e200, 0.0]])
def test_moments_that_are_not_finite_are_refused_by_name(values):
    with pytest.raises(NonFiniteData, match="data.normalize: v0 has no finite mean") as caught:
        scaling_of(values)
    assert caught.value.code == 5


def test_nan_is_left_out_also_where_it_comes_first():
    found = scaling_of([np.nan, 1e9, np.nan, 1e9 + 1, np.nan])
    assert (found.mean, found.std) == ((1e9 + 0.5,), (0.5,))


def test_a_preloaded_variable_is_decoded_once(write_store, tmp_path):
    arrays = {
        "v0": {"dims": ("n", "k"), "values": np.zeros((400, 40)), "chunks": (20, 40)},
        "index": vector(np.arange(400, dtype="int16"), 400),
    }
    samples = open_samples(
        write_store(tmp_path / "s", arrays), inputs=["v0"], targets=["index"], split=WHOLE, normalize=["index"]
    )
    assert [v.name for v in samples.preloaded] == ["index"]
    _, partition = only_partition(samples)
    reader = UnitReader(samples, "zarr")
    before = reader.store.requests
    found = partition_moments(reader, partition, ["index"])["index"]
    assert (reader.store.requests - before, found.count.item(), found.mean.item()) == (1, 400, 199.5)


def test_an_estimate_reads_the_first_units_alone(write_store, tmp_path):
    arrays = {"v0": vector(np.arange(40.0), 4), "index": vector(np.arange(40), 4)}
    samples = open_all(write_store(tmp_path / "s", arrays), arrays)
    _, partition = only_partition(samples, unit_rows=4, cell_rows=4)
    reader = UnitReader(samples, "zarr")
    before = reader.store.requests
    found = partition_moments(reader, partition, ["v0"], most_units=3)
    assert reader.store.requests - before == 3
    assert (found["v0"].count.item(), found["v0"].mean.item()) == (12, 5.5)


def test_a_static_variable_has_moments_too(write_store, tmp_path):
    arrays = {
        "v0": vector(np.arange(8.0), 4),
        "height": {"dims": ("y", "x"), "values": np.arange(6.0).reshape(2, 3), "chunks": (2, 3)},
        "index": vector(np.arange(8), 4),
    }
    samples = open_samples(
        write_store(tmp_path / "s", arrays), inputs=["v0", "height"], targets=["index"], sample_dim="n", split=WHOLE
    )
    _, partition = only_partition(samples)
    found = scalings_of(partition_moments(UnitReader(samples), partition, ["height"]), samples.variables)
    assert found["height"].mean == (2.5,)
    np.testing.assert_allclose(found["height"].std, np.std(np.arange(6.0)))
