"""Boxes: volumes whose rows are too large or too few to be units, cut into blocks of patches."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.config.schema import TrainConfig
from dtrain.data.load.moments import moments_of
from dtrain.data.load.statistics import merge_moments, partition_moments
from dtrain.data.plan import boxes
from dtrain.data.plan.evaluation import plan_evaluation
from dtrain.data.plan.footprint import chunks_of_box, slot_bytes
from dtrain.data.plan.grid import chunks_of
from dtrain.data.plan.partition import eval_partitions, plan_data, train_partitions
from dtrain.data.plan.splits import split_cells
from dtrain.data.plan.summary import describe_plan
from dtrain.data.plan.table import plan_from, plan_table
from dtrain.data.plan.units import DataPlan, box_selection
from dtrain.data.read.store import ReadStore
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import Samples
from dtrain.data.source import open_samples
from dtrain.errors import InvalidConfig, TooFewSamples
from tests.data.helpers import Spy, batches, one_pass, reader_of, readers, same_bits
from tests.sampling import examples

SPLITS = ("train", "val", "test")


def volume(shape: tuple[int, ...], chunks: tuple[int, ...], **options: Any) -> dict[str, Any]:
    """An array of (t, z, y, x) whose values tell all places apart."""
    values = np.arange(math.prod(shape), dtype="float32").reshape(shape)
    return {"dims": ("t", "z", "y", "x"), "values": values, "chunks": chunks, **options}


def opened(path: Path, patch: dict[str, int], **data: Any) -> Samples:
    table = {"split": {"val": 0.0, "test": 0.0}, "patch": patch, "sample_dim": "t", **data}
    return open_samples(path, inputs=["image"], targets=["image"], **table)


def cut_small(limit: int = 0, unit: int = 1) -> Any:
    """Cut small rows as large ones are."""
    return mock.patch.multiple(boxes, WHOLE_OBJECT_BYTES=limit, UNIT_BYTES=unit)


def values_of(samples: Samples, plan: DataPlan, split: Any, which: str = "zarr", batch: int = 5) -> list[np.ndarray]:
    """By partition: its samples in a pass."""
    parts = train_partitions(plan) if split == "train" else eval_partitions(plan, split)
    reader = reader_of(samples, which)
    return [
        np.concatenate([found.inputs[0] for found in batches(reader, part, one_pass(part, batch), replica=k)])
        for k, part in enumerate(parts)
    ]


def most_touched(samples: Samples, plan: DataPlan) -> int:
    """The most chunks of the first variable that a unit touches."""
    (v, *_), units = samples.variables, range(plan.num_units)
    return max(len(list(chunks_of(v.chunks, box_selection(samples, v, plan.unit_box(unit))))) for unit in units)


# One large volume -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, write_store: Callable[..., Path]) -> Path:
    """One time point of 16 MB in 128 chunks."""
    folder = tmp_path_factory.mktemp("volume")
    return write_store(folder / "v.zarr", {"image": volume((1, 64, 256, 256), (1, 32, 32, 32))})


def test_one_volume_is_cut_into_boxes_of_whole_chunks(large: Path) -> None:
    samples = opened(large, {"z": 32, "y": 32, "x": 32}, split={"val": 0.1, "test": 0.1})
    plan = plan_data(samples, replicas=4, seed=0)
    said = describe_plan(samples, plan)
    assert (said["units"], said["unit_block"]) == (128, {"z": 32, "y": 32, "x": 32})
    assert sum(said["partition_samples"]) + said["val_samples"] + said["test_samples"] == 128
    assert (said["val_samples"], said["test_samples"]) == (13, 13)
    assert max(said["partition_samples"]) - min(said["partition_samples"]) <= 1
    assert said["read_amplification"] == said["decodes_per_unit"] == 1
    assert plan.window * slot_bytes(samples, plan) <= 16 << 20
    seen = [values_of(samples, plan, split) for split in SPLITS]
    firsts = Counter(patch.flat[0] for split in seen for part in split for patch in part)
    assert len(firsts) == 128
    assert set(firsts.values()) == {1}
    starts = [(z, y, x) for z in (0, 32) for y in range(0, 256, 32) for x in range(0, 256, 32)]
    assert most_touched(samples, plan) == chunks_of_box(samples, samples, plan, samples.variables[0])[0] == 1
    assert set(firsts) == {float(np.ravel_multi_index(start, (64, 256, 256))) for start in starts}


def test_each_chunk_of_a_volume_is_decoded_once_a_pass(large: Path) -> None:
    samples = opened(large, {"z": 16, "y": 16, "x": 32})
    plan = plan_data(samples, replicas=3, seed=0)
    read: Counter[str] = Counter()
    noted = ReadStore._noted

    def logged(self: ReadStore, key: str, byte_range: Any, value: Any) -> Any:
        read[key] += value is not None
        return noted(self, key, byte_range, value)

    with mock.patch.object(ReadStore, "_noted", logged):
        spies = []
        for k, part in enumerate(train_partitions(plan)):
            reader = UnitReader(samples, "zarr")
            spies.append(Spy(reader))
            batches(reader, part, one_pass(part), replica=k)
    chunks = {key: count for key, count in read.items() if "/c/" in key}
    assert (len(chunks), set(chunks.values())) == (128, {1})
    assert sum(spy.bytes_decoded for spy in spies) == 64 * 256 * 256 * 4


def test_rows_that_are_small_enough_stay_whole(write_store: Callable[..., Path], tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", {"image": volume((100, 4, 8, 8), (1, 4, 8, 8))})
    plan = plan_data(opened(path, {"y": 4, "x": 4}, split={"val": 0.1, "test": 0.1}), replicas=2, seed=0)
    assert (plan.blocks, plan.whole, plan.patches) == ((), "cells", 4)


def test_a_small_stack_is_split_by_patch(write_store: Callable[..., Path], tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", {"image": volume((4, 1, 128, 128), (1, 1, 32, 32))})
    samples = opened(path, {"y": 8, "x": 8}, split={"val": 0.1, "test": 0.1})
    plan = plan_data(samples, replicas=2, seed=0)
    said = describe_plan(samples, plan)
    assert sum(said["partition_samples"]) + said["val_samples"] + said["test_samples"] == 4 * 256
    for name in ("val_samples", "test_samples"):
        assert said[name] == pytest.approx(102.4, rel=0.1)


def test_enough_large_rows_stay_whole_in_a_split(write_store: Callable[..., Path], tmp_path: Path) -> None:
    """Patches of an image are not in training and validation both."""
    path = write_store(tmp_path / "s", {"image": volume((40, 1, 16, 16), (1, 1, 8, 8))})
    with cut_small():
        samples = opened(path, {"y": 8, "x": 8}, split={"val": 0.1, "test": 0.1})
        plan = plan_data(samples, replicas=2, seed=0)
    assert (plan.whole, len(plan.grid)) == ("rows", 4)
    owner = {}
    for split in SPLITS:
        for part in values_of(samples, plan, split):
            for patch in part:
                assert owner.setdefault(int(patch.flat[0]) // 256, split) == split
    assert Counter(owner.values()) == {"train": 32, "val": 4, "test": 4}


def test_patches_true_holds_places_out_of_all_rows(write_store: Callable[..., Path], tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", {"image": volume((6, 1, 40, 40), (1, 1, 4, 4))})
    samples = opened(path, {"y": 4, "x": 4}, split={"patches": True, "val": 0.2, "test": 0.1}, input_offsets=[-1, 0])
    plan = plan_data(samples, replicas=2, seed=0)
    assert (plan.whole, plan.sequential) == ("blocks", False)
    owner = {}
    for split in SPLITS:
        for part in values_of(samples, plan, split):
            for patch in part:
                place = int(patch[0].flat[0]) % 1600
                assert owner.setdefault(place, split) == split
    assert Counter(owner.values()) == {"train": 70, "val": 20, "test": 10}


def test_windows_on_boxes_are_split_along_time(write_store: Callable[..., Path], tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", {"image": volume((50, 1, 16, 16), (5, 1, 8, 8))})
    with cut_small():
        samples = opened(path, {"y": 8, "x": 8}, split={"val": 0.2, "test": 0.2}, input_offsets=[-2, 0])
        plan = plan_data(samples, replicas=2, seed=0)
    assert (plan.whole, plan.sequential, len(plan.grid)) == ("rows", True, 4)
    times = {
        split: sorted({int(row.flat[0]) // 256 for part in values_of(samples, plan, split) for w in part for row in w})
        for split in SPLITS
    }
    assert times == {"train": list(range(30)), "val": list(range(30, 40)), "test": list(range(40, 50))}
    assert describe_plan(samples, plan)["dropped"]["split"] == 4 * 6  # two windows at each beginning, in each block


def test_patches_need_a_dimension_to_cut() -> None:
    with pytest.raises(InvalidConfig, match="data.patch names no dimension to cut"):
        TrainConfig(data={"split": {"patches": True}})


# Everything once ------------------------------------------------------------------------------------------------


@examples(60)
@given(st.data())
def test_every_patch_once_and_no_value_in_two_splits(write_store: Callable[..., Path], data: st.DataObject) -> None:
    draw = data.draw
    shape = (draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    chunks = tuple(draw(st.integers(1, n)) for n in shape)
    patch = {dim: draw(st.integers(1, n)) for dim, n in zip("zyx", shape[1:], strict=True) if draw(st.booleans())}
    split = {"val": draw(st.sampled_from([0.0, 0.2])), "test": draw(st.sampled_from([0.0, 0.2]))}
    if patch and draw(st.booleans()):
        split["patches"] = True
    shards = {"shards": tuple(n * draw(st.integers(1, 2)) for n in chunks)} if draw(st.booleans()) else {}
    with (
        tempfile.TemporaryDirectory() as folder,
        cut_small(draw(st.sampled_from([0, 200])), draw(st.sampled_from([1, 300]))),
    ):
        path = write_store(Path(folder, "s"), {"image": volume(shape, chunks, **shards)})
        samples = opened(path, patch, split=split)
        try:
            plan = plan_data(samples, replicas=draw(st.integers(1, 3)), seed=draw(st.integers(0, 9)))
        except TooFewSamples:
            return
        assert plan_from(plan_table(plan)) == plan
        seen, values = [], {}
        for split_name in SPLITS:
            assert len(split_cells(plan, split_name)) == len(set(split_cells(plan, split_name).tolist()))
            for part in values_of(samples, plan, split_name, draw(readers)):
                for patch_values in part:
                    seen.append(patch_values.tobytes())
                    values.setdefault(split_name, set()).update(patch_values.ravel().tolist())
        stored = np.arange(math.prod(shape), dtype="float32").reshape(shape)
        expected = [
            stored[t][tile.slices(samples.variables[0])].tobytes() for t in range(shape[0]) for tile in samples.tiles
        ]
        assert sorted(seen) == sorted(expected)
        for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
            assert not values.get(one, set()) & values.get(other, set())
        said = describe_plan(samples, plan)
        assert said["patches"] == len(samples.tiles)
        assert sum(said["partition_samples"]) + said["val_samples"] + said["test_samples"] == len(seen)
        assert most_touched(samples, plan) <= chunks_of_box(samples, samples, plan, samples.variables[0])[0]


def test_batches_have_the_same_bits_by_all_readers_and_from_every_position(
    write_store: Callable[..., Path], tmp_path: Path
) -> None:
    path = write_store(tmp_path / "s", {"image": volume((3, 2, 22, 17), (2, 1, 5, 4))})
    with cut_small():
        samples = opened(path, {"y": 5, "x": 3})
        (part,) = train_partitions(plan_data(samples, replicas=1, seed=0))
    assert part.plan.blocks
    sizes = one_pass(part, 4)
    first = batches(UnitReader(samples, "zarr"), part, sizes)
    for which in ("zarrs", "numcodecs", "auto"):
        assert same_bits(first, batches(reader_of(samples, which), part, sizes))
    from dtrain.types import Cursor

    for start in (1, 5, len(sizes) - 1):
        rest = batches(UnitReader(samples, "zarr"), part, sizes[start:], cursor=Cursor(0, 4 * start))
        assert same_bits(first[start:], rest)


def test_moments_are_those_of_all_values(write_store: Callable[..., Path], tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", {"image": volume((3, 2, 22, 17), (2, 1, 5, 4))})
    with cut_small():
        samples = opened(path, {"y": 5, "x": 3}, normalize=["image"])
        parts = train_partitions(plan_data(samples, replicas=2, seed=0))
    assert parts[0].plan.blocks
    moments = merge_moments([partition_moments(UnitReader(samples), part, ["image"]) for part in parts])["image"]
    whole = moments_of(np.arange(3 * 2 * 22 * 17, dtype="float32").reshape(3, -1))
    assert moments.count == whole.count
    np.testing.assert_allclose([moments.mean, moments.std], [whole.mean, whole.std], rtol=1e-12)


def test_amplification_is_what_is_decoded(write_store: Callable[..., Path], tmp_path: Path) -> None:
    """Patches that do not fit the chunks."""
    path = write_store(tmp_path / "s", {"image": volume((2, 1, 40, 40), (1, 1, 8, 8), compressors=None)})
    with cut_small():
        samples = opened(path, {"y": 10, "x": 20})
        plan = plan_data(samples, replicas=1, seed=0)
    seen: list[tuple[str, int]] = []
    noted = ReadStore._noted

    def logged(self: ReadStore, key: str, byte_range: Any, value: Any) -> Any:
        if "/c/" in key and value is not None:
            seen.append((key, len(value)))
        return noted(self, key, byte_range, value)

    with mock.patch.object(ReadStore, "_noted", logged):
        for part in train_partitions(plan):
            batches(UnitReader(samples, "zarr"), part, one_pass(part))
    decoded, unique = sum(size for _, size in seen), sum(dict(seen).values())
    assert describe_plan(samples, plan)["read_amplification"] == pytest.approx(decoded / unique)


# Evaluation -----------------------------------------------------------------------------------------------------


def test_other_patches_are_refused_where_splits_hold_patches(write_store: Callable[..., Path], tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", {"image": volume((1, 1, 40, 40), (1, 1, 8, 8))})
    with cut_small():
        samples = opened(path, {"y": 8, "x": 8}, split={"val": 0.2, "test": 0.0})
        plan = plan_data(samples, replicas=1, seed=0)
        assert plan.whole == "cells"
        other = opened(path, {"y": 4, "x": 8}, split={"val": 0.2, "test": 0.0})
        with pytest.raises(InvalidConfig, match="splits of the run hold patches of { y = 8, x = 8 }"):
            plan_evaluation(other, "val", (plan,), None, 0)
        assert plan_evaluation(samples, "val", (plan,), None, 0) == (plan, "val")
        every, split = plan_evaluation(other, "all", (plan,), None, 0)
    assert sum(part.num_samples for part in eval_partitions(every, split)) == 50


def test_other_patches_of_whole_rows_are_evaluated(write_store: Callable[..., Path], tmp_path: Path) -> None:
    path = write_store(tmp_path / "s", {"image": volume((40, 1, 16, 16), (1, 1, 8, 8))})
    with cut_small():
        samples = opened(path, {"y": 8, "x": 8}, split={"val": 0.1, "test": 0.0})
        plan = plan_data(samples, replicas=1, seed=0)
        other = opened(path, {"y": 4, "x": 4}, split={"val": 0.1, "test": 0.0})
        evaluated, split = plan_evaluation(other, "val", (plan,), None, 0)
    rows = {int(patch.flat[0]) // 256 for part in values_of(other, evaluated, split) for patch in part}
    assert rows == {int(patch.flat[0]) // 256 for part in values_of(samples, plan, "val") for patch in part}
    assert sum(part.num_samples for part in eval_partitions(evaluated, split)) == 4 * 16


def test_tiles_of_a_very_large_volume_are_arithmetic(large: Path) -> None:
    samples = opened(large, {"z": 32, "y": 32, "x": 32})
    image = replace(
        samples.variables[0],
        shape=(1, 10_000, 10_000, 10_000),
        chunks=(1, 64, 64, 64),
        objects=(1, 64, 64, 64),
        select=((0, 1, 1), *((0, 10_000, 1),) * 3),
    )
    cuts = tuple(replace(cut, length=10_000) for cut in samples.tiles.cuts)
    huge = replace(samples, variables=(image,), tiles=replace(samples.tiles, cuts=cuts))
    plan = plan_data(huge, replicas=4, seed=0)
    assert plan.patches == 313**3
    assert sum(part.num_samples for part in train_partitions(plan)) == 313**3
    assert huge.fingerprint
