"""Mean and standard deviation of the training rows: those of numpy, however they are cut into units and replicas."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data.encoding import Scaling
from dtrain.data.load.statistics import Moments, channel_axis, merge_moments, moments_of, partition_moments, scalings_of
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.plan.splits import split_cells
from dtrain.data.plan.units import cell_bounds
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import NonFiniteData
from tests.data.helpers import WHOLE, only_partition, open_all, variable, vector


def rows_of_train(plan):
    starts, stops = cell_bounds(plan, split_cells(plan, "train"))
    return np.concatenate([np.arange(a, b) for a, b in zip(starts.tolist(), stops.tolist(), strict=True)])


@settings(max_examples=25)
@given(
    st.integers(30, 120),
    st.integers(1, 12),
    st.integers(1, 4),
    st.sampled_from([("n",), ("n", "f"), ("n", "y", "x"), ("n", "channel", "y", "x"), ("y", "n", "band")]),
    st.sampled_from(["float32", "float64", "uint8", "packed", "missing"]),
    st.integers(0, 5),
)
def test_moments_are_those_of_numpy_over_the_training_rows(write_store, rows, chunk, replicas, dims, kind, seed):
    rng = np.random.default_rng(seed)
    shape = tuple({"n": rows, "f": 5, "y": 3, "x": 2, "channel": 4, "band": 2}[dim] for dim in dims)
    values = rng.normal(300, 3, shape)
    decoded, options = values.copy(), {}
    if kind == "uint8":
        values = decoded = rng.integers(0, 255, shape).astype("uint8")
    if kind in ("packed", "missing"):
        values = rng.integers(-3000, 3000, shape).astype("int16")
        options = {"attributes": {"scale_factor": 0.01, "add_offset": 280.0, "_FillValue": -9999}}
        decoded = values * 0.01 + 280.0
    if kind == "missing":
        gone = rng.random(shape) < 0.2
        values[gone], decoded[gone] = -9999, np.nan
    values = values.astype(kind) if kind.startswith("float") else values
    v0 = {
        "dims": dims,
        "values": values,
        "chunks": tuple(chunk if d == "n" else n for d, n in zip(dims, shape, strict=True)),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder, "s"), {"v0": {**v0, **options}, "index": vector(np.arange(rows), chunk)})
        samples = open_all(path, ["v0"], non_finite="allow", split={"val": 0.2, "test": 0.0})
        plan = plan_data(samples, replicas=min(replicas, 5), seed=seed)
        reader = UnitReader(samples)
        pieces = [partition_moments(reader, part, ["v0"]) for part in train_partitions(plan)]
        scaling = scalings_of(merge_moments(pieces), samples.variables)["v0"]
        train = np.moveaxis(decoded, dims.index("n"), 0)[rows_of_train(plan)].astype("float64")
        axis = channel_axis(samples.variable("v0"))
        other = tuple(i for i in range(train.ndim) if axis is None or i != axis + 1)
        np.testing.assert_allclose(scaling.mean, np.atleast_1d(np.nanmean(train, axis=other)), rtol=2e-7)
        np.testing.assert_allclose(scaling.std, np.atleast_1d(np.nanstd(train, axis=other)), rtol=2e-4)
        assert (scaling.axis, len(scaling.mean)) == (axis, 1 if axis is None else train.shape[axis + 1])


@pytest.mark.parametrize(
    ("dims", "axis"),
    [
        ((), None),
        (("f",), 0),
        (("y", "x"), None),
        (("c", "y", "x"), 0),
        (("y", "x", "channel"), 2),
        (("lev", "lat", "lon"), 0),
        (("lat", "Level"), 1),
        (("time2", "gene"), 1),
    ],
)
def test_the_channel_axis(dims, axis):
    v = replace(variable("v0", 10, 5, row=(2,) * len(dims)), dims=("n", *dims))
    assert channel_axis(v) == axis


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), min_size=1, max_size=6))
def test_merging_is_as_good_as_counting_at_once(parts):
    merged = moments_of(np.array(parts[0]), None)
    for part in parts[1:]:
        merged = merged + moments_of(np.array(part), None)
    at_once = moments_of(np.concatenate(parts), None)
    assert merged.count == at_once.count
    np.testing.assert_allclose(merged.mean, at_once.mean, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(merged.squares, at_once.squares, rtol=1e-9, atol=1e-6)


def test_a_large_mean_does_not_drown_a_small_deviation():
    values = 1e8 + np.arange(10.0)
    merged = moments_of(values[:3], None) + moments_of(values[3:], None)
    np.testing.assert_allclose(np.sqrt(merged.squares / merged.count), np.std(np.arange(10.0)), rtol=1e-12)


def test_nothing_merges_with_something():
    nothing = moments_of(np.full((2, 3), np.nan), 0)
    some = moments_of(np.arange(6.0).reshape(2, 3), 0)
    assert nothing.count.tolist() == [0, 0, 0]
    for merged in (nothing + some, some + nothing):
        assert merged.count.tolist() == [2, 2, 2]
        assert merged.mean.tolist() == some.mean.tolist()
        assert merged.squares.tolist() == some.squares.tolist()


def test_a_channel_that_never_changes_is_divided_by_one():
    found = scalings_of({"v0": moments_of(np.full((4, 2), 7.0), 0)}, (variable("v0", 10, 5, row=(2,)),))
    assert found == {"v0": Scaling((7.0, 7.0), (1.0, 1.0), 0)}


def test_a_mean_that_is_not_finite_is_refused_by_name():
    moments = {"v0": Moments(np.array([1.0]), np.array([np.inf]), np.array([0.0]))}
    with pytest.raises(NonFiniteData, match="data.normalize: v0 has no finite mean") as caught:
        scalings_of(moments, (variable("v0", 10, 5),))
    assert caught.value.code == 5


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
