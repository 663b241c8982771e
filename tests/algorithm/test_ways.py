"""Every way of averaging: poisoned replicas never reach the average, tied weights stay tied, buffers stay buffers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dtrain.algorithm.average import Update, average, combine, contribute, stepped
from dtrain.algorithm.drift import norm_of
from dtrain.algorithm.outer import WHOLE_TENSORS
from dtrain.algorithm.params import flatten, is_finite, layout_of, load_into, tensors_of
from dtrain.algorithm.pattern import by_replica, first_outer, model_of, round_averages, starts_of
from dtrain.algorithm.plan import first_position, plan_round
from dtrain.algorithm.replica import empty_inner_state
from dtrain.algorithm.slices import cut_broadcast, cut_outer, cut_update, join_broadcast, slices_of
from dtrain.config.average import AverageConfig
from dtrain.config.schema import TrainTable
from dtrain.types import Broadcast, Flat, InnerState, OuterState, Parameters, ReplicaState
from tests.algorithm.helpers import locked, read_only, result, state_after, task

OUTER = {"optimizer": "sgd", "args": {"lr": 0.5, "momentum": 0.9}, "clip_norm": 0.1}
WAYS: dict[str, dict[str, Any]] = {
    "samples": {},
    "uniform": {"weights": "uniform"},
    "median": {"reduce": "median"},
    "trimmed": {"reduce": "trimmed", "trim": 0.26},
    "fednova": {"weights": "fednova"},
    "bf16": {"codec": {"name": "bf16"}},
    "int8": {"codec": {"name": "int8"}},
    "int4": {"codec": {"name": "int4"}},
    "control": {"control": True},
    "averaged states": {"inner_state": "average"},
    "outer": {"outer": OUTER},
    "int4, fednova, outer": {"codec": {"name": "int4"}, "weights": "fednova", "outer": OUTER},
    "control, averaged states, outer": {"control": True, "inner_state": "average", "outer": OUTER},
}
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "ring": {"mix": {"topology": "ring"}},
    "exponential": {"mix": {"topology": "exponential"}},
    "groups": {"mix": {"topology": "hierarchical", "groups": 2, "period": 3}},
    "groups of one": {"mix": {"topology": "hierarchical", "groups": 4, "period": 3}},
    "ring with an outer optimizer": {"mix": {"topology": "ring"}, "outer": OUTER},
    "groups with int8": {"mix": {"topology": "hierarchical", "groups": 2, "period": 3}, "codec": {"name": "int8"}},
    "ring with averaged states": {"mix": {"topology": "ring"}, "inner_state": "average"},
}
REPLICAS = 4


class Model(nn.Module):
    """A tied and a frozen weight, buffers of float32 and others, and parameters for several slices."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one = nn.Linear(90, 100, bias=False)
        self.norm = nn.BatchNorm1d(100)
        self.other = nn.Linear(90, 100, bias=False)
        self.other.weight = self.one.weight
        self.frozen = nn.Parameter(torch.full((3,), 9.0), requires_grad=False)
        self.register_buffer("wide", torch.randn(3, dtype=torch.float64))
        self.register_buffer("narrow", torch.randn(3).bfloat16())
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)


LAYOUT = layout_of(Model())


def trained(seed: int) -> Parameters:
    """Parameters after local steps, without the frozen ones."""
    return replace(flatten(Model(seed), LAYOUT), frozen=np.zeros(0, np.float32))


def place(name: str) -> slice:
    entry = next(entry for entry in LAYOUT.entries if entry.name == name)
    return slice(entry.offset, entry.offset + entry.size)


def control(seed: int, config: AverageConfig) -> Flat | None:
    if not config.control:
        return None
    found: Flat = np.random.default_rng(seed).normal(size=LAYOUT.num_params).astype(np.float32)
    return found


def inner(seed: int) -> InnerState:
    return state_after(torch.optim.Adam, {"lr": 0.1}, [(3, 2), (4,)], steps=seed + 1)


def sent_by(config: AverageConfig, starts: Sequence[Broadcast], poison: Any = None) -> list[Update]:
    """Updates of all replicas; `poison` makes those of replica 1 bad."""
    sent = []
    for k, start in enumerate(starts):
        after, own_control, own_inner = trained(k + 1), control(k, config), inner(k)
        if poison is not None and k == 1:
            after, own_control, own_inner = poison(after, own_control, own_inner)
        local = result(own_inner, own_control, samples=k + 2, step_norm=1.0 + k)
        state = ReplicaState(empty_inner_state())
        sent.append(contribute(read_only(start), after, state, local, task(k), config)[0])
    return sent


def start_of(seed: int = 0) -> Broadcast:
    return Broadcast(trained(seed))


# Poison -----------------------------------------------------------------------------------------------------------


