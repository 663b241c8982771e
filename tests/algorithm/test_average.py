"""`contribute` and `combine` with numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dtrain.algorithm.average import AverageFacts, Combined, Update, combine, contribute
from dtrain.algorithm.local import LocalResult
from dtrain.algorithm.mix import Average, averages
from dtrain.algorithm.params import params_sha256
from dtrain.algorithm.pattern import by_replica, first_outer, model_of, round_averages, summarise
from dtrain.algorithm.plan import first_position, plan_round
from dtrain.algorithm.replica import empty_inner_state, fresh_replica
from dtrain.config.average import AverageConfig, CodecConfig, OuterConfig
from dtrain.config.schema import TrainTable
from dtrain.types import Broadcast, Contribution, Entry, InnerState, Layout, Parameters, ReplicaState

LAYOUT = Layout(
    (Entry("w", "param", "float32", (2,), 0, 2), Entry("b", "buffer", "float32", (1,), 2, 1)),
    num_params=2,
    num_flat=3,
    num_extra=0,
)
OUTER = AverageConfig(outer=OuterConfig(optimizer="sgd", args={"lr": 0.5, "momentum": 0.9}))


def params(*values):
    return Parameters(LAYOUT, np.array(values, np.float32), np.zeros(0, np.uint8))


def update(replica, samples, values, finite=True):
    contribution = Contribution(replica=replica, samples=samples, steps=2, loss_sum=3.0, loss_count=40, finite=finite)
    return Update(params(*values), contribution)


def task(replica=1):
    return plan_round(first_position(3), (40, 40, 40), TrainTable()).tasks[replica]


def inner(value):
    return InnerState((), np.array([value], np.uint8))


THETA = Broadcast(params(0, 0, 0))


# contribute -----------------------------------------------------------------------------------------------------


def test_a_replica_sends_its_parameters_and_keeps_its_new_state():
    after, local = (
        params(1, 2, 3),
        LocalResult(inner(7), loss_sum=12.5, loss_count=40, non_finite=0, samples=40, steps=5),
    )
    sent, kept = contribute(THETA, after, ReplicaState(inner(1)), local, task(), AverageConfig())
    assert sent.payload is after
    assert kept.inner is local.inner
    assert kept.residual is None
    assert sent.contribution == Contribution(
        replica=1, samples=40, steps=5, loss_sum=12.5, loss_count=40, finite=True, update_norm=5**0.5
    )  # the norm of (-1, -2): buffers do not count


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_replica_that_is_not_finite_keeps_the_state_it_came_with(bad):
    state = ReplicaState(inner(1), np.ones(2, np.float32))
    local = LocalResult(inner(7), loss_sum=float("nan"), loss_count=40, non_finite=0, samples=40, steps=5)
    sent, kept = contribute(THETA, params(1, bad, 3), state, local, task(), AverageConfig())
    assert not sent.contribution.finite
    assert kept is state


def test_what_was_infinite_at_the_start_may_be_so_after():
    start = Broadcast(params(0, 0, -np.inf))
    local = LocalResult(inner(7), loss_sum=1.0, loss_count=40, non_finite=0, samples=40, steps=5)
    sent, _ = contribute(start, params(1, 2, -np.inf), fresh_replica(), local, task(), AverageConfig())
    assert sent.contribution.finite


def test_with_a_codec_the_norm_is_that_of_what_is_decoded_and_the_residual_is_kept():
    config = AverageConfig(codec=CodecConfig(name="int4"))
    local = LocalResult(inner(7), loss_sum=1.0, loss_count=40, non_finite=0, samples=40, steps=5)
    before = ReplicaState(inner(1), np.float32([0.0, 0.5]))
    sent, kept = contribute(THETA, params(-14, -2, 3), before, local, task(), config)
    # the scale is 2: u = 14, 2.5 is sent as 14, 2
    assert sent.contribution.update_norm == 200**0.5
    assert kept.residual.tolist() == [0.0, 0.5]
    assert sent.nbytes == 1 + 4 + 4  # a byte for two values, a scale, a buffer
    whole = combine(THETA, [THETA], [sent], (), config)
    assert whole.broadcast.params.flat.tolist() == [-14, -2, 3]


@pytest.mark.parametrize("state", ["keep", "average", "reset"])
def test_the_state_of_the_inner_optimizer_is_kept_sent_or_forgotten(state):
    local = LocalResult(inner(7), loss_sum=1.0, loss_count=40, non_finite=0, samples=40, steps=5)
    sent, kept = contribute(THETA, params(1, 2, 3), fresh_replica(), local, task(), AverageConfig(inner_state=state))
    assert (sent.inner is local.inner, kept.inner is local.inner) == (state == "average", state == "keep")
    assert kept.inner.nbytes == (1 if state == "keep" else 0)


# combine --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "mean"), [("samples", [4, 1, 7]), ("uniform", [3, 2, 6])])
def test_the_mean_by_hand(weights, mean):
    updates = [update(0, 10, (1, 4, 4)), update(1, 30, (5, 0, 8))]
    result = combine(THETA, [THETA] * len(updates), updates, (), AverageConfig(weights=weights))
    assert result.broadcast.params.flat.tolist() == mean
    assert result.outer == ()
    assert result.facts.contributions == tuple(u.contribution for u in updates)
    assert result.facts.nbytes == 2 * 3 * 4


def test_replicas_that_are_not_finite_are_left_out():
    updates = [update(0, 10, (np.nan, 1, 1), finite=False), update(1, 10, (2, 2, 2)), update(2, 10, (4, 4, 4))]
    result = combine(THETA, [THETA] * len(updates), updates, (), AverageConfig())
    assert result.broadcast.params.flat.tolist() == [3, 3, 3]
    assert [c.finite for c in result.facts.contributions] == [False, True, True]


@pytest.mark.parametrize("config", [AverageConfig(), OUTER, AverageConfig(reduce="median")])
def test_if_none_is_finite_those_who_receive_the_mean_stay_where_they_were(config):
    start = Broadcast(params(1, 2, 3), inner(4), np.float32([5, 6]))
    updates = [update(k, 10, (np.nan, k, k), finite=False) for k in range(2)]
    result = combine(start, None, updates, first_outer(config), config)
    assert result.broadcast.params.flat.tolist() == [1, 2, 3]
    assert (result.broadcast.inner, result.broadcast.control) == (start.inner, start.control)
    assert result.facts.contributions == tuple(u.contribution for u in updates)
    assert (result.facts.nbytes, result.facts.coefficients) == (2 * 3 * 4, ())


def test_two_outer_steps_by_hand_and_buffers_never_reach_them():
    updates = [update(0, 1, (2, -4, 10))]
    first = combine(THETA, [THETA] * len(updates), updates, first_outer(OUTER), OUTER)
    # g = theta - mean = (-2, 4); v = g; theta - 0.5 v = (1, -2); the buffer is the mean itself
    assert first.broadcast.params.flat.tolist() == [1, -2, 10]
    second = combine(first.broadcast, [first.broadcast], updates, first.outer, OUTER)
    # g = (-1, 2); v = 0.9 (-2, 4) + g = (-2.8, 5.6); theta - 0.5 v = (2.4, -4.8)
    np.testing.assert_allclose(second.broadcast.params.flat, [2.4, -4.8, 10], rtol=1e-6)


def test_nothing_that_is_given_is_changed():
    updates = [update(0, 1, (2, -4, 10)), update(1, 3, (1, 1, 1))]
    outer = first_outer(OUTER)
    frozen = [THETA.params.flat, *(u.payload.flat for u in updates), *(state.data for state in outer)]
    before = [array.copy() for array in frozen]
    for array in frozen:
        array.flags.writeable = False
    combine(THETA, [THETA] * len(updates), updates, outer, OUTER)
    for array, old in zip(frozen, before, strict=True):
        array.flags.writeable = True
        np.testing.assert_array_equal(array, old)


# The pattern of a round -----------------------------------------------------------------------------------------


def plan():
    return plan_round(first_position(3), (40, 40, 40), TrainTable())


def test_full_averaging_is_one_mean_for_all():
    (mean,) = round_averages(plan(), [THETA] * 3, AverageConfig())
    assert mean == Average(members=(0, 1, 2), receivers=(0, 1, 2))
    (mean,) = round_averages(plan(), [THETA] * 3, OUTER)
    assert mean.receivers == (0, 1, 2)


def test_an_outer_step_is_taken_from_each_start():
    other = Broadcast(params(1, 1, 1))
    assert len(round_averages(plan(), [THETA, other, THETA], AverageConfig())) == 1
    means = round_averages(plan(), [THETA, other, THETA], OUTER)
    assert [mean.receivers for mean in means] == [(0, 2), (1,)]
    assert {mean.members for mean in means} == {(0, 1, 2)}
    assert by_replica(means, ["a", "b"]) == ("a", "b", "a")


def combined(values, replicas):
    contributions = tuple(update(k, 10, values).contribution for k in replicas)
    facts = AverageFacts(contributions, (), np.zeros(0), nbytes=12 * len(replicas))
    return Combined(Broadcast(params(*values)), (), facts)


def test_the_model_is_the_mean_over_replicas():
    means = averages(((0, 1), (0, 1), (2,)), [None] * 3)
    own = [params(0, 3, 6), params(3, 0, 0)]
    assert model_of(means, own).flat.tolist() == [1, 2, 4]
    assert model_of(means[:1], own[:1]) is own[0]


def test_the_summary_of_a_round():
    parts = [combined((1, 1, 1), (1, 2)).facts, combined((2, 2, 2), (0, 1)).facts]
    summary = summarise([[one] for one in parts], params(1, 2, 3))
    assert [c.replica for c in summary.contributions] == [0, 1, 2]
    assert summary.params_sha256 == params_sha256(params(1, 2, 3))
    assert (summary.finite, summary.bytes_reduced, summary.rejected) == (True, 48, ())
    lost = replace(parts[0].contributions[0], finite=False)
    summary = summarise([[replace(parts[0], contributions=(lost,), finite=False)]], params(np.nan, 0, 0))
    assert (summary.finite, summary.rejected) == (False, (1,))


def test_an_outer_state_starts_empty():
    assert first_outer(AverageConfig()) == ()
    assert [state.nbytes for state in first_outer(OUTER)] == [empty_inner_state().nbytes] == [0]
