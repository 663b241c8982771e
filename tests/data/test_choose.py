"""`data.sel`: the values of dimensions that it chooses are read, and printed in the coordinate's own words."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import dtrain
from dtrain.errors import ChunkMissing, InvalidConfig, UnsuitableVariable

DAYS = 400
LEVELS = [1000, 850, 500, 100]
WHOLE = {"val": 0.0, "test": 0.0}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    values = np.arange(DAYS * 4 * 6, dtype="float32").reshape(DAYS, 4, 6)
    time = {"units": "days since 2001-01-01"}
    return write_store(
        tmp_path_factory.mktemp("sel") / "s.zarr",
        {
            "v": {"dims": ("time", "level", "lat"), "values": values, "chunks": (30, 4, 3)},
            "time": {"dims": ("time",), "values": np.arange(DAYS), "chunks": (90,), "attributes": time},
            "level": {"dims": ("level",), "values": np.array(LEVELS), "chunks": (4,)},
            "lat": {"dims": ("lat",), "values": np.linspace(0.1, 0.6, 6, dtype="float32"), "chunks": (6,)},
        },
    )


def opened(store: Path, **sel: Any) -> dtrain.Samples:
    return dtrain.open_samples(store, inputs=["v"], targets=["v"], split=WHOLE, sel=sel)


def rows(samples: dtrain.Samples) -> np.ndarray:
    return np.concatenate([batch.inputs[0].numpy() for batch in dtrain.batches(samples, split="all")])


CHOSEN = {
    "a year": ({"time": "2002"}, ["time 2002-01-01 to 2002-02-04, 35 of 400 places"]),
    "dates": (
        {"time": slice("2001-02", "2001-03-15")},
        ["time 2001-02-01 to 2001-03-15, 43 of 400 places"],
    ),
    "dates of Python": (
        {"time": slice(datetime(2001, 2, 1), datetime(2001, 2, 3))},
        ["time 2001-02-01 to 2001-02-03, 3 of 400 places"],
    ),
    "dates of NumPy": (
        {"time": slice(np.datetime64("2001-02-01"), np.datetime64("2001-02-03T00", "ns"))},
        ["time 2001-02-01 to 2001-02-03, 3 of 400 places"],
    ),
    "one of each": ({"level": 850, "lat": 0.3}, ["level 850", "lat 0.3"]),
    "descending": ({"level": slice(900, 100)}, ["level 850 to 100, 3 of 4 places"]),
    "every other": ({"lat": slice(0.2, None, 2)}, ["lat 0.2 to 0.6, 3 of 6 places"]),
    "a list": ({"level": [1000, 500]}, ["level 1000 to 500, 2 of 4 places"]),
    "an array": ({"level": np.array([850, 500])}, ["level 850 to 500, 2 of 4 places"]),
    "a list of one": ({"level": [500]}, ["level 500 to 500, 1 of 4 places"]),
}


@pytest.mark.parametrize("kind", CHOSEN)
def test_values_are_those_that_xarray_selects(store: Path, kind: str) -> None:
    wanted, said = CHOSEN[kind]
    samples = opened(store, **wanted)
    assert [str(chosen) for chosen in samples.chosen] == said
    assert [("chosen", text) for text in said] == [row for row in samples.rows() if row[0] == "chosen"]
    expected = xr.open_zarr(store, chunks=None, consolidated=False).v.sel(wanted).values
    assert np.array_equal(rows(samples), expected)


def test_a_date_of_python_is_a_whole_day(store: Path) -> None:
    assert opened(store, time=slice(date(2001, 2, 1), date(2001, 2, 3))).chosen[0].stop == 31 + 3


def test_by_coordinate_of_one_dimension_and_by_index_of_another(store: Path) -> None:
    samples = dtrain.open_samples(
        store, inputs=["v"], targets=["v"], split=WHOLE, isel={"lat": slice(1, 3)}, sel={"time": "2002", "level": 500}
    )
    expected = xr.open_zarr(store, chunks=None, consolidated=False).v.isel(lat=slice(1, 3)).sel(time="2002", level=500)
    assert np.array_equal(rows(samples), expected.values)


def test_the_same_places_by_coordinate_and_by_index_are_the_same_samples(store: Path) -> None:
    by_index = dtrain.open_samples(store, inputs=["v"], targets=["v"], split=WHOLE, isel={"time": slice(365, 400)})
    assert opened(store, time="2002").fingerprint == by_index.fingerprint


REFUSED = {
    "no dimension": ({"tme": "2002"}, 'data.sel.tme: no such dimension; did you mean "time"?'),
    "one row": ({"time": "2001-01-03"}, "data.sel.time chooses a single place: time is the dimension of the samples"),
    "rows apart": (
        {"time": slice("2001", None, 2)},
        "data.sel.time chooses places apart: time is the dimension of the samples",
    ),
    "uneven": (
        {"level": [1000, 850, 100]},
        "data.sel.level = [1000, 850, 100]: a list chooses single places at equal intervals, upwards.\n"
        "These are at 0, 1, 3.",
    ),
    "backwards": ({"level": [500, 850]}, "These are at 2, 1. Give a start and a stop."),
    "twice": ({"level": [500, 500]}, "a list chooses single places at equal intervals"),
    "none": ({"level": []}, "These are at no place. Give a start and a stop."),
    "no value": ({"level": 700}, "data.sel.level = 700: level of"),
    "of a list": ({"level": [1000, 700]}, "data.sel.level = 700: level of"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(store: Path, kind: str) -> None:
    wanted, said = REFUSED[kind]
    with pytest.raises(InvalidConfig) as refused:
        opened(store, **wanted)
    assert said in str(refused.value)


@pytest.fixture
def written(tmp_path: Path, write_store: Callable[..., Path]) -> Callable[..., Path]:
    """Write x(n, k) of 6 rows, and more arrays."""

    def write(**arrays: Any) -> Path:
        x = {"dims": ("n", "k"), "values": np.zeros((6, 3), "float32"), "chunks": (2, 3)}
        return write_store(tmp_path / "s.zarr", {"x": x, **arrays})

    return write


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({}, "k has no coordinate."),
        ({"k": {"dims": ("n", "k"), "values": np.zeros((6, 3)), "chunks": (6, 3)}}, "k has no coordinate of one dim"),
    ],
)
def test_without_a_coordinate_places_are_chosen_by_index(written: Callable[..., Path], arrays: Any, said: str) -> None:
    with pytest.raises(InvalidConfig) as refused:
        dtrain.open_samples(written(**arrays), inputs=["x"], targets=["x"], sel={"k": 1})
    assert str(refused.value).startswith("data.sel.k: ")
    assert said in str(refused.value)
    assert "Choose by index: data.isel.k." in str(refused.value)


def test_a_coordinate_of_which_a_chunk_is_missing_is_named(written: Callable[..., Path]) -> None:
    path = written(n={"dims": ("n",), "values": np.arange(6.0), "chunks": (3,)})
    (path / "n/c/1").unlink()
    with pytest.raises(ChunkMissing, match="chunk n/c/1 of n is missing"):
        dtrain.open_samples(path, inputs=["x"], targets=["x"], sel={"n": slice(2, 4)})


def test_a_coordinate_of_bools_is_refused(written: Callable[..., Path]) -> None:
    path = written(k={"dims": ("k",), "values": np.array([True, False, True]), "chunks": (3,)})
    with pytest.raises(UnsuitableVariable, match="k holds bools"):
        dtrain.open_samples(path, inputs=["x"], targets=["x"], sel={"k": 1})
