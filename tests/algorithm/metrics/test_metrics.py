"""The built-in metrics against formulas written out, and states that merge to those of the whole."""

from __future__ import annotations

import math
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.algorithm.metrics.curve import auroc_error, auroc_value
from dtrain.algorithm.metrics.named import metric_named
from dtrain.algorithm.metrics.state import Metric, add_moments, empty_state, merge_parts, merged
from dtrain.errors import ShapesDiffer
from tests.sampling import examples

NUMBERS = ("mse", "mae", "rmse", "r2", "anomaly_correlation")
CLASSES = ("accuracy", "f1", "iou", "dice", "auroc")


def value_of(metric: Metric, *batches, **more):
    """The value of several batches, (outputs, targets[, weight]) each."""
    states = [metric.of_batch(*batch, **more) for batch in batches]
    return metric.value(*reduce(lambda one, other: merge_parts(one, other, metric.rules), states))


def numbers(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(count, 3, generator=generator)
    return targets + 0.5 * torch.randn(count, 3, generator=generator), targets


def classes(count, seed=0, number=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, number, (count,), generator=generator)
    logits = torch.randn(count, number, generator=generator) + 1.5 * torch.nn.functional.one_hot(labels, number)
    return logits, labels


# Values by hand -------------------------------------------------------------------------------------------------


def test_r2_by_hand():
    """That of scikit-learn's documentation: r2_score([3, -0.5, 2, 7], [2.5, 0.0, 2, 8]) is 0.948..."""
    pair = torch.tensor([2.5, 0.0, 2.0, 8.0]), torch.tensor([3.0, -0.5, 2.0, 7.0])
    assert value_of(metric_named("r2"), pair) == pytest.approx(0.9486081370449679, rel=1e-15)
    weighted = value_of(metric_named("r2"), (*pair, torch.tensor([1.0, 2.0, 0.0, 1.0])))
    mean = (3 - 2 * 0.5 + 7) / 4
    squares = (3 - mean) ** 2 + 2 * (-0.5 - mean) ** 2 + (7 - mean) ** 2
    assert weighted == pytest.approx(1 - (0.25 + 2 * 0.25 + 1) / squares, rel=1e-14)
    assert math.isnan(value_of(metric_named("r2"), (pair[0], torch.ones(4))))


def test_r2_keeps_a_small_spread_on_a_large_mean():
    """Squares of the targets themselves would lose it: 1e9 squared is 1e18."""
    targets = torch.tensor([1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3], dtype=torch.float64)
    outputs = targets + torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=torch.float64)
    alone = [(outputs[k : k + 1], targets[k : k + 1]) for k in range(4)]
    assert value_of(metric_named("r2"), (outputs, targets)) == 1 - 1 / 5
    assert value_of(metric_named("r2"), *alone) == pytest.approx(1 - 1 / 5, rel=1e-12)


def test_counts_by_class_by_hand():
    """Labels 0 1 2 2, predicted 0 2 2 2; class 3 occurs nowhere and counts in no mean."""
    logits = torch.eye(4)[[0, 2, 2, 2]]
    pair = logits, torch.tensor([0, 1, 2, 2])
    assert value_of(metric_named("f1"), pair) == pytest.approx((1 + 0 + 4 / 5) / 3)
    assert value_of(metric_named("dice"), pair) == value_of(metric_named("f1"), pair)
    assert value_of(metric_named("iou"), pair) == pytest.approx((1 + 0 + 2 / 3) / 3)
    weighted = (*pair, torch.tensor([1.0, 0.0, 3.0, 1.0]))
    assert value_of(metric_named("iou"), weighted) == 1.0  # what is wrong has weight 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_masks_by_hand(dtype):
    """The class that is there: 2 right, 1 too many, 1 missed."""
    logits = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[-1.0, -1.0], [-0.1, 0.0]]])
    masks = torch.tensor([[[1, 1], [0, 1]], [[0, 0], [0, 0]]]).to(dtype)
    assert value_of(metric_named("f1"), (logits, masks)) == 4 / 6
    assert value_of(metric_named("iou"), (logits, masks)) == 2 / 4
    assert math.isnan(value_of(metric_named("iou"), (-logits.abs(), torch.zeros_like(masks))))


def test_auroc_by_hand():
    logits, labels = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1])
    assert value_of(metric_named("auroc"), (logits, labels)) == 0.75  # scikit-learn's roc_auc_score
    assert value_of(metric_named("auroc"), (torch.zeros(4), labels)) == 0.5
    assert value_of(metric_named("auroc"), (logits, labels, torch.tensor([1.0, 3.0, 1.0, 1.0]))) == 5 / 8
    assert math.isnan(value_of(metric_named("auroc"), (logits, torch.ones(4))))
    assert math.isnan(value_of(metric_named("auroc"), (torch.tensor([math.nan, 1.0]), torch.tensor([0, 1]))))
    far = torch.tensor([-1e30, 1e30, -math.inf, math.inf])
    assert value_of(metric_named("auroc"), (far, torch.tensor([0, 1, 0, 1]))) == 1.0


