from __future__ import annotations

import dataclasses
import json
import math
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dtrain.data.plan.footprint import format_bytes
from dtrain.data.plan.partition import JointPlan, Partition, count_units, eval_partitions, plan_data, train_partitions
from dtrain.data.plan.splits import split_cells
from dtrain.data.plan.summary import describe_plan
from dtrain.data.plan.units import Box, DataPlan, cell_bounds
from dtrain.data.samples import common_rows
from dtrain.errors import TooFewSamples
from tests.data.helpers import make_samples, variable


def walk_cells(plan):
    """[(unit, first sample, one after the last)] of each cell, by walking along the sample axis."""
    cells = []
    for unit, start in enumerate(range(0, plan.num_samples, plan.unit_rows)):
        stop = min(start + plan.unit_rows, plan.num_samples)
        cells += [(unit, a, min(a + plan.cell_rows, stop)) for a in range(start, stop, plan.cell_rows)]
    return cells


def joined(lists):
    return [item for part in lists for item in part]


def samples_of(partition):
    """The samples of a partition as its reader finds them: unit by unit."""
    rows = [partition.part_anchors(part) for part in range(len(partition.units))]
    return np.concatenate(rows).tolist() if rows else []


@st.composite
def problems(draw, shares=((0.0, 0.0), (0.1, 0.1), (0.25, 0.0), (0.01, 0.3), (0.0, 0.5))):
    """Draw (samples, replicas, seed) with every choice that a plan depends on."""
    num_samples = draw(st.integers(1, 3000))
    rows = draw(st.lists(st.integers(1, 200), min_size=1, max_size=2))
    val, test = draw(st.sampled_from(shares))
    samples = make_samples(
        num_samples,
        *rows,
        row=draw(st.sampled_from([(), (7,), (300, 300)])),
        val=val,
        test=test,
        split_order=draw(st.sampled_from(["auto", "random", "sequential"])),
        partition=draw(st.sampled_from(["stratified", "contiguous"])),
        shuffle=draw(st.booleans()),
    )
    return samples, draw(st.integers(1, 9)), draw(st.integers(0, 2**40))


def plan_from(table):
    """A plan from what JSON gives back of it."""
    return DataPlan(**{**table, "absent": tuple(map(tuple, table["absent"]))})


def plan_or_none(problem):
    samples, replicas, seed = problem
    try:
        return plan_data(samples, replicas=replicas, seed=seed)
    except TooFewSamples:
        return None


# Units and cells --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "common"),
    [([5], 5), ([6, 4], 12), ([4, 4], 4), ([2, 8], 8), ([100, 7], 100), ([10, 4], 20), ([10, 7], 10), ([3, 4, 6], 12)],
)
def test_common_rows(rows, common):
    assert common_rows(rows) == common


@given(st.lists(st.integers(1, 50), min_size=1, max_size=3))
def test_common_rows_is_a_multiple_of_all_unless_that_is_too_long(rows):
    multiple = next(n for n in range(1, 50**3 + 1) if all(n % row == 0 for row in rows))
    assert common_rows(rows) == (multiple if multiple <= 4 * max(rows) else max(rows))


@settings(max_examples=200)
@given(problems())
@example((make_samples(5, 7), 1, 0))
@example((make_samples(3000, 200, 199, row=(300, 300)), 3, 0))
def test_units_are_whole_objects_and_no_cell_crosses_a_unit(problem):
    plan = plan_or_none(problem)
    if plan is None:
        return
    samples = problem[0]
    rows = [v.object_rows for v in samples.variables]
    multiple = math.lcm(*rows)
    boundary = multiple if multiple <= 4 * max(rows) else max(rows)
    assert plan.unit_rows == samples.num_samples or plan.unit_rows % boundary == 0
    assert 1 <= plan.cell_rows <= plan.unit_rows <= plan.num_samples == samples.num_samples
    assert count_units(samples) == len(range(0, samples.num_samples, boundary))
    cells = walk_cells(plan)
    starts, stops = cell_bounds(plan, np.arange(plan.num_cells))
    assert list(zip(starts.tolist(), stops.tolist(), strict=True)) == [(start, stop) for _, start, stop in cells]
    assert plan.num_units == cells[-1][0] + 1
    units = [plan.unit_box(unit) for unit in range(plan.num_units)]
    assert all(units[unit].start <= start < stop <= units[unit].stop for unit, start, stop in cells)
    assert [unit.start for unit in units] == list(range(0, plan.num_samples, plan.unit_rows))
    assert units[-1].stop == plan.num_samples
    assert not any(unit.block for unit in units)


