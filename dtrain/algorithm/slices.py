"""Slices of everything that is averaged: the reducer of a large model works on several at once.

    flat      |---- slice 0 ----|---- slice 1 ----|-- slice 2 --|      cut at multiples of `ALIGNMENT` parameters;
    buffers                                             with it |      float buffers and `extra` go with the last slice

The outer optimizer acts element by element, so that its state is cut where the parameters are. Averaged states of inner
optimizers are cut between their values. Every element lies in one slice, and every array of a slice is a view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, TypeAlias

import numpy as np

from dtrain.algorithm import codec, drift
from dtrain.algorithm.average import Update
from dtrain.algorithm.codec import Compressed, cut_compressed
from dtrain.config.average import CodecConfig
from dtrain.types import Broadcast, Flat, InnerState, Layout, OuterState, Parameters, Slot

ALIGNMENT = math.lcm(codec.BLOCK, drift.BLOCK)
"""Elements; slices begin at multiples of it, so that blocks of codecs and of norms are the same in all slices."""
SLICE_BYTES = 8 << 20
"""With ``cluster.slices = "auto"``: parameters are cut if each slice has at least so many bytes."""
SLICE_TASKS = 1 << 12
"""And into so few slices that replicas times slices are no more than that."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One run of the elements of `Parameters.flat`."""

    number: int
    start: int
    stop: int
    count: int
    """Slices of the whole."""

    @property
    def is_last(self) -> bool:
        """Whether buffers go with it."""
        return self.number == self.count - 1


Slices: TypeAlias = tuple[Slice, ...]


