from __future__ import annotations

import pytest
import torch
from torch import nn

from dtrain.algorithm.replica import carried, empty_inner_state, pack_inner_state, unpack_inner_state
from dtrain.errors import UnsuitableModel
from dtrain.types import InnerState


def bits(tensors):
    """The names and the bytes of a state_dict, whatever its dtypes."""
    return {
        name: (t.dtype, tuple(t.shape), t.detach().clone().contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, t in tensors.items()
    }


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "sgd momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01}),
    "adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "adamax": (torch.optim.Adamax, {"lr": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.3}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "radam": (torch.optim.RAdam, {"lr": 0.01}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.01}),
    "asgd": (torch.optim.ASGD, {"lr": 0.01, "t0": 2}),
    "rprop": (torch.optim.Rprop, {"lr": 0.01}),
}
optimizers = pytest.mark.parametrize(("kind", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
STEPS = 7


def small_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def take_steps(module, optimizer, first, count):
    for step in range(first, first + count):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def moved(state):
    """The same state in read-only arrays, as Dask gives them."""
    data = state.data.copy()
    data.flags.writeable = False
    return InnerState(state.slots, data)


def packed(optimizer, module, kind, options):
    return pack_inner_state(optimizer, list(module.parameters()), carried(kind(module.parameters(), **options)))


@optimizers
def test_a_new_optimizer_goes_on_where_the_packed_one_stopped(kind, options):
    whole = small_model()
    take_steps(whole, kind(whole.parameters(), **options), 0, 2 * STEPS)

    module = small_model()
    optimizer = kind(module.parameters(), **options)
    take_steps(module, optimizer, 0, STEPS)
    state = moved(packed(optimizer, module, kind, options))
    fresh = kind(module.parameters(), **options)
    unpack_inner_state(state, fresh, list(module.parameters()))
    packed_again = packed(fresh, module, kind, options)
    assert packed_again.slots == state.slots
    assert packed_again.data.tobytes() == state.data.tobytes()
    take_steps(module, fresh, STEPS, STEPS)
    assert bits(module.state_dict()) == bits(whole.state_dict())


STATEFUL = {name: given for name, given in OPTIMIZERS.items() if name != "sgd"}


@pytest.mark.parametrize(("kind", "options"), STATEFUL.values(), ids=STATEFUL.keys())
def test_without_its_state_the_optimizer_ends_elsewhere(kind, options):
    whole = small_model()
    take_steps(whole, kind(whole.parameters(), **options), 0, 2 * STEPS)
    module = small_model()
    take_steps(module, kind(module.parameters(), **options), 0, STEPS)
    take_steps(module, kind(module.parameters(), **options), STEPS, STEPS)
    assert bits(module.state_dict()) != bits(whole.state_dict())


@optimizers
def test_a_packed_state_does_not_change_when_the_optimizer_goes_on(kind, options):
    module = small_model()
    optimizer = kind(module.parameters(), **options)
    take_steps(module, optimizer, 0, 2)
    state = packed(optimizer, module, kind, options)
    before = state.data.tobytes()
    fresh = kind(module.parameters(), **options)
    unpack_inner_state(state, fresh, list(module.parameters()))
    take_steps(module, fresh, 2, 2)
    take_steps(module, optimizer, 4, 2)
    assert state.data.tobytes() == before


def test_the_state_of_an_optimizer_without_steps_is_empty():
    module = small_model()
    state = packed(torch.optim.Adam(module.parameters()), module, torch.optim.Adam, {})
    assert (state.slots, state.data.size) == ((), 0)
    assert (empty_inner_state().slots, empty_inner_state().data.size) == ((), 0)


def test_plain_values_and_odd_sizes_are_kept():
    module = nn.Linear(1, 1)
    params = list(module.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1)
    told = {"flag": True, "none": None, "count": 3, "rate": 0.1, "mask": torch.tensor([True, False, True])}
    optimizer.state[params[0]].update(told)
    optimizer.state[params[1]].update({"wide": torch.tensor(1.0, dtype=torch.float64), "half": torch.ones(3).half()})
    state = pack_inner_state(optimizer, params, carried(optimizer))
    assert [slot.offset % 8 for slot in state.slots] == [0] * 7
    fresh = torch.optim.SGD(params, lr=0.1)
    unpack_inner_state(state, fresh, params)
    first, second = fresh.state[params[0]], fresh.state[params[1]]
    assert {name: first[name] for name in ("flag", "none", "count", "rate")} == {
        name: told[name] for name in ("flag", "none", "count", "rate")
    }
    assert first["flag"] is True
    assert first["mask"].tolist() == [True, False, True]
    assert (second["wide"].dtype, second["wide"].shape, second["wide"].item()) == (torch.float64, (), 1.0)
    assert second["half"].dtype == torch.float16


def test_a_state_that_is_neither_tensor_nor_number_is_refused():
    module = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.state[module.bias]["history"] = {1, 2}
    with pytest.raises(UnsuitableModel, match="SGD keeps a set as history"):
        pack_inner_state(optimizer, list(module.parameters()), carried(optimizer))


# Values outside of the states of parameters -----------------------------------------------------------------------


class Counting(torch.optim.SGD):
    """Keeps a counter and an estimate in the group, as Prodigy, D-Adaptation and Schedule-Free do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group.update(k=0, d=1.0, betas=(0.9, 0.99), seen=[], scale=torch.ones(2), mode="train")

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["d"] = group["d"] * 0.5 + group["k"]
            group["betas"] = (group["betas"][0] * 0.9, 0.99)
            group["seen"].append(group["k"])
            group["scale"] *= 1.5
            group["mode"] = "stepped"
            for parameter in group["params"]:
                parameter.data -= group["lr"] * group["d"] * group["scale"][0] * parameter.grad


class WithAttributes(torch.optim.SGD):
    """Keeps a counter, a tensor and a key of ``state`` that is no parameter."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.count, self.mean = 0, torch.zeros(())

    def step(self, closure=None):
        self.count += 1
        self.mean = self.mean + self.count
        self.state["total"] = self.state.get("total", 0.0) + 0.5
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * self.mean * self.state["total"] * parameter.grad


@pytest.mark.parametrize("kind", [Counting, WithAttributes])
def test_values_of_groups_and_attributes_go_on(kind):
    whole = small_model()
    take_steps(whole, kind(whole.parameters()), 0, 4 * STEPS)
    module, state = small_model(), empty_inner_state()
    for part in range(4):
        optimizer = kind(module.parameters())
        unpack_inner_state(state, optimizer, list(module.parameters()))
        take_steps(module, optimizer, part * STEPS, STEPS)
        state = moved(packed(optimizer, module, kind, {}))
    assert bits(module.state_dict()) == bits(whole.state_dict())


def test_only_values_that_differ_from_a_fresh_optimizer_are_kept():
    module = small_model()
    optimizer = Counting(module.parameters())
    assert packed(optimizer, module, Counting, {}).slots == ()
    take_steps(module, optimizer, 0, 1)
    slots = packed(optimizer, module, Counting, {}).slots
    assert {(slot.owner, slot.param, slot.key) for slot in slots} == {
        ("group", 0, key) for key in ("k", "d", "betas", "seen", "scale", "mode")
    }


def test_the_learning_rate_is_that_of_the_schedule():
    module = small_model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.param_groups[0]["lr"] = 0.05
    assert packed(optimizer, module, torch.optim.SGD, {"lr": 0.1}).slots == ()


@pytest.mark.parametrize("key", ["momenta", "by_name"])
def test_tensors_in_a_collection_of_the_optimizer_are_refused(key):
    module = small_model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.own = list(module.parameters())  # parameters are no state
    state = packed(optimizer, module, torch.optim.SGD, {"lr": 0.1})
    assert state.slots == ()
    setattr(optimizer, key, {"momenta": [torch.zeros(2)], "by_name": {"a": torch.zeros(2)}}[key])
    with pytest.raises(UnsuitableModel, match=f"keeps a .* as {key}") as caught:
        packed(optimizer, module, torch.optim.SGD, {"lr": 0.1})
    assert "param_groups" in caught.value.hint


def test_several_groups_keep_their_own_values():
    module = small_model()

    def made():
        layers = [{"params": module[0].parameters()}, {"params": module[2].parameters(), "lr": 0.2}]
        return Counting(layers)

    optimizer = made()
    take_steps(module, optimizer, 0, 2)
    optimizer.param_groups[1]["k"] = 99
    state = pack_inner_state(optimizer, list(module.parameters()), carried(made()))
    other = made()
    unpack_inner_state(state, other, list(module.parameters()))
    assert [group["k"] for group in other.param_groups] == [2, 99]
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.2]
