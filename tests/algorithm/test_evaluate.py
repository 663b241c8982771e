from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dtrain.algorithm.batch import TensorBatch
from dtrain.algorithm.evaluate import evaluate, merge, values
from dtrain.algorithm.losses import cross_entropy, mse
from dtrain.algorithm.metrics.named import metric_named
from dtrain.algorithm.metrics.state import of_sums
from dtrain.algorithm.metrics.terms import accuracy, mean_over_batch
from dtrain.config.names import metric_key
from dtrain.errors import InvalidConfig, ShapesDiffer
from tests.algorithm.helpers import means, measured, pair_of
from tests.sampling import examples

ACCURACY = {"accuracy": metric_named("accuracy")}


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))


def samples(count):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def batches(x, y, size):
    return [TensorBatch((a,), b, len(b)) for a, b in zip(x.split(size), y.split(size), strict=True)]


# Pieces and the whole -------------------------------------------------------------------------------------------


@examples(20)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(3, 12))
def test_pieces_give_what_one_pass_gives(pieces, size):
    x, y = samples(sum(pieces))
    module, metrics = classifier(), ACCURACY
    whole = evaluate(module, cross_entropy, metrics, batches(x, y, len(x)))
    parts = [
        evaluate(module, cross_entropy, metrics, batches(a, b, size))
        for a, b in zip(x.split(pieces), y.split(pieces), strict=True)
    ]
    merged = merge(parts)
    assert pair_of(merged, "loss")[1] == pair_of(merged, "accuracy")[1] == merged.samples == len(x)
    assert pair_of(merged, "accuracy") == pair_of(whole, "accuracy")
    assert pair_of(merged, "loss")[0] == pytest.approx(pair_of(whole, "loss")[0], rel=1e-5)


def test_loss_and_accuracy_are_those_of_the_eval_mode():
    x, y = samples(50)
    module = classifier().train()
    found = measured(cross_entropy, ACCURACY, batches(x, y, 7), ["accuracy"], module=module)
    module.eval()
    outputs = module(x)
    right = sum(int(row.index(max(row)) == label) for row, label in zip(outputs.tolist(), y.tolist(), strict=True))
    assert 0 < right < 50
    assert found["accuracy"] == right / 50
    assert found["loss"] == pytest.approx(nn.functional.cross_entropy(outputs, y).item(), rel=1e-6)
    assert module[1].num_batches_tracked.item() == 0


def test_nothing_is_recorded_for_gradients():
    x, y = samples(6)
    seen = []

    def loss(outputs, targets):
        seen.append(outputs.requires_grad)
        return cross_entropy(outputs, targets)

    evaluate(classifier(), loss, {}, batches(x, y, 3))
    assert seen == [False, False]


def test_sums_merge_in_the_order_given():
    pieces = [means(1, (1e16, 1)), means(2, (1.0, 2)), means(3, (-1e16, 3))]
    merged = merge(pieces)
    assert (merged.samples, merged.by_group.tolist()) == (6, [6])
    assert pair_of(merged, "loss") == (0.0, 6)  # 1 is lost behind 1e16
    assert pair_of(merge([pieces[0], pieces[2], pieces[1]]), "loss") == (1.0, 6)
    only = merge([means(2, (0.5, 2), mae=(1.5, 2))])
    assert (pair_of(only, "loss"), pair_of(only, "mae")) == ((0.5, 2), (1.5, 2))


def test_no_batches_give_nan():
    found = measured(cross_entropy, ACCURACY, [], ["accuracy", "perplexity"], module=classifier())
    assert all(math.isnan(value) for value in found.values())
    assert set(found) == {"loss", "accuracy", "perplexity"}


def test_batches_of_other_sizes_count_by_their_samples():
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0.0)
    given = [
        TensorBatch((torch.zeros(1, 1),), torch.tensor([[2.0]]), 1),
        TensorBatch((torch.zeros(3, 1),), torch.tensor([[0.0], [0.0], [3.0]]), 3),
    ]
    # squares 4 and 0, 0, 9; absolute errors 2 and 0, 0, 3
    metrics = {name: metric_named(name) for name in ("mae", "mse", "rmse")}
    found = measured(mse, metrics, given, list(metrics), module=module)
    assert found == {"loss": 3.25, "mae": 1.25, "mse": 3.25, "rmse": math.sqrt(3.25)}