def test_units_of_a_store_with_gaps_are_single_objects():
    # so that as little as can be is left out with a chunk that is missing
    samples = make_samples(1_000_000, 10, row=(25,))
    assert plan_data(samples, replicas=4, seed=0).unit_rows == 4160
    assert plan_data(samples, replicas=4, seed=0, absent=((100, 110),)).unit_rows == 10


@pytest.mark.parametrize(("object_rows", "unit_rows", "group"), [(2048, 2048, 1), (2112, 704, 3)])
def test_shards_of_more_than_8_mib_are_cut(object_rows, unit_rows, group):
    # a row has 4 KiB: 2048 rows are 8 MiB; of 704 rows of 2112, 2.8 MiB, the next longer divisor is more than 4 MiB
    samples = make_samples(object_rows * 100, object_rows, row=(1024,), chunk_rows=32)
    plan = plan_data(samples, replicas=2, seed=0)
    assert (plan.unit_rows, plan.group) == (unit_rows, group)


def test_units_follow_shards_not_their_inner_chunks():
    plan = plan_data(make_samples(10_000, 500, chunk_rows=50, row=(1000,)), replicas=1, seed=0)
    assert plan.unit_rows % 500 == 0


# Worked out by hand: row bytes = 4 * width; a unit is at least 1 MiB unless that leaves fewer than 60 units a replica
@pytest.mark.parametrize(
    ("num_samples", "object_rows", "width", "replicas", "unit_rows", "cell_rows", "window"),
    [
        (10_000, 100, 25, 1, 100, 100, 64),  # 100 units; 10 kB each: 64 of them are less than 64 MiB
        (10_000, 100, 25, 8, 100, 50, 64),  # 100 units < 20 * 8: two cells a unit
        (10_000, 100, 25, 50, 100, 10, 64),  # 20 * 50 cells: ten a unit
        (1_000_000, 10, 25, 4, 4160, 4160, 64),  # 1e6 // (10 * 60 * 4) = 416 objects of the 1049 that make 1 MiB
        (1_000_000, 10, 2500, 4, 110, 110, 61),  # ceil(1 MiB / 100 kB) = 11 objects = 1.1 MB; 64 MiB // 1.1 MB = 61
        (6_000, 10, 250_000, 1, 10, 10, 8),  # units of 10 MB: 6 in 64 MiB, but never fewer than 8
        (6_000, 10, 100_000, 1, 10, 10, 16),  # units of 4 MB
        (50, 100, 25, 2, 50, 1, 64),  # one unit: 40 cells are wanted, more than 4 pieces, so single samples
    ],
)
def test_units_cells_and_window(num_samples, object_rows, width, replicas, unit_rows, cell_rows, window):
    plan = plan_data(make_samples(num_samples, object_rows, row=(width,)), replicas=replicas, seed=0)
    assert (plan.unit_rows, plan.cell_rows, plan.window) == (unit_rows, cell_rows, window)


def test_cells_are_cut_finer_when_a_split_would_miss_its_share():
    large = (300, 300)  # units of 36 MB: a window of 8
    whole = plan_data(make_samples(2_400, 100, row=large, val=0.25), replicas=1, seed=0)
    assert whole.cell_rows == 100  # 6 of 24 units are a quarter
    cut = plan_data(make_samples(2_400, 100, row=large, val=0.1), replicas=1, seed=0)
    assert cut.cell_rows == 50  # 2 of 24 units are 8.3 %, 5 of 48 halves are 10.4 %
    in_window = plan_data(make_samples(2_400, 100, val=0.1), replicas=1, seed=0)
    assert in_window.cell_rows == 1  # all units fit the window: decoding them is cheap


