"""The counts of a plan that people see."""

from __future__ import annotations

from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.plan.summary import describe_plan
from tests.data.helpers import make_samples
from tests.data.plan.helpers import walk_cells


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
