"""Weights of samples in losses and metrics: sums of weight times term, and sums of weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from dtrain.algorithm.batch import TensorBatch
from dtrain.algorithm.local import run_local_steps
from dtrain.algorithm.losses import LOSSES, bce, cross_entropy, huber, loss_named, mae, mean_of_batch, mse
from dtrain.algorithm.metrics.named import metric_named
from dtrain.algorithm.metrics.state import of_sums
from dtrain.algorithm.metrics.terms import accuracy, mean_over_batch
from dtrain.algorithm.recipe import recipe_of
from dtrain.algorithm.replica import empty_inner_state
from dtrain.config.functions import takes_weight
from dtrain.config.schema import TrainTable
from tests.algorithm.helpers import measured

NAN = math.nan


def floats(*values):
    return torch.tensor(values, dtype=torch.float32)


def pair(name, count=60, axes=()):
    """Outputs and targets that a loss takes."""
    generator = torch.Generator().manual_seed(count)
    outputs = torch.randn(count, *axes, generator=generator)
    if name == "cross_entropy":
        outputs = torch.randn(count, 3, *axes, generator=generator)
        return outputs, torch.randint(0, 3, (count, *axes), generator=generator)
    if name == "bce":
        return outputs, torch.randint(0, 2, (count, *axes), generator=generator)
    return outputs, torch.randn(count, *axes, generator=generator)


def mean(name, outputs, targets, weight=None):
    value = LOSSES[name](outputs, targets) if weight is None else LOSSES[name](outputs, targets, weight)
    return mean_of_batch(value, len(targets))


# Values by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weight", [floats(1.0, 0.5, 2.0, 4.0), torch.tensor([1.0, 0.5, 2.0, 4.0], dtype=torch.float64)]
)
def test_mse_mae_and_huber_by_hand(weight):
    outputs, targets = floats(1.0, 2.0, 5.0, 0.0), floats(1.0, 0.0, 1.0, 0.5)
    # errors 0, 2, 4, -0.5
    for loss, total in (
        (mse, 0 + 0.5 * 4 + 2 * 16 + 4 * 0.25),
        (mae, 0 + 0.5 * 2 + 2 * 4 + 4 * 0.5),
        (huber, 0 + 0.5 * 1.5 + 2 * 3.5 + 4 * 0.125),
    ):
        found = loss(outputs, targets, weight)
        assert (found[0].item(), found[1]) == (total, 7.5)


def test_bce_by_hand():
    # -log sigmoid(0) = log 2; -log(1 - sigmoid(log 3)) = log 4
    outputs, weight = floats(0.0, math.log(3.0), 7.0), floats(3.0, 1.0, 5.0)
    for targets in (torch.tensor([1, 0, -100]), floats(1.0, 0.0)):
        count = len(targets)
        total, counted = bce(outputs[:count], targets, weight[:count])
        assert total.item() == pytest.approx(3 * math.log(2) + math.log(4), rel=1e-6)
        assert counted == 4.0


def test_cross_entropy_by_hand():
    # probabilities 1/2, 1/4, 1/4
    outputs = torch.log(floats(2.0, 1.0, 1.0)).repeat(3, 1)
    total, count = cross_entropy(outputs, torch.tensor([0, 2, -100]), floats(1.5, 2.0, 9.0))
    assert total.item() == pytest.approx(1.5 * math.log(2) + 2 * math.log(4), rel=1e-6)
    assert count == 3.5
    last = cross_entropy(outputs[None], torch.tensor([[0, 2, -100]]), floats(1.5, 2.0, 9.0)[None], class_axis=-1)
    assert (last[0].item(), last[1]) == (pytest.approx(total.item()), 3.5)


def test_accuracy_by_hand():
    outputs = floats([3, 1], [0, 2], [5, 1], [0, 1])
    # right, wrong, left out, right
    assert accuracy(outputs, torch.tensor([0, 0, -100, 1]), floats(0.5, 1.5, 7.0, 0.25)) == (0.75, 2.25)
    assert accuracy(floats(1.0, -1.0), floats(1.0, 1.0), floats(2.0, 3.0)) == (2.0, 5.0)


@pytest.mark.parametrize(("name", "expected"), [("mse", (1 * 4 + 3 * 9, 4.0)), ("mae", (1 * 2 + 3 * 3, 4.0))])
def test_metrics_by_hand(name, expected):
    outputs, targets = floats([2.0], [4.0]).double(), floats([0.0], [1.0]).double()
    assert tuple(metric_named(name).of_batch(outputs, targets, floats([1.0], [3.0]))[0]) == expected


def test_the_metrics_of_the_loss_are_of_the_weighted_mean():
    x, y = pair("cross_entropy", 4)
    batch = TensorBatch((x,), y, 4, weight=floats(1.0, 2.0, 0.0, 1.0))
    found = measured(cross_entropy, {}, [batch], ["perplexity", "bits_per_byte"])
    terms = nn.functional.cross_entropy(x, y, reduction="none")
    loss = ((terms[0] + 2 * terms[1] + terms[3]) / 4).item()
    assert found == pytest.approx({"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2)})


# Identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [(), (5, 7)])
@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_1_change_nothing(name, axes):
    """To the bit; cross entropy, whose sum torch adds in another order, and gradients to rounding."""
    outputs, targets = pair(name, 100, axes)
    found = []
    for weight in (None, torch.ones(targets.shape)):
        own = outputs.clone().requires_grad_()
        one = mean(name, own, targets, weight)
        one.value.backward()
        found.append((one.value.detach(), own.grad))
    (value, gradient), (weighted, weighted_gradient) = found
    torch.testing.assert_close(weighted, value, rtol=1e-6 if name == "cross_entropy" else 0, atol=0)
    torch.testing.assert_close(weighted_gradient, gradient, rtol=2e-7, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_sample_of_weight_2_stands_for_two(name):
    outputs, targets = pair(name, 6)
    weight = torch.ones(6)
    weight[2] = 2
    twice = [0, 1, 2, 2, 3, 4, 5]
    once = mean(name, outputs, targets, weight)
    assert once.count == 7
    assert once.value.item() == pytest.approx(mean(name, outputs[twice], targets[twice]).value.item(), rel=1e-6)


@pytest.mark.parametrize("name", [*LOSSES, "accuracy"])
def test_what_has_weight_0_does_not_count(name):
    """Whatever its target is: no number, no class."""
    function = accuracy if name == "accuracy" else LOSSES[name]
    outputs, targets = pair("cross_entropy" if name == "accuracy" else name, 6)
    odd, weight = targets.clone(), floats(1.0, 0.5, 0.0, 2.0, 1.0, 1.0)
    odd[2] = NAN if targets.is_floating_point() else 17
    kept = [0, 1, 3, 4, 5]
    own = outputs.clone().requires_grad_()
    total, count = function(own, odd, weight)
    alone, counted = function(outputs[kept], targets[kept], weight[kept])
    assert (float(total.detach() if name != "accuracy" else total), count) == (
        pytest.approx(float(alone), rel=1e-6),
        counted,
    )
    if name != "accuracy":
        total.backward()
        assert not own.grad[2].any()
        assert torch.isfinite(own.grad).all()


# Steps and evaluations ------------------------------------------------------------------------------------------


def step(micro_batches, loss="mse"):
    """The gradient of one batch, as the step of SGD with a rate of 1."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    before = [p.detach().clone() for p in module.parameters()]
    recipe = recipe_of(TrainTable(loss=loss, optimizer_args={"lr": 1.0}), {})
    steps = [(sum(batch.size for batch in micro_batches), micro_batches)]
    result = run_local_steps(module, recipe, empty_inner_state(), steps, first_step=0, total_steps=1)
    return result, [a - b.detach() for a, b in zip(before, module.parameters(), strict=True)]


