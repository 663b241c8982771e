"""Classes of torchmetrics: values as they compute them over everything at once, and states that do not merge."""

from __future__ import annotations

import warnings
from functools import reduce

import pytest
import torch
import torchmetrics
from torchmetrics import classification, regression

from dtrain.algorithm.metrics.state import merge_parts
from dtrain.algorithm.metrics.torchmetric import direction, is_torchmetric, makes_metric, torchmetric, torchmetric_of
from dtrain.algorithm.recipe import metrics_of
from dtrain.config.schema import TrainTable
from dtrain.errors import InvalidConfig, ShapesDiffer


def numbers():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(60, generator=generator) + 280
    return targets + 0.5 * torch.randn(60, generator=generator), targets


def logits(classes):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, max(2, classes), (60,), generator=generator)
    if not classes:
        return torch.rand(60, generator=generator) * (labels * 2 - 1), labels  # many within [0, 1]
    return torch.randn(60, classes, generator=generator) + torch.nn.functional.one_hot(labels, classes), labels


def value_of(metric, outputs, targets, size):
    states = [metric.of_batch(*pair) for pair in zip(outputs.split(size), targets.split(size), strict=True)]
    return metric.value(*reduce(lambda one, other: merge_parts(one, other, metric.rules), states))


@pytest.mark.parametrize(
    ("make", "loss", "pair", "prepared"),
    [
        (regression.MeanAbsoluteError, "mse", numbers(), torch.Tensor.double),
        (regression.R2Score, "mse", numbers(), torch.Tensor.double),
        (regression.ExplainedVariance, "mae", numbers(), torch.Tensor.double),
        (torchmetrics.MeanSquaredError, "mse", numbers(), torch.Tensor.double),
        (classification.BinaryF1Score, "bce", logits(0), torch.Tensor.sigmoid),
        (lambda: classification.BinaryAUROC(thresholds=50), "bce", logits(0), torch.Tensor.sigmoid),
        (
            lambda: classification.MulticlassF1Score(num_classes=4),
            "cross_entropy",
            logits(4),
            lambda outputs: outputs.softmax(1),
        ),
        (
            lambda: classification.MulticlassAUROC(num_classes=4, thresholds=30),
            "cross_entropy",
            logits(4),
            lambda outputs: outputs.double().softmax(1),
        ),
    ],
)
def test_batches_merge_to_what_it_computes_over_everything(make, loss, pair, prepared):
    whole = make()
    whole.update(prepared(pair[0]), prepared(pair[1]) if pair[1].is_floating_point() else pair[1])
    metric = torchmetric(torchmetric_of(make), loss)
    for size in (1, 7, 60):
        assert value_of(metric, *pair, size) == pytest.approx(whole.compute().item(), rel=1e-5)


def test_numbers_are_summed_in_float64():
    outputs, targets = numbers()
    expected = ((outputs.double() - targets.double()) ** 2).mean().item()
    metric = torchmetric(torchmetric_of(regression.MeanSquaredError), "mse")
    assert value_of(metric, outputs, targets, 7) == pytest.approx(expected, rel=1e-14)


class Largest(torchmetrics.Metric):
    """A subclass of the user's, whose state is a maximum."""

    higher_is_better = False

    def __init__(self):
        super().__init__()
        self.add_state("largest", torch.tensor(-torch.inf), dist_reduce_fx="max")

    def update(self, outputs, targets):
        self.largest = torch.maximum(self.largest, (outputs - targets).abs().max())

    def compute(self):
        return self.largest


def test_states_may_be_largest_values():
    metric = torchmetric(torchmetric_of(Largest), "mse")
    outputs, targets = numbers()
    assert metric.rules == ("max",)
    expected = (outputs.double() - targets.double()).abs().max().item()
    assert value_of(metric, outputs, targets, 7) == expected


def test_a_class_an_object_and_a_function_without_arguments_stand_for_a_metric():
    mine = classification.BinaryF1Score(threshold=0.3)
    table = TrainTable(loss="bce", metrics=("m:a", "m:b", "m:c", "m:d"))

    def plain(outputs, targets):
        return 0.0

    own = {"m:a": classification.BinaryF1Score, "m:b": mine, "m:c": lambda: mine, "m:d": plain}
    metrics = metrics_of(table, {f"train.metrics.{name}": function for name, function in own.items()})
    outputs, labels = logits(0)
    values = {name: value_of(metric, outputs, labels, 20) for name, metric in metrics.items()}
    assert values["b"] == values["c"] != values["a"]
    assert values["d"] == 0.0
    with pytest.warns(UserWarning, match="before the ``update``"):
        mine.compute()  # what the run sums up stays out of the user's own object


@pytest.mark.parametrize(
    ("given", "text", "hint"),
    [
        (
            classification.BinaryAUROC,
            "BinaryAUROC keeps all values in its state preds and target, which grows with the data",
            "BinaryAUROC(thresholds=200, ...)",
        ),
        (regression.SpearmanCorrCoef, "SpearmanCorrCoef keeps all values", "whose states are sums"),
        (regression.PearsonCorrCoef, "the state mean_x of PearsonCorrCoef does not merge: its dist_reduce_fx is", ""),
        (classification.MulticlassF1Score, "MulticlassF1Score of torchmetrics needs arguments: ", "def skill()"),
        (torchmetrics.F1Score, "F1Score of torchmetrics needs arguments", '"model:skill"'),
        (torchmetrics.MetricCollection([regression.R2Score()]), "collections and wrappers", "Name each metric alone"),
        (lambda: 0.5, "<lambda>() returned float; a function without arguments returns a metric", "Return one"),
    ],
)
def test_what_does_not_merge_is_refused(given, text, hint):
    with pytest.raises(InvalidConfig) as caught:
        torchmetric_of(given)
    assert text in caught.value.message
    assert hint in caught.value.hint


def test_a_mean_of_means_is_refused():
    class Mean(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("mean", torch.tensor(0.0), dist_reduce_fx="mean")

        def update(self, outputs, targets):
            pass

        def compute(self):
            return self.mean

    with pytest.raises(InvalidConfig, match="the state mean of Mean does not merge: its dist_reduce_fx is mean"):
        torchmetric_of(Mean)


def test_a_metric_of_several_numbers_is_refused():
    metric = torchmetric(classification.MulticlassF1Score(num_classes=4, average=None), "cross_entropy")
    with pytest.raises(ShapesDiffer, match=r"MulticlassF1Score gives float32\[4\]; a metric of dtrain is one number"):
        value_of(metric, *logits(4), 20)


def test_classes_that_do_not_occur_give_no_warning():
    metric = torchmetric(classification.BinaryAUROC(thresholds=10), "bce")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value_of(metric, torch.randn(6), torch.zeros(6, dtype=torch.int64), 3) == 0.0


def test_masks_of_floats_are_labels():
    outputs, labels = logits(0)
    metric = torchmetric(classification.BinaryF1Score(), "bce")
    assert value_of(metric, outputs, labels.float(), 20) == value_of(metric, outputs, labels, 20)


def test_directions():
    assert direction(classification.BinaryF1Score) is True
    assert direction(regression.MeanAbsoluteError()) is False
    assert direction(torchmetrics.MeanMetric) is None
    assert direction(lambda outputs, targets: 0.0) is None
    assert is_torchmetric(Largest)
    assert not is_torchmetric(torch.nn.MSELoss())
    assert not makes_metric(lambda outputs, targets: 0.0)
