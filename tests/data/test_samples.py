"""Samples as plain values: fingerprints, what is printed, what travels."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.plan.partition import plan_data
from dtrain.data.plan.summary import describe_plan
from dtrain.data.samples import Samples, StoreFacts, common_rows
from dtrain.data.source import open_samples
from dtrain.data.variable import ChunkFormat, Variable
from tests.data.helpers import make_samples, variable


@pytest.fixture
def small(write_store, tmp_path):
    """Write x(n, k) and y(n) of 10 samples, or other arrays, and return the path."""
    x = {"dims": ("n", "k"), "values": np.arange(20.0).reshape(10, 2), "chunks": (4, 2)}
    y = {"dims": ("n",), "values": np.arange(10, dtype="int32"), "chunks": (3,)}

    def write(name="store.zarr", **arrays):
        return write_store(tmp_path / name, {"x": x, "y": y, **arrays})

    return write


def open_xy(path, **data):
    return open_samples(path, **{"inputs": ["x"], "targets": ["y"], **data})


def test_the_fingerprint_tells_stores_apart_but_not_their_paths(small):
    y32 = {"dims": ("n",), "values": np.arange(10, dtype="int32"), "chunks": (3,)}
    first = open_xy(small(name="a"))
    assert open_xy(small(name="b", y=y32)).fingerprint == first.fingerprint
    others = [
        open_xy(small(name="dtype", y={**y32, "values": np.arange(10, dtype="int64")})),
        open_xy(small(name="chunks", y={**y32, "chunks": (4,)})),
        open_xy(small(name="shards", y={**y32, "shards": (6,)})),
        open_xy(first.path, inputs=["x", "y"]),
        open_xy(first.path, inputs=["y"], targets=["x"]),
    ]
    assert len({samples.fingerprint for samples in [first, *others]}) == 6


def test_samples_print_as_a_table(small):
    samples = open_xy(small())
    assert repr(samples).splitlines()[0] == "<dtrain.Samples>"
    assert "10 along n" in repr(samples)
    assert "float64[n, k] (10, 2), chunks 4x2" in repr(samples)
    page = dataclasses.replace(samples, path="<img>")._repr_html_()
    assert "&lt;img&gt;" in page
    assert "<img>" not in page


def test_sample_metadata_is_plain_and_frozen(small):
    samples = open_xy(small())
    assert isinstance(samples, Samples)
    assert isinstance(samples.variables[0], Variable)
    assert all(type(n) is int for v in samples.variables for n in (*v.shape, *v.chunks, *v.objects))
    with pytest.raises(dataclasses.FrozenInstanceError):
        samples.num_samples = 3


def test_what_decides_who_reads_is_not_part_of_the_fingerprint():
    samples = make_samples(100, 10)
    odd = ChunkFormat(codecs=("x",), endian="big", order="F", has_fill_value=False, has_plain_index=False)
    variables = tuple(dataclasses.replace(v, chunk_format=odd) for v in samples.variables)
    elsewhere = dataclasses.replace(samples, variables=variables, store=StoreFacts(is_local=False, read_ahead=True))
    assert elsewhere.fingerprint == samples.fingerprint


def test_samples_travel_as_plain_values(small):
    samples = open_xy(small())
    again = pickle.loads(pickle.dumps(samples))
    assert again == samples
    assert (again.store, again.fingerprint) == (StoreFacts(), samples.fingerprint)


# Rows that are cut together, and variables that are preloaded --------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "common"),
    [([5], 5), ([6, 4], 12), ([4, 4], 4), ([2, 8], 8), ([100, 7], 100), ([10, 4], 20), ([10, 7], 10), ([3, 4, 6], 12)],
)
def test_common_rows(rows, common):
    assert common_rows(rows) == common


@given(st.lists(st.integers(1, 50), min_size=1, max_size=3))
def test_common_rows_is_a_multiple_of_all_unless_that_is_too_long(rows):
    multiple = next(n for n in range(1, 50**3 + 1) if all(n % row == 0 for row in rows))
    assert common_rows(rows) == (multiple if multiple <= 4 * max(rows) else max(rows))


@pytest.mark.parametrize(
    ("object_rows", "widths", "preloaded"),
    [
        ([10, 1000], [100, 1], ["v1"]),  # all labels in one chunk beside small images
        ([10, 10], [100, 1], []),
        ([10, 5], [100, 1], []),  # its objects fit into those of the large one
        ([10, 1000], [10, 1], []),  # not small
        ([10, 20], [100, 1], ["v1"]),
        ([1000, 1000], [100, 1], []),
    ],
)
def test_small_variables_in_long_chunks_are_preloaded(object_rows, widths, preloaded):
    variables = tuple(
        variable(f"v{i}", 1000, rows, row=(width,))
        for i, (rows, width) in enumerate(zip(object_rows, widths, strict=True))
    )
    samples = replace(make_samples(1000, *object_rows), variables=variables)
    assert [v.name for v in samples.preloaded] == preloaded
    assert [v.name for v in samples.streamed] == [v.name for v in variables if v.name not in preloaded]
    plan = plan_data(samples, replicas=1, seed=0)
    if preloaded:
        assert plan.unit_rows == 10  # as if it were not there
        assert describe_plan(samples, plan)["read_amplification"] == 1
