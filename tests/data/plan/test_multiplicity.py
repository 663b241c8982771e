"""Samples that come several times a pass, or not at all: partitions, order and resume, over all that plans vary."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.load.slots import SlotTable
from dtrain.data.plan.anchors import count_samples
from dtrain.data.plan.labels import REST, VAL, GivenSplits, as_text
from dtrain.data.plan.memory import Limits
from dtrain.data.plan.multiplicity import multiplicities, multiplicity_text, repeats_of
from dtrain.data.plan.order import epoch_order
from dtrain.data.plan.partition import cell_anchors, eval_partitions, plan_data, train_partitions
from dtrain.data.tiles import Cut, Tiles
from dtrain.errors import TooFewSamples
from tests.data.helpers import make_samples
from tests.data.plan.helpers import small_problems
from tests.sampling import examples

SPLITS = ("train", "val", "test", "all")


def drawn_by(plan, partition, *, epoch=0, position=0, shuffle=True, replica=0):
    """(anchor, tile) of each sample of a pass from a position on, as a loader locates them."""
    table = SlotTable(partition, Limits(ahead=2 * len(partition.units)), shuffle)
    runs = epoch_order(
        partition.part_sizes,
        mixed_units=plan.window,
        shuffle=shuffle,
        seed=plan.seed,
        replica=replica,
        epoch=epoch,
        position=position,
    )
    found, firsts, opened = [], partition.spans()[0], set()
    for run in runs:
        for part in run.opens:
            table.assign(epoch, part)
            opened.add(part)
        if run.size:
            rows = table.rows(epoch, run)
            tiles = np.zeros(len(rows), np.int64) if rows.tile is None else rows.tile
            found += zip((firsts[run.part] + rows.row).tolist(), tiles.tolist(), strict=True)
        if run.closed in opened:
            table.release(epoch, run.closed)
    return found


def planned(problem):
    samples, drawn, seed, options = problem
    try:
        return plan_data(samples, replicas=drawn, seed=seed, **options)
    except TooFewSamples:
        return None


def drawn_values(plan, seed, most=4):
    shape = multiplicities(plan).shape
    rng = np.random.default_rng(seed)
    values = rng.integers(0, most + 1, shape).astype(np.uint8)
    values[: rng.integers(0, len(values) + 1)] = rng.integers(0, 2)  # whole units are left out, or are as usual
    return values


def wanted(plan, values, split):
    """By hand: how many times a pass each sample of a split comes."""
    bare = replace(plan, multiplicity="")
    own = Counter(drawn_by(bare, cell_anchors(bare, split), shuffle=False))
    assert set(own.values()) <= {1}
    most = 255 if split == "train" else 1
    found = {key: min(most, int(values[key[0] // plan.stride, key[1]])) for key in own}
    return Counter({key: times for key, times in found.items() if times})


@examples(150)
@given(small_problems(), st.integers(0, 2**32), st.integers(1, 5))
def test_each_sample_comes_as_often_as_its_multiplicity_and_resumes_anywhere(problem, seed, window):
    plan = planned(problem)
    if plan is None:
        return
    values = drawn_values(plan, seed)
    plan = replace(plan, multiplicity=multiplicity_text(values), window=window)
    np.testing.assert_array_equal(multiplicities(plan), values)
    partitions = train_partitions(plan)
    seen = Counter()
    for replica, partition in enumerate(partitions):
        if not partition.num_samples:
            continue
        whole = drawn_by(plan, partition, epoch=1, replica=replica)
        assert len(whole) == partition.num_samples == int(partition.part_sizes.sum())
        cursor = int(np.random.default_rng(seed).integers(0, len(whole)))
        assert drawn_by(plan, partition, epoch=1, replica=replica, position=cursor) == whole[cursor:]
        seen.update(whole)
    assert seen == wanted(plan, values, "train")
    for split in SPLITS:
        pieces = eval_partitions(plan, split)
        own = wanted(plan, values, split)
        found = Counter(sample for piece in pieces for sample in drawn_by(plan, piece, shuffle=False))
        if split != "train":
            assert all(piece.num_samples for piece in pieces)
            assert found == own
        assert count_samples(plan, split).samples == sum(own.values()) == cell_anchors(plan, split).num_samples


@examples(60)
@given(small_problems(), st.integers(1, 5))
def test_multiplicities_of_one_change_nothing(problem, window):
    bare = planned(problem)
    if bare is None:
        return
    bare = replace(bare, window=window)
    plan = replace(bare, multiplicity=multiplicity_text(multiplicities(bare)))
    assert repeats_of(plan, "train") is None
    for one, other in zip(train_partitions(bare), train_partitions(plan), strict=True):
        assert one.cells.tolist() == other.cells.tolist()
        assert other.samples is None
        assert drawn_by(bare, one) == drawn_by(plan, other)


def test_rows_of_several_splits_are_repeated_in_training_alone():
    values = (np.arange(40) % 3).astype(np.uint8)[:, None]
    labels = as_text(np.repeat([REST, VAL], 20).astype(np.uint8))
    plan = plan_data(make_samples(40, 8), replicas=1, seed=0, given=GivenSplits(rows=labels))
    plan = replace(plan, multiplicity=multiplicity_text(values))
    assert Counter(drawn_by(plan, cell_anchors(plan, "train"))) == wanted(plan, values, "train")
    assert cell_anchors(plan, "val").num_samples == 13  # of rows 20 to 39, those that are no multiple of 3


def test_patches_of_several_splits_are_repeated_in_training_alone():
    samples = make_samples(10, 5, row=(8,))
    samples = replace(samples, tiles=Tiles((Cut("d0", 8, 1),)))
    labels = as_text(np.array([REST, REST, REST, VAL, VAL, REST, REST, REST], np.uint8))
    plan = plan_data(samples, replicas=1, seed=0, given=GivenSplits(dim="d0", tiles=labels))
    assert plan.blocks
    values = np.random.default_rng(0).integers(0, 4, (10, 8)).astype(np.uint8)
    plan = replace(plan, multiplicity=multiplicity_text(values))
    for split in ("train", "val", "all"):
        assert Counter(drawn_by(plan, cell_anchors(plan, split))) == wanted(plan, values, split)
    assert cell_anchors(plan, "train").num_samples == values[:, [0, 1, 2, 5, 6, 7]].sum()


def test_replicas_get_equal_numbers_of_counted_samples():
    # half of the store is left out: dealt by rows, some replicas would get nothing
    samples = make_samples(8000, 50)
    plan = plan_data(samples, replicas=4, seed=1)
    values = np.ones((8000, 1), np.uint8)
    values[:4000] = 0
    plan = replace(plan, multiplicity=multiplicity_text(values))
    sizes = [partition.num_samples for partition in train_partitions(plan)]
    assert sum(sizes) == 4000
    assert max(sizes) - min(sizes) <= 50


def test_the_text_of_a_plan_stays_small_and_is_part_of_its_fingerprint():
    plan = plan_data(make_samples(1_000_000, 1000), replicas=2, seed=0)
    values = np.ones((1_000_000, 1), np.uint8)
    values[::1000] = 0
    counted = replace(plan, multiplicity=multiplicity_text(values))
    assert sys.getsizeof(counted.multiplicity) < 20_000
    assert counted.fingerprint != plan.fingerprint


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_sums_of_runs_do_not_depend_on_how_many_values_are_summed_at_once(monkeypatch, chunk):
    monkeypatch.setattr("dtrain.data.plan.multiplicity.SUMMED", chunk)
    plan = plan_data(make_samples(50, 7), replicas=1, seed=0)
    values = (np.arange(50) % 5).astype(np.uint8)[:, None]
    repeats = repeats_of(replace(plan, multiplicity=multiplicity_text(values)), "all")
    first, count = np.array([2, 9, 40]), np.array([7, 1, 10])
    by_hand = [sum(int(v > 0) for v in values[a : a + n, 0]) for a, n in zip(first, count, strict=True)]
    assert repeats.totals(np.zeros(3, np.int64), first, count).tolist() == by_hand
