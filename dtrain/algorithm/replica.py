"""What a replica keeps for itself from round to round: its optimizer's state as bytes, and back.

An optimizer keeps values in ``state`` (by parameter, or under keys of its own), in ``param_groups`` (Prodigy,
D-Adaptation and Schedule-Free count and estimate there), or as attributes, and all are carried. Outside of the states
of parameters, only values that differ from those of a fresh optimizer are kept, and never the learning rate: the
schedule sets it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from dtrain.algorithm.params import ALIGNMENT
from dtrain.errors import UnsuitableModel
from dtrain.types import Bytes, InnerState, Owner, Plain, ReplicaState, Slot

Key: TypeAlias = tuple[Owner, int, str]
"""Where an optimizer keeps a value."""
Carried: TypeAlias = Mapping[Key, object]


def fresh_replica() -> ReplicaState:
    """Return the state of a replica that has taken no step."""
    return ReplicaState(empty_inner_state())


def empty_inner_state() -> InnerState:
    """Return the state of an optimizer that has taken no step."""
    return InnerState((), np.zeros(0, np.uint8))


def carried(optimizer: torch.optim.Optimizer) -> Carried:
    """Return copies of the values that an optimizer keeps outside of the states of parameters, by place."""
    return {key: _copied(value) for key, value in _outside_parameters(optimizer)}


def _copied(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return copy.deepcopy(value) if _is_plain(value) else value


def _outside_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Key, object]]:
    """Yield place and value; of attributes those of the types that can be carried, and collections of tensors."""
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if key not in ("params", "lr"):
                yield ("group", index, key), value
    for owner, value in optimizer.state.items():
        if isinstance(owner, str):
            yield ("state", 0, owner), value
    for name, value in vars(optimizer).items():
        if name not in ("param_groups", "state", "defaults") and (_is_plain(value) or _holds_tensors(value)):
            yield ("attribute", 0, name), value


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, int | float | bool | str)


def _holds_tensors(value: object) -> bool:
    """Whether a value is a tensor, or a collection that holds some; the optimizer's parameters are no state."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)


def _is_same(value: object, other: object) -> bool:
    if isinstance(value, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(value, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(value, other)
    return type(value) is type(other) and _is_plain(value) and repr(value) == repr(other)  # NaN equals NaN


def pack_inner_state(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], fresh: Carried) -> InnerState:
    """Copy an optimizer's state into one byte array.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    params : list of nn.Parameter
        Those that it was given.
    fresh : Carried
        From `carried`, before it has taken a step or received a state.

    Raises
    ------
    UnsuitableModel
        The optimizer keeps something that is neither a tensor nor a number.
    """
    kept: list[tuple[Key, object]] = [
        (("param", index, key), value)
        for index, parameter in enumerate(params)
        for key, value in optimizer.state.get(parameter, {}).items()
    ]
    nothing = object()
    kept += [
        (key, value) for key, value in _outside_parameters(optimizer) if not _is_same(value, fresh.get(key, nothing))
    ]
    slots: list[Slot] = []
    chunks: list[Bytes] = []
    offset = 0
    for (owner, index, key), value in kept:
        if isinstance(value, torch.Tensor):
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            dtype = str(value.dtype).removeprefix("torch.")
            slots.append(Slot(index, key, dtype, tuple(value.shape), offset, raw.nbytes, owner=owner))
            padding = np.zeros(-raw.nbytes % ALIGNMENT, np.uint8)
            chunks += [raw, padding]
            offset += raw.nbytes + padding.nbytes
        else:
            slots.append(Slot(index, key, "", (), 0, 0, _plain(optimizer, key, value), owner))
    return InnerState(tuple(slots), np.concatenate(chunks) if chunks else np.zeros(0, np.uint8))


def _plain(optimizer: torch.optim.Optimizer, key: str, value: object) -> Plain:
    if isinstance(value, list | tuple):
        items = [_plain(optimizer, key, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if value is None or isinstance(value, int | float | bool | str):
        return value
    raise UnsuitableModel(
        f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key}; it cannot be carried over from round to "
        "round.",
        "Use an optimizer that keeps tensors and numbers, by parameter in its state, or in param_groups.",
    )


def unpack_inner_state(state: InnerState, optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    """Copy a packed state into an optimizer that has taken no step."""
    for slot in state.slots:
        value: Plain | torch.Tensor = copy.deepcopy(slot.value)
        if slot.dtype:
            raw = state.data[slot.offset : slot.offset + slot.size].copy()
            value = torch.from_numpy(raw).view(getattr(torch, slot.dtype)).reshape(slot.shape)
            if slot.key != "step":  # as torch itself loads it: that one stays on the CPU
                value = value.to(params[slot.param if slot.owner == "param" else 0].device)
        match slot.owner:
            case "param":
                optimizer.state[params[slot.param]][slot.key] = value
            case "group":
                optimizer.param_groups[slot.param][slot.key] = value
            case "state":
                optimizer.state[slot.key] = value  # type: ignore[index]
            case "attribute":
                setattr(optimizer, slot.key, value)
