"""The rule for jumps of a coordinate, worked out by hand in exact numbers, and the median in little memory."""

from __future__ import annotations

import math
import statistics
import tracemalloc
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.plan import gaps
from dtrain.data.plan.gaps import as_text, jumps_of, largest_step, middle_steps, steps_between, too_many
from tests.sampling import examples

MANY = examples(150)
int64s = st.integers(-(2**63), 2**63 - 1)
integers = st.lists(st.integers(-4, 40) | int64s, max_size=60)
floats = st.lists(st.floats(-100, 100) | st.floats() | st.sampled_from([0.0, 0.25, 0.5]), max_size=60)


def blocks_of(values, cut, missing=None, sign=1, dtype=None):
    """All steps of some values, in blocks of so many."""
    values = np.array(values, dtype or (np.int64 if all(isinstance(v, int) for v in values) else np.float64))
    marks = np.zeros(len(values), bool) if missing is None else np.array(missing, bool)

    def blocks():
        for low in range(0, len(values) - 1, cut):
            yield steps_between(low, values[low : low + cut + 1], marks[low : low + cut + 1], sign)

    return blocks


def steps_by_hand(values, missing=()):
    """The exact step to each row but the first; None where it is unknown."""
    known = [not (i < len(missing) and missing[i]) and math.isfinite(v) for i, v in enumerate(values)]
    steps = []
    for i in range(1, len(values)):
        step = values[i] - values[i - 1] if known[i] and known[i - 1] else None
        if isinstance(step, float):
            step = step if math.isfinite(step) else None
        elif step is not None:
            step = max(-(2**63) + 1, min(step, 2**63 - 1))
        steps.append(step)
    return steps


def jumps_by_hand(values, missing=()):
    steps = steps_by_hand(values, missing)
    known = [Fraction(step) for step in steps if step is not None]
    most = Fraction(3, 2) * statistics.median(known) if known else 0
    return [i for i, step in enumerate(steps, 1) if step is None or not 0 < step <= most]


small_tables = st.sampled_from([(1 << 20, 1 << 14, 16), (4, 2, 16), (1, 1, 16), (7, 3, 8)])


@MANY
@given(integers | floats, st.integers(1, 9), small_tables, st.data())
def test_jumps_are_the_steps_outside_of_one_and_a_half_medians(values, cut, sizes, data):
    missing = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    with mock.patch.multiple(gaps, KEPT_STEPS=sizes[0], DISTINCT_STEPS=sizes[1], DIGIT=sizes[2]):
        blocks = blocks_of(values, cut, missing)
        middle = middle_steps(blocks)
        rows = (
            [] if len(values) < 2 else np.concatenate(list(jumps_of(blocks, largest_step(middle or (0, 0))))).tolist()
        )
    known = sorted(step for step in steps_by_hand(values, missing) if step is not None)
    if not known:
        assert middle is None
        return
    assert middle == (known[(len(known) - 1) // 2], known[len(known) // 2])
    if all(isinstance(value, int) for value in values):
        assert rows == jumps_by_hand(values, missing)
    elif abs(sum(middle)) < 1e300:  # of floats, 1.5 x median is rounded
        most = 0.75 * (middle[0] + middle[1])
        expected = [i for i, s in enumerate(steps_by_hand(values, missing), 1) if s is None or not 0 < s <= most]
        assert rows == expected


@MANY
@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(2**63 - 3, 2**63 + 3), min_size=2, max_size=30))
def test_unsigned_integers_of_64_bits(values):
    steps = np.concatenate([s.values for s in blocks_of(values, 7, dtype=np.uint64)()])
    assert steps.tolist() == steps_by_hand(values)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", ">i4", "uint32", ">f4", "float16", "float64", ">i8"])
def test_every_dtype_of_numbers(dtype):
    values = np.array([1, 2, 3, 5, 4, 6, 7, 8], dtype)
    blocks = blocks_of(values, 3, dtype=dtype)
    assert as_text(list(jumps_of(blocks, largest_step(middle_steps(blocks))))) == "3 4 5"


@pytest.mark.parametrize("unit", ["D", "h", "ns", "25s"])
@pytest.mark.parametrize("kind", ["<M8", ">M8", "<m8"])
def test_dates_and_times(kind, unit):
    values = np.arange(9).astype(f"{kind}[{unit}]")
    values[4] = "NaT"
    blocks = blocks_of(values, 4, dtype=values.dtype)
    assert as_text(list(jumps_of(blocks, largest_step(middle_steps(blocks))))) == "4 5"


def test_a_scale_below_zero_turns_the_coordinate_round():
    assert as_text(list(jumps_of(blocks_of([9, 8, 7, 5], 9, sign=-1), 1))) == "3"
    assert as_text(list(jumps_of(blocks_of([9, 8, 7, 5], 9, sign=0), 1))) == "1 2 3"


def test_the_limit_itself_is_no_jump_and_is_exact():
    day = 86_400 * 10**9 * 365  # nanoseconds of a year: 1.5 of them are more than a float64 holds exactly
    values = np.cumsum([0, day, day, day, day * 3 // 2, day, day * 3 // 2 + 1, day]).tolist()
    blocks = blocks_of(values, 3)
    assert as_text(list(jumps_of(blocks, largest_step(middle_steps(blocks))))) == "6"


@pytest.mark.parametrize(("jumps", "steps", "refused"), [(5, 100, False), (6, 100, True), (0, 0, False), (1, 19, True)])
def test_up_to_five_percent_are_left_out(jumps, steps, refused):
    assert too_many(jumps, steps) == refused


@pytest.mark.parametrize("kind", ["few", "distinct", "integers"])
def test_the_median_of_many_steps_takes_little_memory(kind):
    rows, block = 3_000_000, 1 << 16

    def blocks():
        for first in range(0, rows, block):
            rng = np.random.default_rng(first)
            steps = rng.normal(3, 1, block) if kind == "distinct" else rng.integers(0, 9, block)
            steps = steps + rng.integers(0, 10**12, block) if kind == "integers" else steps
            yield gaps.Steps(first, steps, np.ones(block, bool))

    expected = float(np.median(np.concatenate([steps.values for steps in blocks()])))
    tracemalloc.start()
    try:
        lower, upper = middle_steps(blocks)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (lower + upper) / 2 == expected
    assert peak < 12e6  # all steps have 24 MB