def test_anomaly_correlation_by_hand():
    climate = torch.tensor([10.0, 20.0, 30.0])
    outputs, targets = torch.tensor([11.0, 18.0, 30.0]), torch.tensor([12.0, 21.0, 27.0])
    # anomalies 1 -2 0 and 2 1 -3
    metric = metric_named("anomaly_correlation")
    assert value_of(metric, (outputs, targets), climate=climate) == pytest.approx(0 / math.sqrt(5 * 14))
    weight = torch.tensor([1.0, 0.0, 2.0])
    expected = 2 / math.sqrt(1 * (4 + 2 * 9))
    assert value_of(metric, (outputs, targets, weight), climate=climate) == pytest.approx(expected)
    assert value_of(metric, (targets, targets), climate=climate) == pytest.approx(1.0)
    assert math.isnan(value_of(metric, (climate, targets), climate=climate))


# Against formulas of all terms at once --------------------------------------------------------------------------


def area(scores, labels, weights):
    """The share of pairs in order, a tie as half."""
    positive, negative = labels == 1, labels == 0
    order = np.sign(scores[positive][:, None] - scores[negative][None]) / 2 + 0.5
    pairs = weights[positive][:, None] * weights[negative][None]
    return (order * pairs).sum() / pairs.sum()


@examples(40)
@given(st.integers(5, 400), st.integers(0, 10**6), st.floats(0.1, 30))
def test_auroc_is_exact_to_within_its_bound(count, seed, spread):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    labels[:2] = 0, 1
    scores = rng.normal(size=count) * spread + labels
    weights = rng.random(count)
    parts = metric_named("auroc").of_batch(torch.tensor(scores), torch.tensor(labels), torch.tensor(weights))
    assert abs(auroc_value(*parts) - area(scores, labels, weights)) <= auroc_error(*parts) + 1e-12
    assert auroc_error(*parts) < 0.2


@examples(20)
@given(st.integers(20, 200), st.integers(0, 10**6))
def test_metrics_of_several_classes_are_means_of_each_against_the_rest(count, seed):
    logits, labels = classes(count, seed)
    chosen, scores = logits.argmax(1), logits.double().softmax(1).numpy()
    shares, areas = [], []
    for number in range(4):
        own, said = labels == number, chosen == number
        if (own | said).any():
            shares.append((own & said).sum().item() / (own | said).sum().item())
        if own.any() and not own.all():
            areas.append(area(scores[:, number], own.long().numpy(), np.ones(count)))
    assert value_of(metric_named("iou"), (logits, labels)) == pytest.approx(np.mean(shares), rel=1e-12)
    assert value_of(metric_named("f1"), (logits, labels)) == pytest.approx(
        np.mean([2 * share / (1 + share) for share in shares]), rel=1e-12
    )
    parts = metric_named("auroc").of_batch(logits, labels)
    assert abs(auroc_value(*parts) - np.mean(areas)) <= auroc_error(*parts) + 1e-9


@examples(40)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 10**6))
def test_moments_merge_to_those_of_the_whole(sizes, seed):
    values = np.random.default_rng(seed).normal(loc=1e6, size=sum(sizes))
    pieces = np.split(values, np.cumsum(sizes)[:-1])
    own = [np.array([len(piece), piece.mean(), ((piece - piece.mean()) ** 2).sum()]) for piece in pieces]
    count, mean, squares = reduce(add_moments, own, np.zeros(3))
    assert count == len(values)
    assert mean == pytest.approx(values.mean(), rel=1e-14)
    assert squares == pytest.approx(((values - values.mean()) ** 2).sum(), rel=1e-6, abs=1e-9)


# Batches, groups and what does not count ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NUMBERS, *CLASSES])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_batches_add_up_to_the_whole(name, is_weighted):
    outputs, targets = numbers(60) if name in NUMBERS else classes(60)
    weight = torch.rand(targets.shape, generator=torch.Generator().manual_seed(5))
    climate = {"climate": torch.full((60, 3), 0.1)} if name == "anomaly_correlation" else {}
    tensors = (outputs, targets, *([weight] if is_weighted else []))
    metric = metric_named(name)
    whole = value_of(metric, tensors, **climate)
    if name == "anomaly_correlation":
        climate = {"climate": torch.tensor(0.1)}
    for size in (1, 7, 59):
        batches = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))
        assert value_of(metric, *batches, **climate) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("is_binary", [False, True])
