"""Splits by coordinate: of time, of patched dimensions, in stores as they are; what `plan` says about them."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dtrain
from dtrain.data.given import find_given, find_ranges, leakage_note
from dtrain.data.load.statistics import merge_moments, moments_of, partition_moments
from dtrain.data.plan.evaluation import plan_evaluation
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.plan.summary import describe_plan
from dtrain.data.plan.table import plan_from, plan_table
from dtrain.data.plan.units import DataPlan
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import Samples
from dtrain.data.source import open_samples
from dtrain.errors import ChunkMissing, DtrainError, InvalidConfig, TooFewSamples
from tests.data.helpers import readers
from tests.data.test_boxes import SPLITS, cut_small, opened, values_of, volume

DAYS = 730
TIME = {"dims": ("t",), "values": np.arange(DAYS), "chunks": (90,), "attributes": {"units": "days since 2017-01-01"}}
ROWS = {"dims": ("t",), "values": np.arange(DAYS, dtype="float32"), "chunks": (50,)}


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    """Rows of 2017 and 2018, each its own number."""
    return write_store(tmp_path_factory.mktemp("days") / "s.zarr", {"x": ROWS, "t": TIME})


def planned(samples: Samples, replicas: int = 2, **options: Any) -> DataPlan:
    plan = plan_data(samples, replicas=replicas, seed=3, given=find_given(samples, 3).splits, **options)
    assert plan_from(plan_table(plan)) == plan
    return plan


def of_days(path: Path, **data: Any) -> Samples:
    return open_samples(path, inputs=["x"], targets=["x"], **data)


def rows_of(samples: Samples, split: Any) -> list[int]:
    seen = [batch.inputs[0].numpy() for batch in dtrain.batches(samples, split=split, batch_size=1000)]
    return sorted(np.concatenate(seen).astype(int).ravel().tolist())


# Along time -------------------------------------------------------------------------------------------------


def test_splits_by_date_hold_their_rows_and_a_gap_is_left_out(days: Path) -> None:
    split = {"val": {"t": "2018-01"}, "test": {"t": {"start": "2018-07"}}, "gap": 10}
    samples = of_days(days, split=split)
    july = 365 + 181
    assert rows_of(samples, "train") == [*range(365 - 10), *range(365 + 31 + 10, july - 10)]
    assert rows_of(samples, "val") == list(range(365, 365 + 31))
    assert rows_of(samples, "test") == list(range(july, 730))
    found = find_ranges(samples)
    assert {name: str(held) for name, held in found.held.items()} == {
        "train": "2017-01-01 to 2017-12-21, 2018-02-11 to 2018-06-20",
        "val": "2018-01-01 to 2018-01-31",
        "test": "2018-07-01 to 2018-12-31",
    }
    assert {name: held.places for name, held in found.held.items()} == {"train": 355 + 130, "val": 31, "test": 184}
    dropped = describe_plan(samples, planned(samples))["dropped"]
    assert dropped == {"split": 0, "gaps": 0, "missing": 0, "left_out": 30}


def test_windows_stay_within_their_split(days: Path) -> None:
    split = {"val": {"t": "2018-01"}, "test": {"t": {"start": "2018-07"}}}
    samples = of_days(days, split=split, input_offsets=[-2, 0], target_offsets=3)
    plan = planned(samples)
    first = [batch.inputs[0].numpy()[:, 0] for batch in dtrain.batches(samples, split="val", batch_size=1000)]
    assert sorted(np.concatenate(first).tolist()) == list(range(365, 365 + 31 - 5))
    assert describe_plan(samples, plan)["dropped"] == {"split": 5 * 4, "gaps": 0, "missing": 0, "left_out": 0}


def test_ranges_of_what_is_selected_by_coordinate_or_by_index(days: Path) -> None:
    split = {"val": 0.0, "test": {"t": {"start": "2018-07"}}, "gap": 3}
    for chosen in ({"sel": {"t": "2018"}}, {"isel": {"t": {"start": 365, "stop": 730}}}):
        samples = of_days(days, split=split, **chosen)
        assert rows_of(samples, "train") == list(range(365, 365 + 181 - 3))
        assert rows_of(samples, "test") == list(range(365 + 181, 730))
        assert str(find_ranges(samples).held["train"]) == "2018-01-01 to 2018-06-27"
    with pytest.raises(InvalidConfig, match="nothing of t, which goes from 2017-01-01 to 2017-12-31"):
        find_ranges(of_days(days, split=split, sel={"t": "2017"}))


def test_a_coordinate_that_descends(write_store: Callable[..., Path], tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", {"x": ROWS, "t": {**TIME, "values": np.arange(DAYS)[::-1]}})
    samples = of_days(path, split={"val": 0.0, "test": {"t": {"start": "2018-12-31", "stop": "2018-07"}}, "gap": 2})
    assert rows_of(samples, "test") == list(range(184))
    assert rows_of(samples, "train") == list(range(186, 730))
    assert str(find_ranges(samples).held["test"]) == "2018-12-31 to 2018-07-01"


def test_a_share_is_drawn_from_what_a_range_leaves(days: Path) -> None:
    samples = of_days(days, split={"val": 0.2, "test": {"t": "2018"}})
    splits = {name: rows_of(samples, name) for name in SPLITS}
    assert splits["test"] == list(range(365, 730))
    assert sorted(splits["train"] + splits["val"]) == list(range(365))
    assert len(splits["val"]) == 73


def test_evaluations_know_the_ranges_in_other_stores(
    days: Path, write_store: Callable[..., Path], tmp_path: Path
) -> None:
    split = {"val": {"t": "2018-01"}, "test": {"t": {"start": "2018-07"}}, "gap": 10}
    plan = planned(of_days(days, split=split))
    more = np.arange(DAYS + 100)
    path = write_store(
        tmp_path / "s",
        {"x": {**ROWS, "values": more.astype("float32")}, "t": {**TIME, "values": more, "chunks": (830,)}},
    )
    grown = of_days(path, split=split)
    for store in (None, 0):
        found, name = plan_evaluation(grown, "test", (plan,), None, store, given=find_given(grown, 3).splits)
        (rows,) = values_of(grown, found, name)
        assert sorted(rows.tolist()) == list(range(365 + 181, 830))


REFUSED: dict[str, tuple[Any, type[DtrainError], str]] = {
    "no such value": ({"test": {"t": "2031"}}, InvalidConfig, 'data.split.test.t = "2031": t of'),
    "no such range": ({"test": {"t": {"start": "2031"}}}, InvalidConfig, "which goes from 2017-01-01 to 2018-12-31"),
    "a number": ({"test": {"t": 2018}}, InvalidConfig, "data.split.test.t = 2018: t holds dates or times."),
    "no dimension": (
        {"test": {"tt": "2018"}},
        InvalidConfig,
        "tt is neither the dimension of the samples, t, nor cut by data.patch.",
    ),
    "overlap": (
        {"test": {"t": "2018"}, "val": {"t": {"start": "2017-06", "stop": "2018-01"}}},
        InvalidConfig,
        "val and test share 31 places",
    ),
    "everything": (
        {"test": {"t": {"start": "2017"}}},
        TooFewSamples,
        "the ranges of data.split, with gap = 0, leave nothing of the training split.",
    ),
    "a long gap": (
        {"test": {"t": "2018-02"}, "val": {"t": "2018-01"}, "gap": 31},
        TooFewSamples,
        "the ranges of data.split, with gap = 31, leave nothing of val.",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_ranges_that_are_refused(days: Path, kind: str) -> None:
    split, error, said = REFUSED[kind]
    with pytest.raises(error) as refused:
        find_ranges(of_days(days, split={"val": 0.0, **split}))
    assert said in str(refused.value)


def test_without_a_coordinate_there_are_no_ranges(write_store: Callable[..., Path], tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", {"x": ROWS})
    with pytest.raises(InvalidConfig, match=r"t has no coordinate\.\n.*or hold out shares: data.split.test = 0.1"):
        find_ranges(of_days(path, split={"val": 0.0, "test": {"t": "2018"}}))


def test_a_missing_chunk_of_the_coordinate_is_named(write_store: Callable[..., Path], tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", {"x": ROWS, "t": TIME})
    (path / "t/c/3").unlink()
    with pytest.raises(ChunkMissing, match="chunk t/c/3 of t is missing"):
        find_ranges(of_days(path, split={"val": 0.0, "test": {"t": "2018"}}))


# Along a patched dimension ------------------------------------------------------------------------------------


def test_patches_that_an_end_cuts_are_left_out(write_store: Callable[..., Path], tmp_path: Path) -> None:
    y = {"dims": ("y",), "values": np.linspace(5, -5, 11), "chunks": (11,)}
    path = write_store(tmp_path / "s", {"image": volume((4, 1, 11, 3), (1, 1, 11, 3)), "y": y})
    samples = opened(path, {"y": 2}, split={"val": {"y": 1}, "test": {"y": {"start": -2, "stop": -5}}})
    # places 0 to 10 are y = 5 to -5: val is place 4, of which no patch is whole
    with pytest.raises(TooFewSamples, match="no patch of 2 places lies whole in val, which is y 1.0"):
        find_ranges(samples)
    samples = opened(path, {"y": 2}, split={"val": {"y": {"start": 2, "stop": 0}}, "test": {"y": {"start": -2}}})
    # patches begin at 0, 2, 4, 6, 8 and 9; val is places 3 to 5, test 7 to 10
    plan = planned(samples)
    rows = {
        name: {row // 3 % 11 for part in values_of(samples, plan, name) for row in part[..., 0].ravel().astype(int)}
        for name in SPLITS
    }
    assert rows == {"train": {0, 1}, "val": {4, 5}, "test": {8, 9, 10}}
    counts = describe_plan(samples, plan)
    assert (counts["val_samples"], counts["test_samples"], counts["dropped"]["left_out"]) == (4, 8, 8)
    assert str(find_ranges(samples).held["val"]) == "2.0 to 0.0"


@given(st.data())
def test_every_patch_is_in_one_split_or_left_out_and_no_value_within_the_gap(
    write_store: Callable[..., Path], data: st.DataObject
) -> None:
    draw = data.draw
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(6, 24)), draw(st.integers(1, 6)))
    chunks = tuple(draw(st.integers(1, n)) for n in shape)
    patch = {"y": draw(st.integers(1, 4)), **({"x": draw(st.integers(1, shape[3]))} if draw(st.booleans()) else {})}
    first, middle, last = sorted(draw(st.lists(st.integers(1, shape[2] - 1), min_size=3, max_size=3, unique=True)))
    gap, descends = draw(st.integers(0, 3)), draw(st.booleans())
    values = np.arange(shape[2])[:: -1 if descends else 1] * 10
    held: dict[str, Any] = {"test": {"y": {"start": int(values[middle]), "stop": int(values[last])}}, "val": 0.0}
    if draw(st.booleans()):
        held["val"] = {"y": {"start": int(values[first]), "stop": int(values[middle - 1])}}
    with tempfile.TemporaryDirectory() as folder, cut_small(draw(st.sampled_from([0, 200])), 1):
        y = {"dims": ("y",), "values": values, "chunks": (draw(st.integers(1, shape[2])),)}
        path = write_store(Path(folder, "s"), {"image": volume(shape, chunks), "y": y})
        samples = opened(path, patch, split={**held, "gap": gap})
        try:
            plan = planned(samples, replicas=draw(st.integers(1, 3)))
        except TooFewSamples:
            return
        which = draw(readers)
        seen = {name: [p for part in values_of(samples, plan, name, which) for p in part] for name in SPLITS}
        said = describe_plan(samples, plan)
    counts = [sum(said["partition_samples"]), said["val_samples"], said["test_samples"]]
    assert counts == [len(seen[name]) for name in SPLITS]
    assert sum(counts) + sum(said["dropped"].values()) == shape[0] * len(samples.tiles)
    assert set(said["dropped"].values()) - {said["dropped"]["left_out"]} <= {0}
    places = {name: np.unique([v // shape[3] % shape[2] for p in seen[name] for v in p.ravel()]) for name in SPLITS}
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        apart = np.abs(places[one][:, None] - places[other][None, :])
        assert apart.size == 0 or apart.min() > gap
    assert places["test"].min() >= middle
    assert places["test"].max() <= last
    stored = np.arange(math.prod(shape), dtype="float32").reshape(shape)
    whole = {stored[t][tile.slices(samples.variables[0])].tobytes() for t in range(shape[0]) for tile in samples.tiles}
    shown = [p.tobytes() for name in SPLITS for p in seen[name]]
    assert len(shown) == len(set(shown))
    assert set(shown) <= whole


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_means_are_those_of_training_alone(write_store: Callable[..., Path], tmp_path: Path, limit: int) -> None:
    values = np.arange(6 * 2 * 22 * 17, dtype="float32").reshape(6, 2, 22, 17)
    arrays = {
        "image": volume((6, 2, 22, 17), (2, 1, 5, 4)),
        "t": {"dims": ("t",), "values": np.arange(6), "chunks": (6,)},
        "y": {"dims": ("y",), "values": np.arange(22), "chunks": (22,)},
    }
    path = write_store(tmp_path / "s", arrays)
    held = {
        "t": ({"val": {"t": 1}, "test": {"t": {"start": 5}}}, values[[0, 2, 3, 4]]),
        # patches of 5 begin at 0, 5, 10, 15 and 17: the last two are cut
        "y": (
            {"val": {"y": {"start": 5, "stop": 9}}, "test": {"y": {"start": 17}}},
            values[:, :, [*range(5), *range(10, 15)]],
        ),
    }
    for split, expected in held.values():
        with cut_small(limit):
            samples = opened(path, {"y": 5, "x": 3}, normalize=["image"], split=split)
            parts = train_partitions(planned(samples))
        moments = merge_moments([partition_moments(UnitReader(samples), part, ["image"]) for part in parts])["image"]
        whole = moments_of(expected.reshape(len(expected), -1))
        assert moments.count == whole.count
        np.testing.assert_allclose([moments.mean, moments.std], [whole.mean, whole.std], rtol=1e-12)


# Without given splits -------------------------------------------------------------------------------------------


def test_shares_of_rows_along_time_may_leak(days: Path, write_store: Callable[..., Path], tmp_path: Path) -> None:
    assert "are drawn at random into train and val and test: losses of val and test may" in leakage_note(of_days(days))
    assert "into train and val: losses of val" in leakage_note(of_days(days, split={"val": 0.1, "test": 0.0}))
    silent: list[dict[str, Any]] = [
        {"split": {"val": 0.0, "test": 0.0}},
        {"split": {"val": {"t": "2018"}}},
        {"split_order": "random"},
        {"split_order": "sequential"},
        {"input_offsets": [-1, 0]},
    ]
    assert [leakage_note(of_days(days, **data)) for data in silent] == [""] * len(silent)
    plain = write_store(tmp_path / "plain", {"x": ROWS})
    assert leakage_note(of_days(plain)) == ""
    numbers = write_store(tmp_path / "numbers", {"x": ROWS, "t": {**TIME, "attributes": {"units": "m"}}})
    assert leakage_note(of_days(numbers)) == ""
    dates = np.arange("2017-01-01", "2019-01-01", dtype="M8[D]").astype("M8[ns]").view("int64")
    written = {**TIME, "values": dates // 10**9 // 86400, "attributes": {"units": "days since 1970-01-01"}}
    assert leakage_note(of_days(write_store(tmp_path / "dates", {"x": ROWS, "t": written}))) != ""


def test_the_labels_of_a_plan_are_part_of_it(days: Path) -> None:
    one, other = (planned(of_days(days, split={"val": 0.0, "test": {"t": day}})) for day in ("2018-06", "2018-07"))
    assert one.fingerprint != other.fingerprint
    assert replace(one, row_labels=other.row_labels) == replace(other, source=one.source)