def in_flat(name: str, value: float) -> Any:
    def poison(after: Parameters, control: Flat | None, inner: InnerState) -> tuple[Any, ...]:
        flat = after.flat.copy()
        flat[place(name)][2] = value
        return replace(after, flat=flat), control, inner

    return poison


def in_extra(name: str, size: int) -> Any:
    """NaN as float64 and bfloat16 have it: all bits 1."""

    def poison(after: Parameters, control: Flat | None, inner: InnerState) -> tuple[Any, ...]:
        extra = after.extra.copy()
        extra[place(name)][:size] = 0xFF
        return replace(after, extra=extra), control, inner

    return poison


def in_control(after: Parameters, control: Flat | None, inner: InnerState) -> tuple[Any, ...]:
    assert control is not None
    bad = control.copy()
    bad[5] = np.nan
    return after, bad, inner


def in_inner(after: Parameters, control: Flat | None, inner: InnerState) -> tuple[Any, ...]:
    slot = next(slot for slot in inner.slots if slot.key == "exp_avg_sq")
    data = inner.data.copy()
    data[slot.offset : slot.offset + 4] = np.frombuffer(np.float32(np.inf).tobytes(), np.uint8)
    return after, control, InnerState(inner.slots, data)


POISONS: dict[str, Any] = {
    "NaN in the parameters": in_flat("one.weight", np.nan),
    "infinity in the parameters": in_flat("one.weight", -np.inf),
    "NaN in a buffer": in_flat("norm.running_var", np.nan),
    "NaN in a float64 buffer": in_extra("wide", 8),
    "NaN in a bfloat16 buffer": in_extra("narrow", 2),
}
MORE: list[tuple[str, Any]] = [
    *((way, in_control) for way in WAYS if "control" in way),
    *((way, in_inner) for way in WAYS if "averaged states" in way),
    *((way, in_flat("one.weight", np.finfo(np.float32).max)) for way in ("bf16",)),  # rounded to infinity
]


def averaged(
    config: AverageConfig, start: Broadcast, updates: Sequence[Update], outer: OuterState, count: int
) -> Broadcast:
    """The mean of updates of one start, computed on slices."""
    slices = slices_of(LAYOUT, count)
    starts = [read_only(cut_broadcast(start, at)) for at in slices]
    sent = [[cut_update(one, at, config.codec) for one in updates] for at in slices]
    means = [average(own, [own] * len(updates), each, config) for own, each in zip(starts, sent, strict=True)]
    norm = norm_of([mean.facts.squares for mean in means])
    outers = [cut_outer(outer, at, LAYOUT.num_params) for at in slices]
    parts = [stepped(*one, config, 1.0, norm) for one in zip(starts, means, outers, strict=True)]
    return join_broadcast([part.broadcast for part in parts])


def assert_finite(found: Broadcast) -> None:
    assert is_finite(found.params)
    assert found.control is None or np.isfinite(found.control).all()
    if found.inner is not None:
        for slot in found.inner.slots:
            if slot.dtype == "float32":
                assert np.isfinite(found.inner.data[slot.offset : slot.offset + slot.size].view(np.float32)).all()


def bits(broadcast: Broadcast) -> list[bytes | None]:
    params, inner = broadcast.params, broadcast.inner
    arrays = [params.flat, params.extra, broadcast.control, None if inner is None else inner.data]
    return [None if array is None else array.tobytes() for array in arrays]


@pytest.mark.sampled(38)
@pytest.mark.parametrize(
    ("way", "poison"),
    [*((way, poison) for way in WAYS for poison in POISONS.values()), *MORE],
    ids=[*(f"{way}: {poison}" for way in WAYS for poison in POISONS), *(f"{way}: own" for way, _ in MORE)],
)
def test_the_average_is_that_of_the_others(way: str, poison: Any) -> None:
    config, start = AverageConfig.model_validate(WAYS[way]), start_of()
    sent = sent_by(config, [start] * REPLICAS, poison)
    assert [one.contribution.finite for one in sent] == [True, False, True, True]
    others = [one for k, one in enumerate(sent_by(config, [start] * REPLICAS)) if k != 1]
    found = combine(start, [start] * REPLICAS, sent, first_outer(config), config)
    expected = combine(start, [start] * 3, others, first_outer(config), config)
    assert_finite(found.broadcast)
    assert found.facts.finite
    assert bits(found.broadcast) == bits(expected.broadcast)
    assert [state.data.tobytes() for state in found.outer] == [state.data.tobytes() for state in expected.outer]
    on_slices = averaged(config, start, sent, first_outer(config), 2)
    assert bits(on_slices) == bits(expected.broadcast)


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("way", TOPOLOGIES)
def test_neighbours_of_a_poisoned_replica_stay_finite(way: str, poison: str) -> None:
    config, plan = AverageConfig.model_validate(TOPOLOGIES[way]), plan_round(first_position(4), (9,) * 4, TrainTable())
    starts = [start_of(10 + k) for k in range(REPLICAS)] if "groups with" not in way else [start_of()] * REPLICAS
    updates = sent_by(config, starts, POISONS[poison])
    means = round_averages(plan, starts, config)
    found = []
    for mean in means:
        start = starts[mean.receivers[0]]
        own = starts_of(mean, starts, config)
        combined = combine(start, own, [updates[k] for k in mean.members], first_outer(config), config)
        assert_finite(combined.broadcast)
        assert combined.facts.finite
        found.append(combined.broadcast)
    assert is_finite(model_of(means, [one.params for one in found]))
    received = by_replica(means, found)
    if way == "groups of one":  # it has nobody else: it stays where it was
        assert received[1].params.flat.tobytes() == starts[1].params.flat.tobytes()


