"""TrainState <-> the files of a round: safetensors for arrays, JSON for the rest.

params.safetensors          the state_dict that is evaluated and saved
params-0001.safetensors     other parameters that replicas start the next round from, each once
ema.safetensors             the state_dict of the moving average of models (``average.ema``)
inner-0000.safetensors      what replica 0 keeps: its optimizer's state, a codec's residual, a control variate
control.safetensors         the mean of the control variates (``average.control``)
outer-0000.safetensors      a state of the outer optimizer, each once
state.json                  positions, layout, and which replica has which
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from dtrain.algorithm.params import from_tensors, tensors_of
from dtrain.types import (
    Broadcast,
    Cursor,
    Entry,
    InnerState,
    Layout,
    Parameters,
    Plain,
    Position,
    ReplicaState,
    Slot,
    TrainState,
)

T = TypeVar("T")
STATE = "state.json"
PARAMS = "params.safetensors"
EMA = "ema.safetensors"
CONTROLS = "control.safetensors"
RESIDUAL, CONTROL = "residual", "control"


def state_files(state: TrainState, fingerprint: str, format_number: int) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file of a state."""
    vectors, broadcast = _distinct([state.model, *(own.params for own in state.broadcast)])
    outers, outer = _distinct(state.outer)
    for number, params in enumerate(vectors):
        yield _params_name(number), _params_bytes(params)
    if state.ema is not None:
        yield EMA, _params_bytes(state.ema)
    if (control := state.broadcast[0].control) is not None:
        yield CONTROLS, save_tensors({CONTROL: torch.from_numpy(control.copy())})
    for replica, own in enumerate(state.replicas):
        yield _inner_name(replica), save_tensors(_replica_tensors(own))
    slices = [piece for pieces in outers for piece in pieces]
    for number, piece in enumerate(slices):
        yield _outer_name(number), save_tensors(_inner_tensors(piece))
    described = {
        "format": format_number,
        "round": state.round,
        "fingerprint": fingerprint,
        "cursors": [asdict(cursor) for cursor in state.position.cursors],
        "steps": list(state.position.steps),
        "layout": asdict(state.model.layout),
        "inner": [[_described_slot(slot) for slot in own.inner.slots] for own in state.replicas],
        "outer": [[_described_slot(slot) for slot in piece.slots] for piece in slices],
    }
    if len(vectors) > 1:
        described["broadcast"] = broadcast[1:]
    if len(outers) > 1:
        described["outer_of"] = outer
    yield STATE, json_bytes(described)


def state_from(files: Mapping[str, bytes]) -> tuple[TrainState, str]:
    """Return the state and the fingerprint that `state_files` wrote."""
    described = json.loads(files[STATE])
    layout = _layout(described["layout"])
    replicas = tuple(
        _replica(slots, load_tensors(files[_inner_name(replica)])) for replica, slots in enumerate(described["inner"])
    )
    broadcast = described.get("broadcast", [0] * len(replicas))
    vectors = [from_tensors(load_tensors(files[_params_name(number)]), layout) for number in range(max(broadcast) + 1)]
    control = load_tensors(files[CONTROLS])[CONTROL].numpy() if CONTROLS in files else None
    starts = [Broadcast(params, control=control) for params in vectors]
    slices = [
        _inner_state(slots, load_tensors(files[_outer_name(number)])) for number, slots in enumerate(described["outer"])
    ]
    outer_of = described.get("outer_of", [0] * len(replicas))
    each = len(slices) // (max(outer_of) + 1)
    outers = [tuple(slices[each * number : each * (number + 1)]) for number in range(max(outer_of) + 1)]
    state = TrainState(
        position=Position(
            round=described["round"],
            cursors=tuple(Cursor(**cursor) for cursor in described["cursors"]),
            steps=tuple(described["steps"]),
        ),
        model=vectors[0],
        broadcast=tuple(starts[number] for number in broadcast),
        replicas=replicas,
        outer=tuple(outers[number] for number in outer_of),
        ema=from_tensors(load_tensors(files[EMA]), layout) if EMA in files else None,
    )
    return state, described["fingerprint"]


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return a JSON file."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _distinct(values: Sequence[T]) -> tuple[list[T], list[int]]:
    """Return the distinct objects among values, and for each value the number of its object."""
    numbers: dict[int, int] = {}
    for value in values:
        numbers.setdefault(id(value), len(numbers))
    first = {numbers[id(value)]: value for value in reversed(values)}
    return [first[number] for number in range(len(first))], [numbers[id(value)] for value in values]


