"""What an evaluation may be broken down by: coordinates of all kinds, as stores have them."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from dtrain.data.by import MOST_GROUPS, find_groupings, regular_step
from dtrain.data.distinct import Distinct, joined, read_distinct
from dtrain.data.source import open_samples
from dtrain.errors import ChunkMissing, InvalidConfig
from tests.data.layouts.fixtures import CODES, COUNT, NAMES, write_anndata

ROWS = 24


def dataset(**coordinates):
    values = np.zeros((ROWS, 3, 4), "float32")
    return xr.Dataset({"t": (("time", "level", "lat"), values)}, coordinates)


def store(tmp_path, name="s.zarr", encoding=None, **coordinates):
    dataset(**coordinates).to_zarr(tmp_path / name, zarr_format=2, encoding=encoding or {})
    return tmp_path / name


def opened(path, **data):
    return open_samples(path, inputs=["t"], targets=["t"], **data)


def days(count=ROWS, step=1):
    return np.datetime64("2001-12-30", "ns") + np.arange(count) * np.timedelta64(step, "D")


def each_of(*samples):
    return lambda function: [function(one) for one in samples]


def found(samples, *names):
    return find_groupings(samples, names, each_of(samples))


def test_values_of_a_coordinate_of_rows(tmp_path):
    site = np.array(["b", "a", "c"])[np.arange(ROWS) % 3]
    height = np.where(np.arange(ROWS) < 5, np.nan, np.arange(ROWS) % 2).astype("float32")
    path = store(tmp_path, time=days(), site=("time", site), height=("time", height))
    one = read_distinct(opened(path), "site")
    assert (one.dim, one.values.tolist()) == ("time", ["a", "b", "c"])
    assert one.values[one.labels].tolist() == site.tolist()
    two = read_distinct(opened(path), "height")
    assert two.values.tolist() == [0, 1]
    assert two.labels.tolist() == [-1] * 5 + [n % 2 for n in range(5, ROWS)]
    part = read_distinct(opened(path, isel={"time": {"start": 4, "stop": 10}}), "site")
    assert part.labels.tolist() == [-1] * 4 + [("a", "b", "c").index(one) for one in site[4:10]]


def test_parts_of_dates(tmp_path):
    path = store(tmp_path, time=days(step=20), init=("time", days(step=20) - np.timedelta64(40, "D")))
    months = days(step=20).astype("M8[M]").astype(int) % 12 + 1
    samples = opened(path)
    for name, expected in (
        ("time.month", months.tolist()),
        ("time.year", (days(step=20).astype("M8[Y]").astype(int) + 1970).tolist()),
        ("time.season", [("DJF", "MAM", "JJA", "SON")[m % 12 // 3] for m in months]),
        ("time.hour", [0] * ROWS),
        ("init.month", ((days(step=20) - np.timedelta64(40, "D")).astype("M8[M]").astype(int) % 12 + 1).tolist()),
    ):
        own = read_distinct(samples, name)
        assert own.values[own.labels].tolist() == expected
    assert read_distinct(samples, "time.season").values.tolist() == ["DJF", "MAM", "JJA", "SON"]  # not by the alphabet


def test_dates_of_another_calendar(tmp_path):
    times = xr.date_range("2001-01-30", periods=ROWS, freq="D", calendar="360_day", use_cftime=True)
    samples = opened(store(tmp_path, time=times))
    own = read_distinct(samples, "time.month")
    assert own.values[own.labels].tolist() == [1, *([2] * 23)]
    assert regular_step(samples) == np.timedelta64(1, "D")


@pytest.mark.parametrize("how", ["v2", "v3"])
@pytest.mark.filterwarnings("ignore")
def test_categories_by_their_names(tmp_path, how):
    path = write_anndata(tmp_path / "cells.zarr", how)
    samples = open_samples(path, inputs=["X"], targets=["obs/cell_type"])
    for name in ("cell_type", "obs/cell_type"):
        own = read_distinct(samples, name)
        assert own.dim == "cell"
        assert own.values.tolist() == [NAMES[code] for code in sorted(set(CODES.tolist()) - {-1})]
        assert [own.values[label] for label in own.labels[:COUNT]] == [NAMES[code] for code in CODES]


def test_places_of_a_dimension(tmp_path):
    path = store(tmp_path, time=days(), lat=[60.0, 20, -20, -60], band=("lat", ["n", "t", "t", "s"]))
    part = opened(path, isel={"lat": {"start": 1, "stop": 4, "step": 2}})
    assert read_distinct(part, "lat").values.tolist() == [20, -60]
    assert read_distinct(part, "lat").labels.tolist() == [0, 1]
    band = read_distinct(part, "band")
    assert band.values[band.labels].tolist() == ["t", "s"]
    assert read_distinct(part, "level").values.tolist() == [0, 1, 2]  # it has no coordinate
    level = opened(path, isel={"level": 1})
    with pytest.raises(InvalidConfig, match="no dimension or coordinate of the target with that name"):
        read_distinct(level, "level")


def test_what_stores_call_alike_is_one_label():
    one = Distinct("n", np.array(["b", "a"]), np.array([0, 1, -1]))
    other = Distinct("n", np.array(["c", "b"]), np.array([1, 0]))
    values, labels = joined([one, other])
    assert values.tolist() == ["b", "a", "c"]
    assert [own.tolist() for own in labels] == [[0, 1, -1], [0, 2]]
    numbers, own = joined(
        [Distinct("n", np.array([3, 5]), np.array([1, 0])), Distinct("n", np.array([4]), np.array([0]))]
    )
    assert numbers.tolist() == [3, 4, 5]
    assert [one.tolist() for one in own] == [[2, 0], [1]]


@pytest.mark.parametrize(
    ("times", "gaps", "expected"),
    [
        (days(step=3), "auto", np.timedelta64(3, "D")),
        (np.append(days(20), days(4) + np.timedelta64(100, "D")), "drop", np.timedelta64(1, "D")),
        (np.append(days(20), days(4) + np.timedelta64(100, "D")), "allow", None),  # windows cross the jump
        (np.arange(ROWS), "auto", None),
        (np.array([f"2001-{m:02}-01" for m in range(1, 13)] * 2, "M8[ns]"), "allow", None),
    ],
)
def test_leads_are_times_where_the_step_is_one(tmp_path, times, gaps, expected):
    samples = opened(store(tmp_path, time=times), target_offsets=[1, 2], gaps=gaps)
    assert regular_step(samples) == expected
    own = found(samples, "lead")[0]
    assert np.array_equal(own.values, np.array([1, 2]) if expected is None else np.array([1, 2]) * expected)
    assert own.count == 2


def test_groups_of_everything(tmp_path):
    samples = opened(store(tmp_path, time=days()), target_offsets=[1, 2])
    own = found(samples, "variable", "lead", "time.month", "level")
    assert [one.count for one in own] == [1, 2, 2, 3]
    assert [one.kind for one in own] == ["variable", "lead", "row", "place"]


def test_too_many_groups_are_refused_with_a_cure(tmp_path):
    count = MOST_GROUPS + 1
    values = np.zeros((count, 1), "float32")
    times = np.datetime64("2001-01-01", "ns") + np.arange(count) * np.timedelta64(1, "h")
    xr.Dataset({"t": (("time", "k"), values)}, {"time": times}).to_zarr(tmp_path / "s.zarr", zarr_format=2)
    samples = opened(tmp_path / "s.zarr")
    with pytest.raises(InvalidConfig, match=r"by time: there are 10,001 groups \(time has 10,001\)") as caught:
        found(samples, "time")
    assert caught.value.hint == "Name --by time.month, or another part of a date."
    assert found(samples, "time.month")[0].count == 12


def test_a_chunk_of_a_coordinate_that_is_not_there(tmp_path):
    path = store(tmp_path, time=days(), height=("time", np.arange(ROWS) + 1.0), encoding={"height": {"chunks": (6,)}})
    (path / "height" / "2").unlink()
    with pytest.raises(ChunkMissing, match="height"):
        read_distinct(opened(path, missing="error"), "height")


def test_a_repository_is_read_at_the_snapshot_of_its_samples(tmp_path):
    icechunk = pytest.importorskip("icechunk")
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path / "repo")))

    def commit(site):
        session = repository.writable_session("main")
        dataset(time=days(), site=("time", np.array(site)[np.arange(ROWS) % 2])).to_zarr(
            session.store, mode="w", zarr_format=3, consolidated=False
        )
        session.commit("x")

    commit([1, 2])
    samples = opened(tmp_path / "repo")
    commit([3, 4])
    assert read_distinct(samples, "site").values.tolist() == [1, 2]
    assert read_distinct(opened(tmp_path / "repo"), "site").values.tolist() == [3, 4]
