"""SCAFFOLD: the controls are those of the paper, and the bias of local steps vanishes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.algorithm.average import combine, contribute
from dtrain.algorithm.batch import TensorBatch
from dtrain.algorithm.local import LocalResult, run_local_steps
from dtrain.algorithm.losses import mse
from dtrain.algorithm.params import flatten, layout_of, load_into
from dtrain.algorithm.recipe import Recipe
from dtrain.algorithm.replica import empty_inner_state, fresh_replica
from dtrain.algorithm.scaffold import ControlledSteps, Controls
from dtrain.algorithm.schedules import constant
from dtrain.config.average import AverageConfig
from dtrain.types import Broadcast, Flat, Parameters, ReplicaState
from tests.algorithm.helpers import locked, result, task, update, vector

CONTROL = AverageConfig(control=True)
RATE = 0.05


class Net(nn.Module):
    """A tied weight, a frozen one, one without a gradient, one that lies transposed in memory, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.first = nn.Linear(3, 4, bias=False)
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.norm = nn.BatchNorm1d(4)
        self.turned = nn.Parameter(torch.randn(3, 4).t())
        self.again = nn.Linear(3, 4, bias=False)
        self.again.weight = self.first.weight
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x)) * self.frozen
        mixed: torch.Tensor = torch.tanh(hidden) @ self.turned @ self.again.weight.t()
        return mixed


def steps(count: int, first: int = 0) -> list[tuple[int, list[TensorBatch]]]:
    made = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(6, 3, generator=generator), torch.randn(6, 4, generator=generator)
        made.append((6, [TensorBatch((x,), y, 6)]))
    return made


def run(
    module: nn.Module,
    count: int,
    controls: Controls | None,
    make: Any = torch.optim.SGD,
    first: int = 0,
    **options: Any,
) -> LocalResult:
    recipe = Recipe(mse, make, {"lr": RATE, **options}, constant, clip_norm=0.0)
    controlled = None if controls is None else ControlledSteps(module, layout_of(module), controls)
    return run_local_steps(
        module,
        recipe,
        empty_inner_state(),
        steps(count, first),
        first_step=0,
        total_steps=count,
        controlled=controlled,
    )


def params(module: nn.Module) -> Parameters:
    return flatten(module, layout_of(module))


def some(seed: int, scale: float = 0.1) -> Flat:
    found: Flat = locked((np.random.default_rng(seed).normal(size=layout_of(Net()).num_params) * scale).astype("f4"))
    return found


def control_of(local: LocalResult) -> Flat:
    assert local.control is not None
    return local.control


# Controls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 5, 20])
def test_with_plain_sgd_the_control_is_option_two_of_the_paper(count: int) -> None:
    module, shared, own = Net(), some(0), some(1)
    end = layout_of(module).num_params
    before = params(module).flat[:end].astype(np.float64)
    local = run(module, count, Controls(shared, own))
    after = params(module).flat[:end]
    expected = own.astype(np.float64) - shared + (before - after) / (count * RATE)
    np.testing.assert_allclose(control_of(local), expected, rtol=1e-4, atol=1e-5)


def test_a_corrected_step_by_hand() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 2.0)
    batch = TensorBatch((torch.ones(1, 1),), torch.zeros(1, 1), 1)
    controlled = ControlledSteps(module, layout_of(module), Controls(np.float32([0.5]), np.float32([1.5])))
    recipe = Recipe(mse, torch.optim.SGD, {"lr": 0.25}, constant, clip_norm=0.0)
    local = run_local_steps(
        module, recipe, empty_inner_state(), [(1, [batch])] * 2, first_step=0, total_steps=2, controlled=controlled
    )
    # 2 w + 0.5 - 1.5: from 2 by 0.25 * 3 to 1.25, by 0.25 * 1.5 to 0.875; the control is the mean of 4 and 2.5
    assert module.weight.item() == 0.875
    assert control_of(local).tolist() == [3.25]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_the_first_round_is_that_without_controls_bit_for_bit(make: Any) -> None:
    plain, controlled = Net(), Net()
    run(plain, 5, None, make, weight_decay=0.1)
    run(controlled, 5, Controls(None, None), make, weight_decay=0.1)
    assert params(controlled).flat.tobytes() == params(plain).flat.tobytes()


