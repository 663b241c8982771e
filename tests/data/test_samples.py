"""Samples as plain values: fingerprints, what is printed, what travels."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from dtrain.data.samples import ChunkFormat, Samples, StoreFacts, Variable
from dtrain.data.source import open_samples
from tests.data.helpers import make_samples


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
    assert "&lt;" in dataclasses.replace(samples, path="<b>")._repr_html_()
    assert "<b>" not in dataclasses.replace(samples, path="<b>")._repr_html_()


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
