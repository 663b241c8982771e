"""Several stores as one hold the samples of the same rows in one store, but for windows across two stores."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import assume, given
from hypothesis import strategies as st

import dtrain
from dtrain.data.given import find_given
from dtrain.data.load.loader import read_batches
from dtrain.data.plan.footprint import chunks_of_box
from dtrain.data.plan.grid import chunks_of
from dtrain.data.plan.partition import Partition, cell_anchors, plan_data, train_partitions
from dtrain.data.plan.summary import describe_plan
from dtrain.data.plan.units import Box, DataPlan, rows_selection
from dtrain.data.read import joined
from dtrain.data.read.joined import JoinedReader, open_reader
from dtrain.data.samples import Samples
from dtrain.errors import (
    ChunkMissing,
    ChunkUndecodable,
    InvalidConfig,
    LengthsDiffer,
    NonFiniteData,
    NothingSelected,
    TooFewSamples,
    UnsuitableVariable,
)
from tests.data.helpers import START, WHOLE
from tests.data.layouts.fixtures import NAMES, write_anndata
from tests.sampling import examples

Write = Callable[..., Path]
YEARS = (365, 366, 365, 365)


def write_rows(write: Write, folder: Path, rows: Sequence[int], chunks: Sequence[int], **options: Any) -> list[str]:
    """Write a store for each number of rows; values tell the row of the whole and the place apart."""
    paths, before = [], 0
    for number, (count, chunk) in enumerate(zip(rows, chunks, strict=True)):
        of_all = np.arange(before, before + count)
        x = of_all[:, None] * 5 + np.arange(5)
        arrays = {
            "x": {"dims": ("t", "y"), "values": x.astype("float32"), "chunks": (chunk, 3), **options.get("x", {})},
            "row": {"dims": ("t",), "values": of_all.astype("int32"), "chunks": (max(1, count),)},
            "t": {"dims": ("t",), "values": of_all.astype("float64"), "chunks": (max(1, count),)},
        }
        arrays |= {name: given(of_all, number) for name, given in options.items() if callable(given)}
        paths.append(str(write(folder / f"{number}.zarr", arrays)))
        before += count
    return paths


def open_rows(paths: Any, **data: Any) -> Samples:
    return dtrain.open_samples(paths, inputs=["x"], targets=["row"], **{"sample_dim": "t", "split": WHOLE, **data})


def read(samples: Samples, partition: Partition) -> tuple[np.ndarray, np.ndarray]:
    """All inputs and targets of a partition, in stored order."""
    sizes = [min(7, partition.num_samples - done) for done in range(0, partition.num_samples, 7)]
    stream = read_batches(open_reader(samples), partition, START, sizes, replica=0, shuffle=False)
    pairs = [(batch.inputs[0].copy(), batch.targets[0].copy()) for batch in stream]
    inputs, targets = (np.concatenate(some) for some in zip(*pairs, strict=True))
    return inputs, targets


def chunks_by_hand(samples: Samples, plan: DataPlan, number: int) -> int:
    """The most chunks of the first variable that a unit touches in a store."""
    store, begin = samples.stores[number], samples.begins[number]
    v, (low, high), most = store.moving[0], samples.reach(store.moving[0].name), 0
    for unit in range(plan.num_units):
        box = plan.unit_box(unit)
        start = max(box.start + low - begin, store.first_row)
        stop = min(box.stop + high - begin, store.num_samples)
        if start < stop:
            most = max(most, len(list(chunks_of(v.chunks, rows_selection(v, Box(start, stop, box.block))))))
    return most


# The same samples -------------------------------------------------------------------------------------------


@examples(100)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 45)), min_size=2, max_size=6),
    offsets=st.sampled_from([0, [-1, 0], [-3, 2], {"start": 1, "stop": 4}, 2]),
    stride=st.sampled_from([1, 1, 2, 5]),
    patch=st.sampled_from([{}, {}, {"y": 2}]),
    split=st.sampled_from([WHOLE, {"val": 0.2, "test": 0.2}]),
    order=st.sampled_from(["random", "sequential"]),
    replicas=st.integers(1, 3),
)
def test_each_sample_of_each_store_stands_once_with_its_values(
    write_store: Write,
    lengths: list[tuple[int, int]],
    offsets: Any,
    stride: int,
    patch: dict[str, int],
    split: dict[str, float],
    order: str,
    replicas: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = write_rows(write_store, Path(folder), *zip(*lengths, strict=True))
        keys: dict[str, Any] = {"input_offsets": offsets, "stride": stride, "patch": patch, "split": split}
        samples = open_rows(paths, split_order=order, gaps="allow", **keys)
        try:
            plan = plan_data(samples, replicas=replicas, seed=3)
        except TooFewSamples:
            assume(False)
        for number, store in enumerate(samples.stores):
            wanted_chunks = chunks_by_hand(samples, plan, number)
            counted, _ = chunks_of_box(samples, store, plan, store.moving[0])
            assert wanted_chunks <= counted <= 2 * max(1, wanted_chunks)
        parts = [*train_partitions(plan), *(cell_anchors(plan, name) for name in ("val", "test"))]
        seen: list[tuple[int, int]] = []
        window = list(range(1, 4)) if isinstance(offsets, dict) else [offsets] if isinstance(offsets, int) else offsets
        for part in filter(lambda part: part.num_samples, parts):
            inputs, anchors = read(samples, part)
            rows = inputs.reshape(len(inputs), len(window), -1)
            places = rows[:, 0] - 5 * (anchors[:, None] + window[0])
            expected = 5 * (anchors[:, None, None] + np.array(window)[:, None]) + places[:, None, :]
            assert np.array_equal(rows, expected)
            assert (np.diff(places, axis=1) == 1).all()
            seen += zip(anchors.tolist(), places[:, 0].astype(int).tolist(), strict=True)
        wanted, before = [], 0
        for count, _ in lengths:
            whole = [a for a in range(0, count, stride) if a + min(window) >= 0 and a + max(window) < count]
            wanted += [(before + a, place) for a in whole for place in ((0, 2, 3) if patch else (0,))]
            before += count
        assert len(seen) == len(set(seen))
        assert set(seen) <= set(wanted)
        if split == WHOLE or window in ([0], [2]):
            assert window == [2] or sorted(seen) == sorted(wanted)


@examples(30)
@given(
    rows=st.lists(st.integers(1, 12), min_size=2, max_size=4),
    chunk=st.integers(1, 6),
    shards=st.integers(1, 3),
    zarr_format=st.sampled_from([2, 3]),
    offsets=st.sampled_from([0, [-1, 0, 1]]),
)
def test_places_held_out_are_those_of_all_stores(
    write_store: Write, rows: list[int], chunk: int, shards: int, zarr_format: int, offsets: Any
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for number, count in enumerate(rows):
            values = np.arange(count * 16).reshape(count, 16) + 1000 * number
            row: dict[str, Any] = {"dims": ("t",), "values": np.arange(count) + 100 * number, "chunks": (count,)}
            x: dict[str, Any] = {"dims": ("t", "y"), "values": values.astype("int32"), "chunks": (chunk, 4)}
            if zarr_format == 3 and number % 2:  # stores need not be stored alike
                x["shards"] = (chunk * shards, 8)
            paths.append(
                str(write_store(Path(folder, f"{number}.zarr"), {"x": x, "row": row}, zarr_format=zarr_format))
            )
        split = {"patches": True, "val": 0.25, "test": 0.25}
        samples = open_rows(paths, patch={"y": 4}, split=split, input_offsets=offsets, gaps="allow")
        try:
            plan = plan_data(samples, replicas=1, seed=0)
        except TooFewSamples:
            assume(False)
        held: dict[str, set[int]] = {}
        seen = []
        for name in ("train", "val", "test"):
            inputs, anchors = read(samples, cell_anchors(plan, name))  # type: ignore[arg-type]
            own = inputs.reshape(len(inputs), -1, 4)[:, len(np.atleast_1d(offsets)) // 2]
            places = own[:, 0] - 1000 * (anchors // 100) - 16 * (anchors % 100)
            assert np.array_equal(own, own[:, :1] + np.arange(4))
            held[name] = set(places.tolist())
            seen += zip(anchors.tolist(), places.tolist(), strict=True)
        reach = 0 if offsets == 0 else 1
        wanted = [100 * k + row for k, count in enumerate(rows) for row in range(reach, count - reach)]
        assert sorted(seen) == [(row, place) for row in wanted for place in (0, 4, 8, 12)]
        assert not held["train"] & held["val"] | held["train"] & held["test"] | held["val"] & held["test"]


def test_means_are_of_the_rows_of_all_stores_and_of_no_others(write_store: Write, tmp_path: Path) -> None:
    paths = write_rows(write_store, tmp_path, [10, 20, 5], [10, 20, 5])
    x = np.arange(35 * 5).reshape(35, 5).astype(float)
    for keys, mean, std in (
        ({"normalize": ["x"]}, x.mean(), x.std()),
        ({"normalize": {"x": ["y"]}}, x.mean(0), x.std(0)),
    ):
        with dtrain.batches(open_rows(paths, **keys), split="all", batch_size=35) as batches:
            (batch,) = batches
        np.testing.assert_allclose(batch.inputs[0].numpy(), (x - mean) / std, rtol=1e-5, atol=1e-6)


def test_a_list_of_one_path_is_the_path(write_store: Write, tmp_path: Path) -> None:
    (path,) = write_rows(write_store, tmp_path, [30], [7])
    listed, alone = open_rows([path]), open_rows(path)
    assert listed == alone
    assert listed.config.path == path
    assert listed.fingerprint == alone.fingerprint
    assert not listed.members


def test_stores_of_the_same_rows_in_another_order_are_other_data(write_store: Write, tmp_path: Path) -> None:
    paths = write_rows(write_store, tmp_path, [30, 31], [7, 7])
    assert open_rows(paths).fingerprint != open_rows(paths[::-1]).fingerprint


# Rows and units ---------------------------------------------------------------------------------------------


def test_years_in_one_chunk_each_are_units(write_store: Write, tmp_path: Path) -> None:
    samples = open_rows(write_rows(write_store, tmp_path, YEARS, YEARS))
    assert samples.begins == (0, 366, 732, 1098)
    assert samples.num_rows == 1461
    assert samples.streamed[0].objects == (366, 3)
    plan = plan_data(samples, replicas=1, seed=0)
    assert plan.members == ((0, 0, 365), (366, 366, 732), (732, 732, 1097), (1098, 1098, 1463))
    assert describe_plan(samples, plan)["partition_samples"] == [1461]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("keys", [{}, {"input_offsets": [-3, 0]}, {"input_offsets": [-3, 0], "stride": 4}])
@pytest.mark.parametrize("chunks", [YEARS, (30, 30, 60, 400), (100, 50, 25, 10)])
def test_each_chunk_is_requested_once_a_pass(
    write_store: Write, tmp_path: Path, chunks: Sequence[int], keys: dict[str, Any]
) -> None:
    samples = open_rows(write_rows(write_store, tmp_path, YEARS, chunks), reader="zarr", gaps="allow", **keys)
    plan = plan_data(samples, replicas=1, seed=0)
    reader, (part,) = JoinedReader(samples, "zarr"), train_partitions(plan)
    opened = [reader.member(number) for number in range(len(YEARS))]
    before = sum(one.store.requests for one in opened)
    sizes = [part.num_samples]
    for _ in read_batches(reader, part, START, sizes, replica=0, shuffle=True):
        pass
    stored = sum(-(-count // chunk) * 2 + 1 for count, chunk in zip(YEARS, chunks, strict=True))
    requested = sum(one.store.requests for one in opened) - before
    printed = describe_plan(samples, plan)["read_amplification"]
    assert requested <= 1.1 * stored + 2 * len(YEARS)
    if not keys:
        assert requested == stored
        assert printed == 1.0


def test_the_amplification_of_chunks_that_do_not_fit_together_is_printed(write_store: Write, tmp_path: Path) -> None:
    paths = write_rows(write_store, tmp_path, (900, 900), (101, 97))
    samples = open_rows(paths)
    assert samples.streamed[0].object_rows == 101 * 97  # a row has 24 bytes: so many are read at once
    wide = {"x": {"dims": ("t", "y"), "values": np.zeros((60, 90_000), "float32")}}
    for number, rows in enumerate((17, 19)):
        arrays = {"x": {**wide["x"], "chunks": (rows, 90_000)}, "row": {"dims": ("t",), "values": np.arange(60)}}
        arrays["row"]["chunks"] = (rows,)
        write_store(tmp_path / f"wide{number}.zarr", arrays)
    samples = open_rows([str(tmp_path / f"wide{number}.zarr") for number in (0, 1)])
    assert samples.streamed[0].object_rows == 19
    assert samples.begins == (0, 76)
    counts = describe_plan(samples, plan_data(samples, replicas=1, seed=0))
    assert counts["unit_rows"] == 19
    # units of the first store touch 2, 2, 2 and 1 of its 4 chunks of 17 rows
    assert counts["read_amplification"] == pytest.approx((7 * 17 + 4 * 19) / (4 * 17 + 4 * 19))


def test_few_stores_are_open_at_a_time(write_store: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "KEPT_STORES", 2)
    samples = open_rows(write_rows(write_store, tmp_path, [9] * 7, [4] * 7))
    reader, (part,) = JoinedReader(samples), train_partitions(plan_data(samples, replicas=1, seed=0))
    for _ in read_batches(reader, part, START, [part.num_samples] * 3, replica=0, shuffle=True):
        assert len(reader._open) <= 2


# Rows that are chosen ---------------------------------------------------------------------------------------


def anchors_of(samples: Samples) -> list[int]:
    plan = plan_data(samples, replicas=1, seed=0)
    return sorted(read(samples, cell_anchors(plan, "all"))[1].tolist())


def test_isel_counts_rows_of_all_stores(write_store: Write, tmp_path: Path) -> None:
    paths = write_rows(write_store, tmp_path, [10, 20, 5, 8], [4, 20, 5, 3])
    assert anchors_of(open_rows(paths, isel={"t": slice(8, 32)})) == list(range(8, 32))
    last = open_rows(paths, isel={"t": slice(-9, None)})
    assert anchors_of(last) == list(range(34, 43))
    assert [Path(one.path).name for one in last.members] == ["2.zarr", "3.zarr"]
    assert last.location == tuple(paths)  # rows are counted from the first of them
    with pytest.raises(InvalidConfig, match="selects nothing of the 43 places of t"):
        open_rows(paths, isel={"t": slice(43, 50)})


def test_sel_is_looked_up_in_each_store_and_those_without_are_left_out(write_store: Write, tmp_path: Path) -> None:
    paths = write_rows(write_store, tmp_path, [10, 20, 5, 8], [4, 20, 5, 3])
    samples = open_rows(paths, sel={"t": slice(12, 32)})
    assert anchors_of(samples) == list(range(12, 33))
    assert len(samples.members) == 2
    assert samples.location == tuple(paths)
    assert [str(chosen) for chosen in samples.chosen] == ["t 12.0 to 32.0, 21 of 25 places"]
    with pytest.raises(NothingSelected, match="selects nothing of t"):
        open_rows(paths, sel={"t": slice(100, 110)})


def test_a_place_of_another_dimension_must_be_in_all_stores(write_store: Write, tmp_path: Path) -> None:
    def y(_: np.ndarray, number: int) -> dict[str, Any]:
        return {"dims": ("y",), "values": np.arange(5) + 10 * number, "chunks": (5,)}

    paths = write_rows(write_store, tmp_path, [10, 10], [4, 4], y=y)
    with pytest.raises(InvalidConfig, match=r"1\.zarr has no such value"):
        open_rows(paths, sel={"y": 3})


# Splits -----------------------------------------------------------------------------------------------------


def splits_of(samples: Samples) -> dict[str, list[int]]:
    plan = plan_data(samples, replicas=1, seed=0, given=find_given(samples, 0).splits)
    return {name: sorted(read(samples, cell_anchors(plan, name))[1].tolist()) for name in ("train", "val", "test")}


def test_splits_by_coordinate_reach_over_stores_with_their_gap(write_store: Write, tmp_path: Path) -> None:
    paths = write_rows(write_store, tmp_path, [10, 20, 5, 8], [4, 20, 5, 3])
    split = {"val": {"t": {"start": 28, "stop": 31}}, "test": {"t": {"start": 35}}, "gap": 2}
    samples = open_rows(paths, split=split)
    held = splits_of(samples)
    assert held == {"train": list(range(26)), "val": [28, 29, 30, 31], "test": list(range(35, 43))}
    assert str(find_given(samples, 0).held["val"]) == "28.0 to 31.0"
    with pytest.raises(NothingSelected, match="test"):
        splits_of(open_rows(paths, split={"test": {"t": {"start": 99}}}))


def test_a_group_of_several_stores_lies_in_one_split(write_store: Write, tmp_path: Path) -> None:
    def donor(rows: np.ndarray, number: int) -> dict[str, Any]:
        return {"dims": ("t",), "values": (rows % 7).astype("int16"), "chunks": (4,)}

    paths = write_rows(write_store, tmp_path, [10, 20, 5, 8], [4, 20, 5, 3], donor=donor)
    held = splits_of(open_rows(paths, split={"by": "donor", "val": 0.2, "test": 0.2}))
    assert sorted(row for rows in held.values() for row in rows) == list(range(43))
    groups = [{row % 7 for row in rows} for rows in held.values()]
    assert all(groups)
    assert sum(map(len, groups)) == 7


# Values -----------------------------------------------------------------------------------------------------


def test_stores_that_are_packed_one_by_one_are_decoded_one_by_one(write_store: Write, tmp_path: Path) -> None:
    paths = []
    for number, (scale, offset) in enumerate([(0.5, 10.0), (0.25, -3.0)]):
        stored = np.arange(12, dtype="int16").reshape(6, 2)
        packed = {"scale_factor": scale, "add_offset": offset, "_FillValue": -1 - number}
        arrays = {
            "x": {"dims": ("t", "y"), "values": stored, "chunks": (3, 2), "attributes": packed},
            "row": {"dims": ("t",), "values": np.arange(6) + 6 * number, "chunks": (6,)},
        }
        paths.append(str(write_store(tmp_path / f"{number}.zarr", arrays)))
    for keys in ({}, {"normalize": ["x"]}):
        with dtrain.batches(open_rows(paths, **keys), split="all", batch_size=12) as batches:
            (batch,) = batches
        decoded = np.concatenate([stored * 0.5 + 10, stored * 0.25 - 3])[batch.targets.numpy()]
        expected = decoded if not keys else (decoded - decoded.mean()) / decoded.std()
        np.testing.assert_allclose(batch.inputs[0].numpy(), expected, rtol=1e-6)
    samples = open_rows([paths[0], paths[0].replace("0.zarr", "1.zarr")])
    assert samples.streamed[0].kept_dtype == np.float32


def test_integers_of_different_sizes_are_int64(write_store: Write, tmp_path: Path) -> None:
    for number, dtype in enumerate(["int8", "int32"]):
        arrays = {
            "x": {"dims": ("t",), "values": np.arange(6, dtype="float32"), "chunks": (3,)},
            "row": {"dims": ("t",), "values": np.arange(6).astype(dtype) + 6 * number, "chunks": (6,)},
        }
        write_store(tmp_path / f"{number}.zarr", arrays)
    samples = open_rows([str(tmp_path / f"{number}.zarr") for number in (0, 1)])
    assert anchors_of(samples) == list(range(12))


def test_faults_name_the_store(write_store: Write, tmp_path: Path) -> None:
    paths = write_rows(write_store, tmp_path, [10, 20], [5, 5])
    Path(paths[1], "x", "c", "2", "0").unlink()
    samples = open_rows(paths)
    with pytest.raises(ChunkMissing, match=r"1\.zarr: chunk x/c/2/0 of x is missing"):
        dtrain.batches(samples)
    with dtrain.batches(open_rows(paths, missing="skip"), split="all") as batches:
        rows = np.concatenate([batch.targets.numpy() for batch in batches])
    assert sorted(rows.tolist()) == [*range(20), *range(25, 30)]
    with dtrain.batches(open_rows(paths, missing="fill"), split="all", batch_size=30) as batches:
        (batch,) = batches
    assert batch.inputs[0].numpy()[20:25, :3].tolist() == [[0.0] * 3] * 5


def test_a_value_that_is_not_finite_is_named_by_its_store(write_store: Write, tmp_path: Path) -> None:
    paths = write_rows(write_store, tmp_path, [10, 20], [5, 5])
    array = zarr.open_group(paths[1], mode="a")["x"]
    array[7, 2] = np.nan
    with dtrain.batches(open_rows(paths)) as batches, pytest.raises(NonFiniteData, match=r"1\.zarr: x\[7, 2\]"):
        list(batches)


# Gaps -------------------------------------------------------------------------------------------------------


def test_jumps_are_looked_for_in_each_store(write_store: Write, tmp_path: Path) -> None:
    def t(rows: np.ndarray, number: int) -> dict[str, Any]:
        values = rows + np.where(rows >= 55, 100, 0)
        return {"dims": ("t",), "values": values.astype("float64"), "chunks": (50,)}

    paths = write_rows(write_store, tmp_path, [40, 50], [10, 10], t=t)
    samples = open_rows(paths, input_offsets=[-1, 0])
    with dtrain.batches(samples, split="all") as batches:
        rows = sorted(row for batch in batches for row in batch.targets.tolist())
    assert rows == [row for row in range(90) if row not in (0, 40, 55)]


# Refused ----------------------------------------------------------------------------------------------------


def test_a_store_that_is_named_twice_is_refused(write_store: Write, tmp_path: Path) -> None:
    (path,) = write_rows(write_store, tmp_path, [10], [5])
    with pytest.raises(InvalidConfig, match="twice"):
        open_rows([path, f"{path}/"])


@pytest.mark.parametrize(
    ("second", "error", "said"),
    [
        ({"x": {"dims": ("t", "y"), "values": np.zeros((4, 6), "f4")}}, LengthsDiffer, "t, y 6; in .* they are t, y 5"),
        ({"x": {"dims": ("t", "z"), "values": np.zeros((4, 5), "f4")}}, LengthsDiffer, "t, z 5; in .* they are t, y 5"),
        ({"x": {"dims": ("t", "y"), "values": np.zeros((4, 5), "i4")}}, UnsuitableVariable, r"integers \(int32\); in"),
        ({"y": {"dims": ("y",), "values": np.arange(5) + 1}}, UnsuitableVariable, "y is 1, 2, 3 and 2 more at 5 of 5"),
    ],
)
def test_stores_that_differ_are_refused_by_name(
    write_store: Write, tmp_path: Path, second: dict[str, Any], error: type[Exception], said: str
) -> None:
    arrays: dict[str, dict[str, Any]] = {
        "x": {"dims": ("t", "y"), "values": np.zeros((4, 5), "f4")},
        "row": {"dims": ("t",), "values": np.arange(4)},
        "y": {"dims": ("y",), "values": np.arange(5)},
    }
    if second.get("x", arrays["x"])["dims"] != ("t", "y") or second.get("x", arrays["x"])["values"].shape[1] != 5:
        arrays_of_second = {name: array for name, array in {**arrays, **second}.items() if name != "y"}
    else:
        arrays_of_second = {**arrays, **second}
    for number, described in enumerate((arrays, arrays_of_second)):
        whole = {name: {**one, "chunks": one["values"].shape} for name, one in described.items()}
        write_store(tmp_path / f"{number}.zarr", whole)
    paths = [str(tmp_path / f"{number}.zarr") for number in (0, 1)]
    with pytest.raises(error, match=rf"1\.zarr: .*{said}"):
        open_rows(paths)


def test_a_static_variable_must_be_the_same_in_all_stores(write_store: Write, tmp_path: Path) -> None:
    for number, height in enumerate((1.0, 1.0, 2.0)):
        arrays = {
            "x": {"dims": ("t", "y"), "values": np.zeros((4, 5), "f4"), "chunks": (4, 5)},
            "height": {"dims": ("y",), "values": np.full(5, height, "f4"), "chunks": (5,)},
            "row": {"dims": ("t",), "values": np.arange(4), "chunks": (4,)},
        }
        write_store(tmp_path / f"{number}.zarr", arrays)
    paths = [str(tmp_path / f"{number}.zarr") for number in range(3)]
    keys: dict[str, Any] = {"inputs": ["x", "height"], "targets": ["row"], "sample_dim": "t", "split": WHOLE}
    with dtrain.batches(dtrain.open_samples(paths[:2], **keys)) as batches:
        assert next(batches).inputs[1][0].tolist() == [1.0] * 5
    with pytest.raises(UnsuitableVariable, match=r"2\.zarr: height has other values than in .*0\.zarr"):
        dtrain.batches(dtrain.open_samples(paths, **keys))


# Donors -----------------------------------------------------------------------------------------------------


def test_categories_of_a_file_each_are_put_together(tmp_path: Path) -> None:
    first = write_anndata(tmp_path / "a.zarr", codes=np.array([0, 1, -1] * 10, "int8"), names=["B cell", "T cell"])
    other = write_anndata(tmp_path / "b.zarr", codes=np.array([1, 0, -1] * 10, "int16"), names=["NK cell", "B cell"])
    samples = dtrain.open_samples([first, other], inputs=["X"], targets=["obs/cell_type"], split=WHOLE)
    categories = samples.variable("obs/cell_type").categories
    assert categories is not None
    assert categories.names == ("B cell", "T cell", "NK cell")
    with dtrain.batches(samples, split="all", batch_size=60) as batches:
        (batch,) = batches
    assert batch.targets.tolist() == [0, 1, -100] * 10 + [0, 2, -100] * 10


def test_categories_that_one_store_has_more_of_need_no_decoding(tmp_path: Path) -> None:
    codes = np.array([0, 1, 0] * 10, "int8")
    paths = [write_anndata(tmp_path / f"{len(names)}.zarr", codes=codes, names=names) for names in (NAMES[:2], NAMES)]
    samples = dtrain.open_samples(paths, inputs=["X"], targets=["obs/cell_type"], split=WHOLE)
    label = samples.variable("obs/cell_type")
    assert label.kept_dtype == np.int8
    assert label.categories is not None
    assert label.categories.names == tuple(NAMES)


def test_donors_are_dealt_whole_to_splits(tmp_path: Path) -> None:
    paths = []
    for number, names in enumerate((["d1", "d2", "d3"], ["d3", "d4", "d5"])):
        codes = (np.arange(30) // 10).astype("int8")
        paths.append(write_anndata(tmp_path / f"{number}.zarr", codes=codes, names=names))
    keys: dict[str, Any] = {"inputs": ["X"], "targets": ["obs/age"], "split": {"by": "obs/cell_type"}}
    samples = dtrain.open_samples(paths, **keys)
    held = find_given(samples, 0).held
    assert {name: one.places for name, one in held.items()} in (
        {"train": 40, "val": 10, "test": 10},
        {"train": 30, "val": 10, "test": 20},
        {"train": 30, "val": 20, "test": 10},
    )


def test_stores_of_other_genes_are_refused(tmp_path: Path) -> None:
    paths = [write_anndata(tmp_path / f"{number}.zarr") for number in (0, 1)]
    names = zarr.open_group(paths[1], mode="a")["var/_index"]
    assert isinstance(names, zarr.Array)
    names[2:4] = np.array(["var-3", "var-2"], np.dtypes.StringDType())
    keys: dict[str, Any] = {"inputs": ["X"], "targets": ["obs/cell_type"], "split": WHOLE}
    with pytest.raises(UnsuitableVariable, match=r"1\.zarr: gene is var-3, var-2 at 2 of 6 places, from 2 on; in"):
        dtrain.open_samples(paths, **keys)
    alike = dtrain.open_samples(paths, isel={"gene": slice(0, 2)}, **keys)
    assert alike.num_rows == 60


def test_a_damaged_coordinate_is_named(write_store: Write, tmp_path: Path) -> None:
    def y(_: np.ndarray, number: int) -> dict[str, Any]:
        return {"dims": ("y",), "values": np.arange(5), "chunks": (5,)}

    paths = write_rows(write_store, tmp_path, [10, 10], [4, 4], y=y)
    Path(paths[1], "y", "c", "0").write_bytes(b"none")
    with pytest.raises(ChunkUndecodable, match=r"1\.zarr: y, which is compared between stores"):
        open_rows(paths)