def test_equal_controls_correct_nothing() -> None:
    plain, controlled = Net(), Net()
    run(plain, 5, None)
    run(controlled, 5, Controls(some(0), some(0)))
    assert params(controlled).flat.tobytes() == params(plain).flat.tobytes()


def test_each_control_belongs_to_its_parameter() -> None:
    """One step moves each parameter by its own gradient and its own correction."""
    module, shared, own = Net(), some(0), some(1)
    plain = Net()
    run(plain, 1, None)
    run(module, 1, Controls(shared, own))
    of, start = layout_of(module), params(Net())
    for entry in of.entries:
        if entry.kind == "param" and not entry.alias:
            place = slice(entry.offset, entry.offset + entry.size)
            moved = params(plain).flat[place] - RATE * (shared[place] - own[place])
            np.testing.assert_allclose(params(module).flat[place], moved, atol=1e-6)
            assert not np.allclose(moved, start.flat[place], atol=1e-6), entry.name
    assert sum(entry.kind == "param" for entry in of.entries) == 6  # the tied weight twice


def test_frozen_parameters_and_buffers_are_left_alone() -> None:
    plain, controlled = Net(), Net()
    run(plain, 1, None)
    run(controlled, 1, Controls(some(0), some(1)))
    assert torch.equal(controlled.frozen, Net().frozen)
    assert controlled.again.weight is controlled.first.weight
    before, after = plain.norm.state_dict(), controlled.norm.state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(before[name], after[name])


def test_a_parameter_without_a_gradient_has_the_gradient_zero() -> None:
    module = Net()
    entry = next(entry for entry in layout_of(module).entries if entry.name == "unused")
    place = slice(entry.offset, entry.offset + entry.size)
    shared, own = some(0), some(1)
    local = run(module, 3, Controls(shared, own))
    np.testing.assert_allclose(module.unused.detach(), 1 - 3 * RATE * (shared[place] - own[place]), rtol=1e-5)
    assert control_of(local)[place].tolist() == [0.0, 0.0]


def test_the_control_does_not_depend_on_prox_clipping_or_the_optimizer() -> None:
    def control(make: Any = torch.optim.SGD, **more: Any) -> Flat:
        module = Net()
        recipe = Recipe(mse, make, {"lr": RATE}, constant, **{"clip_norm": 0.0, **more})
        controlled = ControlledSteps(module, layout_of(module), Controls(some(0), some(1)))
        return control_of(
            run_local_steps(
                module,
                recipe,
                empty_inner_state(),
                steps(1),
                first_step=0,
                total_steps=1,
                controlled=controlled,
            )
        )

    plain = control().tobytes()
    assert (
        control(torch.optim.AdamW).tobytes() == control(clip_norm=0.1).tobytes() == control(prox=3.0).tobytes() == plain
    )


# A round ----------------------------------------------------------------------------------------------------------


def test_a_replica_keeps_its_control_and_sends_it() -> None:
    start, control = Broadcast(vector([0.0, 0.0])), np.float32([1.0, 2.0])
    sent, kept = contribute(start, vector([1.0, 1.0]), fresh_replica(), result(control=control), task(), CONTROL)
    assert sent.control is control
    assert kept.control is control


def test_controls_are_averaged_as_parameters_are() -> None:
    start = Broadcast(vector([0.0]), control=np.float32([9.0]))
    for weights, mean in (("samples", 4.0), ("uniform", 3.0), ("fednova", 4.0)):
        sent = [
            replace(update(0, 10, vector([1.0]), step_norm=1.0), control=np.float32([1.0])),
            replace(update(1, 30, vector([1.0]), step_norm=2.0), control=np.float32([5.0])),
        ]
        config = AverageConfig(control=True, weights=weights)  # type: ignore[arg-type]
        found = combine(start, [start] * 2, sent, (), config).broadcast.control
        assert found is not None
        assert found.tolist() == [mean]


