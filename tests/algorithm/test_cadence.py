"""What rounds cost: numbers by hand, and what must hold for all of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.algorithm.cadence import STEPS, TARGET_SHARE, Costs, cadence, pays_from, recommended, table
from dtrain.algorithm.traffic import Traffic


def costs(
    step: float, overhead: float, bandwidth: float | None = None, *, busiest: int = 0, all_reduce: int = 0
) -> Costs:
    of_a_round = Traffic(sent=0, received=0, busiest=busiest, all_reduce=all_reduce)
    return Costs(step=step, overhead=overhead, traffic=of_a_round, bandwidth=bandwidth)


WIRED = costs(0.1, 0.05, 1000.0, busiest=250, all_reduce=200)
"""A round: 0.05 s and 0.25 s on the wire beside its steps of 0.1 s; a step of synchronous training: 0.1 + 0.2 s."""

seconds = st.floats(1e-5, 10)
some_costs = st.builds(
    costs,
    seconds,
    st.floats(0, 100),
    st.none() | st.floats(1e3, 1e10),
    busiest=st.integers(0, 10**10),
    all_reduce=st.integers(0, 10**10),
)


def test_a_round_by_hand() -> None:
    row = cadence(3, WIRED)
    assert (WIRED.wire, WIRED.all_reduce) == pytest.approx((0.25, 0.2))
    assert row.local_steps == 3
    assert row.seconds == pytest.approx(0.3 + 0.05 + 0.25)
    assert row.share == pytest.approx(0.5)
    assert row.bytes_per_second == pytest.approx(250 / 0.6)
    assert row.speedup == pytest.approx(3 * 0.3 / 0.6)


def test_without_a_bandwidth_the_overhead_holds_the_wire_and_nothing_is_said_of_synchronous_training() -> None:
    row = cadence(3, costs(0.1, 0.3, busiest=250, all_reduce=200))
    assert (row.seconds, row.share) == pytest.approx((0.6, 0.5))
    assert row.bytes_per_second == pytest.approx(250 / 0.6)
    assert row.speedup is None


def test_the_recommended_number_by_hand() -> None:
    assert recommended(WIRED) == 27  # 27 x 0.1 is 9 times the 0.3 s beside the steps
    assert recommended(costs(0.1, 0.0)) == 1
    assert recommended(costs(0.001, 0.1371)) == 1300  # 1,234 to two digits, upwards
    assert recommended(costs(0.01, 1.0)) == 900


def test_where_averaging_pays_by_hand() -> None:
    assert pays_from(WIRED) == 2  # 0.3 s beside the steps, 0.2 s saved by each
    assert pays_from(costs(0.1, 0.4, 1000.0, all_reduce=200)) == 3  # two steps save as much as they cost
    assert pays_from(costs(0.1, 0.0, 1000.0, all_reduce=200)) == 1
    assert pays_from(costs(0.1, 0.4)) is None
    assert pays_from(costs(0.1, 0.4, 1000.0)) is None  # one worker: there is nothing to save


def test_the_table_has_the_recommended_number_and_the_present_one() -> None:
    rows = table(WIRED, 7)
    assert [row.local_steps for row in rows] == [1, 2, 5, 7, 10, 20, 27, 50, 100, 200, 500, 1000]
    assert [row.local_steps for row in table(costs(0.1, 0.0), 2)] == list(STEPS)


@given(some_costs)
def test_the_share_of_steps_rises_with_their_number(given_costs: Costs) -> None:
    shares = [cadence(number, given_costs).share for number in STEPS]
    assert shares == sorted(shares)
    assert all(0 < share <= 1 for share in shares)


@given(some_costs)
def test_the_recommended_number_reaches_the_target_and_few_less_do_not(given_costs: Costs) -> None:
    number = recommended(given_costs)
    assert cadence(number, given_costs).share >= TARGET_SHARE - 1e-9
    fewer = number - 10 ** max(0, len(str(number)) - 2)
    assert fewer < 1 or cadence(fewer, given_costs).share <= TARGET_SHARE + 1e-9


@given(some_costs)
def test_averaging_pays_where_a_round_is_faster_than_as_many_synchronous_steps(given_costs: Costs) -> None:
    first = pays_from(given_costs)
    if first is None:
        assert given_costs.all_reduce == 0
        return
    synchronous = given_costs.step + given_costs.all_reduce
    near = 1e-6 * first * synchronous
    assert cadence(first, given_costs).seconds <= first * synchronous + near
    assert cadence(first - 1, given_costs).seconds >= (first - 1) * synchronous - near