# Who owns what ----------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(problems())
def test_every_sample_belongs_to_one_partition_or_held_out_split(problem):
    plan = plan_or_none(problem)
    if plan is None:
        return
    owned = [samples_of(p) for p in train_partitions(plan)]
    held = [samples_of(p) for name in ("val", "test") for p in eval_partitions(plan, name)]
    assert len(owned) == plan.replicas
    assert all(owned)
    assert all(held)
    assert sorted(joined(owned + held)) == list(range(plan.num_samples))
    assert joined(map(samples_of, eval_partitions(plan, "all"))) == list(range(plan.num_samples))
    assert joined(map(samples_of, eval_partitions(plan, "train"))) == sorted(joined(owned))


@settings(max_examples=200)
@given(problems())
def test_parts_are_what_walking_along_the_cells_gives(problem):
    plan = plan_or_none(problem)
    if plan is None:
        return
    cells = walk_cells(plan)
    for partition in (*train_partitions(plan), *eval_partitions(plan, "val")):
        parts = {}
        for cell in partition.cells.tolist():
            unit, start, stop = cells[cell]
            parts.setdefault(unit, []).extend(range(start, stop))
        assert partition.units.tolist() == sorted(parts)
        assert partition.part_sizes.tolist() == [len(parts[unit]) for unit in sorted(parts)]
        assert [partition.part_anchors(i).tolist() for i in range(len(parts))] == [
            parts[unit] for unit in sorted(parts)
        ]
        assert [partition.box(i) for i in range(len(parts))] == [
            Box(parts[unit][0], parts[unit][-1] + 1) for unit in sorted(parts)
        ]
        assert partition.num_samples == sum(map(len, parts.values()))


@st.composite
def ragged_plans(draw):
    """Draw a plan whose units end in a short cell, of any length."""
    num_samples = draw(st.integers(1, 3000))
    unit_rows = draw(st.integers(1, 60))
    plan = plan_data(make_samples(num_samples, 1, split_order="random"), replicas=1, seed=draw(st.integers(0, 99)))
    plan = replace(
        plan,
        unit_rows=min(unit_rows, num_samples),
        cell_rows=draw(st.integers(1, min(unit_rows, num_samples))),
        val=draw(st.sampled_from([0.0, 0.1, 0.5])),
        sequential=draw(st.booleans()),
    )
    cells = len(split_cells(plan, "train"))
    return replace(plan, replicas=draw(st.integers(1, max(1, min(9, cells)))), eval_pieces=draw(st.integers(1, 12)))


@settings(max_examples=300)
@given(ragged_plans())
def test_stratified_partitions_are_equal_to_within_one_cell(plan):
    counts = [p.num_samples for p in train_partitions(plan)]
    assert max(counts) - min(counts) <= plan.cell_rows


@settings(max_examples=300)
@given(ragged_plans())
def test_contiguous_partitions_are_runs_of_the_train_split_as_equal_as_cells_allow(plan):
    partitions = train_partitions(replace(plan, contiguous=True))
    assert joined(p.cells.tolist() for p in partitions) == split_cells(plan, "train").tolist()
    counts = [p.num_samples for p in partitions]
    assert max(counts) - min(counts) <= 2 * plan.cell_rows
    assert min(counts) > 0 or len(split_cells(plan, "train")) == 0


@pytest.mark.parametrize("replicas", [2, 3, 7])
def test_stratified_partitions_look_alike(replicas):
    plan = plan_data(make_samples(420 * 8, 8, row=(300, 300)), replicas=replicas, seed=5)
    assert (plan.num_cells, plan.cell_rows) == (420, 8)
    owner = np.empty(420, int)
    for replica, partition in enumerate(train_partitions(plan)):
        owner[partition.cells] = replica
    strata = owner.reshape(-1, replicas).tolist()
    assert all(sorted(stratum) == list(range(replicas)) for stratum in strata)
    assert {stratum[0] for stratum in strata} == {stratum[-1] for stratum in strata} == set(range(replicas))


@settings(max_examples=200)
@given(problems(shares=[(0.1, 0.1), (0.3, 0.0), (0.0, 0.02), (0.45, 0.45)]))
def test_splits_get_their_shares(problem):
    plan = plan_or_none(problem)
    if plan is None:
        return
    for name, share in (("val", plan.val), ("test", plan.test)):
        got = sum(p.num_samples for p in eval_partitions(plan, name))
        if share * plan.num_samples >= 5:  # half a sample of rounding is then within a tenth
            assert abs(got - share * plan.num_samples) <= 0.1 * share * plan.num_samples
        assert (got > 0) == (share > 0)