def test_micro_batches_add_up_to_the_batch():
    x, y = torch.randn(9, 3), torch.randn(9, 2)
    weight = torch.rand(9, 1).expand_as(y)
    parts = zip(x.split([4, 3, 2]), y.split([4, 3, 2]), weight.split([4, 3, 2]), strict=True)
    whole, gradient = step([TensorBatch((x,), y, 9, weight=weight)])
    split, added = step([TensorBatch((a,), b, len(b), weight=w) for a, b, w in parts])
    assert (split.loss_sum, split.loss_count) == (
        pytest.approx(whole.loss_sum, rel=1e-6),
        pytest.approx(weight.double().sum().item()),
    )
    assert split.samples == whole.samples == 9  # n_k counts rows
    for one, other in zip(gradient, added, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-7)


def test_a_micro_batch_of_weight_0_changes_nothing():
    x, y, zero = torch.randn(6, 3), torch.randn(6, 2), torch.zeros(2, 2)
    rest = TensorBatch((x[2:],), y[2:], 4, weight=torch.ones(4, 2))
    result, gradient = step([TensorBatch((x[:2],), y[:2], 2, weight=zero), rest])
    alone, expected = step([rest])
    assert (result.loss_sum, result.loss_count) == (alone.loss_sum, alone.loss_count) == (alone.loss_sum, 8)
    for one, other in zip(expected, gradient, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-8)


def test_batches_of_an_evaluation_add_up():
    x, y = pair("mse", 10, (2,))
    weight = torch.rand(10, 2)
    plain = of_sums(mean_over_batch(lambda o, t: (o - t).mean()))
    metrics = {"mae": metric_named("mae"), "bias": of_sums(mean_over_batch(bias)), "plain": plain}

    def sums(size):
        parts = zip(x.split(size), y.split(size), weight.split(size), strict=True)
        batches = [TensorBatch((a,), b, len(b), weight=w) for a, b, w in parts]
        return measured(mse, metrics, batches, ["mae", "m:bias", "m:plain"])

    error = (x - y).double()
    assert sums(3) == pytest.approx(sums(10), rel=1e-6)
    assert sums(3) == pytest.approx(
        {
            "loss": ((error**2 * weight).sum() / weight.sum()).item(),
            "mae": ((error.abs() * weight).sum() / weight.sum()).item(),
            "bias": ((error * weight).sum() / weight.sum()).item(),
            "plain": error.mean().item(),
        },
        rel=1e-5,
    )


# Functions of the user's ----------------------------------------------------------------------------------------


def bias(outputs, targets, weight):
    return ((outputs - targets) * weight).sum(), weight.sum()


class Own(nn.Module):
    def forward(self, outputs, targets, w):
        return (outputs - targets).mean()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (bias, True),
        (Own(), True),
        (lambda outputs, targets, weights=None: 0, True),
        (lambda *given: 0, True),
        (lambda outputs, targets: 0, False),
        (lambda outputs, targets, eps=1e-6: 0, False),
        (lambda outputs, targets, *, weight=None: 0, False),
        (nn.MSELoss(), False),
        (nn.functional.cross_entropy, False),  # its third argument has a weight for each class
        (nn.GaussianNLLLoss(), False),
        (max, False),
    ],
)
def test_the_third_argument_of_a_function_is_a_weight(function, expected):
    assert takes_weight(function) is expected


def test_names_of_losses_take_a_weight():
    outputs, targets = pair("cross_entropy", 4)
    assert loss_named("cross_entropy", -1)(outputs, targets, torch.full((4,), 0.5))[1] == 2.0
