from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from dtrain.algorithm.batch import TensorBatch
from dtrain.algorithm.local import run_local_steps
from dtrain.algorithm.losses import cross_entropy, mse
from dtrain.algorithm.recipe import Recipe
from dtrain.algorithm.replica import empty_inner_state
from dtrain.algorithm.schedules import constant, schedule_named
from dtrain.types import InnerState

SGD = (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3})
ADAM = (torch.optim.Adam, {"lr": 0.01})


def recipe_of(kind=SGD, *, loss=cross_entropy, schedule=constant, clip_norm=0.0):
    optimizer, options = kind
    return Recipe(loss=loss, optimizer=optimizer, optimizer_args=options, schedule=schedule, clip_norm=clip_norm)


def network():
    torch.manual_seed(3)
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)]
    return nn.Sequential(*layers)


def batches(count, size=6, first=0):
    made = []
    for step in range(first, first + count):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(size, 5, generator=generator)
        made.append(TensorBatch((x,), torch.randint(0, 3, (size,), generator=generator), size))
    return made


def one_batch_a_step(made):
    return [(batch.size, [batch]) for batch in made]


def bits(module):
    return {name: tensor.numpy().tobytes() for name, tensor in module.state_dict().items()}


def train_plainly(module, made, kind, factor, clip_norm):
    """Local SGD as anybody would write it; returns the sum of the samples' losses."""
    optimizer = kind[0](module.parameters(), **kind[1])
    module.train()
    loss_sum = 0.0
    for step, batch in enumerate(made):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(batch.inputs[0]), batch.targets)
        loss.backward()
        loss_sum += loss.item() * batch.size
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = kind[1]["lr"] * factor(step)
        optimizer.step()
    return loss_sum


def linear_after_warmup(step):
    return (step + 1) / 4 if step < 4 else 1 - (step - 4) / 8


SCHEDULES = {"constant": (constant, lambda step: 1.0), "linear": (schedule_named("linear", 4), linear_after_warmup)}


