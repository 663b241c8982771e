"""Units of predictions: every place of every array in one unit, whole chunks, whatever the store."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.config.schema import DataConfig
from dtrain.data.plan import prediction
from dtrain.data.plan.blend import hann, tile_axis
from dtrain.data.plan.heads import Head, OutputArray
from dtrain.data.plan.predicted import Anchors, predicted_anchors, without
from dtrain.data.plan.prediction import PredictionPlan, plan_prediction
from dtrain.data.samples import Samples
from dtrain.data.selection import tiles
from dtrain.data.variable import Variable
from dtrain.errors import TooFewSamples


def variable(shape: tuple[int, ...], chunks: tuple[int, ...], dims: str = "tyx") -> Variable:
    return Variable(
        name="x",
        dims=tuple(dims[: len(shape)]),
        shape=shape,
        dtype="float32",
        chunks=chunks,
        objects=chunks,
        sample_axis=0,
        checksums=True,
        select=tuple((0, n, 1) for n in shape),
    )


def samples(v: Variable, first_row: int = 0, **data: Any) -> Samples:
    config = DataConfig(path="s.zarr", inputs=("x",), **data)
    made = Samples(
        path="s.zarr", config=config, sample_dim="t", first_row=first_row, num_samples=v.shape[0], variables=(v,)
    )
    return replace(made, tiles=tiles(config, (v,), "t"))


# Anchors ----------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 60),
    first=st.integers(0, 10),
    offsets=st.lists(st.integers(-4, 4), min_size=1, max_size=3, unique=True),
    stride=st.integers(1, 5),
    jumps=st.sets(st.integers(1, 59), max_size=5),
    absent=st.sets(st.integers(0, 59), max_size=5),
)
def test_anchors_are_those_whose_windows_are_whole(
    rows: int, first: int, offsets: list[int], stride: int, jumps: set[int], absent: set[int]
) -> None:
    first = min(first, rows - 1)
    own = samples(variable((rows, 2), (3, 2)), first, input_offsets=tuple(sorted(offsets)), stride=stride)
    low, high = min(offsets), max(offsets)
    wanted = []
    for anchor in range(first, rows):
        window = range(anchor + low, anchor + high + 1)
        whole = window[0] >= first and window[-1] < rows and not absent & set(window)
        if anchor % stride == 0 and whole and not jumps & set(window[1:]):
            wanted.append(anchor)
    missing = tuple((row, row + 1) for row in sorted(absent))
    try:
        found = predicted_anchors(own, np.array(sorted(jumps), np.int64), missing)
    except TooFewSamples:
        assert wanted == []
        return
    assert found.rows(0, found.total).tolist() == wanted
    for start in range(0, found.total, 3):
        stop = min(start + 3, found.total)
        parts = list(found.parts(start, stop))
        assert np.concatenate([part.rows for part in parts]).tolist() == wanted[start:stop]
        for part in parts:
            assert part.low <= part.rows[0] + low
            assert part.rows[-1] + high < part.high
            assert not absent & set(range(part.low, part.high))


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=4))
def test_runs_without_absent_rows(runs: list[tuple[int, int]]) -> None:
    absent = [(start, start + length) for start, length in runs]
    kept = [row for first, stop in without(3, 18, absent) for row in range(first, stop)]
    assert kept == [row for row in range(3, 18) if not any(a <= row < b for a, b in absent)]


# Patches ----------------------------------------------------------------------------------------------------


@given(length=st.integers(1, 80), size=st.integers(1, 80), overlap=st.floats(0, 0.9), block=st.integers(1, 80))
def test_weights_add_up_to_one_and_blocks_have_the_patches_that_cover_them(
    length: int, size: int, overlap: float, block: int
) -> None:
    size = min(size, length)
    axis = replace(tile_axis("x", length, size, overlap), extent=min(block, length))
    sums = np.zeros(length)
    for tile in range(axis.count):
        weights = axis.weights(tile)
        assert (weights > 0).all()
        sums[axis.start(tile) : axis.start(tile) + size] += weights
    np.testing.assert_allclose(sums, 1, rtol=1e-12)
    for number in range(axis.num_blocks):
        low, high = axis.bounds(number)
        covering = [t for t in range(axis.count) if axis.start(t) < high and axis.start(t) + size > low]
        assert list(axis.tiles(number)) == covering
        needed = axis.needed(number)
        assert needed[0] <= low
        assert high <= needed[1]


def test_a_window_by_hand() -> None:
    np.testing.assert_allclose(hann(2), [0.5, 0.5])
    np.testing.assert_allclose(hann(3), [0.25, 1.0, 0.25])


# Units ------------------------------------------------------------------------------------------------------


def head(own: Samples, anchors: Anchors, dtype: str = "float32", classes: int = 0, lead: int = 0) -> Head:
    (v,) = own.variables
    inner = (*(("class",) if classes else ()), *(("lead",) if lead else ()), *v.row_dims)
    lengths = (*((classes,) if classes else ()), *((lead,) if lead else ()), *v.row_shape)
    array = OutputArray(
        name="p", dims=("t", *inner), computed=("t", *inner), shape=(anchors.total, *lengths), dtype=dtype
    )
    return Head(tensor=0, kind="raw", dims=inner, shape=lengths, output=lengths, arrays=(array,))


@st.composite
def plans(draw: Any) -> tuple[Samples, PredictionPlan, Head]:
    shape = draw(st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 30)))
    chunks = tuple(draw(st.integers(1, n)) for n in shape)
    patch = {dim: draw(st.integers(1, n)) for dim, n in zip("yx", shape[1:], strict=True) if draw(st.booleans())}
    data = {"patch": patch, "stride": draw(st.integers(1, 4)), "input_offsets": (0, draw(st.integers(0, 2)))}
    own = samples(variable(shape, chunks), **{**data, "input_offsets": tuple(sorted(set(data["input_offsets"])))})
    try:
        anchors = predicted_anchors(own, np.zeros(0, np.int64))
    except TooFewSamples:
        own = replace(own, config=own.config.model_copy(update={"input_offsets": 0}))
        anchors = predicted_anchors(own, np.zeros(0, np.int64))
    one = head(own, anchors, classes=draw(st.integers(0, 3)), lead=draw(st.integers(0, 3)))
    return own, plan_prediction(own, anchors, [one], patch, draw(st.sampled_from([0.0, 0.25, 0.5]))), one


@given(plans(), st.sampled_from([1, 400, 10_000_000]), st.sampled_from([1, 300, 10_000_000]))
def test_every_place_is_owned_once_in_whole_chunks(
    made: tuple[Samples, PredictionPlan, Head], unit_bytes: int, row_bytes: int
) -> None:
    own, plan, one = made
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prediction, "UNIT_BYTES", unit_bytes)
        patch.setattr(prediction, "ROW_BYTES", row_bytes)
        patch.setattr(prediction, "SMALL_CHUNK_BYTES", 100)
        overlap = 0.25
        plan = plan_prediction(own, plan.anchors, [one], own.config.patch, overlap)
    (array,) = one.arrays
    owned = np.zeros(array.shape, np.int64)
    tiles_seen = 0
    for number in range(plan.num_units):
        unit = plan.unit(number)
        at = (unit.start // plan.rows, *unit.blocks)
        assert plan.number(at) == number
        region = plan.region(array, unit)
        owned[region] += 1
        for part, chunk, n in zip(region, plan.chunks["p"], array.shape, strict=True):
            assert part.start % chunk == 0
            assert part.stop % chunk == 0 or part.stop == n
        tiles_seen += plan.samples_in(unit)
    assert (owned == 1).all()
    assert tiles_seen == plan.anchors.total * math.prod(axis.count for axis in plan.axes)


def planned(shape: tuple[int, ...], chunks: tuple[int, ...], **options: Any) -> tuple[PredictionPlan, Head]:
    patch = options.pop("patch", {})
    outputs = {key: options.pop(key) for key in ("classes", "lead") if key in options}
    own = samples(variable(shape, chunks), patch=patch, **options)
    anchors = predicted_anchors(own, np.zeros(0, np.int64))
    one = head(own, anchors, **outputs)
    return plan_prediction(own, anchors, [one], patch, 0.25), one


def test_units_and_chunks_of_usual_stores() -> None:
    maps, _ = planned((50_000, 180, 360), (24, 180, 360))
    assert maps.chunks["p"] == (24, 180, 360)  # 6 MB, as the inputs
    assert maps.rows == 24
    narrow, _ = planned((100_000, 10, 1), (1000, 10, 1))
    assert narrow.rows == 1000  # enough units for many workers
    assert narrow.chunks["p"] == (1000, 10, 1)
    many, _ = planned((10_000_000, 10, 1), (1000, 10, 1))
    assert many.rows == 156_000  # 12 MB of inputs and predictions: one of 64 units
    leads, _ = planned((1000, 721, 1440), (1, 721, 1440), lead=40)
    assert leads.chunks["p"] == (1, 16, 721, 1440)  # below 64 MB


def test_large_rows_are_cut_so_that_little_is_done_twice() -> None:
    plan, one = planned((3, 20_000, 20_000), (1, 512, 512), patch={"y": 256, "x": 256})
    (y, x) = plan.axes
    assert (y.extent % 512, x.extent % 512) == (0, 0)
    own = samples(variable((3, 20_000, 20_000), (1, 512, 512)), patch={"y": 256, "x": 256})
    decoded = [prediction._shared_places(own, axis) for axis in plan.axes]
    assert math.prod(decoded) / max(decoded) <= 1.3
    computed = sum(len(plan.tiles(plan.unit(number))) for number in range(plan.counts[1] * plan.counts[2]))
    assert computed / (y.count * x.count) <= 1.3
    assert prediction._row_bytes(own, [one], plan.axes) <= prediction.ROW_BYTES
    sweeping = [plan.unit(number).blocks[plan.sweep - 1] for number in range(3)]
    assert sweeping == [0, 1, 2]  # neighbours follow each other


def test_units_never_look_at_memory_or_workers() -> None:
    first, _ = planned((500, 40, 40), (10, 40, 40))
    again, _ = planned((500, 40, 40), (10, 40, 40), memory="1MB", cache="0", reader="zarr")
    assert (first.rows, first.axes, first.chunks) == (again.rows, again.axes, again.chunks)
