"""FedNova: the norms of steps by hand and against torch, and where it converges to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.algorithm.average import combine, contribute
from dtrain.algorithm.fednova import coefficients, equal_norms, first_norm
from dtrain.algorithm.local import LocalResult, run_local_steps
from dtrain.algorithm.recipe import Recipe
from dtrain.algorithm.reduce import moved
from dtrain.algorithm.replica import empty_inner_state, fresh_replica
from dtrain.algorithm.schedules import Schedule, constant, schedule_named
from dtrain.config.average import AverageConfig
from dtrain.types import Broadcast, Flat, InnerState
from tests.algorithm.helpers import contribution, locked, one_batch, result, task, update, vector

RATE = 2.0**-6


class Number(nn.Module):
    """One parameter, which is what it returns."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.expand(len(x))


def slope(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient is 1."""
    return outputs.mean()


def run(
    module: Number,
    steps: int,
    loss: Any = slope,
    inner: InnerState | None = None,
    first_step: int = 0,
    schedule: Schedule = constant,
    prox: float = 0.0,
    make: Any = torch.optim.SGD,
    **options: Any,
) -> LocalResult:
    options = {"lr": RATE, **options}
    recipe = Recipe(loss, make, options, schedule, clip_norm=0.0, prox=prox)
    return run_local_steps(
        module, recipe, inner or empty_inner_state(), one_batch() * steps, first_step=first_step, total_steps=20
    )


def step_norm(steps: int, **options: Any) -> float:
    return run(Number(), steps, **options).step_norm


# Norms ------------------------------------------------------------------------------------------------------------


def test_the_norm_of_plain_sgd_is_the_number_of_steps() -> None:
    assert [step_norm(steps) for steps in (1, 5, 17)] == [1, 5, 17]
    assert step_norm(4, weight_decay=0.1) == 4


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
def test_the_norm_of_momentum_is_that_of_the_paper(rho: float) -> None:
    for tau in (1, 2, 3, 10, 50):
        assert step_norm(tau, momentum=rho) == pytest.approx((tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho))


def test_norms_by_hand() -> None:
    assert step_norm(3, momentum=0.5) == 1 + 1.5 + 1.75
    assert step_norm(3, momentum=0.5, dampening=0.5) == 1 + (0.5 + 0.5) + (0.5 + 0.5)  # the first one is not damped
    assert step_norm(3, momentum=0.5, dampening=1.0) == 1 + 0.5 + 0.25
    # the gradient and 0.5 times the momentum: 1 + 0.5 * 1, 1 + 0.5 * 1.5, 1 + 0.5 * 1.75
    assert step_norm(3, momentum=0.5, nesterov=True) == 1.5 + 1.75 + 1.875
    # a_i = (1 - lr mu)^(tau - 1 - i), with lr mu = 0.25
    assert step_norm(3, prox=0.25 / RATE) == pytest.approx(1 + 0.75 + 0.75**2)


def test_factors_of_the_schedule_weigh_the_steps() -> None:
    linear = schedule_named("linear", 0)  # 1, 19 / 20, 18 / 20 ...
    assert step_norm(3, schedule=linear) == pytest.approx(1 + 0.95 + 0.9)
    assert step_norm(2, schedule=linear, first_step=10) == pytest.approx(0.5 + 0.45)
    assert step_norm(3, schedule=linear, momentum=0.5) == pytest.approx(1 + 0.95 * 1.5 + 0.9 * 1.75)


@pytest.mark.parametrize("prox", [0.0, 0.5 / RATE, 1.0 / RATE])
@pytest.mark.parametrize("name", ["constant", "cosine"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.8, "dampening": 0.3},
        {"momentum": 1.0},
    ],
)
def test_the_norm_is_how_far_sgd_goes_along_a_constant_gradient(
    options: dict[str, Any], name: str, prox: float
) -> None:
    schedule, inner, module = schedule_named(name, 0), empty_inner_state(), Number(0.0)
    first = 0
    for steps in (1, 6, 8):  # momentum is kept from round to round
        before = module.weight.item()
        if prox and first:
            inner, first = empty_inner_state(), 0  # the pull of the rounds before is not known
        local = run(module, steps, inner=inner, first_step=first, schedule=schedule, prox=prox, **options)
        assert local.step_norm == pytest.approx((before - module.weight.item()) / RATE, rel=1e-4)
        inner, first = local.inner, first + steps


def test_momentum_that_is_kept_counts_and_momentum_that_is_reset_does_not() -> None:
    inner = run(Number(), 3, momentum=0.5).inner
    assert step_norm(2, momentum=0.5, inner=inner, first_step=3) == 1.875 + 1.9375
    assert step_norm(2, momentum=0.5, first_step=3) == 1 + 1.5
    # after many steps the momentum of a constant gradient is its limit
    assert step_norm(2, momentum=0.999, inner=inner, first_step=10**6) == pytest.approx(2000, rel=1e-6)


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_other_optimizers_count_their_steps(make: Any) -> None:
    assert step_norm(7, make=make) == 7
    assert step_norm(3, make=lambda params, **options: make(params, **options), schedule=lambda step, total: 0.5) == 1.5


def test_the_norm_is_a_float_whatever_the_schedule_returns() -> None:
    assert type(step_norm(2, schedule=lambda step, total: np.float32(0.5))) is float
    rate = first_norm(torch.optim.SGD, {}, torch.tensor(0.5), 0.5, 0)  # type: ignore[arg-type]
    assert rate.after(1.0).after(1.0).total == 1.75


# Coefficients -----------------------------------------------------------------------------------------------------


def test_coefficients_by_hand() -> None:
    # p = 1/4, 3/4; tau = (1 * 2 + 3 * 6) / 4 = 5; tau p / |a| = 5/8, 5/8
    kept = [contribution(0, 10, step_norm=2.0), contribution(1, 30, step_norm=6.0)]
    assert coefficients(kept) == [0.625, 0.625]
    equal = [contribution(k, n, step_norm=4.0) for k, n in enumerate((10, 30))]
    assert coefficients(equal) == [0.25, 0.75]
    assert (equal_norms(kept), equal_norms(equal), equal_norms(kept[:1])) == (False, True, True)
    assert coefficients([contribution(0, 10, step_norm=0.0), contribution(1, 30, step_norm=6.0)]) == [0.0, 0.5625]


def test_a_step_by_hand() -> None:
    start = Broadcast(vector([1.0, 0.0], [0.0], [0.0]))
    # updates (2, -4) and (-3, 6); 0.625 times their sum (-1, 2); buffers get the mean by samples
    sent = [
        update(0, 10, vector([-1.0, 4.0], [4.0], [8.0]), step_norm=2.0),
        update(1, 30, vector([4.0, -6.0], [8.0], [4.0]), step_norm=6.0),
    ]
    found = combine(start, [start] * 2, sent, (), AverageConfig(weights="fednova"))
    assert found.broadcast.params.flat.tolist() == [1.625, -1.25, 7.0]
    assert found.broadcast.params.extra.view(np.float64).tolist() == [5.0]
    assert found.facts.coefficients == (0.625, 0.625)


def test_replicas_of_different_starts_step_from_the_mean_of_their_starts() -> None:
    one, other = Broadcast(vector([0.0])), Broadcast(vector([4.0]))
    sent = [update(0, 1, vector([2.0]), step_norm=1.0), update(1, 3, vector([8.0]), step_norm=2.0)]
    # from (0 + 3 * 4) / 4 = 3; tau = 7 / 4; 7 / 16 * 2 and 21 / 32 * 4
    found = combine(one, [one, other], sent, (), AverageConfig(weights="fednova"))
    assert found.broadcast.params.flat.tolist() == [3 + 7 / 8 + 21 / 8]


@pytest.mark.parametrize("norm", [1.0, 7.3])
def test_equal_norms_give_the_bits_of_the_mean_by_samples(norm: float) -> None:
    generator = np.random.default_rng(3)
    start, other = (Broadcast(vector(generator.normal(size=50).tolist(), [1.0])) for _ in range(2))
    sent = [
        update(k, n, vector(generator.normal(size=50).tolist(), [k]), step_norm=norm) for k, n in enumerate((3, 11, 7))
    ]
    for starts in ([start] * 3, [start, other, start]):
        means = [combine(start, starts, sent, (), AverageConfig(weights=weights)) for weights in ("fednova", "samples")]  # type: ignore[arg-type]
        flats = [mean.broadcast.params.flat.tobytes() for mean in means]
        assert flats[0] == flats[1]


def test_a_rejected_replica_has_no_part_in_the_norm() -> None:
    start, bad = Broadcast(vector([0.0])), update(0, 100, vector([np.nan]), finite=False, step_norm=50.0)
    sent = [bad, update(1, 10, vector([2.0]), step_norm=2.0), update(2, 30, vector([6.0]), step_norm=6.0)]
    config = AverageConfig(weights="fednova")
    found = combine(start, [start] * 3, sent, (), config)
    assert found.broadcast.params.flat.tolist() == [0.625 * 8]
    assert found.facts.coefficients == (0.0, 0.625, 0.625)


def test_a_mask_stays_and_nothing_that_is_given_is_changed() -> None:
    start = vector([-np.inf, 1.0])
    sent = [vector([-np.inf, 2.0]), vector([-np.inf, 3.0])]
    for params in (start, *sent):
        params.flat.flags.writeable = False
    mean = vector([-np.inf, 2.5])
    mean.flat.flags.writeable = False
    assert moved(mean, [start] * 2, sent, [1, 1], [0.5, 1.0]).flat.tolist() == [-np.inf, 3.5]
    assert moved(mean, [start, vector([-np.inf, 2.0])], sent, [1, 1], [0.5, 1.0]).flat.tolist() == [-np.inf, 3.0]


# A quadratic: f_k(x) = a (x - b_k)^2 / 2, weights n_k, different numbers of steps -----------------------------------

CURVATURE, OPTIMA, SAMPLES, STEPS = 0.5, (3.0, -1.0, 0.5), (10, 30, 20), (2, 5, 11)
SHARES = [n / sum(SAMPLES) for n in SAMPLES]
OPTIMUM = sum(p * b for p, b in zip(SHARES, OPTIMA, strict=True))


def quadratic(optimum: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda outputs, targets: (CURVATURE / 2 * (outputs - optimum) ** 2).mean()


def a_round(theta: Flat, optima: Sequence[float], weights: Any, rate: float, **options: Any) -> Flat:
    """Return the parameters after a round whose replicas take their steps from theta."""
    start, config = Broadcast(vector(locked(theta).tolist())), AverageConfig(weights=weights)
    sent = []
    for k, (optimum, samples, steps) in enumerate(zip(optima, SAMPLES, STEPS, strict=True)):
        module = Number(float(theta[0]))
        local = run(module, steps, quadratic(optimum), lr=rate, **options)
        facts = result(samples=samples, steps=steps, step_norm=local.step_norm)
        sent.append(contribute(start, vector([module.weight.item()]), fresh_replica(), facts, task(k), config)[0])
    return combine(start, [start] * 3, sent, (), config).broadcast.params.flat


def fixed_point(weights: str, rate: float) -> float:
    """Where a round of plain SGD does not move: replica k goes (1 - (1 - lr a)^tau_k) of its way to b_k."""
    parts = [
        p * (1 - (1 - rate * CURVATURE) ** steps) / (steps if weights == "fednova" else 1)
        for p, steps in zip(SHARES, STEPS, strict=True)
    ]
    return sum(part * b for part, b in zip(parts, OPTIMA, strict=True)) / sum(parts)


@pytest.mark.parametrize("weights", ["samples", "fednova"])
@pytest.mark.parametrize("rate", [0.4, 0.1])
def test_rounds_converge_to_the_fixed_point_of_the_theory(weights: str, rate: float) -> None:
    theta = np.float32([5.0])
    for _ in range(60):
        theta = a_round(theta, OPTIMA, weights, rate)
    assert theta[0] == pytest.approx(fixed_point(weights, rate), abs=1e-5)


def test_the_bias_of_fednova_vanishes_with_the_rate_and_that_of_fedavg_does_not() -> None:
    rates = (0.1, 0.01, 0.001)
    nova, avg = ([abs(fixed_point(weights, rate) - OPTIMUM) for rate in rates] for weights in ("fednova", "samples"))
    assert nova[0] / nova[1] == pytest.approx(10, rel=0.2)
    assert nova[1] / nova[2] == pytest.approx(10, rel=0.05)
    assert min(avg) > 0.1
    # as all steps count alike, FedAvg finds the optimum of n_k tau_k
    parts = [p * steps for p, steps in zip(SHARES, STEPS, strict=True)]
    inconsistent = sum(part * b for part, b in zip(parts, OPTIMA, strict=True)) / sum(parts)
    assert fixed_point("samples", 1e-6) == pytest.approx(inconsistent, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.5, "nesterov": True}])
def test_at_a_small_rate_the_weighted_optimum_is_where_fednova_stays(options: dict[str, Any]) -> None:
    # the optimum is moved to 0, where float32 shows the smallest steps
    rate, optima, norms = 1e-8, [b - OPTIMUM for b in OPTIMA], [step_norm(steps, **options) for steps in STEPS]
    way = rate * CURVATURE * sum(p * norm for p, norm in zip(SHARES, norms, strict=True))  # of a distance of 1
    bias = {
        weights: float(a_round(np.float32([0.0]), optima, weights, rate, **options)[0]) / way
        for weights in ("fednova", "samples")
    }
    assert bias["fednova"] == pytest.approx(0.0, abs=1e-6)
    parts = [p * norm for p, norm in zip(SHARES, norms, strict=True)]
    expected = sum(part * b for part, b in zip(parts, optima, strict=True)) / sum(parts)
    assert bias["samples"] == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 0.02
