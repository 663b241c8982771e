"""Where the sample axis is cut into units and cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given

from dtrain.data.plan.partition import count_units, plan_data
from dtrain.data.plan.units import cell_bounds
from tests.data.helpers import make_samples
from tests.data.plan.helpers import plan_or_none, problems, walk_cells
from tests.sampling import examples


@examples(200)
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
