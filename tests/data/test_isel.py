"""`isel` of Python: slices, ranges and lists select what xarray selects, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import dtrain
from dtrain.errors import InvalidConfig

SIZE = 12


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    values = np.arange(SIZE * 5, dtype="float32").reshape(SIZE, 5)
    return write_store(
        tmp_path_factory.mktemp("isel") / "s.zarr", {"v": {"dims": ("time", "k"), "values": values, "chunks": (3, 5)}}
    )


def opened(store: Path, **isel: Any) -> dtrain.Samples:
    whole = {"val": 0.0, "test": 0.0}
    return dtrain.open_samples(store, inputs=["v"], targets=["v"], split=whole, isel=isel)


def rows(samples: dtrain.Samples) -> np.ndarray:
    return np.concatenate([batch.inputs[0].numpy() for batch in dtrain.batches(samples, split="all")])


@pytest.mark.parametrize(
    "given",
    [
        slice(0, 5),
        slice(3, None),
        slice(None, 4),
        slice(-5, None),
        slice(-6, -2),
        slice(4, 500),
        slice(-500, 3),
        slice(np.int64(2), np.int64(8)),
        range(2, 6),
        [0, 1, 2],
        [7],
        np.arange(3, 9),
        [-3, -2, -1],
        {"start": 2},
        {"start": -4, "stop": -1},
    ],
    ids=str,
)
def test_rows_are_those_that_xarray_selects(store: Path, given: Any) -> None:
    as_xarray = slice(given.get("start"), given.get("stop")) if isinstance(given, dict) else given
    expected = xr.open_zarr(store, chunks=None, consolidated=False).v.isel(time=as_xarray).values
    assert np.array_equal(rows(opened(store, time=given)), expected)


@pytest.mark.parametrize("given", [slice(0, 5, 2), range(0, 5, 2), [1, 3], [-1], np.int64(-2), np.uint8(1)], ids=str)
def test_other_dimensions_too(store: Path, given: Any) -> None:
    expected = xr.open_zarr(store, chunks=None, consolidated=False).v.isel(k=given).values
    assert np.array_equal(rows(opened(store, k=given)), expected)


@pytest.mark.parametrize(
    ("isel", "said"),
    [
        ({"time": range(6, 15)}, "time has 12 places"),
        ({"k": [3, 4, 5]}, "k has 5 places"),
        ({"k": [-6, -5]}, "k has 5 places"),
        ({"time": slice(9, 2)}, "selects nothing of the 12 places"),
        ({"time": slice(0, 9, 3)}, "a step along time is not for isel"),
        ({"time": np.int64(3)}, "time is the dimension of the samples"),
    ],
    ids=str,
)
def test_what_selects_something_else_than_it_says_is_refused(store: Path, isel: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        opened(store, **isel)


def test_batches_take_numbers_of_numpy(store: Path) -> None:
    sizes = dtrain.batches(
        opened(store), batch_size=np.int64(5), split="all", epochs=np.int32(1), seed=np.uint8(1), replicas=np.int64(1)
    )
    assert [batch.size for batch in sizes] == [5, 5, 2]
