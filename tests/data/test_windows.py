"""Samples of several rows: every window once a pass, none across a split, with the right values."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.load.loader import read_batches
from dtrain.data.plan.partition import eval_partitions, plan_data, plan_held_out, train_partitions
from dtrain.data.plan.splits import split_cells
from dtrain.data.plan.summary import describe_plan
from dtrain.data.plan.units import cell_bounds
from dtrain.data.read.units import UnitReader
from dtrain.data.source import open_samples
from dtrain.errors import InvalidConfig, TooFewSamples
from dtrain.types import Cursor
from tests.data.helpers import Spy
from tests.sampling import examples

START = Cursor(0, 0)
SPLITS = ("train", "val", "test")


def write(write_store, folder, rows, chunks, **options):
    """Write t(n) and u(n, 2) whose values are the row numbers."""
    numbers = np.arange(rows, dtype="int64")
    return write_store(
        Path(folder) / "s",
        {
            "t": {"dims": ("n",), "values": numbers, "chunks": (chunks[0],), **options},
            "u": {"dims": ("n", "k"), "values": np.stack([numbers, numbers + 0.5], 1), "chunks": (chunks[1], 1)},
        },
    )


def splits_of_rows(plan):
    """The split of every row, from the cells alone."""
    found = np.full(plan.num_samples, "", dtype=object)
    for name in SPLITS:
        for start, stop in zip(*cell_bounds(plan, split_cells(plan, name)), strict=True):
            found[start:stop] = name
    return found


def expected_anchors(plan, low, high, stride):
    """By split: the anchors whose rows, from the first to the last, all lie in it."""
    rows = splits_of_rows(plan)
    found = {name: [] for name in SPLITS}
    for anchor in range(0, plan.num_samples, stride):
        window = rows[anchor + low : anchor + high + 1] if anchor + low >= 0 else []
        if len(window) == high - low + 1 and len({*window, rows[anchor]}) == 1:
            found[rows[anchor]].append(anchor)
    return found


offsets = st.one_of(
    st.integers(-3, 3),
    st.lists(st.integers(-5, 6), min_size=1, max_size=4, unique=True),
    st.builds(
        lambda a, n, s: {"start": a, "stop": a + n, "step": s}, st.integers(-6, 4), st.integers(1, 8), st.integers(1, 3)
    ),
)


def listed(value):
    if isinstance(value, int):
        return [value]
    return list(range(value["start"], value["stop"], value["step"])) if isinstance(value, dict) else value


@examples(50)
@given(
    st.integers(60, 160),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    offsets,
    offsets,
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from(["auto", "random", "sequential"]),
    st.sampled_from([(0.0, 0.0), (0.2, 0.2)]),
    st.booleans(),
)
def test_every_window_once_a_pass_and_none_across_a_split(
    write_store, rows, chunks, inputs, targets, stride, replicas, order, shares, shuffle
):
    with tempfile.TemporaryDirectory() as folder:
        samples = open_samples(
            write(write_store, folder, rows, chunks),
            inputs=["t", "u"],
            targets=["t"],
            input_offsets=inputs,
            target_offsets=targets,
            stride=stride,
            split_order=order,
            split={"val": shares[0], "test": shares[1]},
            shuffle=shuffle,
        )
        try:
            plan = plan_data(samples, replicas=replicas, seed=3)
        except TooFewSamples:
            return
        every = [*listed(inputs), *listed(targets)]
        expected = expected_anchors(plan, min(every), max(every), stride)
        for split in SPLITS:
            parts = train_partitions(plan) if split == "train" else eval_partitions(plan, split)
            seen: Counter[int] = Counter()
            for replica, partition in enumerate(parts):
                reader = UnitReader(samples)
                spy = Spy(reader)
                (batch,) = read_batches(
                    reader, partition, START, [partition.num_samples], replica=replica, shuffle=shuffle
                )
                check_values(batch, inputs, targets, seen)
                assert len(spy.reads) == len(partition.units)
            assert sorted(seen.elements()) == expected[split], split


def check_values(batch, inputs, targets, seen):
    """Values are row numbers, so the anchors can be read off the tensors."""
    t, u = batch.inputs
    (y,) = batch.targets
    first = t if isinstance(inputs, int) else t[:, 0]
    anchors = first - listed(inputs)[0]
    seen.update(anchors.tolist())
    wanted = anchors[:, None] + np.array(listed(inputs))
    np.testing.assert_array_equal(t, wanted[:, 0] if isinstance(inputs, int) else wanted)
    np.testing.assert_array_equal(u[..., 0], wanted[:, 0] if isinstance(inputs, int) else wanted)
    np.testing.assert_array_equal(u[..., 1], u[..., 0] + 0.5)
    wanted = anchors[:, None] + np.array(listed(targets))
    np.testing.assert_array_equal(y, wanted[:, 0] if isinstance(targets, int) else wanted)


def test_a_language_model_reads_input_and_target_from_one_array(write_store, tmp_path):
    path = write_store(
        tmp_path / "s", {"tokens": {"dims": ("n",), "values": np.arange(1000).astype("uint16"), "chunks": (100,)}}
    )
    samples = open_samples(
        path,
        inputs=["tokens"],
        targets=["tokens"],
        input_offsets={"start": 0, "stop": 8},
        target_offsets={"start": 1, "stop": 9},
        stride=8,
        split={"val": 0.1, "test": 0.0},
    )
    plan = plan_data(samples, replicas=2, seed=0)
    assert plan.sequential
    parts = train_partitions(plan)
    assert [part.num_samples for part in parts] == [56, 56]  # 900 rows hold 112 windows of 9, the 113th would cross
    reader = UnitReader(samples)
    batch = next(read_batches(reader, parts[0], START, [5], replica=0, shuffle=True))
    assert batch.inputs[0].dtype == batch.targets[0].dtype == np.int64
    np.testing.assert_array_equal(batch.inputs[0] + 1, batch.targets[0])
    assert batch.inputs[0].shape == (5, 8)
    assert describe_plan(samples, plan)["dropped_samples"] == 2  # 896 would cross into val, 992 the end


def test_halos_are_read_from_a_neighbours_unit_but_not_beyond_what_the_windows_need(write_store, tmp_path, monkeypatch):
    path = write(write_store, tmp_path, 400, (10, 10))
    samples = open_samples(
        path,
        inputs=["t"],
        targets=["u"],
        input_offsets=[-1, 0],
        target_offsets=1,
        split={"val": 0.0, "test": 0.0},
        split_order="sequential",
    )
    plan = replace(plan_data(samples, replicas=2, seed=0), unit_rows=10, cell_rows=10)
    read, original = [], UnitReader._fill

    def spied(self, variable, select, out):
        read.append((variable.name, *select[variable.sample_axis][:2]))
        return original(self, variable, select, out)

    monkeypatch.setattr(UnitReader, "_fill", spied)
    for replica, partition in enumerate(train_partitions(plan)):
        list(
            read_batches(UnitReader(samples), partition, START, [partition.num_samples], replica=replica, shuffle=False)
        )
    assert ("t", 9, 20) in read  # the unit 10..19 with one row before it
    assert ("u", 11, 21) in read  # and one behind it
    assert min(start for _, start, _ in read) == 0
    assert max(stop for _, _, stop in read) == 400


def test_resume_in_a_pass_of_windows(write_store, tmp_path):
    path = write(write_store, tmp_path, 500, (20, 30))
    samples = open_samples(path, inputs=["t"], targets=["u"], input_offsets=[-2, 0], target_offsets=[1, 3], stride=3)
    plan = plan_data(samples, replicas=2, seed=0)
    partition = train_partitions(plan)[1]
    total = partition.num_samples

    def stream(cursor, sizes):
        batches = read_batches(UnitReader(samples), partition, cursor, sizes, replica=1, shuffle=True)
        return np.concatenate([batch.inputs[0] for batch in batches])

    whole = stream(START, [total, total])
    for position in (0, 1, total // 2, total - 1):
        np.testing.assert_array_equal(stream(Cursor(0, position), [total]), whole[position : position + total])


@pytest.mark.sampled(10)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("offsets", [0, [-2, 0, 1], {"start": 0, "stop": 6, "step": 2}])
@pytest.mark.parametrize("stride", [2, 3, 7])
def test_anchors_of_whole_units_lie_a_stride_apart(write_store, tmp_path, stride, offsets, shuffle):
    path = write(write_store, tmp_path, 403, (20, 10))
    samples = open_samples(
        path, inputs=["t", "u"], targets=["t"], input_offsets=offsets, stride=stride, split={"val": 0.0, "test": 0.0}
    )
    plan = replace(plan_data(samples, replicas=2, seed=0), unit_rows=20, cell_rows=20)
    seen: Counter[int] = Counter()
    for replica, partition in enumerate(train_partitions(plan)):
        (batch,) = read_batches(
            UnitReader(samples), partition, START, [partition.num_samples], replica=replica, shuffle=shuffle
        )
        check_values(batch, offsets, 0, seen)
    low, high = min(0, *listed(offsets), 0), max(0, *listed(offsets), 0)
    assert sorted(seen.elements()) == [a for a in range(0, 403, stride) if a + low >= 0 and a + high < 403]


def test_a_window_longer_than_a_split_is_refused(write_store, tmp_path):
    path = write(write_store, tmp_path, 100, (10, 10))
    samples = open_samples(
        path, inputs=["t"], targets=["t"], input_offsets={"start": 0, "stop": 30}, split={"val": 0.1, "test": 0.0}
    )
    with pytest.raises(TooFewSamples, match="data.split.val = 0.1 of 100 rows holds no sample with its whole window"):
        plan_data(samples, replicas=1, seed=0)
    longer = open_samples(path, inputs=["t"], targets=["t"], input_offsets={"start": 0, "stop": 101})
    with pytest.raises(TooFewSamples, match="samples span 101 rows"):
        plan_data(longer, replicas=1, seed=0)


def test_offsets_that_hold_nothing_are_refused(write_store, tmp_path):
    path = write(write_store, tmp_path, 10, (5, 5))
    for bad in ([], {"start": 3, "stop": 3}):
        with pytest.raises(InvalidConfig, match="data.input_offsets"):
            open_samples(path, inputs=["t"], targets=["t"], input_offsets=bad)


def test_a_store_for_validation_is_one_split(write_store, tmp_path):
    path = write(write_store, tmp_path, 500, (20, 20))
    samples = open_samples(path, inputs=["t"], targets=["u"], val_path=str(path))
    plan = plan_data(samples, replicas=3, seed=0)
    assert split_cells(plan, "val").size == 0
    held_out = plan_held_out(samples, plan)
    pieces = eval_partitions(held_out, "all")
    assert len(pieces) == 3
    assert sum(piece.num_samples for piece in pieces) == 500