@settings(max_examples=200)
@given(problems())
def test_sequential_splits_are_train_then_val_then_test(problem):
    plan = plan_or_none(problem)
    if plan is None or not plan.sequential:
        return
    names = ("train", "val", "test")
    splits = [joined(map(samples_of, eval_partitions(plan, name))) for name in names]
    assert joined(splits) == list(range(plan.num_samples))


def test_random_splits_are_spread_over_the_store_and_drawn_by_the_seed():
    samples = make_samples(10_000, 10, row=(300, 300), val=0.2)
    val = [split_cells(plan_data(samples, replicas=1, seed=seed), "val") for seed in range(3)]
    assert len({tuple(cells) for cells in val}) == 3
    for cells in val:
        thirds = np.bincount(cells * 3 // 1000, minlength=3)
        assert thirds.sum() == 200
        assert thirds.min() > 40


def test_partitions_are_drawn_by_the_seed():
    samples = make_samples(1_000, 10)
    first, second = (train_partitions(plan_data(samples, replicas=2, seed=seed))[0] for seed in (0, 1))
    assert first.cells.tolist() != second.cells.tolist()


def test_the_deal_never_changes():
    # As golden_order.json does for the order: runs that were committed are continued with the partitions that this
    # deal gives, so these numbers must never be written anew. They were worked out with the plain-integer hash of
    # test_order.py: SPLIT = 0 and DEAL = 1 are what it is drawn for.
    plan = replace(plan_data(make_samples(30, 1), replicas=3, seed=11), val=0.2, test=0.1)
    assert plan.num_cells == 30
    assert split_cells(plan, "val").tolist() == [1, 5, 7, 15, 20, 29]
    assert split_cells(plan, "test").tolist() == [9, 10, 16]
    assert [p.cells.tolist() for p in train_partitions(plan)] == [
        [2, 8, 13, 17, 22, 23, 27],
        [0, 6, 11, 14, 19, 25, 26],
        [3, 4, 12, 18, 21, 24, 28],
    ]


@settings(max_examples=300)
@given(ragged_plans())
def test_an_evaluation_is_cut_into_runs_none_of_them_empty(plan):
    for name in ("train", "val", "test", "all"):
        partitions = eval_partitions(plan, name)
        cells = split_cells(plan, name)
        assert len(partitions) == min(plan.eval_pieces, len(cells))
        assert all(p.num_samples > 0 for p in partitions)
        assert joined(p.cells.tolist() for p in partitions) == cells.tolist()


@settings(max_examples=200)
@given(problems(shares=((0.0, 0.0), (0.2, 0.1))), st.floats(0, 0.95), st.data())
def test_rows_that_are_not_used_belong_to_nobody_and_every_replica_has_something(problem, before, data):
    samples, replicas, seed = problem
    first_row = int(before * samples.num_samples)
    rows = st.integers(first_row, samples.num_samples)
    runs = sorted({tuple(sorted(data.draw(st.tuples(rows, rows)))) for _ in range(data.draw(st.integers(0, 3)))})
    absent = tuple((a, b) for a, b in runs if a < b)
    try:
        plan = plan_data(replace(samples, first_row=first_row), replicas=replicas, seed=seed, absent=absent)
    except TooFewSamples:
        return
    owned = [samples_of(p) for p in train_partitions(plan)]
    held = [samples_of(p) for name in ("val", "test") for p in eval_partitions(plan, name)]
    assert all(owned)
    assert all(held)
    found = joined(owned + held)
    assert len(set(found)) == len(found)
    gone = {row for a, b in absent for row in range(a, b)}
    cells = walk_cells(plan)
    whole = [range(max(start, first_row), stop) for _, start, stop in cells if stop > first_row]
    expected = joined(cell for cell in whole if not gone.intersection(cell))
    assert sorted(found) == expected
    described = describe_plan(replace(samples, first_row=first_row), plan)
    assert described["dropped_samples"] == samples.num_samples - first_row - len(found)
    assert described["absent_rows"] == sum(b - a for a, b in absent)


def test_of_a_few_selected_rows_at_the_end_of_a_large_store_every_replica_gets_some():
    # the units before them are many, but they are not there to be dealt
    samples = replace(make_samples(20_000, 20), first_row=19_950)
    counts = [p.num_samples for p in train_partitions(plan_data(samples, replicas=4, seed=0))]
    assert sum(counts) == 50
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("object_rows", "widths", "preloaded"),
    [
        ([10, 1000], [100, 1], ["v1"]),  # all labels in one chunk beside small images
        ([10, 10], [100, 1], []),
        ([10, 5], [100, 1], []),  # its objects fit into those of the large one
        ([10, 1000], [10, 1], []),  # not small
        ([10, 20], [100, 1], ["v1"]),
        ([1000, 1000], [100, 1], []),
    ],
)
def test_small_variables_in_long_chunks_are_preloaded(object_rows, widths, preloaded):
    variables = tuple(
        variable(f"v{i}", 1000, rows, row=(width,))
        for i, (rows, width) in enumerate(zip(object_rows, widths, strict=True))
    )
    samples = replace(make_samples(1000, *object_rows), variables=variables)
    assert [v.name for v in samples.preloaded] == preloaded
    assert [v.name for v in samples.streamed] == [v.name for v in variables if v.name not in preloaded]
    plan = plan_data(samples, replicas=1, seed=0)
    if preloaded:
        assert plan.unit_rows == 10  # as if it were not there
        assert describe_plan(samples, plan)["read_amplification"] == 1


