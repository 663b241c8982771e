"""Fields of samples out of the arena: against indexing sample by sample."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.config.schema import TrainConfig
from dtrain.data.encoding import Encoding, Scaling
from dtrain.data.load import gather
from dtrain.data.load.gather import BatchGatherer
from dtrain.data.load.slots import Rows
from dtrain.data.samples import Samples
from dtrain.data.tiles import Cut, Tiles
from dtrain.data.variable import Variable
from tests.sampling import examples

SLOTS, SLOT_ROWS, CHANNELS, WIDTH = 3, 12, 3, 4
PACKED = Encoding(dtype="float32", scale=0.5, offset=1.0, missing=(-9.0,))


TILES = {
    "whole": Tiles(),
    "one patch": Tiles((Cut("c", CHANNELS, CHANNELS), Cut("x", WIDTH, WIDTH))),
    "columns": Tiles((Cut("x", WIDTH, 2),)),
    "both": Tiles((Cut("c", CHANNELS, 2), Cut("x", WIDTH, 3))),  # each ends in a patch that begins earlier
}


def variable(name, dtype, *, is_static=False, encoding=None):
    shape = (CHANNELS, WIDTH) if is_static else (1000, CHANNELS, WIDTH)
    return Variable(
        name=name,
        dims=("c", "x") if is_static else ("n", "c", "x"),
        shape=shape,
        dtype=dtype,
        chunks=shape,
        objects=shape,
        sample_axis=-1 if is_static else 0,
        checksums=False,
        select=tuple((0, size, 1) for size in shape),
        encoding=encoding,
    )


def samples_with(dtype="float32", encoding=None, offsets=0, tiles=TILES["whole"]):
    variables = (variable("v", dtype, encoding=encoding), variable("height", "float32", is_static=True))
    table = {"path": "p", "inputs": ["v", "height"], "targets": ["v"], "input_offsets": offsets}
    config = TrainConfig(data=table).data
    return Samples(path="p", config=config, sample_dim="n", num_samples=1000, variables=variables, tiles=tiles)


def values_of(rng, shape, dtype):
    values = rng.integers(-9, 50, shape).astype(dtype)
    if dtype == "float32":
        values += rng.normal(size=shape).astype(dtype)
    return values


def decoded(values, encoding):
    if encoding is None:
        return values
    return np.where(values == -9, np.nan, values * 0.5 + 1.0)


def standardised(row, scaling, channels):
    """A row that is cut to a patch; its channels are `channels`: in float64, rounded once."""
    mean, std = (np.array(part) for part in (scaling.mean, scaling.std))
    if not scaling.axes:
        return ((row - mean[0]) / std[0]).astype("float32")
    assert scaling.axes == (0,)
    return ((row - mean[channels][:, None]) / std[channels][:, None]).astype("float32")


@examples(200)
@given(
    st.sampled_from(["float32", "int16", "uint8", "bool", "packed"]),
    st.sampled_from([0, -2, [-1, 0], {"start": -1, "stop": 2}, [0, 3, 1], [0, 2, 4]]),
    st.sampled_from(list(TILES)),
    st.booleans(),
    st.sampled_from([1, 100, 512 << 10]),
    st.integers(0, 40),
    st.integers(0, 99),
)
def test_fields_are_those_of_each_sample(kind, offsets, patched, scaled, piece_bytes, count, seed):
    encoding, dtype = (PACKED, "int16") if kind == "packed" else (None, kind)
    tiles = TILES[patched]
    samples = samples_with(dtype, encoding, offsets, tiles)
    rng = np.random.default_rng(seed)
    arena = {"v": values_of(rng, (SLOTS, SLOT_ROWS, CHANNELS, WIDTH), dtype)}
    height = values_of(rng, (CHANNELS, WIDTH), "float32")
    # channels can have means of their own where patches leave them whole
    axes = (0,) if scaled and patched != "both" and rng.random() < 0.5 else ()
    length = CHANNELS if axes else 1
    scaling = Scaling(tuple(rng.normal(size=length).tolist()), tuple(rng.uniform(0.5, 2, length).tolist()), axes)
    gatherer = BatchGatherer(samples, {"height": height}, {"v": scaling, "height": scaling} if scaled else {})

    low, high = samples.reach("v")
    rows = Rows(
        rng.integers(0, SLOTS, count),
        rng.integers(0, SLOT_ROWS - (high - low), count),
        rng.integers(0, len(tiles), count) if len(tiles) > 1 else None,
    )
    out = [np.empty((count, *spec.shape), spec.dtype) for spec in gatherer.specs]
    with mock.patch.object(gather, "PIECE_BYTES", piece_bytes):
        for field, array in enumerate(out):
            gatherer.fill(field, array, arena, rows)
    batch = gatherer.batch(tuple(out), count)

    kind_of_model = "float32" if scaled or encoding is not None or dtype == "float32" else "int64"
    window, *_ = batch.inputs
    fields = samples.fields
    for i in range(count):
        tile = tiles[0 if rows.tile is None else rows.tile[i]]
        cut = tile.slices(samples.variable("v"))
        for field, values in ((fields[0], window), (fields[2], batch.targets[0])):
            assert values.dtype == kind_of_model
            stored = [arena["v"][rows.slot[i], rows.row[i] + offset - low] for offset in field.offsets]
            expected = [decoded(row, encoding)[cut] for row in stored]
            expected = [standardised(row, scaling, cut[0]) if scaled else row.astype(kind_of_model) for row in expected]
            np.testing.assert_array_equal(values[i], expected if field.window else expected[0])
        expected = standardised(height[cut], scaling, cut[0]) if scaled else height[cut]
        np.testing.assert_array_equal(batch.inputs[1][i], expected)


def test_values_that_are_the_same_for_all_samples_are_repeated_without_copying():
    gatherer = BatchGatherer(samples_with(), {"height": np.arange(12, dtype="float32").reshape(3, 4)}, {})
    assert [spec.shape for spec in gatherer.specs] == [(3, 4)] * 2  # of v alone
    fields = tuple(np.zeros((5, 3, 4), "float32") for _ in range(2))
    one, other = (gatherer.batch(fields, 5).inputs[1] for _ in range(2))
    assert one.shape == (5, 3, 4)
    assert one.strides[0] == 0
    one[...] = -1  # torch lets zero_() and x[...] = 0 through, although samples share their memory
    np.testing.assert_array_equal(other, np.broadcast_to(np.arange(12).reshape(3, 4), (5, 3, 4)))


@pytest.mark.parametrize("scaled", [False, True])
def test_patches_of_a_static_variable_have_memory_of_their_own(scaled):
    height = np.arange(12, dtype="float32").reshape(3, 4)
    scalings = {"height": Scaling((1.0,), (2.0,))} if scaled else {}
    gatherer = BatchGatherer(samples_with(tiles=TILES["columns"]), {"height": height}, scalings)
    assert [spec.shape for spec in gatherer.specs] == [(3, 2)] * 3
    out = np.empty((3, 3, 2), "float32")
    gatherer.fill(1, out, {}, Rows(np.zeros(3, int), np.zeros(3, int), np.array([1, 0, 1])))
    expected = (height - 1) / 2 if scaled else height
    np.testing.assert_array_equal(out, [expected[:, 2:4], expected[:, 0:2], expected[:, 2:4]])
