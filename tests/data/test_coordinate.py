"""Jumps of the sample dimension's coordinate: found in stores of all kinds, and no window crosses one."""

from __future__ import annotations

import calendar
import tracemalloc
import warnings
from dataclasses import replace
from datetime import date
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import xarray as xr

import dtrain
from dtrain.data import column
from dtrain.data import coordinate as module
from dtrain.data.coordinate import find_gaps
from dtrain.data.load.statistics import partition_moments
from dtrain.data.plan.partition import eval_partitions, plan_data, train_partitions
from dtrain.data.plan.summary import describe_plan
from dtrain.data.read.presence import content_digest
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import ChunkMissing, ChunkUndecodable, CoordinateJumps
from tests.data.helpers import WHOLE, vector
from tests.data.plan.helpers import samples_of

DAYS = {"units": "days since 2001-01-01"}
HOURS = {"units": "hours since 2001-01-01", "calendar": "standard"}
WINDOWS = {"input_offsets": [-1, 0], "target_offsets": 1}


@pytest.fixture
def timed(write_store, tmp_path):
    """Write x(time) of row numbers and a coordinate, and open it: timed(values, attributes, inputs=..., **store)."""

    def write(values, attributes=None, *, zarr_format=3, chunks=100, x_chunks=100, name="s", data=None, **options):
        values = np.asarray(values)
        rows = np.arange(len(values), dtype="float32")
        time = {"dims": ("time",), "values": values, "chunks": (chunks,), "attributes": attributes or {}, **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr warns of dates
            path = write_store(
                tmp_path / name,
                {"x": {"dims": ("time",), "values": rows, "chunks": (x_chunks,)}, "time": time},
                zarr_format=zarr_format,
            )
        return open_samples(path, inputs=["x"], targets=["x"], **{"split": WHOLE, **WINDOWS, **(data or {})})

    return write


def jumps(samples):
    return [int(row) for row in find_gaps(samples).jumps.split()]


def ordinals(days):
    first = date(2001, 1, 1).toordinal()
    return [day.toordinal() - first for day in days]


def months(years):
    return ordinals(date(2001 + year, month, 1) for year in range(years) for month in range(1, 13))


def every_day(years):
    first = date(2001, 1, 1).toordinal()
    return [date.fromordinal(first + n) for n in range(date(2001 + years, 1, 1).toordinal() - first)]


COMPLETE = {
    "hours": (np.arange(9_000), HOURS),
    "months": (months(10), DAYS),  # of 28 to 31 days
    "months of 360 days a year": (np.arange(0, 3600, 30), {**DAYS, "calendar": "360_day"}),
    "months of noleap": (np.cumsum([0, 31, 28, *[31, 30, 31, 30, 31] * 20]), {**DAYS, "calendar": "noleap"}),
    "years": (ordinals(date(2001 + n, 1, 1) for n in range(30)), DAYS),
    "noleap days": (np.arange(2000.5, 4000), {**DAYS, "calendar": "noleap"}),
    "numbers": (np.linspace(-3, 3, 500), {}),
    "irregular": (np.cumsum(np.random.default_rng(0).uniform(1, 1.4, 500)), {}),
}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", COMPLETE)
def test_calendars_and_uneven_steps_are_no_jumps(timed, kind, zarr_format):
    values, attributes = COMPLETE[kind]
    samples = timed(values, attributes, zarr_format=zarr_format)
    found = find_gaps(samples)
    assert found.jumps == ""
    assert found.text.startswith(f"none in {len(values) - 1:,} steps of time (median ")
    assert plan_data(samples, replicas=1, seed=0, jumps=found.jumps) == plan_data(samples, replicas=1, seed=0)


def leap_days_missing():
    days = [day for day in every_day(20) if (day.month, day.day) != (2, 29)]
    return ordinals(days), [
        i for i, day in enumerate(days) if (day.month, day.day) == (3, 1) and calendar.isleap(day.year)
    ]


def summers():
    days = [day for day in every_day(20) if day.month in (6, 7, 8)]
    return ordinals(days), [i for i, day in enumerate(days) if (day.month, day.day) == (6, 1) and i]


JUMPING = {
    "a year of hours is missing": (lambda: ([*range(8760), *range(2 * 8760, 3 * 8760)], [8760]), HOURS),
    "leap days are missing": (leap_days_missing, DAYS),
    "one season a year": (summers, DAYS),
    "episodes": (lambda: ([*range(50)] * 20, [*range(50, 1000, 50)]), {}),
    "a row twice": (lambda: ([*range(100), *range(99, 300)], [100]), {}),
    "not a number": (lambda: ([*range(50), float("nan"), *range(51, 300)], [50, 51]), {}),
    "infinite": (lambda: ([*range(50), float("inf"), *range(51, 300)], [50, 51]), {}),
    "after 1.5 medians": (lambda: ([*np.arange(100.0), *np.arange(100.51, 300)], [100]), {}),
}


@pytest.mark.parametrize("kind", JUMPING)
def test_few_jumps_are_found_and_no_window_crosses_one(timed, kind):
    make, attributes = JUMPING[kind]
    values, expected = make()
    samples = timed(values, attributes)
    found = find_gaps(samples)
    assert jumps(samples) == expected
    assert f"{len(expected):,} in {len(values) - 1:,} steps of time" in found.text
    plan = plan_data(samples, replicas=2, seed=0, jumps=found.jumps)
    anchors = sorted(row for p in train_partitions(plan) for row in samples_of(p))
    crossing = {row - offset for row in expected for offset in (0, 1)}  # of rows -1, 0 and 1 around the anchor
    assert anchors == sorted(set(range(1, len(values) - 1)) - crossing)
    counts = describe_plan(samples, plan)["dropped"]
    assert counts == {"split": 2, "gaps": len(crossing & set(range(1, len(values) - 1))), "missing": 0}
    seen = [batch.inputs[0].numpy().copy() for batch in dtrain.batches(samples, batch_size=1000)]
    firsts = np.concatenate(seen)[:, 0].astype(int)
    assert sorted((firsts + 1).tolist()) == anchors


REFUSED = {
    "weekdays only": (ordinals(d for d in every_day(2) if d.weekday() < 5), DAYS, "jumps 104 times in 521 steps"),
    "more than 5 %": ([*range(19), 40], {}, "jumps 1 time in 19 steps (5.3%): from 18 to 40 at row 19"),
    "descending": (np.arange(300)[::-1], {}, "time does not ascend in 299 of 299 steps: from 299 to 298 at row 1"),
    "back and forth": (
        [*range(30), *range(29, -1, -1)],
        {},
        "in 30 of 59 steps: from 29 to 29 at row 30;",
    ),
    "permuted": (np.random.default_rng(0).permutation(300), {}, "time "),
    "all the same": (np.full(300, 7), {}, "time does not ascend in 299 of 299 steps: from 7 to 7 at row 1"),
    "no number at all": (
        np.full(300, np.nan),
        {},
        "in 299 of 299 steps: from nan to nan at row 1",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_many_jumps_are_refused_in_the_words_of_the_coordinate(timed, kind):
    values, attributes, words = REFUSED[kind]
    with pytest.raises(CoordinateJumps) as caught:
        find_gaps(timed(values, attributes))
    assert caught.value.code == 3
    assert words in caught.value.message
    assert caught.value.message.count("at row") <= 3
    assert '"allow"' in caught.value.hint
    assert find_gaps(timed(values, attributes, name="allowed", data={"gaps": "allow"})).jumps == ""


def test_weekdays_are_shown_as_dates_and_may_be_dropped(timed):
    values, attributes, _ = REFUSED["weekdays only"]
    with pytest.raises(CoordinateJumps) as caught:
        find_gaps(timed(values, attributes))
    assert caught.value.message.endswith(
        "(20.0%): from 2001-01-05 to 2001-01-08 at row 5; from 2001-01-12 to 2001-01-15 at row 10; "
        "from 2001-01-19 to 2001-01-22 at row 15; the median step is 1 days."
    )
    assert caught.value.hint == (
        'data.gaps = "auto" leaves out at most 5%. Set "drop" to leave out the windows across jumps, or "allow" to use '
        "them all."
    )
    dropped = timed(values, attributes, name="dropped", data={"gaps": "drop"})
    assert jumps(dropped) == [*range(5, 521, 5)]
    (whole,) = train_partitions(plan_data(dropped, replicas=1, seed=0, jumps=find_gaps(dropped).jumps))
    assert {row % 5 for row in samples_of(whole)} == {1, 2, 3}


@pytest.mark.parametrize("kind", ["descending", "all the same"])
def test_what_never_ascends_cannot_be_dropped(timed, kind):
    values, attributes, _ = REFUSED[kind]
    with pytest.raises(CoordinateJumps, match="does not ascend"):
        find_gaps(timed(values, attributes, data={"gaps": "drop"}))


def test_error_refuses_a_single_jump(timed):
    values, attributes = [*range(500), *range(501, 900)], HOURS
    assert jumps(timed(values, attributes)) == [500]
    with pytest.raises(CoordinateJumps) as caught:
        find_gaps(timed(values, attributes, name="strict", data={"gaps": "error"}))
    assert "from 2001-01-21 19:00:00 to 2001-01-21 21:00:00 at row 500" in caught.value.message
    assert find_gaps(timed(range(900), HOURS, name="complete", data={"gaps": "error"})).jumps == ""


# How coordinates are stored -----------------------------------------------------------------------------------

GAP = [*range(100), *range(150, 400)]
STORED = {
    "datetime64": {"values": np.array(GAP, "M8[h]").astype("M8[ns]")},
    "datetime64 of v2": {"values": np.array(GAP, "M8[D]"), "zarr_format": 2},
    "timedelta64": {"values": np.array(GAP, "m8[s]")},
    "big-endian": {"values": np.array(GAP, ">i4"), "zarr_format": 2},
    "float16": {"values": np.array(GAP, "float16")},
    "uint64": {"values": np.array(GAP, "uint64") + 2**63 - 120},
    "shards": {"values": GAP, "chunks": 10, "shards": (60,)},
    "one chunk": {"values": GAP, "chunks": 1000},
    "one row a chunk": {"values": GAP, "chunks": 1},
    "packed": {"values": np.array(GAP, "int16"), "attributes": {"scale_factor": 0.25, "add_offset": -7.0}},
    "packed downwards": {"values": -np.array(GAP, "int16"), "attributes": {"scale_factor": -1.0}},
    "unsigned": {"values": np.r_[70:170, 200:255].astype("uint8").view("int8"), "attributes": {"_Unsigned": "true"}},
}


@pytest.mark.sampled(15)
@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("block", [64, 1 << 18])
def test_coordinates_of_every_dtype_and_layout(timed, kind, block):
    described = dict(STORED[kind])
    values, attributes = described.pop("values"), described.pop("attributes", None)
    with mock.patch.object(column, "BLOCK_ROWS", block), mock.patch.object(module, "KEPT_STEPS", block):
        assert jumps(timed(values, attributes, **described)) == [100]


def test_missing_values_of_a_coordinate_are_jumps(timed):
    values = np.array(GAP, "int32")
    values[30] = -999
    assert jumps(timed(values, {"missing_value": -999})) == [30, 31, 100]
    assert jumps(timed(values, {"_FillValue": -999}, zarr_format=2, fill_value=-999, name="v2")) == [30, 31, 100]


def test_only_the_selected_rows_are_looked_at(timed):
    values = [*range(40), *range(90, 150), *range(151, 400)]
    assert jumps(timed(values, data={"isel": {"time": {"start": 40, "stop": 300}}})) == [100]
    assert jumps(timed(values, name="less", data={"isel": {"time": {"start": 41, "stop": 100}}})) == []


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("consolidated", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_stores_as_xarray_writes_them(tmp_path, zarr_format, consolidated, dtype):
    times = np.array(["2001-01-01", "2001-07-01"], "M8[ns]")[:, None] + np.arange(60).astype("m8[h]")
    dataset = xr.Dataset({"x": ("time", np.arange(120, dtype="float32"))}, {"time": times.ravel()})
    encoding = {"time": {"dtype": dtype, "units": "hours since 2001-01-01", "chunks": (50,)}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.to_zarr(tmp_path / "s", zarr_format=zarr_format, consolidated=consolidated, encoding=encoding)
    samples = open_samples(tmp_path / "s", inputs=["x"], targets=["x"], **WINDOWS)
    found = find_gaps(samples)
    assert found.jumps == "60"
    assert "(median 1 hours)" in found.text
    assert "from 2001-01-03 11:00:00 to 2001-07-01 at row 60" in found.text


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zero_in_a_chunk_of_one_row_is_not_stored_and_is_no_fault(timed, zarr_format):
    # zarr leaves out chunks that hold only the fill value
    samples = timed(np.arange(200), HOURS, chunks=1, zarr_format=zarr_format, fill_value=0)
    (path,) = (p for p in (Path(samples.path) / "time").rglob("0") if p.is_file())
    path.unlink()
    assert jumps(samples) == []


def test_a_coordinate_that_misses_chunks_or_is_damaged_is_named(timed):
    samples = timed(np.arange(1000), HOURS, chunks=100)
    (Path(samples.path) / "time/c/3").write_bytes(b"no")
    with pytest.raises(ChunkUndecodable, match="chunk time/c/3 of time"):
        find_gaps(samples)
    (Path(samples.path) / "time/c/3").unlink()
    with pytest.raises(ChunkMissing, match=r"chunk time/c/3 of time is missing \(1 of 10\)"):
        find_gaps(samples)
    filled = open_samples(samples.path, inputs=["x"], targets=["x"], missing="fill", gaps="drop", **WINDOWS)
    assert jumps(filled) == [*range(300, 401)]


def of_dims(*dims, values):
    return {"time": {"dims": dims, "values": values, "chunks": values.shape}}


UNCHECKED = {
    "no coordinate": ({}, "time has no coordinate"),
    "text": (of_dims("time", values=np.array(["a", "b"] * 50, "S1")), "holds neither numbers nor dates"),
    "truth": (of_dims("time", values=np.zeros(100, bool)), "holds neither numbers nor dates"),
    "two dimensions": (of_dims("time", "k", values=np.zeros((100, 2))), "no coordinate of one dimension"),
    "another dimension": (of_dims("other", values=np.zeros(100)), "no coordinate of one dimension"),
    "another length": (of_dims("time", values=np.zeros(9)), "no coordinate of one dimension"),
}


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("kind", UNCHECKED)
def test_without_a_coordinate_of_numbers_gaps_are_unchecked_and_the_text_says_so(
    write_store, tmp_path, kind, zarr_format
):
    arrays, words = UNCHECKED[kind]
    x = {"dims": ("time",), "values": np.arange(100, dtype="float32"), "chunks": (10,)}
    path = write_store(tmp_path / "s", {"x": x, **arrays}, zarr_format=zarr_format)
    samples = open_samples(path, inputs=["x"], targets=["x"], **WINDOWS)
    found = find_gaps(samples)
    assert found.jumps == ""
    assert found.text.startswith("unchecked: ")
    assert words in found.text


def test_a_group_in_the_place_of_a_coordinate(write_store, tmp_path):
    import zarr

    path = write_store(tmp_path / "s", {"x": vector(np.arange(100, dtype="float32"), 10)})
    zarr.open_group(path, mode="a").create_group("n")
    samples = open_samples(path, inputs=["x"], targets=["x"], **WINDOWS)
    assert find_gaps(samples).text == "unchecked: n has no coordinate"


def test_without_windows_the_coordinate_is_not_even_opened(timed):
    samples = timed(np.arange(300)[::-1], data={"input_offsets": 0, "target_offsets": 0})
    assert samples.coordinate == ""
    assert find_gaps(samples) == module.Gaps()
    moved = timed(np.arange(300)[::-1], name="moved", data={"input_offsets": 2, "target_offsets": 2})
    assert find_gaps(moved) == module.Gaps()


def test_a_coordinate_changes_no_fingerprint(timed):
    complete, without = timed(np.arange(300)), timed(np.arange(300), name="allow", data={"gaps": "allow"})
    assert complete.coordinate != without.coordinate == ""
    assert complete.fingerprint == without.fingerprint
    plans = [plan_data(s, replicas=2, seed=0, jumps=find_gaps(s).jumps) for s in (complete, without)]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert content_digest(complete) == content_digest(without)
    cut = plan_data(timed([*range(100), *range(200, 400)], name="cut"), replicas=2, seed=0, jumps="100")
    assert cut.fingerprint != plans[0].fingerprint


def test_splits_and_strides_with_jumps(timed):
    values = [*range(120), *range(300, 700)]
    samples = timed(
        values, data={"split": {"val": 0.2, "test": 0.1}, "stride": 3, "input_offsets": {"start": 0, "stop": 7}}
    )
    plan = plan_data(samples, replicas=2, seed=0, jumps=find_gaps(samples).jumps)
    kept = [r for p in (*train_partitions(plan), *eval_partitions(plan, "val")) for r in samples_of(p)]
    assert all(values[row + 6] - values[row] == 6 for row in kept)
    assert not any(row % 3 for row in kept)


def test_rows_beside_a_jump_count_once_for_normalisation(timed):
    samples = timed([*range(120), *range(300, 700)])
    plan = plan_data(samples, replicas=2, seed=0, jumps=find_gaps(samples).jumps)
    plan = replace(plan, unit_rows=100, cell_rows=50)  # the third cell has anchors on both sides of the jump
    moments = [partition_moments(UnitReader(samples), part, ["x"])["x"] for part in train_partitions(plan)]
    assert sum(int(each.count[0]) for each in moments) == 520
    assert sum(each.mean[0] * each.count[0] for each in moments) == pytest.approx(sum(range(520)))


def test_a_coordinate_of_millions_of_rows_is_read_in_little_memory(timed):
    values = np.arange(4_000_000) + np.repeat([0, 5, 9, 100], 1_000_000)
    samples = timed(values.astype("int64"), HOURS, chunks=1 << 17, x_chunks=1 << 20)
    tracemalloc.start()
    try:
        found = find_gaps(samples)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.jumps == "1000000 2000000 3000000"
    assert peak < 16e6  # of 32 MB
