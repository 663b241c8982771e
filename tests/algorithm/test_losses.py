from __future__ import annotations

import math

import pytest
import torch

from dtrain.algorithm.losses import (
    LOSSES,
    bce,
    classes_first,
    cross_entropy,
    huber,
    loss_named,
    mae,
    mean_of_batch,
    mse,
)
from dtrain.errors import ShapesDiffer


def floats(*values):
    return torch.tensor(values, dtype=torch.float32)


def mean(name, outputs, targets):
    """The mean over a batch, whatever the loss returns."""
    return mean_of_batch(LOSSES[name](outputs, targets), len(targets)).value


# Values by hand -------------------------------------------------------------------------------------------------


def test_mse_mae_and_huber_by_hand():
    outputs, targets = floats(1.0, 2.0, 5.0, 0.0), floats(1.0, 0.0, 1.0, 0.5)
    # errors 0, 2, 4, -0.5
    assert mse(outputs, targets).item() == (0 + 4 + 16 + 0.25) / 4
    assert mae(outputs, targets).item() == (0 + 2 + 4 + 0.5) / 4
    assert huber(outputs, targets).item() == (0 + 1.5 + 3.5 + 0.125) / 4  # |e| - 1/2 beyond 1, e^2 / 2 within


def test_bce_takes_logits():
    # -log sigmoid(0) = log 2; -log(1 - sigmoid(log 3)) = log 4
    outputs, targets = floats(0.0, math.log(3.0)), floats(1.0, 0.0)
    assert bce(outputs, targets).item() == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-6)


@pytest.mark.parametrize("shape", [(6,), (6, 4), (6, 2, 3)])
def test_bce_leaves_out_ignored_targets(shape):
    torch.manual_seed(0)
    outputs, targets = torch.randn(shape, requires_grad=True), torch.randint(0, 2, shape)
    targets[1::2] = -100
    total, count = bce(outputs, targets)
    kept = targets != -100
    assert count == pytest.approx(3.0)  # samples: half of 6 count
    expected = bce(outputs[kept], targets[kept].float())
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-6)
    total.backward()
    assert not outputs.grad[~kept].any()
    # micro-batches add up to the whole, whether or not one of them has ignored targets
    targets[:2] = 1
    whole = mean_of_batch(bce(outputs, targets), 6)
    parts = [mean_of_batch(bce(outputs[i : i + 2], targets[i : i + 2]), 2) for i in (0, 2, 4)]
    assert sum(part.sum for part in parts) == pytest.approx(whole.sum, rel=1e-6)
    assert sum(part.count for part in parts) == pytest.approx(whole.count)


def test_bce_of_nothing_but_ignored_targets_is_0():
    mean = mean_of_batch(bce(torch.randn(3, 2), torch.full((3, 2), -100)), 3)
    assert (mean.value.item(), mean.count) == (0.0, 0.0)


def test_minus_100_is_a_number_among_floats():
    outputs, targets = torch.zeros(2), floats(-100.0, 1.0)
    assert isinstance(bce(outputs, targets), torch.Tensor)


def test_cross_entropy_by_hand():
    outputs = torch.log(floats(0.5, 0.25, 0.25, 0.1, 0.8, 0.1)).reshape(2, 3)
    total, count = cross_entropy(outputs, torch.tensor([0, 2]))
    assert count == 2
    assert total.item() == pytest.approx(math.log(2) + math.log(10), rel=1e-6)


@pytest.mark.parametrize("name", ["mse", "mae", "huber", "bce"])
def test_targets_may_be_integers_or_bools(name):
    outputs = floats(0.5, -1.0, 2.0)
    expected = LOSSES[name](outputs, floats(1.0, 0.0, 1.0)).item()
    assert LOSSES[name](outputs, torch.tensor([1, 0, 1])).item() == expected
    assert LOSSES[name](outputs, torch.tensor([True, False, True])).item() == expected


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_loss_is_the_mean_over_the_samples(name):
    torch.manual_seed(0)
    outputs = torch.randn(8, 3)
    targets = torch.randint(0, 3, (8,)) if name == "cross_entropy" else torch.rand(8, 3)
    each = [mean(name, outputs[i : i + 1], targets[i : i + 1]).item() for i in range(8)]
    assert mean(name, outputs, targets).item() == pytest.approx(sum(each) / 8, rel=1e-6)