def test_a_rejected_replica_keeps_the_control_that_it_had() -> None:
    start, before = Broadcast(vector([0.0])), ReplicaState(empty_inner_state(), control=np.float32([7.0]))
    bad, kept = contribute(start, vector([np.nan]), before, result(control=np.float32([3.0])), task(0), CONTROL)
    good, _ = contribute(start, vector([1.0]), fresh_replica(), result(control=np.float32([5.0])), task(1), CONTROL)
    assert kept is before
    found = combine(start, [start] * 2, [bad, good], (), CONTROL).broadcast
    assert found.control is not None
    assert (found.params.flat.tolist(), found.control.tolist()) == ([1.0], [5.0])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_control_that_is_not_finite_rejects_the_replica(bad: float) -> None:
    """An optimizer may leave out a gradient that is not finite, and keep its parameters finite."""
    start, before = Broadcast(vector([0.0])), ReplicaState(empty_inner_state(), control=np.float32([7.0]))
    sent, kept = contribute(start, vector([1.0]), before, result(control=np.float32([bad])), task(), CONTROL)
    assert not sent.contribution.finite
    assert kept is before


# Quadratics: f_k(x) = a_k (x - b_k)^2 / 2, many local steps ---------------------------------------------------------

CURVATURES, OPTIMA, SAMPLES = (4.0, 1.0, 0.5), (1.0, -2.0, 3.0), (10, 30, 20)
PARTS = [n * a for n, a in zip(SAMPLES, CURVATURES, strict=True)]
OPTIMUM = sum(part * b for part, b in zip(PARTS, OPTIMA, strict=True)) / sum(PARTS)


def quadratic(curvature: float, optimum: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda outputs, targets: (curvature / 2 * (outputs - optimum) ** 2).mean()


def trained(config: AverageConfig, rounds: int, local_steps: Sequence[int], rate: float = RATE) -> float:
    """Rounds of plain SGD on the quadratics; a replica's model returns its parameter."""
    module = nn.Linear(1, 1, bias=False)
    start, states = Broadcast(params(module)), [fresh_replica()] * 3
    batch = TensorBatch((torch.ones(1, 1),), torch.zeros(1, 1), 1)
    for number in range(1, rounds + 1):
        each = []
        for k, count in enumerate(local_steps):
            load_into(module, start.params)
            loss = quadratic(CURVATURES[k], OPTIMA[k])
            recipe = Recipe(loss, torch.optim.SGD, {"lr": rate}, constant, clip_norm=0.0)
            controls = Controls(start.control, states[k].control)
            local = run_local_steps(
                module,
                recipe,
                empty_inner_state(),
                [(1, [batch])] * count,
                first_step=0,
                total_steps=count,
                controlled=ControlledSteps(module, layout_of(module), controls) if config.control else None,
            )
            local = replace(local, samples=SAMPLES[k])
            each.append(contribute(start, params(module), states[k], local, task(k, number), config))
        states = [kept for _, kept in each]
        start = combine(start, [start] * 3, [sent for sent, _ in each], (), config).broadcast
    return float(start.params.flat[0])


@pytest.mark.parametrize("local_steps", [(10, 10, 10), (3, 20, 8)])
def test_the_bias_of_local_steps_vanishes_with_controls_only(local_steps: tuple[int, ...]) -> None:
    # without them replica k goes (1 - (1 - lr a_k)^H_k) of its way to b_k
    parts = [n * (1 - (1 - RATE * a) ** count) for n, a, count in zip(SAMPLES, CURVATURES, local_steps, strict=True)]
    biased = sum(part * b for part, b in zip(parts, OPTIMA, strict=True)) / sum(parts)
    assert abs(biased - OPTIMUM) > 0.1
    assert trained(AverageConfig(), 40, local_steps) == pytest.approx(biased, abs=1e-5)
    assert trained(CONTROL, 100, local_steps) == pytest.approx(OPTIMUM, abs=1e-5)
