"""Which anchors a split holds, with windows, strides, patches, missing rows and jumps; plans of few rows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given

from dtrain.data.plan.anchors import count_samples
from dtrain.data.plan.partition import JointPlan, cell_anchors, eval_partitions, plan_data, train_partitions
from dtrain.data.tiles import Cut, Tiles
from dtrain.errors import TooFewSamples
from tests.data.helpers import make_samples
from tests.data.plan.helpers import NEXT_BLOCK, anchors_by_hand, joined, samples_of, small_problems
from tests.sampling import examples

MANY = examples(200)
SPLITS = ("train", "val", "test")


def planned(problem, replicas=None):
    samples, drawn, seed, options = problem
    return plan_data(samples, replicas=replicas or drawn, seed=seed, **options)


@MANY
@given(small_problems())
def test_a_small_plan_gives_every_replica_samples_and_each_sample_once_or_is_refused(problem):
    try:
        plan = planned(problem)
    except TooFewSamples as error:
        refused_with_a_cure_that_works(problem, error)
        return
    expected = anchors_by_hand(plan)
    partitions = train_partitions(plan)
    assert len(partitions) == plan.replicas
    assert all(partition.num_samples for partition in partitions)
    assert sorted(joined(map(samples_of, partitions))) == expected["train"]
    assert len(set(joined(set(p.cells.tolist()) for p in partitions))) == sum(
        len(set(p.cells.tolist())) for p in partitions
    )
    for split in SPLITS:
        pieces = eval_partitions(plan, split)
        assert all(piece.num_samples for piece in pieces)
        assert joined(map(samples_of, pieces)) == samples_of(cell_anchors(plan, split)) == expected[split]
        assert count_samples(plan, split).samples == sum(tiles_of(plan, anchor) for anchor in expected[split])
    assert all(expected[split] or not share for split, share in (("val", plan.val), ("test", plan.test)))


def tiles_of(plan, anchor):
    return int(plan.grid.tiles_in(np.array([anchor // NEXT_BLOCK]))[0]) if plan.blocks else plan.patches


def refused_with_a_cure_that_works(problem, error):
    assert error.hint
    if most := re.match(r"Ask for at most ([\d,]+) replica", error.hint):
        assert int(most[1]) < problem[1]
        assert planned(problem, replicas=int(most[1])).replicas == int(most[1])


@MANY
@given(small_problems())
def test_what_a_partition_says_of_its_parts_is_what_its_anchors_say(problem):
    try:
        plan = planned(problem)
    except TooFewSamples:
        return
    for partition in (*train_partitions(plan), *eval_partitions(plan, "all")):
        starts, stops = partition.spans()
        assert len(starts) == len(partition.units) == len(partition.part_sizes)
        for part, unit in enumerate(partition.units.tolist()):
            anchors = partition.part_anchors(part)
            block, number = divmod(unit, plan.units_per_block)
            assert set((anchors // plan.unit_rows).tolist()) == {number}
            assert (starts[part], stops[part]) == (anchors[0], anchors[-1] + 1)
            assert (partition.box(part).start, partition.box(part).stop) == (anchors[0], anchors[-1] + 1)
            assert partition.part_sizes[part] == len(anchors) * tiles_of(plan, block * NEXT_BLOCK)
            index = np.random.default_rng(0).permutation(len(anchors))
            rows = partition.rows(np.full(len(index), part), index)
            assert rows.tolist() == (anchors[index] - anchors[0]).tolist()
        assert partition.nbytes >= partition.cells.nbytes + partition.first.nbytes + partition.count.nbytes


@examples(100)
@given(small_problems(), small_problems())
def test_every_store_of_several_is_dealt_to_its_own_replicas(first, second):
    try:
        joint = JointPlan((planned(first), planned(second)))
    except TooFewSamples:
        return
    assert all(joint.sizes)
    own = [samples_of(partition) for partition in joint.partitions]
    for number, plan in enumerate(joint.plans):
        seen = joined(rows for rows, store in zip(own, joint.stores, strict=True) if store == number)
        assert sorted(seen) == anchors_by_hand(plan)["train"]


@pytest.mark.parametrize("partition", ["stratified", "contiguous"])
def test_more_replicas_than_rows_of_many_patches_get_blocks_of_patches(partition):
    images = replace(make_samples(8, 1, partition=partition), tiles=Tiles((Cut("x", 100, 1),)))
    counts = [p.num_samples for p in train_partitions(plan_data(images, replicas=8, seed=0))]
    assert counts == [100] * 8
    plan = plan_data(images, replicas=16, seed=0)
    counts = [p.num_samples for p in train_partitions(plan)]
    assert len(plan.grid) > 1
    assert sum(counts) == 800
    assert min(counts) > 0


def test_contiguous_partitions_never_share_a_cell():
    samples = replace(make_samples(2, 1, partition="contiguous"), tiles=Tiles((Cut("x", 100, 1),)))
    plan = plan_data(samples, replicas=2, seed=0)
    counts = [p.num_samples for p in train_partitions(plan)]
    assert counts == [100, 100]
    # of a plan that an earlier version stored with more replicas than cells, each row is still dealt once
    assert [p.num_samples for p in train_partitions(replace(plan, replicas=4))] == [100, 100, 0, 0]


def test_a_plan_whose_cells_would_leave_replicas_without_anchors_has_shorter_cells():
    samples = make_samples(26, 26, stride=3, val=0.3, split_order="random")
    plan = plan_data(samples, replicas=5, seed=1)
    assert all(p.num_samples for p in train_partitions(plan))


def test_a_jump_within_a_cell_cuts_it_into_runs_of_anchors():
    samples = make_samples(40, 40, input_offsets=[-2, 0], target_offsets=1, split_order="sequential")
    plan = replace(plan_data(samples, replicas=1, seed=0, jumps="10 11 30"), cell_rows=40)
    (whole,) = train_partitions(plan)
    assert whole.cells.tolist() == [0, 0, 0]
    assert list(zip(whole.first.tolist(), whole.count.tolist(), strict=True)) == [(2, 7), (13, 16), (32, 7)]
    assert whole.units.tolist() == [0]
    assert (whole.box(0).start, whole.box(0).stop) == (2, 39)


def test_many_missing_rows_take_no_more_time_than_few():
    absent = tuple((row, row + 1) for row in range(5, 200_000, 10))
    samples = make_samples(200_000, 1, row=(300, 300))
    plan = plan_data(samples, replicas=3, seed=0, absent=absent)
    counts = Counter(row % 10 for row in joined(map(samples_of, train_partitions(plan))))
    assert set(counts) == set(range(10)) - {5}