def test_if_all_are_poisoned_nothing_moves() -> None:
    for way in WAYS.values():
        config, start = AverageConfig.model_validate(way), start_of()
        bad, _ = contribute(start, in_flat("one.weight", np.nan)(trained(1), None, inner(0))[0], *local(), config)
        found = combine(start, [start] * 2, [bad, bad], first_outer(config), config)
        assert found.broadcast.params.flat.tobytes() == start.params.flat.tobytes()


def local() -> tuple[Any, ...]:
    return ReplicaState(empty_inner_state()), result(), task()


# Values that are huge ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_an_update_beyond_float32_is_rejected_and_the_residual_stays(name: str) -> None:
    config = AverageConfig.model_validate({"codec": {"name": name}})
    largest = np.finfo(np.float32).max
    far, back = start_of(), trained(1)
    far.params.flat[4], back.flat[4] = largest, -largest
    state = ReplicaState(empty_inner_state(), locked(np.zeros(LAYOUT.num_params, np.float32)))
    sent, kept = contribute(far, back, state, result(), task(), config)
    assert not sent.contribution.finite
    assert kept is state


@pytest.mark.parametrize("way", ["int8", "int4", "fednova", "samples", "median"])
def test_huge_parameters_that_hardly_move_are_averaged(way: str) -> None:
    config, start = AverageConfig.model_validate(WAYS[way]), start_of()
    start.params.flat[4] = 3e38
    updates = []
    for k in range(3):
        after = replace(start.params, flat=start.params.flat + np.float32(1e-3))
        updates.append(contribute(start, after, *local()[:1], result(step_norm=1.0 + k), task(k), config)[0])
    found = combine(start, [start] * 3, updates, (), config)
    assert all(one.contribution.finite for one in updates)
    assert found.broadcast.params.flat[4] == np.float32(3e38)


# Ties, frozen parameters and buffers ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [*WAYS, *TOPOLOGIES])
def test_tied_weights_stay_tied_and_frozen_ones_apart(way: str) -> None:
    config, start = AverageConfig.model_validate({**WAYS, **TOPOLOGIES}[way]), start_of()
    found = combine(start, [start] * REPLICAS, sent_by(config, [start] * REPLICAS), first_outer(config), config)
    params = found.broadcast.params
    assert len(params.frozen) == 0
    tensors = tensors_of(params)
    assert tensors["one.weight"].data_ptr() == tensors["other.weight"].data_ptr()
    module = Model(5)
    load_into(module, replace(params, frozen=np.full(3, 9.0, np.float32)))
    assert module.one.weight is module.other.weight
    assert torch.equal(module.one.weight, tensors["one.weight"])
    assert not torch.equal(module.one.weight, Model(0).one.weight)


ELEMENTWISE = sorted(
    name.lower()
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    if name.lower() not in {"optimizer", "lbfgs", *WHOLE_TENSORS}
)


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        *((name, {}) for name in ELEMENTWISE),
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("rmsprop", {"momentum": 0.9}),
        ("adam", {"amsgrad": True}),
    ],
)
def test_buffers_never_reach_an_outer_optimizer_so_that_variances_stay_positive(
    optimizer: str, more: dict[str, Any]
) -> None:
    config = AverageConfig.model_validate({"outer": {"optimizer": optimizer, "args": {"lr": 1.0, **more}}})
    start, outer = start_of(), first_outer(config)
    variance = place("norm.running_var")
    for number in range(8):
        updates = []
        for k in range(2):  # variances that fall and rise again, as a momentum would overshoot
            after = trained(number + k)
            after.flat[variance] = 1e-3 if number % 2 else 5.0
            updates.append(contribute(start, after, *local()[:1], result(samples=k + 1), task(k), config)[0])
        combined = combine(start, [start] * 2, updates, outer, config)
        start, outer = combined.broadcast, combined.outer
        assert (start.params.flat[variance] == np.float32(1e-3 if number % 2 else 5.0)).all()
        assert outer[0].slots == () or {slot.shape for slot in outer[0].slots} <= {(), (LAYOUT.num_params,)}
