from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.algorithm.schedules import constant, cosine, linear, schedule_named, with_warmup


def test_constant_is_one():
    assert {constant(step, 10) for step in range(20)} == {1.0}


def test_cosine_by_hand():
    assert cosine(0, 8) == 1.0
    assert cosine(2, 8) == pytest.approx((1 + math.sqrt(0.5)) / 2, rel=1e-15)
    assert cosine(4, 8) == pytest.approx(0.5, rel=1e-15)
    assert cosine(6, 8) == pytest.approx((1 - math.sqrt(0.5)) / 2, rel=1e-15)
    assert cosine(8, 8) == 0.0
    assert cosine(100, 8) == 0.0


def test_linear_by_hand():
    assert [linear(step, 4) for step in range(7)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]


def test_warmup_rises_to_one_and_the_schedule_starts_after_it():
    warmed = schedule_named("linear", 4)
    # 4 steps of warm-up, then linear over the other 5
    assert [warmed(step, 9) for step in range(10)] == [0.25, 0.5, 0.75, 1.0, 1.0, 0.8, 0.6, 0.4, pytest.approx(0.2), 0]
    assert [schedule_named("constant", 2)(step, 5) for step in range(5)] == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_without_warmup_nothing_changes():
    for name, plain in {"constant": constant, "cosine": cosine, "linear": linear}.items():
        assert [schedule_named(name, 0)(step, 9) for step in range(12)] == [plain(step, 9) for step in range(12)]


@pytest.mark.parametrize("name", ["constant", "cosine", "linear"])
def test_a_warmup_longer_than_the_run_only_rises(name):
    assert [schedule_named(name, 10)(step, 5) for step in range(5)] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_a_schedule_of_the_users_can_be_warmed_up():
    asked = []
    warmed = with_warmup(lambda step, total: asked.append((step, total)) or 0.5, 3)
    assert [warmed(step, 7) for step in range(5)] == [1 / 3, 2 / 3, 1.0, 0.5, 0.5]
    assert asked == [(0, 4), (1, 4)]


@given(st.sampled_from(["cosine", "linear"]), st.integers(1, 500), st.integers(0, 20))
def test_factors_lie_between_zero_and_one_and_fall_after_the_warmup(name, total, warmup):
    factors = [schedule_named(name, warmup)(step, total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    after = factors[warmup:]
    assert after == sorted(after, reverse=True)