# Metrics --------------------------------------------------------------------------------------------------------


def test_accuracy_with_the_classes_on_axis_1():
    outputs = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert accuracy(outputs, torch.tensor([1, 0, 0])) == (2.0, 3)
    image = torch.stack([torch.zeros(2, 3), torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])]).unsqueeze(0)
    assert image.shape == (1, 2, 2, 3)
    assert accuracy(image, torch.tensor([[[1, 0, 0], [0, 1, 0]]])) == (4.0, 6)


def test_accuracy_with_the_classes_last():
    outputs = torch.tensor([[[9.0, 0, 0, 0, 0], [0, 9, 0, 0, 0]], [[0, 0, 9, 0, 0], [0, 0, 0, 0, 9]]])
    assert outputs.shape == (2, 2, 5)
    assert accuracy(outputs, torch.tensor([[0, 1], [2, 3]])) == (3.0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_accuracy_of_two_classes_takes_logits(dtype):
    outputs = torch.tensor([2.0, -1.0, 0.1, -0.1, 0.0])
    assert accuracy(outputs, torch.tensor([1, 0, 0, 1, 0]).to(dtype)) == (3.0, 5)
    assert accuracy(outputs.reshape(5, 1), torch.tensor([1, 0, 0, 1, 0]).to(dtype).reshape(5, 1)) == (3.0, 5)


def test_accuracy_names_shapes_that_do_not_fit():
    with pytest.raises(InvalidConfig, match=r"shape \[4, 1\], the target \[4\]"):
        accuracy(torch.zeros(4, 1), torch.zeros(4))
    with pytest.raises(ShapesDiffer, match=r"float32\[4, 3\], the target int64\[5\]"):
        accuracy(torch.zeros(4, 3), torch.zeros(5, dtype=torch.int64))


def test_perplexity_and_bits_per_byte_are_of_the_mean_loss():
    found = values(means(3, (3 * math.log(8.0), 3)), ["perplexity", "bits_per_byte"], {})
    assert found == {
        "loss": pytest.approx(math.log(8.0), rel=1e-12),
        "perplexity": pytest.approx(8.0, rel=1e-12),
        "bits_per_byte": pytest.approx(3.0, rel=1e-12),
    }


def test_the_perplexity_of_a_huge_loss_is_infinite_and_of_nan_nan():
    assert values(means(1, (1e6, 1)), ["perplexity"], {})["perplexity"] == math.inf
    assert math.isnan(values(means(1, (math.nan, 1)), ["perplexity"], {})["perplexity"])


def test_only_the_wanted_metrics_are_returned():
    sums, metrics = means(2, (2.0, 2), mae=(4.0, 2)), {"mae": metric_named("mae")}
    assert values(sums, [], metrics) == {"loss": 1.0}
    assert values(sums, ["mae"], metrics) == {"loss": 1.0, "mae": 2.0}


def test_a_metric_of_the_users_is_averaged_over_the_samples():
    bias = mean_over_batch(lambda outputs, targets: (outputs - targets).mean())
    sums = [bias(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)), bias(torch.tensor([10.0]), torch.zeros(1))]
    assert sums == [(6.0, 3), (10.0, 1)]
    merged = merge([means(3, (0.0, 1), bias=pair) for pair in sums])
    assert values(merged, ["mine:bias"], {"bias": of_sums(bias)})["bias"] == 4.0


def test_a_metric_over_several_targets_counts_the_first():
    metric = mean_over_batch(lambda outputs, targets: 0.5)
    assert metric(torch.zeros(6, 2), (torch.zeros(6), torch.zeros(6, 9))) == (3.0, 6)


def test_metrics_are_reported_by_the_name_of_the_function():
    assert metric_key("mine:skill.score") == "score"
    assert metric_key("accuracy") == "accuracy"