# What is refused --------------------------------------------------------------------------------------------


def test_no_samples_at_all():
    with pytest.raises(TooFewSamples, match="no samples along n") as caught:
        plan_data(make_samples(0, 10), replicas=1, seed=0)
    assert caught.value.code == 3


@pytest.mark.parametrize(
    ("num_samples", "val", "replicas", "train"),
    [(3, 0.0, 4, 3), (10, 0.5, 6, 5), (10, 0.5, 5, None), (9, 0.0, 9, None)],
)
def test_fewer_train_samples_than_replicas(num_samples, val, replicas, train):
    samples = make_samples(num_samples, 4, val=val)
    if train is None:
        counts = [p.num_samples for p in train_partitions(plan_data(samples, replicas=replicas, seed=0))]
        assert counts == [1] * replicas
        return
    with pytest.raises(TooFewSamples, match=f"{train} training samples for average.replicas = {replicas}") as caught:
        plan_data(samples, replicas=replicas, seed=0)
    assert caught.value.code == 3


@pytest.mark.parametrize(
    ("shares", "name"), [({"val": 0.1}, "val"), ({"test": 0.1}, "test"), ({"val": 0.4, "test": 0.1}, "test")]
)
def test_a_split_of_less_than_one_sample(shares, name):
    with pytest.raises(TooFewSamples, match=f"data.split.{name} = 0.1 of 4 rows holds no sample") as caught:
        plan_data(make_samples(4, 2, **shares), replicas=1, seed=0)
    assert caught.value.code == 3


# Bytes ------------------------------------------------------------------------------------------------------


def test_bytes_are_written_for_people():
    counts = [0, 999, 1000, 1_500_000, 2_000_000_000, 3_250_000_000_000, 10**16]
    assert [format_bytes(n) for n in counts] == ["0 B", "999 B", "1.0 kB", "1.5 MB", "2.0 GB", "3.2 TB", "10,000.0 TB"]


# The plan as a thing ----------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(problems())
def test_the_same_arguments_give_the_same_plan(problem):
    plan = plan_or_none(problem)
    assert plan == plan_or_none(problem)
    if plan is not None:
        again = plan_from(json.loads(json.dumps(dataclasses.asdict(plan))))
        assert again == plan
        assert again.fingerprint == plan.fingerprint
        pairs = zip(train_partitions(plan), train_partitions(again), strict=True)
        assert all(a.cells.tolist() == b.cells.tolist() for a, b in pairs)


@settings(max_examples=200)
@given(problems(), st.sampled_from([{"path": "/else/where.zarr"}, {"memory": "64MB"}, {"missing": "fill"}]))
def test_a_plan_does_not_depend_on_path_or_memory(problem, change):
    samples, replicas, seed = problem
    config = samples.config.model_copy(update=change)
    other = replace(samples, config=config, path=change.get("path", samples.path))
    assert plan_or_none((other, replicas, seed)) == plan_or_none(problem)


