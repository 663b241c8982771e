"""Groups of values: every value belongs to one box of its group, and states by group are those of its values alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dtrain.algorithm import evaluate as evaluation
from dtrain.algorithm.batch import TensorBatch
from dtrain.algorithm.evaluate import Breakdown, Context, columns, evaluate, merge, values
from dtrain.algorithm.grouped import Labels, boxes, num_groups, output_axes, part_of
from dtrain.algorithm.losses import bce, cross_entropy, mse
from dtrain.algorithm.metrics.named import metric_named
from dtrain.errors import OutOfMemory, ShapesDiffer


def labels_of(rng, shape, axis, count, *, by_sample):
    places = shape[axis] if axis else 1
    return Labels("g", axis, rng.integers(-1, count, (shape[0] if by_sample else 1, places)), count)


def whole(label, shape):
    """The labels of all values."""
    values = label.values
    axes = [1] * len(shape)
    axes[0] = len(values)
    if label.axis:
        axes[label.axis] = values.shape[1]
    return np.broadcast_to(values.reshape(axes), shape)


@given(
    st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3)),
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.booleans()), max_size=3),
    st.integers(0, 10**6),
)
def test_every_value_lies_in_one_box_of_its_group(shape, kinds, seed):
    rng = np.random.default_rng(seed)
    labels = [labels_of(rng, shape, axis, count, by_sample=own or not axis) for axis, count, own in kinds]
    expected, is_out = np.zeros(shape, np.int64), np.zeros(shape, bool)
    for label in labels:
        expected = expected * label.count + whole(label, shape)
        is_out |= whole(label, shape) < 0
    found = np.full(shape, -1)
    numbers = torch.arange(int(np.prod(shape))).reshape(shape)
    for box in boxes(labels, shape[0]):
        own = part_of(numbers, box).reshape(-1).numpy()
        assert (found.reshape(-1)[own] == -1).all()
        found.reshape(-1)[own] = box.group
        assert len(np.unique(own // (shape[1] * shape[2]))) == box.size
    assert (found == np.where(is_out, -1, expected)).all()
    assert num_groups([label.count for label in labels]) > expected.max()


def batches_of(x, y, size, weight=None):
    pieces = zip(x.split(size), y.split(size), x.split(size) if weight is None else weight.split(size), strict=True)
    return [TensorBatch((a,), b, len(b), weight=None if weight is None else w) for a, b, w in pieces]


def evaluated(module, loss, names, batches, labels, counts, **more):
    """Columns by group; `labels` are those of all samples, cut as the batches are."""
    at = 0

    def context_of(batch):
        nonlocal at
        own = [
            Labels(
                one.name, one.axis, one.values if len(one.values) == 1 else one.values[at : at + batch.size], one.count
            )
            for one in labels
        ]
        at += batch.size
        return Context(labels=(tuple(own),))

    metrics = {name: metric_named(name) for name in names}
    sums = evaluate(module, loss, metrics, batches, context_of=context_of, breakdown=Breakdown(counts=counts, **more))
    return columns(sums, names, metrics), sums


def test_groups_are_what_each_alone_gives():
    rng = np.random.default_rng(0)
    x, y = torch.randn(20, 3, 4), torch.randn(20, 3, 4)
    weight = torch.rand(20, 3, 4)
    sites, leads = rng.integers(0, 3, 20), np.arange(3)
    labels = [Labels("site", 0, sites[:, None], 4), Labels("lead", 1, leads[None], 3)]
    names = ["mae", "rmse", "r2"]
    for own in (None, weight):
        batches = batches_of(x, y, 7, own)
        found, sums = evaluated(nn.Identity(), mse, names, batches, labels, (4, 3))
        for site in range(4):
            for lead in range(3):
                chosen = sites == site
                group = site * 3 + lead
                assert sums.by_group[group] == chosen.sum()
                if not chosen.any():
                    assert all(np.isnan(found[name][group]) for name in found)
                    continue
                alone = batches_of(x[chosen, lead], y[chosen, lead], 20, None if own is None else own[chosen, lead])
                metrics = {name: metric_named(name) for name in names}
                expected = values(evaluate(nn.Identity(), mse, metrics, alone), names, metrics)
                assert {name: column[group] for name, column in found.items()} == pytest.approx(expected, rel=1e-5)


def test_one_group_of_everything_is_the_whole_to_the_bit():
    x, y = torch.randn(23, 5), torch.randn(23, 5)
    names = ["mse", "mae", "r2"]
    metrics = {name: metric_named(name) for name in names}
    found, sums = evaluated(
        nn.Identity(), mse, names, batches_of(x, y, 4), [Labels("a", 0, np.zeros((1, 1), int), 1)], (1,)
    )
    plain = evaluate(nn.Identity(), mse, metrics, batches_of(x, y, 4))
    assert {name: column[0] for name, column in found.items()} == values(plain, names, metrics)
    assert sums.samples == plain.samples == 23


@pytest.mark.parametrize("axis", [1, -1])
def test_classes_are_cut_beside_their_axis(axis):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 4, 3, generator=generator)  # [sample, place, class]
    targets = torch.randint(0, 3, (12, 4), generator=generator)
    targets[3, 2] = -100
    x = logits if axis == -1 else logits.movedim(-1, 1).contiguous()
    labels = [Labels("place", 1, np.array([[0, 1, 1, 0]]), 2)]
    found, _ = evaluated(nn.Identity(), cross_entropy, ["accuracy", "f1"], batches_of(x, targets, 5), labels, (2,))
    for group, places in enumerate(([0, 3], [1, 2])):
        own, wanted = logits[:, places], targets[:, places]
        counted = wanted != -100
        right = (own.argmax(-1) == wanted)[counted].double().mean().item()
        assert found["accuracy"][group] == pytest.approx(right)
        loss = nn.functional.cross_entropy(own[counted], wanted[counted]).item()
        assert found["loss"][group] == pytest.approx(loss, rel=1e-5)


def nothing(outputs, targets):
    return torch.tensor(0.0)


def test_targets_are_compared_one_by_one():
    class Two(nn.Module):
        def forward(self, x):
            return x, 2 * x

    x, y = torch.randn(9, 2), torch.randn(9, 2)
    batch = TensorBatch((x,), (y, y + 1), 9)
    labels = tuple((Labels("variable", 0, np.array([[number]]), 2),) for number in (0, 1))
    metrics = {"mae": metric_named("mae")}
    breakdown = Breakdown(counts=(2,), by_target=True, has_loss=False)
    sums = evaluate(
        Two(),
        lambda o, t: torch.tensor(0.0),
        metrics,
        [batch],
        context_of=lambda _: Context(labels=labels),
        breakdown=breakdown,
    )
    found = columns(sums, ["mae"], metrics)["mae"]
    assert found == pytest.approx([(x - y).abs().mean().item(), (2 * x - y - 1).abs().mean().item()], rel=1e-6)
    assert "loss" not in sums.states


def test_pieces_of_which_some_lack_groups_merge():
    x, y = torch.randn(10, 2), torch.randn(10, 2)
    sites = np.array([0] * 5 + [2] * 5)[:, None]
    labels = [Labels("site", 0, sites, 3)]
    whole_found, _ = evaluated(nn.Identity(), mse, ["mae", "r2"], batches_of(x, y, 5), labels, (3,))
    pieces = [
        evaluated(
            nn.Identity(), mse, ["mae", "r2"], batches_of(x[own], y[own], 5), [Labels("site", 0, sites[own], 3)], (3,)
        )[1]
        for own in (slice(5), slice(5, 10))
    ]
    nothing = evaluated(nn.Identity(), mse, ["mae", "r2"], [], labels, (3,))[1]
    merged = merge([*pieces, nothing])
    metrics = {name: metric_named(name) for name in ("mae", "r2")}
    for name, column in columns(merged, ["mae", "r2"], metrics).items():
        np.testing.assert_array_equal(column, whole_found[name])
    assert merged.by_group.tolist() == [5, 0, 5]


def test_outputs_without_the_axes_of_the_target_are_refused():
    with pytest.raises(ShapesDiffer, match=r"output is float32\[5, 7\], the target float32\[5, 2, 3\]: which part"):
        output_axes(torch.zeros(5, 7), torch.zeros(5, 2, 3), "auto", "lead")
    with pytest.raises(ShapesDiffer, match="tuple of 2"):
        output_axes((torch.zeros(5), torch.zeros(5)), torch.zeros(5, 2), "auto", "lead")
    box = next(boxes([Labels("site", 0, np.array([[0], [1]]), 2)], 2))
    assert part_of({"a": [torch.arange(2)]}, box)["a"][0].tolist() == [0]
    with pytest.raises(ShapesDiffer, match="str cannot be cut into groups"):
        part_of("text", box)


def test_states_of_too_many_groups_are_refused(monkeypatch):
    monkeypatch.setattr(evaluation, "MOST_BYTES", 3 << 20)
    labels = [Labels("site", 0, np.zeros((1, 1), int), 300)]
    x, y = torch.randn(5, 4), torch.randint(0, 2, (5, 4))
    with pytest.raises(OutOfMemory, match="state of auroc takes 4 MB for 500 groups; at most 3 MB are used") as caught:
        evaluated(nn.Identity(), bce, ["auroc"], batches_of(x, y, 5), labels, (500,))
    assert "fewer groups" in caught.value.hint
