"""Slices: every element once, and what is computed on them is what is computed on the whole, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.algorithm.average import Combined, Update, average, combine, contribute, stepped
from dtrain.algorithm.codec import BLOCK
from dtrain.algorithm.drift import norm_of
from dtrain.algorithm.outer import outer_step
from dtrain.algorithm.pattern import summarise
from dtrain.algorithm.replica import empty_inner_state, fresh_replica
from dtrain.algorithm.slices import (
    ALIGNMENT,
    SLICE_BYTES,
    SLICE_TASKS,
    Slice,
    Slices,
    cut_broadcast,
    cut_inner,
    cut_outer,
    cut_params,
    cut_update,
    join_broadcast,
    join_outer,
    join_params,
    num_slices,
    slices_of,
)
from dtrain.config.average import AverageConfig, OuterConfig
from dtrain.types import Broadcast, Entry, InnerState, Layout, OuterState, Parameters, Slot
from tests.algorithm.helpers import contribution, locked, read_only, result, state_after, task

SHAPES = [(300, 7), (5,), (), (41, 2, 3), (1,), (2000,)]
INNER: dict[str, InnerState] = {
    "sgd with momentum": state_after(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, SHAPES),
    "adamw": state_after(torch.optim.AdamW, {"lr": 0.1, "amsgrad": True}, SHAPES),
    "nadam": state_after(torch.optim.NAdam, {"lr": 0.1}, SHAPES),
    "sgd keeps nothing": state_after(torch.optim.SGD, {"lr": 0.1}, SHAPES),
    "no step": empty_inner_state(),
    "plain values": InnerState(
        tuple(Slot(k, "k", "", (), 0, 0, value, "group") for k, value in enumerate((1, 2.5, "a", None, (1, 2)))),
        np.zeros(0, np.uint8),
    ),
    "mixed": InnerState(
        (
            Slot(0, "k", "", (), 0, 0, 3, "group"),
            Slot(0, "small", "uint8", (3,), 0, 3),
            Slot(0, "none", "float32", (0,), 8, 0),
            Slot(1, "k", "", (), 0, 0, "x", "group"),
            Slot(1, "large", "float64", (50,), 8, 400),
            Slot(2, "k", "", (), 0, 0, -0.0, "group"),
        ),
        np.arange(408, dtype=np.uint16).astype(np.uint8),
    ),
}
OUTER: dict[str, OuterConfig] = {
    name: OuterConfig(optimizer=optimizer, args=options)
    for name, optimizer, options in (
        ("sgd with momentum", "sgd", {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
        ("sgd", "sgd", {"lr": 0.7}),
        ("adam", "adam", {"lr": 0.01}),
        ("nadam", "nadam", {"lr": 0.01}),
        ("rmsprop", "rmsprop", {"lr": 0.01, "momentum": 0.5}),
        ("adagrad", "adagrad", {"lr": 0.01}),
        ("rprop", "rprop", {"lr": 0.01}),
    )
}


def layout(params: Sequence[int], buffers: Sequence[int] = (), extra: int = 0) -> Layout:
    sizes = [*(("param", size) for size in params), *(("buffer", size) for size in buffers)]
    offsets = np.cumsum([0, *(size for _, size in sizes)]).tolist()
    entries = [
        Entry(f"{kind}{k}", kind, "float32", (size,), offsets[k], size)  # type: ignore[arg-type]
        for k, (kind, size) in enumerate(sizes)
    ]
    if extra:
        entries.append(Entry("extra", "extra", "float64", (extra,), 0, 8 * extra))
    return Layout(tuple(entries), sum(params), sum(params) + sum(buffers), 8 * extra)


layouts = st.builds(
    layout,
    st.lists(st.integers(1, 2 * ALIGNMENT), min_size=1, max_size=5),
    st.lists(st.integers(1, 300), max_size=3),
    st.integers(0, 3),
)
counts = st.integers(1, 7)


def numbered(of: Layout) -> Parameters:
    """Parameters whose values are all different."""
    extra = np.arange(of.num_extra // 8, dtype=np.float64).view(np.uint8)
    return Parameters(of, locked(np.arange(of.num_flat, dtype=np.float32)), locked(extra))


def bits(value: Any) -> Any:
    """All of a value in a form that can be compared."""
    match value:
        case np.ndarray():
            return value.dtype, value.tobytes()
        case InnerState(slots, data):
            return [(slot, repr(slot.value)) for slot in slots], data.tobytes()
        case Parameters():
            return value.layout, value.flat.tobytes(), value.extra.tobytes(), value.start
        case Broadcast():
            return bits(value.params), bits(value.inner), bits(value.control)
        case tuple() | list():
            return [bits(one) for one in value]
    return value


# Bounds -----------------------------------------------------------------------------------------------------------


@given(layouts, st.integers(1, 50))
def test_slices_cover_everything_once_and_begin_at_whole_blocks(of: Layout, count: int) -> None:
    slices = slices_of(of, count)
    assert 1 <= len(slices) <= count
    assert [one.number for one in slices] == list(range(len(slices)))
    assert {one.count for one in slices} == {len(slices)}
    assert [one.start for one in slices] == [0, *(one.stop for one in slices[:-1])]
    assert slices[-1].stop == of.num_flat
    for one in slices:
        assert one.start % ALIGNMENT == one.start % BLOCK == 0
        assert one.start < min(one.stop, of.num_params)  # none without parameters
    assert [one.is_last for one in slices] == [False] * (len(slices) - 1) + [True]


def test_slices_are_about_equal() -> None:
    sizes = [one.stop - one.start for one in slices_of(layout([40 * ALIGNMENT + 5], [9]), 7)]
    assert len(sizes) == 7
    assert max(sizes) - min(sizes) <= ALIGNMENT + 14


def test_a_small_model_is_not_cut() -> None:
    assert slices_of(layout([5, 6], [7], 1), 4) == (Slice(0, 0, 18, 1),)


def test_the_number_of_slices() -> None:
    def whole(nbytes: int) -> Layout:
        return Layout((), nbytes // 4, nbytes // 4, 0)

    for nbytes, workers, replicas, expected in (
        (SLICE_BYTES - 4, 8, 8, 1),
        (2 * SLICE_BYTES - 4, 8, 8, 1),
        (2 * SLICE_BYTES, 8, 8, 2),
        (50 * SLICE_BYTES, 8, 8, 8),
        (50 * SLICE_BYTES, 0, 8, 1),
        (1000 * SLICE_BYTES, 64, 64, 64),  # 4,096 tasks
        (1000 * SLICE_BYTES, 65, 65, 63),
        (1000 * SLICE_BYTES, 1000, 1000, 4),
        (1000 * SLICE_BYTES, 4096, 4097, 1),
    ):
        assert num_slices("auto", whole(nbytes), workers, replicas) == expected
        assert expected == 1 or expected * replicas <= SLICE_TASKS
    assert num_slices(3, whole(4), 1, 1) == 3
    assert num_slices(10, whole(1000 * SLICE_BYTES), 1000, 1000) == 10


# Every element once -----------------------------------------------------------------------------------------------


@given(layouts, counts)
def test_every_element_of_the_parameters_lies_in_one_slice(of: Layout, count: int) -> None:
    params, slices = numbered(of), slices_of(of, count)
    parts = [cut_params(params, at) for at in slices]
    assert np.concatenate([part.flat for part in parts]).tolist() == list(range(of.num_flat))
    assert np.concatenate([part.extra for part in parts]).tobytes() == params.extra.tobytes()
    assert sum(part.num_params for part in parts) == of.num_params
    for at, part in zip(slices, parts, strict=True):
        assert np.shares_memory(part.flat, params.flat)
        assert part.flat[: part.num_params].tolist() == list(range(at.start, min(at.stop, of.num_params)))
    assert bits(join_params(parts)) == bits(params)


@pytest.mark.parametrize("kind", INNER)
@given(layouts, counts)
def test_every_value_of_a_broadcast_lies_in_one_slice(kind: str, of: Layout, count: int) -> None:
    control = np.arange(of.num_params, dtype=np.float32)
    whole, slices = read_only(Broadcast(numbered(of), INNER[kind], control)), slices_of(of, count)
    parts = [cut_broadcast(whole, at) for at in slices]
    inner = [part.inner for part in parts if part.inner is not None]
    assert [name(slot) for state in inner for slot in state.slots] == [name(slot) for slot in INNER[kind].slots]
    assert b"".join(state.data.tobytes() for state in inner) == INNER[kind].data.tobytes()
    assert np.concatenate([part.control for part in parts if part.control is not None]).tolist() == control.tolist()
    for part in parts:
        assert part.control is not None
        assert len(part.control) == part.params.num_params
    assert bits(join_broadcast(parts)) == bits(whole)
    bare = replace(whole, inner=None, control=None)
    assert bits(join_broadcast([cut_broadcast(bare, at) for at in slices])) == bits(bare)


def name(slot: Slot) -> tuple[Any, ...]:
    return slot.param, slot.key, slot.dtype, slot.shape, slot.size, slot.owner, repr(slot.value)


@pytest.mark.parametrize("kind", INNER)
@given(count=counts)
def test_the_tensors_of_a_slice_lie_where_its_slots_say(kind: str, count: int) -> None:
    whole = INNER[kind]
    tensors = {(slot.param, slot.key): of_slot(whole, slot) for slot in whole.slots if slot.dtype}
    for number in range(count):
        part = cut_inner(whole, Slice(number, 0, 1, count))
        assert np.shares_memory(part.data, whole.data) or not len(part.data)
        for slot in part.slots:
            if slot.dtype:
                assert of_slot(part, slot) == tensors.pop((slot.param, slot.key))
    assert not tensors


def of_slot(state: InnerState, slot: Slot) -> bytes:
    found: bytes = state.data[slot.offset : slot.offset + slot.size].tobytes()
    assert len(found) == slot.size
    return found


def test_states_of_inner_optimizers_are_cut_into_about_equal_bytes() -> None:
    state = state_after(torch.optim.AdamW, {"lr": 0.1}, [(100,)] * 60)
    sizes = [cut_inner(state, Slice(number, 0, 1, 5)).nbytes for number in range(5)]
    assert sum(sizes) == state.nbytes
    assert max(sizes) - min(sizes) <= 2 * (400 + 8)


@cache
def outer_state(kind: str, size: int, steps: int) -> OuterState:
    theta, state = np.linspace(-1, 1, size, dtype=np.float32), empty_inner_state()
    for step in range(steps):
        mean = theta + np.sin(np.arange(size, dtype=np.float32) + step)
        theta, state = outer_step(theta, mean.astype(np.float32), state, OUTER[kind], factor=1.0, norm=0.0)
    return (state,)


@pytest.mark.parametrize("kind", OUTER)
@given(st.sampled_from([1, ALIGNMENT - 1, 2 * ALIGNMENT + 1, 3 * ALIGNMENT + 5]), st.integers(0, 9), counts)
def test_every_element_of_the_outer_state_lies_in_one_slice(kind: str, size: int, buffers: int, count: int) -> None:
    slices = slices_of(layout([size], [buffers] if buffers else []), count)
    sizes = [min(at.stop, size) - at.start for at in slices]
    for steps in (0, 2):
        whole = outer_state(kind, size, steps)
        whole[0].data.flags.writeable = False
        parts = [cut_outer(whole, at, size) for at in slices]
        assert bits(join_outer(parts, sizes)) == bits(whole)
        for slot in whole[0].slots:
            own = [(part, next(s for s in part[0].slots if name(s)[:2] == name(slot)[:2])) for part in parts]
            raw = [of_slot(part[0], s) for part, s in own]
            if slot.shape == (size,):
                assert b"".join(raw) == of_slot(whole[0], slot)
                assert [s.shape for _, s in own] == [(size,) for size in sizes]
            else:
                assert slot.shape == ()  # a counter goes with all slices
                assert set(raw) == {of_slot(whole[0], slot)}
    assert join_outer([()] * len(slices), sizes) == ()


# A round ----------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "samples": {},
    "uniform": {"weights": "uniform"},
    "fednova": {"weights": "fednova"},
    "median": {"reduce": "median"},
    "trimmed": {"reduce": "trimmed", "trim": 0.34},
    "bf16": {"codec": {"name": "bf16"}},
    "int8": {"codec": {"name": "int8"}},
    "int4": {"codec": {"name": "int4"}, "weights": "fednova"},
    "control": {"control": True},
    "averaged states": {"inner_state": "average"},
    "outer sgd": {"outer": {}},
    "outer sgd, clipped": {"outer": {"clip_norm": 0.01}},
    "outer adam, clipped": {"outer": {"optimizer": "adam", "args": {"lr": 0.01}, "clip_norm": 0.01}},
    "int4, outer, clipped": {"codec": {"name": "int4"}, "outer": {"clip_norm": 0.01}},
    "median, outer, clipped": {"reduce": "median", "outer": {"clip_norm": 0.01}},
    "all": {"control": True, "inner_state": "average", "weights": "fednova", "outer": {"clip_norm": 0.01}},
}
WHOLE = layout([ALIGNMENT + 3, 2 * ALIGNMENT, 4 * ALIGNMENT - 77], [31, 5], 2)


def varied(seed: int) -> Parameters:
    generator = np.random.default_rng(seed)
    extra = generator.normal(size=WHOLE.num_extra // 8).view(np.uint8)
    return Parameters(WHOLE, generator.normal(size=WHOLE.num_flat).astype(np.float32), extra)


def sent_by(config: AverageConfig, start: Broadcast) -> list[Update]:
    """Updates of three replicas, and of one that is left out."""
    sent = []
    for k in range(4):
        after = varied(k + 1)
        if k == 1:
            after.flat[7] = np.nan
        control = np.random.default_rng(k).normal(size=WHOLE.num_params).astype(np.float32) if config.control else None
        inner = state_after(torch.optim.AdamW, {"lr": 0.1}, SHAPES, steps=k + 1)
        local = result(inner, control, samples=k + 2, step_norm=1.0 + k)
        sent.append(contribute(start, after, fresh_replica(), local, task(k), config)[0])
    return sent


def on_slices(
    config: AverageConfig, start: Broadcast, updates: Sequence[Update], outer: OuterState, slices: Slices
) -> list[Combined]:
    """A round as a cluster computes it, with arrays that cannot be written to."""
    starts = [read_only(cut_broadcast(start, at)) for at in slices]
    sent = [[cut_update(one, at, config.codec) for one in updates] for at in slices]
    means = [average(own, [own] * len(updates), each, config) for own, each in zip(starts, sent, strict=True)]
    norm = norm_of([mean.facts.squares for mean in means])
    outers = [cut_outer(outer, at, WHOLE.num_params) for at in slices]
    return [
        stepped(own, mean, state, config, 0.5, norm) for own, mean, state in zip(starts, means, outers, strict=True)
    ]


@pytest.mark.sampled(9)
@pytest.mark.parametrize("way", WAYS)
def test_a_round_on_slices_is_the_round_on_the_whole(way: str) -> None:
    config = AverageConfig.model_validate(WAYS[way])
    start, outer = Broadcast(varied(0)), () if config.outer is None else (empty_inner_state(),)
    for _ in range(2):
        updates = sent_by(config, start)
        whole = combine(start, [start] * 4, updates, outer, config, 0.5)
        summary = summarise([[whole.facts]], whole.broadcast.params)
        assert summary.rejected == (1,)
        for count in range(1, 8):
            slices = slices_of(WHOLE, count)
            assert len(slices) == count
            parts = on_slices(config, start, updates, outer, slices)
            joined = join_broadcast([part.broadcast for part in parts])
            sizes = [part.broadcast.params.num_params for part in parts]
            assert bits(joined) == bits(whole.broadcast)
            assert bits(join_outer([part.outer for part in parts], sizes)) == bits(whole.outer)
            assert summarise([[part.facts for part in parts]], joined.params) == summary
        start, outer = whole.broadcast, whole.outer


def test_a_clip_by_the_norm_of_each_slice_would_be_another_step() -> None:
    config = AverageConfig.model_validate(WAYS["outer sgd, clipped"])
    start = Broadcast(varied(0))
    updates, slices, outer = sent_by(config, start), slices_of(WHOLE, 3), (empty_inner_state(),)
    whole = combine(start, [start] * 4, updates, outer, config)
    alone = [
        combine(
            own := cut_broadcast(start, at),
            [own] * 4,
            [cut_update(one, at, None) for one in updates],
            cut_outer(outer, at, WHOLE.num_params),
            config,
        )
        for at in slices
    ]
    assert bits(join_broadcast([part.broadcast for part in alone])) != bits(whole.broadcast)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
@given(st.integers(1, 5 * ALIGNMENT + 3), counts)
def test_slices_send_the_bytes_of_the_whole(name: str, size: int, count: int) -> None:
    config, of = AverageConfig.model_validate({"codec": {"name": name}}), layout([size], [3], 1)
    start = Broadcast(numbered(of))
    sent, _ = contribute(start, start.params, fresh_replica(), result(), task(), config)
    parts = [cut_update(sent, at, config.codec) for at in slices_of(of, count)]
    assert sum(part.nbytes for part in parts) == sent.nbytes
    plain = Update(start.params, contribution(0), INNER["adamw"], start.params.flat[:size])
    parts = [cut_update(plain, at, None) for at in slices_of(of, count)]
    assert sum(part.nbytes for part in parts) == plain.nbytes