def test_the_fingerprint_covers_every_field():
    plan = plan_data(make_samples(100, 10, val=0.2), replicas=2, seed=0)
    fingerprints = {plan.fingerprint}
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        others = {bool: lambda v: not v, str: lambda v: v + "x", tuple: lambda v: (*v, (3, 4))}
        other = others.get(type(value), lambda v: v + 1)(value)
        fingerprints.add(replace(plan, **{field.name: other}).fingerprint)
    assert len(fingerprints) == 1 + len(dataclasses.fields(plan))
    assert all(len(f) == 64 for f in fingerprints)


@pytest.mark.parametrize("object_rows", [1, 10_000, 100_000_000])
def test_a_huge_store_is_planned_in_seconds_and_little_memory(object_rows):
    samples = make_samples(1_000_000_000, object_rows, row=(256,), val=0.05, test=0.05)
    tracemalloc.start()
    began = time.process_time()
    plan = plan_data(samples, replicas=100, seed=0)
    partitions = train_partitions(plan)
    counts = [p.num_samples for p in partitions]
    seconds = time.process_time() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.num_units == -(-1_000_000_000 // max(1024, object_rows))  # units of at least 1 MiB
    assert sum(counts) + sum(p.num_samples for n in ("val", "test") for p in eval_partitions(plan, n)) == 1_000_000_000
    assert max(counts) - min(counts) <= plan.cell_rows
    assert abs(sum(counts) - 900_000_000) <= 10_000_000
    assert seconds < 20  # of this process, whatever else runs; it takes 2
    assert peak < 100e6
    assert len(json.dumps(dataclasses.asdict(plan))) < 1000


def test_the_counts_that_people_see():
    samples = make_samples(100, 10, val=0.2, test=0.1)
    plan = plan_data(samples, replicas=2, seed=0)
    seen = describe_plan(samples, plan)
    cells = walk_cells(plan)
    owners = {}
    for replica, partition in enumerate(train_partitions(plan)):
        for cell in partition.cells.tolist():
            owners.setdefault(cells[cell][0], set()).add(replica)
    assert seen["units"] == 10
    assert (seen["val_samples"], seen["test_samples"]) == (20, 10)
    assert sum(seen["partition_samples"]) == 70
    assert seen["decodes_per_unit"] == sum(map(len, owners.values())) / len(owners)


def test_whole_units_are_decoded_once():
    samples = make_samples(10_000, 10)
    seen = describe_plan(samples, plan_data(samples, replicas=3, seed=0))
    assert seen["decodes_per_unit"] == seen["read_amplification"] == 1


def test_plans_of_several_stores_are_numbered_through():
    plans = (
        plan_data(make_samples(300, 10, val=0.2), replicas=2, seed=0),
        plan_data(make_samples(90, 5, val=0.2), replicas=1, seed=0, eval_pieces=3),
    )
    joint = JointPlan(plans)
    assert (joint.replicas, joint.stores) == (3, (0, 0, 1))
    expected = [*train_partitions(plans[0]), *train_partitions(plans[1])]
    assert [samples_of(p) for p in joint.partitions] == [samples_of(p) for p in expected]
    pieces = joint.pieces("val")
    assert [store for store, _ in pieces] == [0, 0, 1, 1, 1]
    assert [samples_of(p) for _, p in pieces] == [samples_of(p) for plan in plans for p in eval_partitions(plan, "val")]
    assert JointPlan(plans[:1]).fingerprint == plans[0].fingerprint
    others = [plans[:1], plans[1:], plans, plans[::-1], (plans[0], replace(plans[1], seed=1))]
    assert len({JointPlan(tuple(of)).fingerprint for of in others}) == 5


def test_a_partition_of_no_cells_holds_nothing():
    plan = plan_data(make_samples(10, 2), replicas=1, seed=0)
    none = np.zeros(0, np.int64)
    empty = Partition(plan, none, none, none)
    assert (empty.num_samples, empty.units.tolist(), empty.part_sizes.tolist()) == (0, [], [])
