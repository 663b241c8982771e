"""The plan as a value, and boxes: what a read covers of each variable."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from dtrain.data.plan.partition import plan_data
from dtrain.data.plan.units import Box, box_selection, box_shape, box_slices
from tests.data.helpers import make_samples


@pytest.fixture
def samples():
    """v0(n, d0, d1) of 12 x 9 x 10, of which every second place of d0 from 1 on is selected; v1(n, d1)."""
    samples = make_samples(12, 3, 4, row=(9, 10), input_offsets=[-1, 0])
    v0, v1 = samples.variables
    v0 = replace(v0, select=((0, 12, 1), (1, 8, 2), (0, 10, 1)))
    v1 = replace(v1, dims=("n", "d1"), shape=(12, 10), chunks=(4, 10), objects=(4, 10), select=((0, 12, 1), (0, 10, 1)))
    return replace(samples, variables=(v0, v1))


def test_a_box_is_a_run_of_rows_times_a_block(samples):
    v0, v1 = samples.variables
    box = Box(3, 7, (("d0", 1, 3), ("d1", 2, 9)))
    assert box_selection(samples, v0, box) == ((2, 7, 1), (3, 6, 2), (2, 9, 1))  # with the row before the first
    assert box_selection(samples, v1, box) == ((2, 7, 1), (2, 9, 1))
    assert box_shape(samples, v0, box) == (5, 2, 7)
    assert box_shape(samples, v1, box) == (5, 7)
    assert box_slices(v0, box) == (slice(1, 3), slice(2, 9))
    assert box_slices(v1, box) == (slice(2, 9),)


def test_without_a_block_rows_are_whole(samples):
    v0, _ = samples.variables
    assert box_shape(samples, v0, Box(3, 8)) == (6, 4, 10)
    assert box_selection(samples, v0, Box(3, 8)) == ((2, 8, 1), (1, 8, 2), (0, 10, 1))
    assert box_slices(v0, Box(3, 8)) == (slice(None), slice(None))


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