# The class axis -------------------------------------------------------------------------------------------------


def nll_by_hand(outputs, targets, place):
    """Mean over all targets of -log softmax, element by element; place(index, class) -> index into outputs."""
    total, count = 0.0, 0
    classes = 3
    for index in torch.cartesian_prod(*[torch.arange(n) for n in targets.shape]).reshape(-1, targets.ndim).tolist():
        logits = [outputs[place(index, c)].item() for c in range(classes)]
        total += math.log(sum(map(math.exp, logits))) - logits[targets[tuple(index)].item()]
        count += 1
    return total / count


@pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 4, 5)])
def test_the_class_axis_is_the_first_after_the_samples_or_the_last(shape):
    torch.manual_seed(0)
    targets = torch.randint(0, 3, shape)
    first = torch.randn(shape[0], 3, *shape[1:])
    by_hand = nll_by_hand(first, targets, lambda index, c: (index[0], c, *index[1:]))
    assert mean("cross_entropy", first, targets).item() == pytest.approx(by_hand, rel=1e-5)
    last = torch.randn(*shape, 3)
    by_hand = nll_by_hand(last, targets, lambda index, c: (*index, c))
    assert mean("cross_entropy", last, targets).item() == pytest.approx(by_hand, rel=1e-5)


BOTH_FIT = [(4, 3), (2, 3, 3)]


@pytest.mark.parametrize("shape", BOTH_FIT)
def test_where_both_axes_fit_the_class_axis_must_be_given(shape):
    torch.manual_seed(0)
    outputs = torch.randn(*shape, 3) if len(shape) == 2 else torch.randn(*shape[:1], 3, 3, 3)
    targets = torch.randint(0, 3, shape)
    with pytest.raises(ShapesDiffer) as caught:
        cross_entropy(outputs, targets)
    assert "both axis 1 and the last axis" in caught.value.message
    assert "train.class_axis = 1" in caught.value.hint
    assert caught.value.code == 3
    for axis in (1, -1):
        total, count = loss_named("cross_entropy", axis)(outputs, targets)
        place = (lambda index, c: (index[0], c, *index[1:])) if axis == 1 else (lambda index, c: (*index, c))
        assert total.item() / count == pytest.approx(nll_by_hand(outputs, targets, place), rel=1e-5)


def test_a_perfect_model_of_windows_as_long_as_the_classes_scores_zero():
    targets = torch.randint(0, 256, (2, 256), generator=torch.Generator().manual_seed(0))
    outputs = 100.0 * torch.nn.functional.one_hot(targets, 256).float()  # [sample, window, class]
    total, count = loss_named("cross_entropy", -1)(outputs, targets)
    assert total.item() / count < 1e-6


def test_without_a_window_axis_there_is_one_class_axis():
    outputs, targets = torch.randn(3, 3), torch.tensor([0, 1, 2])
    assert classes_first(outputs, targets) is outputs
    assert torch.equal(loss_named("cross_entropy", 1)(outputs, targets)[0], cross_entropy(outputs, targets)[0])
    assert torch.equal(loss_named("cross_entropy", -1)(outputs, targets)[0], cross_entropy(outputs, targets)[0])


@pytest.mark.parametrize(("axis", "shape"), [(1, (4, 5, 3)), (-1, (4, 3, 5))])
def test_a_class_axis_that_does_not_fit_is_refused(axis, shape):
    with pytest.raises(ShapesDiffer, match=rf"at axis {axis} \(train.class_axis\)"):
        loss_named("cross_entropy", axis)(torch.zeros(shape), torch.zeros(4, 5, dtype=torch.int64))


# What counts ----------------------------------------------------------------------------------------------------


