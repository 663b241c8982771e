"""Losses and metrics over finite targets, against torch by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dtrain.algorithm.batch import TensorBatch
from dtrain.algorithm.losses import LOSSES, mean_of_batch
from dtrain.algorithm.masked import of_finite_targets
from dtrain.algorithm.metrics.named import metric_named
from dtrain.algorithm.recipe import metrics_of, recipe_of
from dtrain.config.schema import TrainTable
from dtrain.errors import ShapesDiffer
from tests.algorithm.helpers import measured

NAN, INF = math.nan, math.inf
BY_HAND = {
    "mse": F.mse_loss,
    "mae": F.l1_loss,
    "huber": F.huber_loss,
    "bce": F.binary_cross_entropy_with_logits,
}


def tensors():
    torch.manual_seed(0)
    outputs = torch.randn(4, 3, requires_grad=True)
    targets = torch.rand(4, 3)
    targets[0, 1], targets[2], targets[3, 0] = NAN, NAN, INF
    return outputs, targets


@pytest.mark.parametrize("name", BY_HAND)
def test_a_loss_is_the_mean_over_finite_targets(name):
    outputs, targets = tensors()
    finite = torch.isfinite(targets)
    mean = mean_of_batch(of_finite_targets(LOSSES[name])(outputs, targets), 4)
    wanted = BY_HAND[name](outputs[finite], targets[finite])
    assert mean.value.item() == pytest.approx(wanted.item())
    assert mean.count == 7 / 3  # of three values a sample
    mean.value.backward()
    grad, outputs.grad = outputs.grad.clone(), None
    wanted.backward()
    torch.testing.assert_close(grad, outputs.grad)
    assert (grad[~finite] == 0).all()


@pytest.mark.parametrize("name", BY_HAND)
def test_finite_targets_give_the_bits_of_before(name):
    outputs, targets = torch.randn(5, 2), torch.rand(5, 2)
    own = of_finite_targets(LOSSES[name])(outputs, targets)
    assert isinstance(own, torch.Tensor)
    assert torch.equal(own, LOSSES[name](outputs, targets))


def test_a_batch_without_finite_targets_counts_nothing():
    outputs = torch.randn(2, 2, requires_grad=True)
    mean = mean_of_batch(of_finite_targets(LOSSES["mse"])(outputs, torch.full((2, 2), NAN)), 2)
    assert (mean.value.item(), mean.count) == (0.0, 0.0)
    mean.value.backward()
    assert (outputs.grad == 0).all()


def test_batches_add_up_to_the_mean_over_all_finite_targets():
    inputs, targets = torch.randn(6, 2), torch.rand(6, 2)
    targets[4:, 0] = NAN
    recipe = recipe_of(TrainTable(loss="mse"), {}, finite_targets=True)
    metrics = metrics_of(TrainTable(loss="mse", metrics=("mse", "mae", "accuracy")), {}, True)
    halves = [TensorBatch((inputs[part],), targets[part], 3) for part in (slice(3), slice(3, 6))]
    found = measured(recipe.loss, metrics, halves, ("mse", "mae", "accuracy"))
    finite = torch.isfinite(targets)
    errors = (inputs - targets)[finite]
    assert found["loss"] == found["mse"] == pytest.approx(float((errors**2).mean()))
    assert found["mae"] == pytest.approx(float(errors.abs().mean()))
    right = ((inputs > 0) == (targets > 0.5))[finite]
    assert found["accuracy"] == pytest.approx(float(right.float().mean()))


def test_a_loss_of_the_users_and_labels_are_as_they_were():
    def own(outputs, targets):
        return (outputs - targets).sum()

    assert recipe_of(TrainTable(loss="m:own"), {"train.loss": own}, finite_targets=True).loss is own
    logits, labels = torch.randn(4, 3), torch.tensor([0, -100, 2, 1])
    loss = recipe_of(TrainTable(loss="cross_entropy"), {}, finite_targets=True).loss
    assert float(mean_of_batch(loss(logits, labels), 4).value) == pytest.approx(float(F.cross_entropy(logits, labels)))
    assert metric_named("accuracy", "auto", True).of_batch(logits, labels)[0][1] == 3
    with pytest.raises(ShapesDiffer, match="mse: the model's output"):
        of_finite_targets(LOSSES["mse"])(torch.zeros(2, 1), torch.full((2,), NAN))


def test_weights_of_targets_that_are_not_finite_are_0():
    outputs, weight = (
        torch.tensor([[1.0], [2.0], [3.0], [4.0]], requires_grad=True),
        torch.tensor([[2.0], [5.0], [1.0], [0.0]]),
    )
    targets = torch.tensor([[0.0], [NAN], [5.0], [INF]])
    total, count = of_finite_targets(LOSSES["mse"])(outputs, targets, weight)
    assert (float(total.detach()), count) == (2 * 1.0 + 1 * 4.0, 3.0)
    total.backward()
    assert outputs.grad.flatten().tolist() == [4.0, 0.0, -4.0, 0.0]
    metrics = metrics_of(TrainTable(loss="mse", metrics=("mae", "accuracy")), {}, True)
    assert metrics["mae"].of_batch(outputs.detach(), targets, weight)[0].tolist() == [2 * 1.0 + 1 * 2.0, 3.0]
    assert metrics["accuracy"].of_batch(outputs.detach(), targets, weight)[0].tolist() == [1.0, 3.0]
