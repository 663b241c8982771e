"""The outer optimizer against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dtrain.algorithm.outer import outer_optimizer, outer_step, pseudo_gradient
from dtrain.algorithm.replica import empty_inner_state
from dtrain.config.average import OuterConfig
from dtrain.config.schema import TrainConfig
from dtrain.errors import InvalidConfig, UserCodeFailed

DILOCO = OuterConfig()


def run(config, rounds, delta, theta0=1.0):
    """Rounds whose replicas always end `delta` below where they began: a constant pseudo-gradient."""
    theta, state, path = np.array([theta0], np.float32), empty_inner_state(), []
    for _ in range(rounds):
        theta, state = outer_step(theta, theta - np.float32(delta), state, config, factor=1.0, norm=0.0)
        path.append(float(theta[0]))
    return path


def test_the_default_is_diloco():
    assert (DILOCO.optimizer, DILOCO.args) == ("sgd", {"lr": 0.7, "momentum": 0.9, "nesterov": True})


def test_diloco_follows_its_closed_form():
    # v_t = g (1 - 0.9^t) / 0.1 ; Nesterov step g + 0.9 v_t ; theta_T = theta_0 - 0.7 sum_t (g + 0.9 v_t)
    g, theta, expected = 0.01, 1.0, []
    for t in range(1, 41):
        theta -= 0.7 * (g + 0.9 * g * (1 - 0.9**t) / 0.1)
        expected.append(theta)
    np.testing.assert_allclose(run(DILOCO, 40, g), expected, atol=2e-5)
    assert (1 - expected[0]) / g == pytest.approx(1.33)  # the first round moves 1.33 times the mean update
    assert (expected[38] - expected[39]) / g == pytest.approx(6.9, abs=0.1)  # the fortieth 6.9 times


def test_sgd_with_rate_one_is_the_mean_to_rounding():
    config = OuterConfig(optimizer="sgd", args={"lr": 1.0})
    rng = np.random.default_rng(0)
    theta, mean = rng.normal(size=(2, 1000)).astype(np.float32)
    stepped, _ = outer_step(theta, mean, empty_inner_state(), config, factor=1.0, norm=0.0)
    np.testing.assert_allclose(stepped, mean, atol=1e-6)


def test_adam_takes_a_step_of_its_rate_against_the_sign():
    config = OuterConfig(optimizer="adam", args={"lr": 0.1})
    assert run(config, 3, 0.5) == pytest.approx([0.9, 0.8, 0.7], abs=1e-5)
    assert run(config, 1, -0.5) == pytest.approx([1.1], abs=1e-5)


def test_the_difference_is_taken_in_float64():
    theta, mean = np.array([1e8], np.float32), np.array([-1.0], np.float32)
    assert pseudo_gradient(theta, mean).tolist() == [np.float32(1e8 + 1.0)]
    assert pseudo_gradient(theta, theta).tolist() == [0.0]


def test_a_mask_of_minus_infinity_stays():
    theta, mean = np.float32([-np.inf, 1.0]), np.float32([-np.inf, 0.5])
    assert pseudo_gradient(theta, mean).tolist() == [0.0, 0.5]
    state = empty_inner_state()
    for _ in range(2):
        theta, state = outer_step(theta, mean, state, DILOCO, factor=1.0, norm=0.0)
        assert theta[0] == -np.inf
        assert np.isfinite(theta[1])


def test_a_difference_that_is_no_float32_is_infinite():
    largest = np.float32([np.finfo(np.float32).max])
    assert pseudo_gradient(largest, -largest).tolist() == [np.inf]


@pytest.mark.parametrize("clip", [0.05, 0.9, 1.0, 1.1, 100.0])
def test_a_clip_is_that_of_torch(clip):
    generator = np.random.default_rng(2)
    theta, mean = generator.normal(size=(2, 500)).astype(np.float32)
    norm = float(np.linalg.norm(theta.astype(np.float64) - mean))
    parameter = torch.nn.Parameter(torch.from_numpy(theta.copy()))
    parameter.grad = torch.from_numpy(theta - mean)
    torch.nn.utils.clip_grad_norm_([parameter], clip * norm)
    torch.optim.SGD([parameter], lr=0.7).step()
    config = OuterConfig(args={"lr": 0.7}, clip_norm=clip * norm)
    found, _ = outer_step(theta, mean, empty_inner_state(), config, factor=1.0, norm=norm)
    np.testing.assert_allclose(found, parameter.detach(), rtol=1e-6, atol=1e-6)
    if clip > 1.01:  # by 1: the gradient less a part of 1e-6 / norm
        plain, _ = outer_step(theta, mean, empty_inner_state(), OuterConfig(args={"lr": 0.7}), factor=1.0, norm=norm)
        assert found.tobytes() == plain.tobytes()


def test_a_clip_by_hand():
    config = OuterConfig(args={"lr": 1.0}, clip_norm=1.0)
    found, _ = outer_step(
        np.float32([3.0, 4.0]), np.zeros(2, np.float32), empty_inner_state(), config, factor=1.0, norm=5.0
    )
    assert found.tolist() == pytest.approx([3 - 0.6, 4 - 0.8])
    # the norm is that of all slices
    found, _ = outer_step(np.float32([3.0]), np.zeros(1, np.float32), empty_inner_state(), config, factor=1.0, norm=5.0)
    assert found.tolist() == pytest.approx([3 - 0.6])


def test_the_factor_is_on_the_learning_rate_alone():
    # v = 1, 1.9; steps 0.1 * 0.5 * 1 and 0.1 * 0.25 * 1.9
    config, theta, state = OuterConfig(args={"lr": 0.1, "momentum": 0.9}), np.zeros(1, np.float32), empty_inner_state()
    for factor, expected in ((0.5, -0.05), (0.25, -0.0975), (0.0, -0.0975)):
        theta, state = outer_step(theta, theta - np.float32(1.0), state, config, factor=factor, norm=0.0)
        assert theta[0] == pytest.approx(expected, rel=1e-5)
    adam = OuterConfig(optimizer="adam", args={"lr": 0.1})
    found, _ = outer_step(
        np.ones(1, np.float32), np.zeros(1, np.float32), empty_inner_state(), adam, factor=0.5, norm=0.0
    )
    assert found[0] == pytest.approx(0.95)


def test_slices_stepped_apart_are_the_whole_bit_for_bit():
    rng = np.random.default_rng(1)
    theta, mean = rng.normal(size=(2, 999)).astype(np.float32)
    whole, state = outer_step(theta, mean, empty_inner_state(), DILOCO, factor=1.0, norm=0.0)
    whole, _ = outer_step(whole, mean, state, DILOCO, factor=1.0, norm=0.0)
    parts = []
    for part in (slice(0, 400), slice(400, 999)):
        piece, state = outer_step(theta[part], mean[part], empty_inner_state(), DILOCO, factor=1.0, norm=0.0)
        parts.append(outer_step(piece, mean[part], state, DILOCO, factor=1.0, norm=0.0)[0])
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_arguments_are_not_changed():
    theta, mean = np.ones(5, np.float32), np.zeros(5, np.float32)
    _, state = outer_step(theta, mean, empty_inner_state(), DILOCO, factor=1.0, norm=0.0)
    before = state.data.copy()
    for array in (theta, mean, state.data):
        array.flags.writeable = False
    outer_step(theta, mean, state, DILOCO, factor=1.0, norm=0.0)
    np.testing.assert_array_equal(theta, 1)
    np.testing.assert_array_equal(state.data, before)


@pytest.mark.parametrize("name", ["adafactor", "Muon", "sparseadam"])
def test_optimizers_of_whole_tensors_are_refused(name):
    with pytest.raises(InvalidConfig, match="whole tensors"):
        outer_optimizer(OuterConfig(optimizer=name, args={}))


def test_unknown_names_and_arguments():
    with pytest.raises(InvalidConfig, match=r'average.outer.optimizer = "sdg".*did you mean "sgd"'):
        outer_optimizer(OuterConfig(optimizer="sdg"))
    with pytest.raises(UserCodeFailed, match=r"SGD does not accept average.outer.args"):
        outer_optimizer(OuterConfig(args={"learning_rate": 1.0}))


def test_the_table_alone_means_diloco():
    assert TrainConfig(average={"outer": {}}).average.outer == DILOCO
    assert TrainConfig().average.outer is None