@pytest.mark.sampled(11)
@pytest.mark.parametrize("kind", [SGD, ADAM], ids=["sgd", "adam"])
@pytest.mark.parametrize(("schedule", "by_hand"), SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
@pytest.mark.parametrize("rounds", [1, 3, 12])
def test_one_replica_is_plain_training_bit_for_bit(kind, schedule, by_hand, clip_norm, rounds):
    made = batches(12)
    plain = network()
    torch.manual_seed(11)
    loss_sum = train_plainly(plain, made, kind, by_hand, clip_norm)

    module, inner, seen, losses = network(), empty_inner_state(), 0, []
    recipe = recipe_of(kind, schedule=schedule, clip_norm=clip_norm)
    torch.manual_seed(11)
    for number in range(rounds):
        steps = 12 // rounds
        part = one_batch_a_step(made[number * steps : (number + 1) * steps])
        result = run_local_steps(module, recipe, inner, part, first_step=seen, total_steps=12)
        assert (result.steps, result.samples) == (steps, 6 * steps)
        inner, seen = result.inner, seen + steps
        losses.append(result.loss_sum)
    assert bits(module) == bits(plain)
    if rounds == 1:
        assert losses == [loss_sum]
    assert sum(losses) == pytest.approx(loss_sum, rel=1e-12)


def test_each_part_of_the_recipe_makes_a_difference():
    made = one_batch_a_step(batches(12))
    ends = set()
    for recipe in (
        recipe_of(),
        recipe_of(ADAM),
        recipe_of(schedule=schedule_named("linear", 4)),
        recipe_of(clip_norm=0.05),
        recipe_of((torch.optim.SGD, {**SGD[1], "lr": 0.06})),
    ):
        module = network()
        torch.manual_seed(11)
        run_local_steps(module, recipe, empty_inner_state(), made, first_step=0, total_steps=12)
        ends.add(bits(module)["0.weight"])
    assert len(ends) == 5


def test_one_step_by_hand():
    module = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(1.0)
    batch = TensorBatch((torch.tensor([[1.0], [2.0]]),), torch.tensor([[0.0], [0.0]]), 2)
    recipe = recipe_of((torch.optim.SGD, {"lr": 0.125}), loss=mse, schedule=lambda step, total: step / total)
    result = run_local_steps(module, recipe, empty_inner_state(), [(2, [batch])], first_step=4, total_steps=8)
    # loss (1 + 4) / 2 w^2 = 2.5, gradient 5, rate 0.125 * 4 / 8
    assert (result.loss_sum, result.samples, result.steps) == (5.0, 2, 1)
    assert module.weight.item() == 1 - 0.0625 * 5


def test_clipping_by_hand():
    module = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        module.weight.zero_()
    # loss (w . x - t)^2 = 1 with x = (3, 4), t = 1: gradient -2 x, norm 10, clipped to 2.5
    batch = TensorBatch((torch.tensor([[3.0, 4.0]]),), torch.tensor([[1.0]]), 1)
    recipe = recipe_of((torch.optim.SGD, {"lr": 1.0}), loss=mse, clip_norm=2.5)
    run_local_steps(module, recipe, empty_inner_state(), [(1, [batch])], first_step=0, total_steps=1)
    assert module.weight.tolist()[0] == pytest.approx([1.5, 2.0], rel=1e-6)


# Accumulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(8,), (3, 3, 2), (1,) * 8, (5, 3)])
@pytest.mark.parametrize("clip_norm", [0.0, 0.05])
def test_micro_batches_give_the_gradient_of_the_whole_batch(cuts, clip_norm):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    recipe = recipe_of(clip_norm=clip_norm)
    whole, module = model(), model()
    steps = []
    for batch in batches(5, size=8):
        parts = zip(batch.inputs[0].split(cuts), batch.targets.split(cuts), strict=True)
        steps.append((8, [TensorBatch((x,), y, len(y)) for x, y in parts]))
    expected = run_local_steps(
        whole, recipe, empty_inner_state(), one_batch_a_step(batches(5, size=8)), first_step=0, total_steps=5
    )
    result = run_local_steps(module, recipe, empty_inner_state(), steps, first_step=0, total_steps=5)
    for cut, full in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(cut, full, rtol=1e-6, atol=1e-7)
    assert result.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    assert (result.samples, result.steps) == (expected.samples, expected.steps) == (40, 5)


def ignoring(made, share=0.6):
    """The same batches with some targets of -100; the first has none at all."""
    generator = torch.Generator().manual_seed(5)
    changed = []
    for number, batch in enumerate(made):
        lost = torch.rand(batch.size, generator=generator) < (1.0 if number == 0 else share)
        changed.append(replace(batch, targets=torch.where(lost, -100, batch.targets)))
    return changed


@pytest.mark.parametrize("cuts", [(3, 3, 2), (1,) * 8, (5, 3)])
def test_micro_batches_with_ignored_targets_give_the_gradient_of_the_whole_batch(cuts):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    whole, module, by_hand = model(), model(), model()
    made = ignoring(batches(5, size=8))
    steps = []
    for batch in made:
        parts = zip(batch.inputs[0].split(cuts), batch.targets.split(cuts), strict=True)
        steps.append((8, [TensorBatch((x,), y, len(y)) for x, y in parts]))
    recipe = recipe_of()
    expected = run_local_steps(whole, recipe, empty_inner_state(), one_batch_a_step(made), first_step=0, total_steps=5)
    result = run_local_steps(module, recipe, empty_inner_state(), steps, first_step=0, total_steps=5)
    optimizer = SGD[0](by_hand.parameters(), **SGD[1])
    for batch in made:
        optimizer.zero_grad()
        total = nn.functional.cross_entropy(by_hand(batch.inputs[0]), batch.targets, reduction="sum")
        (total / max(1, int((batch.targets != -100).sum()))).backward()
        optimizer.step()
    for cut, full, plain in zip(module.parameters(), whole.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(cut, full, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(full, plain, rtol=1e-6, atol=1e-7)
    assert result.loss_count == expected.loss_count == sum(int((batch.targets != -100).sum()) for batch in made)
    assert result.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
    assert (result.samples, result.steps) == (40, 5)


def test_weighted_losses_add_up_over_micro_batches():
    def weighted(outputs, targets):  # the weight of a sample is its class + 1
        weights = (targets + 1).float()
        return nn.functional.cross_entropy(outputs, targets, reduction="none") @ weights, weights.sum()

    def trained(cuts):
        torch.manual_seed(0)
        module = nn.Linear(5, 3)
        steps = []
        for batch in batches(5, size=8):
            parts = zip(batch.inputs[0].split(cuts), batch.targets.split(cuts), strict=True)
            steps.append((8, [TensorBatch((x,), y, len(y)) for x, y in parts]))
        result = run_local_steps(
            module, recipe_of(loss=weighted), empty_inner_state(), steps, first_step=0, total_steps=5
        )
        return module.weight.detach(), result

    whole, expected = trained((8,))
    for cuts in ((3, 5), (1,) * 8):
        weight, result = trained(cuts)
        torch.testing.assert_close(weight, whole, rtol=1e-6, atol=1e-7)
        assert result.loss_count == expected.loss_count
        assert result.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)


def test_batches_are_taken_one_at_a_time():
    open_now = []

    def stream():
        for batch in batches(4):
            open_now.append(batch)
            yield batch
            open_now.remove(batch)
            assert not open_now

    source = stream()
    steps = ((12, (next(source) for _ in range(2))) for _ in range(2))
    result = run_local_steps(network(), recipe_of(), empty_inner_state(), steps, first_step=0, total_steps=2)
    assert (result.steps, result.samples) == (2, 24)


# What is left alone ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SGD, ADAM], ids=["sgd", "adam"])
def test_the_given_inner_state_is_not_changed(kind):
    module = network()
    first = run_local_steps(
        module, recipe_of(kind), empty_inner_state(), one_batch_a_step(batches(2)), first_step=0, total_steps=4
    )
    data = first.inner.data.copy()
    data.flags.writeable = False
    given = InnerState(first.inner.slots, data)
    before = data.tobytes()
    second = run_local_steps(
        module, recipe_of(kind), given, one_batch_a_step(batches(2, first=2)), first_step=2, total_steps=4
    )
    assert given.data.tobytes() == before
    assert second.inner.data.tobytes() != before


def test_frozen_parameters_stay_and_need_no_state():
    module = network()
    for parameter in module[0].parameters():
        parameter.requires_grad_(False)
    before = bits(module)
    result = run_local_steps(
        module, recipe_of(ADAM), empty_inner_state(), one_batch_a_step(batches(3)), first_step=0, total_steps=3
    )
    after = bits(module)
    assert {n for n in after if after[n] == before[n]} == {"0.weight", "0.bias"}
    assert {slot.param for slot in result.inner.slots} == set(range(4))  # norm and last layer


def test_a_parameter_without_gradient_is_left_out():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.used(x)

    module = Partly()
    before = bits(module)
    recipe = recipe_of(clip_norm=1.0)
    run_local_steps(module, recipe, empty_inner_state(), one_batch_a_step(batches(2)), first_step=0, total_steps=2)
    after = bits(module)
    assert {n for n in after if after[n] == before[n]} == {"unused.weight", "unused.bias"}


def test_the_module_is_in_train_mode():
    module = network().eval()
    run_local_steps(module, recipe_of(), empty_inner_state(), one_batch_a_step(batches(1)), first_step=0, total_steps=1)
    assert module.training
    assert module[1].num_batches_tracked.item() == 1


def test_the_options_of_the_recipe_are_not_changed():
    options = dict(SGD[1])
    recipe = recipe_of((torch.optim.SGD, options), schedule=lambda step, total: 0.5)
    run_local_steps(network(), recipe, empty_inner_state(), one_batch_a_step(batches(2)), first_step=0, total_steps=2)
    assert options == SGD[1]


def test_the_optimizers_default_rate_follows_the_schedule():
    asked = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            asked.append(self.param_groups[0]["lr"])
            return super().step(closure)

    recipe = recipe_of((Spy, {}), schedule=lambda step, total: 1 / (step + 1))
    run_local_steps(network(), recipe, empty_inner_state(), one_batch_a_step(batches(3)), first_step=1, total_steps=9)
    assert asked == [0.001 / 2, 0.001 * (1 / 3), 0.001 / 4]


def test_a_loss_that_is_not_finite_is_reported_as_it_is():
    module = nn.Linear(5, 3)
    batch = TensorBatch((torch.full((2, 5), math.nan),), torch.zeros(2, dtype=torch.int64), 2)
    result = run_local_steps(module, recipe_of(), empty_inner_state(), [(2, [batch])], first_step=0, total_steps=1)
    assert math.isnan(result.loss_sum)


# FedProx ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prox", [0.0, 0.5, 3.0])
def test_the_proximal_term_pulls_towards_the_start_as_by_hand(prox):
    rate, start, target = 0.1, 2.0, -1.0
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, start)
    batch = TensorBatch((torch.ones(1, 1),), torch.full((1, 1), target), 1)
    recipe = replace(recipe_of((torch.optim.SGD, {"lr": rate}), loss=mse), prox=prox)
    found = []
    for steps in (1, 2, 5):
        nn.init.constant_(module.weight, start)
        run_local_steps(
            module, recipe, empty_inner_state(), one_batch_a_step([batch] * steps), first_step=0, total_steps=9
        )
        found.append(module.weight.item())
    fixed = (2 * target + prox * start) / (2 + prox)  # where 2 (w - target) + prox (w - start) = 0
    expected = [fixed + (start - fixed) * (1 - rate * (2 + prox)) ** steps for steps in (1, 2, 5)]
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_proximal_term_is_clipped_with_the_gradient_and_leaves_parameters_without_gradient_alone():
    module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    nn.init.constant_(module[0].weight, 2.0)
    unused = module[1].weight.detach().clone()
    batch = TensorBatch((torch.ones(1, 1),), torch.zeros(1, 1), 1)
    recipe = replace(recipe_of((torch.optim.SGD, {"lr": 1.0}), loss=mse, clip_norm=0.25), prox=4.0)
    first = module[0]

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.both = module

        def forward(self, x):
            return first(x)

    run_local_steps(First(), recipe, empty_inner_state(), one_batch_a_step([batch] * 2), first_step=0, total_steps=2)
    assert first.weight.item() == pytest.approx(1.5)  # two steps of norm 0.25
    assert torch.equal(module[1].weight, unused)
