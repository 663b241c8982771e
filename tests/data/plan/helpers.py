"""Plans that tests draw, and the same arithmetic by walking along the sample axis."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from dtrain.data.plan.blocks import BlockAxis
from dtrain.data.plan.partition import plan_data
from dtrain.data.plan.splits import split_cells
from dtrain.data.plan.units import DataPlan
from dtrain.data.tiles import Cut, Tiles
from dtrain.errors import TooFewSamples
from tests.data.helpers import make_samples

NEXT_BLOCK = 1 << 40
"""Added to the anchors of each block, counted from the first one."""


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
    """The anchors of a partition as its reader finds them: unit by unit; of each block by `NEXT_BLOCK` later."""
    plan = partition.plan
    rows = [
        partition.part_anchors(part) + unit // plan.units_per_block * NEXT_BLOCK
        for part, unit in enumerate(partition.units.tolist())
    ]
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


def plan_or_none(problem):
    samples, replicas, seed = problem
    try:
        return plan_data(samples, replicas=replicas, seed=seed)
    except TooFewSamples:
        return None


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


def plan_from(table):
    """A plan from what JSON gives back of it."""
    blocks = tuple(BlockAxis(**axis) for axis in table["blocks"])
    lists = {name: tuple(map(tuple, table[name])) for name in ("absent", "members")}
    return DataPlan(**{**table, **lists, "blocks": blocks, "values": tuple(table["values"])})


@st.composite
def small_problems(draw):
    """Draw (samples, replicas, seed, options of plan_data): few rows, cut in every way that a plan knows."""
    count = draw(st.integers(1, 60))
    table = {
        "split_order": draw(st.sampled_from(["auto", "random", "sequential"])),
        "partition": draw(st.sampled_from(["stratified", "contiguous"])),
        "stride": draw(st.sampled_from([1, 1, 2, 3, 5, 12])),
        "input_offsets": draw(st.sampled_from([0, 0, 3, [-1, 0], [-7, -3], {"start": 0, "stop": 6}])),
        "target_offsets": draw(st.sampled_from([0, 0, 1, -2, [1, 4]])),
    }
    val, test = draw(st.sampled_from([(0.0, 0.0), (0.1, 0.1), (0.3, 0.0), (0.0, 0.5)]))
    samples = make_samples(
        count, *draw(st.lists(st.integers(1, 30), min_size=1, max_size=2)), val=val, test=test, **table
    )
    shards = draw(st.sampled_from([1, 1, 3]))
    tiles = Tiles((Cut("x", draw(st.sampled_from([1, 1, 2, 100])), 1),))
    wider = tuple(replace(v, objects=(shards * v.objects[0],)) for v in samples.variables)
    samples = replace(samples, variables=wider, tiles=tiles, first_row=draw(st.integers(0, count - 1)))
    rows = st.lists(st.integers(0, count), max_size=6, unique=True)
    edges = sorted(draw(rows))
    absent = tuple(zip(edges[::2], edges[1::2], strict=False)) if draw(st.booleans()) else ()
    jumps = sorted(set(draw(rows)) - {0}) if samples.has_windows else []
    options = {"absent": absent, "jumps": " ".join(map(str, jumps))}
    return samples, draw(st.integers(1, 16)), draw(st.integers(0, 99)), options


def anchors_by_hand(plan):
    """By split: the anchors whose rows all lie in one run of neighbouring cells of it, without a jump between them."""
    cells, run_of = walk_cells(plan), {}
    for split in ("train", "val", "test"):
        own = split_cells(plan, split).tolist()
        for before, cell in zip([-9, *own], own, strict=False):
            (block, local), last = divmod(cell, plan.block_step), cells[before % plan.block_step % len(cells)]
            follows = cell == before + 1 and local > 0
            run = run_of[block, max(plan.first_row, last[1])] if follows else (split, cell)
            rows = range(max(plan.first_row, cells[local][1]), cells[local][2])
            run_of.update(((block, row), run) for row in rows)
    jumps = set(plan.jump_rows.tolist())
    anchors = {split: [] for split in ("train", "val", "test")}
    for block, anchor in itertools.product(range(len(plan.grid)), range(0, plan.num_samples, plan.stride)):
        rows = range(anchor + plan.first_offset, anchor + plan.last_offset + 1)
        runs = {run_of.get((block, row)) for row in [anchor, *rows]}
        if len(runs) == 1 and None not in runs and not jumps.intersection(rows[1:]):
            anchors[runs.pop()[0]].append(block * NEXT_BLOCK + anchor)
    return anchors
