"""Identities of averaging, bit for bit. Those of whole runs, (a) to (c), stand in tests/runtime/test_identities.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from dtrain.algorithm.average import Update, combine, contribute
from dtrain.algorithm.local import LocalResult
from dtrain.algorithm.pattern import by_replica, round_averages, starts_of
from dtrain.algorithm.plan import first_position, plan_round
from dtrain.algorithm.replica import empty_inner_state, fresh_replica
from dtrain.config.average import AverageConfig, CodecConfig, MixConfig
from dtrain.config.schema import TrainTable
from dtrain.types import Broadcast, Entry, Flat, Layout, LocalTask, Parameters, RoundPlan

SIZE = 1000
LAYOUT = Layout((Entry("w", "param", "float32", (SIZE,), 0, SIZE),), num_params=SIZE, num_flat=SIZE, num_extra=0)


def params(flat: Flat) -> Parameters:
    return Parameters(LAYOUT, flat, np.zeros(0, np.uint8))


def drawn(seed: int) -> Flat:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=SIZE) * 10.0 ** rng.integers(-6, 6, size=SIZE)).astype(np.float32)


def plan_of(replicas: int, number: int) -> RoundPlan:
    plan = plan_round(first_position(replicas), (40,) * replicas, TrainTable())
    return RoundPlan(number, plan.tasks)


def sent(start: Broadcast, after: Flat, task: LocalTask, config: AverageConfig) -> Update:
    samples = 10 + 7 * task.replica  # replicas do not weigh the same
    local = LocalResult(empty_inner_state(), 0.0, 1, 0, samples, steps=1 + task.replica, step_norm=1.0 + task.replica)
    return contribute(start, params(after), fresh_replica(), local, task, config)[0]


def mixed(starts: Sequence[Flat], after: Sequence[Flat], config: AverageConfig, number: int = 1) -> list[Flat]:
    """What replicas go on from, by replica; equal arrays are one start."""
    distinct = {id(flat): Broadcast(params(flat)) for flat in starts}
    broadcast = [distinct[id(flat)] for flat in starts]
    plan = plan_of(len(starts), number)
    updates = [sent(*given, config) for given in zip(broadcast, after, plan.tasks, strict=True)]
    means = round_averages(plan, broadcast, config)
    combined = [
        combine(
            broadcast[mean.receivers[0]],
            starts_of(mean, broadcast, config),
            [updates[k] for k in mean.members],
            (),
            config,
        )
        for mean in means
    ]
    return [one.broadcast.params.flat for one in by_replica(means, combined)]


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"weights": "uniform"},
        {"weights": "fednova"},
        {"reduce": "median"},
        {"reduce": "trimmed", "trim": 0.2},
        {"mix": {"topology": "ring"}},
        {"mix": {"topology": "exponential"}},
        {"mix": {"topology": "hierarchical", "groups": 2, "period": 3}},
        {"codec": {"name": "int4"}},
    ],
    ids=str,
)
def test_replicas_that_are_equal_and_have_not_moved_stay(config: dict[str, Any], number: int) -> None:
    """Identity (d): any mixing of equal parameters changes nothing."""
    theta = drawn(0)
    for flat in mixed([theta] * 5, [theta] * 5, AverageConfig(**config), number):
        np.testing.assert_array_equal(flat, theta)


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_groups_that_are_averaged_with_all_in_every_round_are_full_averaging(number: int) -> None:
    """Identity (e): hierarchical averaging whose two periods are one."""
    after = [drawn(k) for k in range(5)]
    theta = drawn(9)
    groups = AverageConfig(mix=MixConfig(topology="hierarchical", groups=2, period=1))
    for own, full in zip(
        mixed([theta] * 5, after, groups, number), mixed([theta] * 5, after, AverageConfig()), strict=True
    ):
        np.testing.assert_array_equal(own, full)


@pytest.mark.parametrize("replicas", [2, 4, 8])
def test_exponential_rounds_without_steps_are_the_full_mean(replicas: int) -> None:
    """Identity (f): log2 M rounds of the one-peer exponential graph; small integers are averaged without rounding."""
    thetas = [np.random.default_rng(k).integers(-1000, 1000, SIZE).astype(np.float32) for k in range(replicas)]
    config = AverageConfig(weights="uniform", mix=MixConfig(topology="exponential"))
    mean = mixed(thetas, thetas, AverageConfig(weights="uniform"))[0]
    for number in range(1, replicas.bit_length()):
        assert any((theta != mean).any() for theta in thetas)
        thetas = mixed(thetas, thetas, config, number)
    for theta in thetas:
        np.testing.assert_array_equal(theta, mean)


def test_error_feedback_changes_nothing_where_a_codec_loses_nothing() -> None:
    """Identity (g): with updates that the codec holds exactly, it is as if there were no codec."""
    theta = np.random.default_rng(0).integers(-1000, 1000, SIZE).astype(np.float32)
    steps = [np.random.default_rng(k).integers(-100, 100, SIZE).astype(np.float32) for k in (1, 2)]
    ways = []
    for codec in (None, CodecConfig(name="bf16"), CodecConfig(name="bf16", error_feedback=False)):
        config, start, kept, path = AverageConfig(codec=codec), Broadcast(params(theta)), [fresh_replica()] * 2, []
        for number in (1, 2):
            plan = plan_of(2, number)
            after = [params(start.params.flat + step) for step in steps]
            local = LocalResult(empty_inner_state(), 0.0, 1, 0, samples=10, steps=1)
            given = zip(after, kept, plan.tasks, strict=True)
            pairs = [contribute(start, own, state, local, task, config) for own, state, task in given]
            kept = [state for _, state in pairs]
            start = combine(start, [start] * 2, [update for update, _ in pairs], (), config).broadcast
            path.append(start.params.flat)
        residuals = [state.residual for state in kept]
        assert all(residual is None or not residual.any() for residual in residuals)
        assert (residuals[0] is not None) == (codec is not None and codec.error_feedback)
        ways.append(np.concatenate(path))
    np.testing.assert_array_equal(ways[1], ways[0])
    np.testing.assert_array_equal(ways[2], ways[0])
    assert (ways[0][:SIZE] != theta).any()