def test_ignored_classes_are_in_neither_sum_nor_count():
    outputs = torch.log(floats(0.5, 0.25, 0.25, 0.1, 0.8, 0.1, 0.2, 0.2, 0.6)).reshape(3, 3).requires_grad_()
    total, count = cross_entropy(outputs, torch.tensor([0, -100, 2]))
    assert count == 2
    assert total.item() == pytest.approx(math.log(2) - math.log(0.6), rel=1e-6)
    total, count = cross_entropy(outputs, torch.full((3,), -100))
    result = mean_of_batch((total, count), 3)
    assert (result.value.item(), result.count, result.sum) == (0.0, 0, 0.0)
    result.value.backward()
    assert outputs.grad.tolist() == [[0.0] * 3] * 3


def test_a_mean_counts_the_samples_and_a_sum_what_it_says():
    plain = mean_of_batch(torch.tensor(1.5), 4)
    assert (plain.value.item(), plain.count, plain.sum) == (1.5, 4, 6.0)
    for count in (8, 8.0, torch.tensor(8)):
        given = mean_of_batch((torch.tensor(6.0), count), 4)
        assert (given.value.item(), given.count, given.sum) == (0.75, 8, 6.0)


@pytest.mark.parametrize(
    "value",
    [1.0, None, torch.zeros(3), (torch.tensor(1.0),), (1.0, 2), (torch.tensor(1.0), -1), (torch.tensor(1.0), True),
     (torch.tensor(1.0), math.inf), (torch.zeros(3), 2), (torch.tensor(1.0), torch.zeros(2))],
)  # fmt: skip
def test_what_is_no_loss_is_refused(value):
    with pytest.raises(ShapesDiffer, match=r"\(sum, count\)"):
        mean_of_batch(value, 3)


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("short", [torch.bfloat16, torch.float16])
def test_targets_are_not_rounded_to_the_outputs_of_autocast(name, short):
    torch.manual_seed(0)
    if name == "cross_entropy":
        outputs, targets = torch.randn(64, 3).to(short), torch.randint(0, 3, (64,))
    else:
        targets = torch.rand(64) if name == "bce" else 273 + 0.3 * torch.randn(64)
        outputs = torch.randn(64).to(short) if name == "bce" else torch.full((64,), 273.0).to(short)
    expected = mean(name, outputs.float(), targets)
    assert mean(name, outputs, targets).item() == expected.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mean(name, outputs, targets).item() == expected.item()


# What does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mse", "mae", "huber", "bce"])
@pytest.mark.parametrize(("outputs", "targets"), [((4, 1), (4,)), ((4,), (4, 1)), ((4, 2), (4, 3)), ((4,), (1,))])
def test_shapes_that_torch_would_broadcast_are_refused_by_name(name, outputs, targets):
    with pytest.raises(ShapesDiffer) as caught:
        LOSSES[name](torch.zeros(outputs), torch.zeros(targets))
    assert f"float32{list(outputs)}" in caught.value.message
    assert f"float32{list(targets)}" in caught.value.message
    assert caught.value.code == 3


@pytest.mark.parametrize(("outputs", "targets"), [((4, 3), (5,)), ((4,), (4,)), ((4, 3, 2), (4, 5)), ((4, 3), (4, 1))])
def test_cross_entropy_names_shapes_without_a_class_axis(outputs, targets):
    with pytest.raises(ShapesDiffer) as caught:
        cross_entropy(torch.zeros(outputs), torch.zeros(targets, dtype=torch.int64))
    assert f"float32{list(outputs)}" in caught.value.message
    assert f"int64{list(targets)}" in caught.value.message


def test_float_classes_are_refused():
    with pytest.raises(ShapesDiffer, match=r"integer classes, but the target is float32\[4\]"):
        cross_entropy(torch.zeros(4, 3), torch.zeros(4))


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_several_outputs_or_targets_need_a_loss_of_ones_own(name):
    one = torch.zeros(4)
    with pytest.raises(ShapesDiffer, match="tuple of 2"):
        LOSSES[name]((one, one), one)
    with pytest.raises(ShapesDiffer, match="tuple of 2"):
        LOSSES[name](one, (one, one))
    with pytest.raises(ShapesDiffer, match="NoneType"):
        LOSSES[name](None, one)
