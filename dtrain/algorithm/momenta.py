"""The mean of the inner optimizers' states: ``average.inner_state = "average"``.

Momentum, and Adam's moments, of replicas that go on from the mean of their parameters: the mean of the states goes on
with them. Where replicas are averaged every few steps this is nearly training with the large batch.

References
----------
Yu et al. 2019, arXiv:1905.03817 (momentum); Reddi et al. 2021, arXiv:2003.00295, appendix (resetting, keeping).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dtrain.algorithm.evaluate import in_order
from dtrain.algorithm.params import finite_tensor
from dtrain.algorithm.reduce import mixed_tensor, weighted_mean
from dtrain.errors import UnsuitableModel
from dtrain.types import Bytes, InnerState, Plain, Slot


def mean_state(states: Sequence[InnerState], weights: Sequence[int]) -> InnerState:
    """Average the states of inner optimizers, given in replica order.

    Floats become the weighted mean, integers (counters) the maximum; all else must agree.

    Raises
    ------
    UnsuitableModel
        The optimizers keep different things.
    """
    first = states[0]
    if any(_places(state) != _places(first) for state in states):
        raise _differ("their states have different parts")
    data = first.data.copy()
    slots = []
    for index, slot in enumerate(first.slots):
        if slot.dtype:
            place = slice(slot.offset, slot.offset + slot.size)
            data[place] = _mean_of_bytes(slot, [state.data[place] for state in states], weights)
            slots.append(slot)
        else:
            slots.append(replace(slot, value=_mean_of_plain([state.slots[index].value for state in states], weights)))
    return InnerState(tuple(slots), data)


def is_finite_state(state: InnerState) -> bool:
    """Whether all floats among the tensors of an inner optimizer's state are finite."""
    tensors = (
        torch.from_numpy(state.data[slot.offset : slot.offset + slot.size].copy()).view(getattr(torch, slot.dtype))
        for slot in state.slots
        if slot.dtype
    )
    return all(map(finite_tensor, tensors))


def _places(state: InnerState) -> list[Slot]:
    return [replace(slot, value=None) for slot in state.slots]


def _mean_of_bytes(slot: Slot, own: Sequence[Bytes], weights: Sequence[int]) -> Bytes:
    if slot.dtype == "float32":
        return weighted_mean([raw.view(np.float32) for raw in own], weights).view(np.uint8)
    tensors = [torch.from_numpy(raw.copy()).view(getattr(torch, slot.dtype)) for raw in own]
    mixed = mixed_tensor(slot.key, tensors, weights).to(tensors[0].dtype).contiguous()
    mean: Bytes = mixed.view(torch.uint8).numpy()
    return mean


def _mean_of_plain(values: Sequence[Plain], weights: Sequence[int]) -> Plain:
    first = values[0]
    if all(repr(value) == repr(first) for value in values):  # NaN equals NaN
        return first
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        raise _differ(f"one keeps {first!r:.40}, and another one something else")
    if all(isinstance(number, int) for number in numbers):
        return max(numbers)
    return in_order(number * weight for number, weight in zip(numbers, weights, strict=True)) / sum(weights)


def _differ(how: str) -> UnsuitableModel:
    return UnsuitableModel(
        f'average.inner_state = "average": the inner optimizers cannot be averaged, since {how}.',
        'Use average.inner_state = "keep" or "reset".',
    )
