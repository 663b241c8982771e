"""Which cells belong to train, val and test."""

from __future__ import annotations

import numpy as np
from hypothesis import given

from dtrain.data.plan.partition import eval_partitions, plan_data
from dtrain.data.plan.splits import split_cells
from tests.data.helpers import make_samples
from tests.data.plan.helpers import joined, plan_or_none, problems, samples_of
from tests.sampling import examples


@examples(200)
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


@examples(200)
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
