"""Units that follow each other: the rows that each needs, and every chunk decoded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.config.schema import DataConfig
from dtrain.data.encoding import Array
from dtrain.data.plan import prediction
from dtrain.data.plan.heads import Head, OutputArray
from dtrain.data.plan.predicted import predicted_anchors
from dtrain.data.plan.prediction import PredictionPlan, plan_prediction
from dtrain.data.read.joined import open_reader
from dtrain.data.read.sweep import SweepReader
from dtrain.data.samples import Samples
from dtrain.data.source import describe_inputs

NO_JUMPS = np.zeros(0, np.int64)


def opened(path: Any, **data: Any) -> Samples:
    return describe_inputs(DataConfig(path=path, inputs=("x",), **data), Path("/"))


def planned(samples: Samples, overlap: float = 0.25, **patch: int) -> PredictionPlan:
    anchors = predicted_anchors(samples, NO_JUMPS)
    (v,) = samples.variables
    array = OutputArray(
        name="p",
        dims=(samples.sample_dim, *v.row_dims),
        computed=(samples.sample_dim, *v.row_dims),
        shape=(anchors.total, *v.row_shape),
        dtype="float32",
    )
    one = Head(tensor=0, kind="raw", dims=v.row_dims, shape=v.row_shape, output=v.row_shape, arrays=(array,))
    return plan_prediction(samples, anchors, [one], patch, overlap)


def swept(samples: Samples, plan: PredictionPlan, numbers: Any = None) -> tuple[SweepReader, list[tuple[Any, Array]]]:
    """Read units in order; check each against the rows that it needs, and return the reader."""
    reader = SweepReader(open_reader(samples), plan)
    low, high = samples.reach("x")
    seen = []
    for number in range(plan.num_units) if numbers is None else numbers:
        for part in reader.read(plan.unit(number)):
            seen.append((plan.unit(number), part.part, part.rows["x"]))
            assert len(part.rows["x"]) == part.part.rows[-1] - part.part.rows[0] + 1 + high - low
    return reader, seen


@pytest.mark.sampled(33)
@pytest.mark.parametrize("chunks", [1, 3, 7, 50])
@pytest.mark.parametrize("offsets", [(0,), (-2, 0), (0, 5), (-9, -4)])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("unit_bytes", [1, 4000])
def test_rows_of_windows_are_read_once(
    tmp_path: Path,
    write_store: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    chunks: int,
    offsets: tuple[int, ...],
    shards: bool,
    unit_bytes: int,
) -> None:
    monkeypatch.setattr(prediction, "UNIT_BYTES", unit_bytes)
    values = np.random.default_rng(0).normal(size=(50, 4)).astype("float32")
    described = {"dims": ("t", "f"), "values": values, "chunks": (chunks, 4)}
    if shards:
        described["shards"] = (2 * chunks, 4)
    samples = opened(str(write_store(tmp_path / "s.zarr", {"x": described})), input_offsets=offsets)
    plan = planned(samples)
    reader, seen = swept(samples, plan)
    low = samples.reach("x")[0]
    for _, part, rows in seen:
        begin = int(part.rows[0]) + low
        np.testing.assert_array_equal(rows, values[begin : begin + len(rows)])
    first, last = int(plan.anchors.first[0]) + low, int(plan.anchors.rows(0, plan.anchors.total)[-1]) + max(offsets)
    assert reader.decoded == (min(50, -(-(last + 1) // chunks) * chunks) - first) * 16


@pytest.mark.parametrize("row_bytes", [1, 10_000_000])
@pytest.mark.parametrize("isel", [{}, {"x": {"start": 2, "stop": 33, "step": 2}}])
def test_blocks_of_patches_are_read_with_their_halo(
    tmp_path: Path,
    write_store: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    row_bytes: int,
    isel: dict[str, Any],
) -> None:
    monkeypatch.setattr(prediction, "ROW_BYTES", row_bytes)
    values = np.random.default_rng(0).normal(size=(4, 30, 35)).astype("float32")
    store = write_store(tmp_path / "s.zarr", {"x": {"dims": ("t", "y", "x"), "values": values, "chunks": (1, 6, 7)}})
    samples = opened(str(store), patch={"y": 8, "x": 5}, isel=isel, input_offsets=[0, 1])
    plan = planned(samples, y=8, x=5)
    assert (len(plan.counts), plan.counts[1] > 1) == (3, row_bytes == 1)
    selected = values[:, :, 2:33:2] if isel else values
    for unit, part, rows in swept(samples, plan)[1]:
        (_, y0, y1), (_, x0, x1) = plan.needed(unit)
        begin = int(part.rows[0])
        np.testing.assert_array_equal(rows, selected[begin : begin + len(rows), y0:y1, x0:x1])


def test_neighbours_along_the_sweep_share_what_they_decode(
    tmp_path: Path, write_store: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "ROW_BYTES", 1500)
    values = np.zeros((2, 64, 4), "float32")
    store = write_store(tmp_path / "s.zarr", {"x": {"dims": ("t", "y", "x"), "values": values, "chunks": (1, 8, 4)}})
    samples = opened(str(store), patch={"y": 12})
    plan = planned(samples, y=12)
    assert plan.sweep == 1
    assert plan.counts[1] > 3
    assert swept(samples, plan)[0].decoded == values.nbytes
    alone = sum(swept(samples, plan, [number])[0].decoded for number in range(plan.num_units))
    assert alone > 1.5 * values.nbytes


def test_several_stores(tmp_path: Path, write_store: Callable[..., Path]) -> None:
    lengths, paths, rows = (13, 5, 20), [], []
    for number, length in enumerate(lengths):
        values = np.random.default_rng(number).normal(size=(length, 2)).astype("float32")
        rows.append(values)
        described = {"dims": ("t", "f"), "values": values, "chunks": (4, 2)}
        paths.append(str(write_store(tmp_path / f"s{number}.zarr", {"x": described})))
    samples = opened(tuple(paths), input_offsets=[-1, 0])
    reader, seen = swept(samples, planned(samples))
    found = [values for _, part, own in seen for values in own[1:][part.rows - part.rows[0]]]
    np.testing.assert_array_equal(np.stack(found), np.concatenate([one[1:] for one in rows]))
    assert reader.decoded == sum(one.nbytes for one in rows)