def _params_name(number: int) -> str:
    return f"params-{number:04d}.safetensors" if number else PARAMS


def _inner_name(replica: int) -> str:
    return f"inner-{replica:04d}.safetensors"


def _outer_name(number: int) -> str:
    return f"outer-{number:04d}.safetensors"


# States ---------------------------------------------------------------------------------------------------


def _replica_tensors(own: ReplicaState) -> dict[str, torch.Tensor]:
    more = {RESIDUAL: own.residual, CONTROL: own.control}
    kept = {name: torch.from_numpy(values.copy()) for name, values in more.items() if values is not None}
    return {**_inner_tensors(own.inner), **kept}


def _replica(slots: Sequence[dict[str, Any]], tensors: Mapping[str, torch.Tensor]) -> ReplicaState:
    residual, control = (tensors[name].numpy() if name in tensors else None for name in (RESIDUAL, CONTROL))
    return ReplicaState(_inner_state(slots, tensors), residual, control)


def _params_bytes(params: Parameters) -> bytes:
    data: bytes = save_tensors({name: tensor.clone() for name, tensor in tensors_of(params).items()})
    return data


def _inner_tensors(inner: InnerState) -> dict[str, torch.Tensor]:
    return {
        _tensor_name(slot): torch.from_numpy(inner.data[slot.offset : slot.offset + slot.size].copy())
        .view(getattr(torch, slot.dtype))
        .reshape(slot.shape)
        for slot in inner.slots
        if slot.dtype
    }


def _inner_state(described: Sequence[dict[str, Any]], tensors: Mapping[str, torch.Tensor]) -> InnerState:
    slots = tuple(map(_slot, described))
    size = max((slot.offset + slot.size + (-slot.size % 8) for slot in slots), default=0)
    data = np.zeros(size, np.uint8)
    for slot in slots:
        if slot.dtype:
            raw = tensors[_tensor_name(slot)].contiguous().reshape(-1).view(torch.uint8).numpy()
            data[slot.offset : slot.offset + slot.size] = raw
    return InnerState(slots, data)


def _layout(described: dict[str, Any]) -> Layout:
    entries = tuple(Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in described["entries"])
    counts = {name: described.get(name, 0) for name in ("num_params", "num_flat", "num_extra", "num_frozen")}
    return Layout(entries, **counts)


def _tensor_name(slot: Slot) -> str:
    name = f"{slot.param}.{slot.key}"
    return name if slot.owner == "param" else f"{slot.owner}.{name}"


def _described_slot(slot: Slot) -> dict[str, Any]:
    return {**asdict(slot), "value": _described_value(slot.value)}


def _slot(described: dict[str, Any]) -> Slot:
    return Slot(**{**described, "shape": tuple(described["shape"]), "value": _value(described["value"])})


def _described_value(value: Plain) -> Any:
    """Return a value as JSON has it: inf and nan as text; texts and tuples in an object."""
    if isinstance(value, tuple | list):
        items = [_described_value(item) for item in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, str):
        return {"text": value}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _value(described: Any) -> Plain:
    """Return what `_described_value` was given."""
    if isinstance(described, list):
        return [_value(item) for item in described]
    if isinstance(described, dict):
        return str(described["text"]) if "text" in described else tuple(map(_value, described["tuple"]))
    return float(described) if isinstance(described, str) else described