def num_slices(wanted: int | Literal["auto"], layout: Layout, workers: int, replicas: int) -> int:
    """Return the number of slices: with "auto" at most one a worker, each of `SLICE_BYTES` at least.

    Each slice of each replica's update is a task of its own, of which the scheduler runs one or two in a millisecond:
    "auto" cuts the updates of a round into `SLICE_TASKS` at most.

    >>> layout = Layout((), 250_000_000, 250_000_000, 0)  # 1 GB
    >>> num_slices("auto", layout, 64, 64), num_slices("auto", layout, 1000, 1000), num_slices(10, layout, 1000, 1000)
    (64, 4, 10)
    """
    if wanted != "auto":
        return wanted
    fitting = layout.num_flat * 4 // SLICE_BYTES
    return max(1, min(workers, fitting, SLICE_TASKS // replicas))


def slices_of(layout: Layout, count: int) -> Slices:
    """Cut a layout into at most `count` slices of about equal size; each begins at a multiple of `ALIGNMENT`.

    >>> [(one.start, one.stop) for one in slices_of(Layout((), 10_000, 10_010, 0), 2)]
    [(0, 4096), (4096, 10010)]
    """
    ideal = (round(number * layout.num_params / count / ALIGNMENT) * ALIGNMENT for number in range(1, count))
    inner = sorted({cut for cut in ideal if 0 < cut < layout.num_params})
    bounds = list(pairwise([0, *inner, layout.num_flat]))
    return tuple(Slice(number, start, stop, len(bounds)) for number, (start, stop) in enumerate(bounds))


# Cutting --------------------------------------------------------------------------------------------------


def cut_params(params: Parameters, at: Slice) -> Parameters:
    """Return a slice of parameters, without the frozen ones."""
    extra = params.extra if at.is_last else params.extra[:0]
    return Parameters(params.layout, params.flat[at.start : at.stop], extra, start=at.start)


def cut_broadcast(whole: Broadcast, at: Slice) -> Broadcast:
    """Return a slice of what a replica is given."""
    return Broadcast(
        cut_params(whole.params, at),
        None if whole.inner is None else cut_inner(whole.inner, at),
        None if whole.control is None else _trained(whole.control, at),
    )


def cut_update(whole: Update, at: Slice, config: CodecConfig | None) -> Update:
    """Return a slice of what a replica sends."""
    return Update(
        _cut_payload(whole.payload, at, config),
        whole.contribution,
        None if whole.inner is None else cut_inner(whole.inner, at),
        None if whole.control is None else _trained(whole.control, at),
    )


def _cut_payload(payload: Parameters | Compressed, at: Slice, config: CodecConfig | None) -> Parameters | Compressed:
    if isinstance(payload, Parameters):
        return cut_params(payload, at)
    assert config is not None
    return cut_compressed(payload, at.start, at.stop, at.is_last, config)


def _trained(values: Flat, at: Slice) -> Flat:
    return values[at.start : at.stop]  # buffers lie beyond its end


def cut_inner(state: InnerState, at: Slice) -> InnerState:
    """Return the values of an inner optimizer's state that go with a slice: about as many bytes with each."""
    first, last = (_value_at(state, number / at.count) for number in (at.number, at.number + 1))
    own = state.slots[first:last]
    tensors = [slot for slot in own if slot.dtype]
    begin = tensors[0].offset if tensors else 0
    end = max((_end(slot) for slot in tensors), default=0)
    slots = tuple(replace(slot, offset=slot.offset - begin) if slot.dtype else slot for slot in own)
    return InnerState(slots, state.data[begin:end])


def _value_at(state: InnerState, share: float) -> int:
    """Return how many values of a state begin in a share of its bytes."""
    if share == 1:
        return len(state.slots)
    ends = np.maximum.accumulate([0, *(_end(slot) for slot in state.slots)])[:-1]
    return int(np.searchsorted(ends, share * state.nbytes)) if share else 0


def _end(slot: Slot) -> int:
    return slot.offset + slot.size + (-slot.size % 8)


def cut_outer(whole: OuterState, at: Slice, params: int) -> OuterState:
    """Return a slice of the state of an outer optimizer of `params` parameters."""
    return tuple(_cut_state(state, at, params) for state in whole)


def _cut_state(state: InnerState, at: Slice, params: int) -> InnerState:
    stop = min(at.stop, params)
    slots, chunks, offset = [], [], 0
    for slot in state.slots:
        raw = state.data[slot.offset : slot.offset + slot.size]
        if slot.dtype and slot.shape == (params,):
            width = slot.size // params
            raw = raw[at.start * width : stop * width]
            slot = replace(slot, shape=(stop - at.start,))
        slots.append(replace(slot, offset=offset, size=len(raw)) if slot.dtype else slot)
        chunks += [raw, np.zeros(-len(raw) % 8, np.uint8)]
        offset += len(raw) + -len(raw) % 8
    return InnerState(tuple(slots), np.concatenate(chunks) if chunks else state.data)


# Joining --------------------------------------------------------------------------------------------------


def join_params(slices: Sequence[Parameters]) -> Parameters:
    """Return the whole of parameters from all of their slices, in order."""
    if len(slices) == 1:
        return slices[0]
    return Parameters(slices[0].layout, np.concatenate([one.flat for one in slices]), slices[-1].extra)


def join_broadcast(slices: Sequence[Broadcast]) -> Broadcast:
    """Return the whole of what a replica is given from all slices, in order."""
    if len(slices) == 1:
        return slices[0]
    inner = [one.inner for one in slices if one.inner is not None]
    controls = [one.control for one in slices if one.control is not None]
    return Broadcast(
        join_params([one.params for one in slices]),
        _join_inner(inner) if inner else None,
        np.concatenate(controls) if controls else None,
    )


def _join_inner(parts: Sequence[InnerState]) -> InnerState:
    slots, begin = [], 0
    for part in parts:
        slots += [replace(slot, offset=slot.offset + begin) if slot.dtype else slot for slot in part.slots]
        begin += part.nbytes
    return InnerState(tuple(slots), np.concatenate([part.data for part in parts]))


def join_outer(slices: Sequence[OuterState], sizes: Sequence[int]) -> OuterState:
    """Return the whole state of an outer optimizer from all slices, in order, of `sizes` parameters each."""
    if len(slices) == 1 or not slices[0]:
        return slices[0]
    return (_join_state([state for (state,) in slices], sizes),)


def _join_state(parts: Sequence[InnerState], sizes: Sequence[int]) -> InnerState:
    slots, chunks, offset = [], [], 0
    for index, slot in enumerate(parts[0].slots):
        own = [part.slots[index] for part in parts]
        raws = [part.data[one.offset : one.offset + one.size] for part, one in zip(parts, own, strict=True)]
        if slot.dtype and [one.shape for one in own] == [(size,) for size in sizes]:
            slot = replace(slot, shape=(sum(sizes),))
            raw = np.concatenate(raws)
        else:
            raw = raws[0]  # a counter: all slices count alike
        slots.append(replace(slot, offset=offset, size=len(raw)) if slot.dtype else slot)
        chunks += [raw, np.zeros(-len(raw) % 8, np.uint8)]
        offset += len(raw) + -len(raw) % 8
    return InnerState(tuple(slots), np.concatenate(chunks) if chunks else parts[0].data)