# What counts ----------------------------------------------------------------------------------------------------


def labelled(count, share):
    """Samples of which some targets are ignored."""
    x, y = samples(count)
    return x, torch.where(torch.rand(count, generator=torch.Generator().manual_seed(2)) < share, -100, y)


@pytest.mark.parametrize("size", [1, 7, 50])
def test_ignored_targets_count_neither_in_loss_nor_in_accuracy(size):
    x, y = labelled(50, 0.6)
    module = classifier().eval()
    own = y != -100
    assert 10 < own.sum() < 30
    got = measured(cross_entropy, ACCURACY, batches(x, y, size), ["accuracy", "perplexity"], module=module)
    logits = module(x)[own]
    assert got["accuracy"] == (logits.argmax(1) == y[own]).double().mean().item()
    assert got["loss"] == pytest.approx(nn.functional.cross_entropy(logits, y[own]).item(), rel=1e-6)
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]), rel=1e-12)


def test_no_counted_target_gives_nan():
    x, y = samples(6)
    sums = evaluate(classifier(), cross_entropy, ACCURACY, batches(x, torch.full_like(y, -100), 3))
    assert (sums.samples, pair_of(sums, "loss"), pair_of(sums, "accuracy")) == (6, (0.0, 0), (0.0, 0))
    assert all(math.isnan(value) for value in values(sums, ["accuracy"], ACCURACY).values())


def test_a_loss_and_a_metric_may_return_sum_and_count():
    weights = torch.tensor([1.0, 0.0, 3.0, 2.0, 5.0, 1.0])

    def loss(outputs, targets):  # the weight of a sample is its target
        return ((outputs[:, 0] - 1) ** 2 * targets).sum(), targets.sum()

    def share(outputs, targets):
        return (outputs[:, 0] > 0).float() @ targets, targets.sum().item()

    x = torch.arange(6.0).reshape(6, 1) - 2
    for size in (1, 2, 4, 6):
        given = [TensorBatch((a,), b, len(b)) for a, b in zip(x.split(size), weights.split(size), strict=True)]
        got = measured(loss, {"share": of_sums(mean_over_batch(share))}, given, ["mine:share"])
        # errors -3 -2 -1 0 1 2: 9 * 1 + 0 + 1 * 3 + 0 + 1 * 5 + 4 * 1
        assert got == {"loss": pytest.approx(21 / 12), "share": pytest.approx(8 / 12)}


@pytest.mark.parametrize("value", ["0.5", None, torch.zeros(2), (1.0,), (1.0, -1), (1.0, True), (1.0, math.nan), {}])
def test_what_is_no_metric_is_named(value):
    def skill(outputs, targets):
        return value

    with pytest.raises(ShapesDiffer, match=r"metric skill returned .*\(sum, count\)"):
        mean_over_batch(skill)(torch.zeros(3), torch.zeros(3))


def test_the_class_axis_of_accuracy_can_be_given():
    outputs = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])  # [sample, 2, 2]
    targets = torch.tensor([[0, 0]])
    with pytest.raises(ShapesDiffer, match="train.class_axis"):
        accuracy(outputs, targets)
    assert accuracy(outputs, targets, class_axis=-1) == (2.0, 2)
    assert accuracy(outputs, torch.tensor([[0, 0]]), class_axis=1) == (2.0, 2)
    assert metric_named("accuracy", 1).of_batch(outputs, torch.tensor([[1, 0]]))[0].tolist() == [1.0, 2]


def test_metrics_are_computed_in_decoded_units_and_the_loss_is_not():
    x = torch.tensor([[0.0], [1.0], [2.0]])
    given = [TensorBatch((x,), torch.zeros(3, 1), 3)]

    def decode(outputs, targets):
        return outputs.double() * 10 + 1e9, targets.double() * 10 + 1e9

    got = measured(mse, {"mae": metric_named("mae")}, given, ["mae"], decode=decode)
    assert got == {"loss": pytest.approx(5 / 3), "mae": 10.0}
