"""The fingerprints of samples and plans never change: runs that were started by an earlier version continue.

`golden_fingerprints.json` was written by the version of dtrain that first committed runs. Never write it anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ShardingCodec, TransposeCodec, ZstdCodec

from dtrain.data.plan.partition import JointPlan, plan_data
from dtrain.data.read.presence import content_digest
from dtrain.data.source import open_samples
from tests.data.helpers import vector

GOLDEN = json.loads(Path(__file__).with_name("golden_fingerprints.json").read_text())

X = {"dims": ("n", "y", "x"), "values": np.arange(60 * 4 * 6, dtype="float32").reshape(60, 4, 6), "chunks": (5, 4, 3)}
LABEL = vector(np.arange(60, dtype="int32"), 20)
PACKED = {
    **X,
    "values": X["values"].astype("int16"),
    "attributes": {"scale_factor": 0.1, "add_offset": 5.0, "missing_value": -9, "_Unsigned": "true"},
}
PLACE = {"dims": ("y", "x"), "values": np.zeros((4, 6)), "chunks": (4, 6)}

STORES = {
    "v2": (2, {"x": X, "label": LABEL}, {}),
    "v2 with a fill value": (2, {"x": {**X, "fill_value": 0.0}, "label": {**LABEL, "fill_value": 0}}, {}),
    "v2 columns first": (2, {"x": {**X, "order": "F"}, "label": LABEL}, {}),
    "v2 big-endian": (2, {"x": {**X, "values": X["values"].astype(">f8")}, "label": LABEL}, {}),
    "v2 codecs": (
        2,
        {"x": {**X, "compressors": numcodecs.GZip(), "filters": [numcodecs.Delta("<f4")]}, "label": LABEL},
        {},
    ),
    "v3": (3, {"x": X, "label": LABEL}, {}),
    "v3 transposed": (3, {"x": {**X, "filters": [TransposeCodec(order=(1, 0, 2))]}, "label": LABEL}, {}),
    "v3 checksums": (3, {"x": {**X, "compressors": [ZstdCodec(), Crc32cCodec()]}, "label": LABEL}, {}),
    "shards": (
        3,
        {"x": {**X, "shards": (15, 4, 6), "compressors": BloscCodec()}, "label": {**LABEL, "shards": (40,)}},
        {},
    ),
    "packed": (3, {"x": PACKED, "label": LABEL}, {}),
    "packed v2": (2, {"x": PACKED, "label": LABEL}, {}),
    "normalised integers": (
        3,
        {"x": {**X, "values": X["values"].astype("uint8")}, "label": LABEL},
        {"normalize": ["x"]},
    ),
    "windows": (
        3,
        {"x": X, "label": LABEL},
        {
            "split": {"val": 0.0, "test": 0.0},
            "input_offsets": {"start": -3, "stop": 1},
            "target_offsets": 2,
            "stride": 2,
        },
    ),
    "patches": (3, {"x": X, "label": LABEL}, {"patch": {"y": 2, "x": 4}}),
    "selected": (
        3,
        {"x": X, "label": LABEL},
        {"isel": {"n": {"start": 7, "stop": 50}, "y": 1, "x": {"start": 0, "stop": 6, "step": 2}}},
    ),
    "without the sample dimension": (3, {"x": X, "place": PLACE, "label": LABEL}, {"sample_dim": "n"}),
    "split": (
        3,
        {"x": X, "label": LABEL},
        {"split": {"val": 0.2, "test": 0.1}, "split_order": "sequential", "partition": "contiguous"},
    ),
}


def fingerprints(path, names, options, **plan):
    """What identifies a store's samples, and a plan of them."""
    samples = open_samples(path, inputs=names, targets=["label"], **options)
    data = plan_data(samples, replicas=2, seed=5, **plan)
    return {"samples": samples.fingerprint, "plan": data.fingerprint}


@pytest.mark.parametrize("kind", STORES)
def test_a_store_has_the_fingerprint_that_it_always_had(write_store, tmp_path, kind):
    zarr_format, arrays, options = STORES[kind]
    path = write_store(tmp_path / "s", arrays, zarr_format=zarr_format)
    names = [name for name in arrays if name != "label"]
    assert fingerprints(path, names, options) == GOLDEN[kind]


def test_shards_with_a_rare_index_have_the_fingerprint_that_they_always_had(write_store, tmp_path):
    path = write_store(tmp_path / "s", {"label": LABEL})
    codec = ShardingCodec(chunk_shape=(3,), index_codecs=[*ShardingCodec(chunk_shape=(3,)).index_codecs, Crc32cCodec()])
    zarr.create(
        store=path,
        path="x",
        shape=(60,),
        chunk_shape=(12,),
        dtype="float32",
        codecs=[codec],
        dimension_names=("n",),
        fill_value=0,
        zarr_format=3,
    )[...] = 1
    assert fingerprints(path, ["x"], {}) == GOLDEN["rare index"]


def test_a_plan_with_missing_rows_has_the_fingerprint_that_it_always_had(write_store, tmp_path):
    path = write_store(tmp_path / "s", {"x": X, "label": LABEL})
    assert fingerprints(path, ["x"], {}, absent=((10, 15), (20, 30))) == GOLDEN["missing rows"]


def test_plans_of_several_stores_have_the_fingerprint_that_they_always_had(write_store, tmp_path):
    path = write_store(tmp_path / "s", {"x": X, "label": LABEL})
    samples = open_samples(path, inputs=["x"], targets=["label"])
    plans = tuple(plan_data(samples, replicas=replicas, seed=5) for replicas in (1, 2))
    assert JointPlan(plans).fingerprint == GOLDEN["two stores"]["plan"]


def test_the_digest_of_what_is_stored_is_what_it_always_was(write_store, tmp_path):
    # every other place of ten, in chunks of three: no place of the last chunk is selected, and it counts all the same
    x = {"dims": ("n", "x"), "values": np.zeros((6, 10), "float32"), "chunks": (2, 3), "compressors": None}
    path = write_store(tmp_path / "s", {"x": x, "label": vector(np.arange(6, dtype="int32"), 3, compressors=None)})
    isel = {"x": {"start": 0, "stop": 10, "step": 2}, "n": {"start": 2, "stop": 6}}
    assert content_digest(open_samples(path, inputs=["x"], targets=["label"], isel=isel)) == GOLDEN["contents"]