def test_ignored_targets_and_those_of_weight_0_do_not_count(name, is_binary):
    logits, labels = classes(40, number=2)
    logits, labels = (logits[:, 0], labels) if is_binary else (logits, labels)
    marked, weight = labels.clone(), torch.ones(40)
    marked[5:20] = -100
    weight[5:20] = 0
    kept = [*range(5), *range(20, 40)]
    expected = value_of(metric_named(name), (logits[kept], labels[kept]))
    assert value_of(metric_named(name), (logits, marked)) == expected
    assert value_of(metric_named(name), (logits, labels, weight)) == pytest.approx(expected, rel=1e-12)
    assert math.isnan(value_of(metric_named(name), (logits, torch.full_like(labels, -100))))


@pytest.mark.parametrize("name", [*NUMBERS, "f1", "iou", "auroc"])
def test_of_finite_targets_alone(name):
    outputs, targets = numbers(40)
    targets = targets if name in NUMBERS else (targets > 0).float()
    marked = targets.clone()
    marked[3:9, 1] = math.nan
    finite = torch.isfinite(marked)
    climate = [{"climate": torch.full((n,), 0.2)} if name == "anomaly_correlation" else {} for n in (finite.sum(), 1)]
    metric = metric_named(name, "auto", True)
    expected = value_of(metric_named(name), (outputs[finite], targets[finite]), **climate[0])
    got = value_of(metric, (outputs, marked), **({"climate": torch.full((40, 3), 0.2)} if climate[0] else {}))
    assert got == pytest.approx(expected, rel=1e-6)
    weighted = (outputs, marked, torch.full((40, 3), 2.0))
    more = {"climate": torch.full((40, 3), 0.2)} if climate[0] else {}
    assert value_of(metric, weighted, **more) == pytest.approx(expected, rel=1e-6)


def test_where_the_climatology_knows_no_value_there_is_no_anomaly():
    outputs, targets = numbers(10)
    climate = torch.zeros(10, 3)
    climate[:, 1] = math.nan
    metric = metric_named("anomaly_correlation", "auto", True)
    expected = value_of(metric, (outputs[:, [0, 2]], targets[:, [0, 2]]), climate=torch.zeros(10, 2))
    assert value_of(metric, (outputs, targets), climate=climate) == expected


@pytest.mark.parametrize("name", CLASSES)
def test_the_class_axis_may_be_last(name):
    logits, labels = classes(24)
    image = logits.reshape(4, 2, 3, 4), labels.reshape(4, 2, 3)
    first = image[0].movedim(-1, 1)
    expected = value_of(metric_named(name), (logits, labels))
    assert value_of(metric_named(name), image) == value_of(metric_named(name, -1), image) == expected
    assert value_of(metric_named(name), (first, image[1])) == expected


@pytest.mark.parametrize("rules", [("sum", "max"), ("min", "moments")])
def test_states_of_groups_merge_group_by_group(rules):
    rng = np.random.default_rng(0)
    rows = [(rng.normal(size=3), rng.normal(size=3)) for _ in range(4)]
    if rules[1] == "moments":
        rows = [(one, np.array([2.0, *other[1:]])) for one, other in rows]
    pieces = [empty_state(rows[0], rules, 2) for _ in range(4)]
    for number, (piece, row) in enumerate(zip(pieces, rows, strict=True)):
        for part, own in zip(piece.parts, merge_parts(piece.of_group(number % 2), row, rules), strict=True):
            part[number % 2] = own
    whole = merged(pieces)
    for group in (0, 1):
        expected = merge_parts(rows[group], rows[group + 2], rules)
        for got, wanted in zip(whole.of_group(group), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-14)
    assert whole.nbytes == 2 * 6 * 8


# Refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["f1", "iou", "dice", "auroc"])
@pytest.mark.parametrize(
    ("outputs", "targets", "text"),
    [
        (torch.zeros(3), torch.tensor([0.0, 1.0, 0.5]), "0 or 1, and it holds 0.5"),
        (torch.zeros(3), torch.tensor([0, 2, 1]), "0 or 1, and it holds 2"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 2]), "holds class 2, and the model's output has the classes 0 to 1"),
        (torch.zeros(3, 2), torch.tensor([0, 1, -1]), "holds class -1"),
        (torch.zeros(3, 1), torch.zeros(3), "a target of floats must have the output's shape"),
        (torch.zeros(3, 4), torch.zeros(5, dtype=torch.int64), "float32[3, 4], the target int64[5]"),
        ((torch.zeros(3), torch.zeros(3)), (torch.zeros(3), torch.zeros(3)), "one output and one target tensor"),
    ],
)
def test_what_has_no_labels_is_named(name, outputs, targets, text):
    with pytest.raises(ShapesDiffer) as caught:
        metric_named(name).of_batch(outputs, targets)
    assert f"{name}" in caught.value.message
    assert text in caught.value.message


@pytest.mark.parametrize("name", ["r2", "rmse", "mse"])
def test_numbers_of_other_shapes_are_refused(name):
    with pytest.raises(ShapesDiffer, match=rf"^{name}: the model's output is float32\[4, 1\], the target float32\[4\]"):
        metric_named(name).of_batch(torch.zeros(4, 1), torch.zeros(4))
