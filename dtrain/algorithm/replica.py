"""What a replica keeps for itself from round to round: its optimizer's state as bytes, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from dtrain.algorithm.params import ALIGNMENT
from dtrain.errors import UnsuitableModel
from dtrain.types import Bytes, InnerState, ReplicaState, Slot


def fresh_replica() -> ReplicaState:
    """Return the state of a replica that has taken no step."""
    return ReplicaState(empty_inner_state())


def empty_inner_state() -> InnerState:
    """Return the state of an optimizer that has taken no step."""
    return InnerState((), np.zeros(0, np.uint8))


def pack_inner_state(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> InnerState:
    """Copy an optimizer's state into one byte array.

    Raises
    ------
    UnsuitableModel
        The optimizer keeps something that is neither a tensor nor a number.
    """
    slots: list[Slot] = []
    chunks: list[Bytes] = []
    offset = 0
    for index, parameter in enumerate(params):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                dtype = str(value.dtype).removeprefix("torch.")
                slots.append(Slot(index, key, dtype, tuple(value.shape), offset, raw.nbytes))
                padding = np.zeros(-raw.nbytes % ALIGNMENT, np.uint8)
                chunks += [raw, padding]
                offset += raw.nbytes + padding.nbytes
            elif value is None or isinstance(value, int | float | bool):
                slots.append(Slot(index, key, "", (), 0, 0, value))
            else:
                raise UnsuitableModel(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} as {key}; it cannot be carried over "
                    "from round to round.",
                    "Use an optimizer whose state is tensors and numbers.",
                )
    return InnerState(tuple(slots), np.concatenate(chunks) if chunks else np.zeros(0, np.uint8))


def unpack_inner_state(state: InnerState, optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
    """Copy a packed state into an optimizer that has taken no step."""
    for slot in state.slots:
        value: Any = slot.value
        if slot.dtype:
            raw = state.data[slot.offset : slot.offset + slot.size].copy()
            value = torch.from_numpy(raw).view(getattr(torch, slot.dtype)).reshape(slot.shape)
            if slot.key != "step":  # as torch itself loads it: that one stays on the CPU
                value = value.to(params[slot.param].device)
        optimizer.state[params[slot.param]][slot.key] = value
