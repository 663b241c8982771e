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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from dtrain.algorithm.params import from_tensors, tensors_of
from dtrain.files import write_bytes
from dtrain.runfiles import read_known, sha256
from dtrain.types import (
    Broadcast,
    Cursor,
    Entry,
    Flat,
    InnerState,
    Layout,
    OuterState,
    Parameters,
    Plain,
    Position,
    ReplicaState,
    Slot,
    StateFile,
    StoredState,
    TrainState,
)

T = TypeVar("T")
STATE = "state.json"
PARAMS = "params.safetensors"
EMA = "ema.safetensors"
CONTROLS = "control.safetensors"
RESIDUAL, CONTROL = "residual", "control"


def state_files(
    state: TrainState | StoredState, fingerprint: str, format_number: int
) -> Iterator[tuple[str, bytes | StateFile]]:
    """Yield name and content of each file of a state; of a stored one the files themselves."""
    if isinstance(state, StoredState):
        yield from named_files(state)
        yield STATE, json_bytes(_described_stored(state, fingerprint, format_number))
        return
    vectors, broadcast = distinct([state.model, *(own.params for own in state.broadcast)])
    outers, outer = distinct(state.outer)
    for number, params in enumerate(vectors):
        yield params_name(number), _params_bytes(params)
    if state.ema is not None:
        yield EMA, _params_bytes(state.ema)
    if (control := state.broadcast[0].control) is not None:
        yield CONTROLS, _control_bytes(control)
    for replica, own in enumerate(state.replicas):
        yield replica_name(replica), _replica_bytes(own)
    pieces = [piece for pieces in outers for piece in pieces]
    for number, piece in enumerate(pieces):
        yield outer_name(number), _outer_bytes(piece)
    yield (
        STATE,
        json_bytes(
            _described(
                state.position,
                state.model.layout,
                [own.inner.slots for own in state.replicas],
                [piece.slots for piece in pieces],
                broadcast[1:] if len(vectors) > 1 else None,
                outer if len(outers) > 1 else None,
                fingerprint,
                format_number,
            )
        ),
    )


def _described_stored(state: StoredState, fingerprint: str, format_number: int) -> dict[str, Any]:
    return _described(
        state.position,
        state.layout,
        [file.slots for file in state.replicas],
        [file.slots for pieces in state.outers for file in pieces],
        state.broadcast if len(state.vectors) > 1 else None,
        state.outer if len(state.outers) > 1 else None,
        fingerprint,
        format_number,
    )


def _described(
    position: Position,
    layout: Layout,
    inner: Sequence[Sequence[Slot]],
    outer: Sequence[Sequence[Slot]],
    broadcast: Sequence[int] | None,
    outer_of: Sequence[int] | None,
    fingerprint: str,
    format_number: int,
) -> dict[str, Any]:
    """Return what state.json holds; `broadcast` and `outer_of` are None where all replicas share one."""
    described = {
        "format": format_number,
        "round": position.round,
        "fingerprint": fingerprint,
        "cursors": [asdict(cursor) for cursor in position.cursors],
        "steps": list(position.steps),
        "layout": asdict(layout),
        "inner": [[_described_slot(slot) for slot in slots] for slots in inner],
        "outer": [[_described_slot(slot) for slot in slots] for slots in outer],
    }
    if broadcast is not None:
        described["broadcast"] = list(broadcast)
    if outer_of is not None:
        described["outer_of"] = list(outer_of)
    return described


def stored_state(described: Mapping[str, Any], files: Mapping[str, StateFile]) -> tuple[StoredState, str]:
    """Return a state of state.json and the other files of a round, and its fingerprint."""
    inner, outer = described["inner"], described["outer"]
    broadcast = tuple(map(int, described.get("broadcast", [0] * len(inner))))
    outer_of = tuple(map(int, described.get("outer_of", [0] * len(inner))))
    pieces = [_with_slots(files[outer_name(number)], slots) for number, slots in enumerate(outer)]
    count = max(outer_of) + 1
    each = len(pieces) // count
    state = StoredState(
        position=Position(
            round=described["round"],
            cursors=tuple(Cursor(**cursor) for cursor in described["cursors"]),
            steps=tuple(described["steps"]),
        ),
        layout=_layout(described["layout"]),
        vectors=tuple(files[params_name(number)] for number in range(max(broadcast) + 1)),
        broadcast=broadcast,
        replicas=tuple(_with_slots(files[replica_name(k)], slots) for k, slots in enumerate(inner)),
        outers=tuple(tuple(pieces[each * number : each * (number + 1)]) for number in range(count)),
        outer=outer_of,
        ema=files.get(EMA),
        control=files.get(CONTROLS),
    )
    return state, described["fingerprint"]


def named_files(state: StoredState) -> Iterator[tuple[str, StateFile]]:
    """Yield the files of a state with their names in a round."""
    yield from ((params_name(number), file) for number, file in enumerate(state.vectors))
    if state.ema is not None:
        yield EMA, state.ema
    if state.control is not None:
        yield CONTROLS, state.control
    yield from ((replica_name(replica), file) for replica, file in enumerate(state.replicas))
    yield from ((outer_name(number), file) for number, file in enumerate(chain.from_iterable(state.outers)))


def moved(state: StoredState, directory: Path) -> StoredState:
    """Return a state whose files have been moved to a directory, under their names in a round."""
    names = {file.path: name for name, file in named_files(state)}

    def there(file: StateFile) -> StateFile:
        return replace(file, path=directory / names[file.path])

    return replace(
        state,
        vectors=tuple(map(there, state.vectors)),
        replicas=tuple(map(there, state.replicas)),
        outers=tuple(tuple(map(there, pieces)) for pieces in state.outers),
        ema=state.ema and there(state.ema),
        control=state.control and there(state.control),
    )


def evaluated_params(state: TrainState | StoredState) -> tuple[Parameters, Parameters | None]:
    """Return the parameters of the model, and the moving average of models if there is one."""
    if isinstance(state, TrainState):
        return state.model, state.ema
    ema = None if state.ema is None else read_params(state.ema, state.layout)
    return read_params(state.vectors[0], state.layout), ema


def check_parts(state: StoredState) -> None:
    """Read each part of a state, one after the other.

    Raises
    ------
    RunDamaged
        A file is missing, or not what was written.
    """
    for file in state.vectors if state.ema is None else (*state.vectors, state.ema):
        read_params(file, state.layout)
    for file in state.replicas:
        read_replica(file)
    for pieces in state.outers:
        read_outer(pieces)
    if state.control is not None:
        read_control(state.control)


def held_state(state: StoredState) -> TrainState:
    """Read a state as a whole.

    Raises
    ------
    RunDamaged
        A file is missing, or not what was written.
    """
    vectors = [read_params(file, state.layout) for file in state.vectors]
    control = None if state.control is None else read_control(state.control)
    starts = [Broadcast(params, control=control) for params in vectors]
    outers = [read_outer(pieces) for pieces in state.outers]
    return TrainState(
        position=state.position,
        model=vectors[0],
        broadcast=tuple(starts[number] for number in state.broadcast),
        replicas=tuple(map(read_replica, state.replicas)),
        outer=tuple(outers[number] for number in state.outer),
        ema=None if state.ema is None else read_params(state.ema, state.layout),
    )


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Return a JSON file."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def distinct(values: Sequence[T], key: Callable[[T], Hashable] = id) -> tuple[list[T], list[int]]:
    """Return the distinct objects among values, and for each value the number of its object."""
    numbers: dict[Hashable, int] = {}
    for value in values:
        numbers.setdefault(key(value), len(numbers))
    first = {numbers[key(value)]: value for value in reversed(values)}
    return [first[number] for number in range(len(first))], [numbers[key(value)] for value in values]


def params_name(number: int) -> str:
    """Return the name of the file of distinct parameters."""
    return f"params-{number:04d}.safetensors" if number else PARAMS


def replica_name(replica: int) -> str:
    """Return the name of the file of what a replica keeps."""
    return f"inner-{replica:04d}.safetensors"


def outer_name(number: int) -> str:
    """Return the name of the file of a state of the outer optimizer."""
    return f"outer-{number:04d}.safetensors"


# Parts ----------------------------------------------------------------------------------------------------

Part: TypeAlias = Parameters | ReplicaState | InnerState | Flat
"""What one file holds: parameters, what a replica keeps, a state of the outer optimizer, a control variate."""


def write_part(path: Path, part: Part) -> StateFile:
    """Write a part of a state to a file, which appears as a whole.

    Raises
    ------
    DiskFull
        It could not be written.
    """
    data, slots = _bytes_of(part)
    write_bytes(path, data)
    return StateFile(path, len(data), sha256(data), slots)


def _bytes_of(part: Part) -> tuple[bytes, tuple[Slot, ...]]:
    if isinstance(part, Parameters):
        return _params_bytes(part), ()
    if isinstance(part, ReplicaState):
        return _replica_bytes(part), part.inner.slots
    if isinstance(part, InnerState):
        return _outer_bytes(part), part.slots
    return _control_bytes(part), ()


def read_params(file: StateFile, layout: Layout) -> Parameters:
    """Read parameters.

    Raises
    ------
    RunDamaged
        The file is missing, or not what was written.
    """
    return from_tensors(_tensors(file), layout)


def read_replica(file: StateFile) -> ReplicaState:
    """Read what a replica keeps; errors as `read_params`."""
    tensors = _tensors(file)
    residual, control = (tensors[name].numpy() if name in tensors else None for name in (RESIDUAL, CONTROL))
    return ReplicaState(_inner_state(file.slots, tensors), residual, control)


def read_outer(pieces: Sequence[StateFile]) -> OuterState:
    """Read a state of the outer optimizer; errors as `read_params`."""
    return tuple(_inner_state(file.slots, _tensors(file)) for file in pieces)


def read_control(file: StateFile) -> Flat:
    """Read a control variate; errors as `read_params`."""
    control: Flat = _tensors(file)[CONTROL].numpy()
    return control


def _tensors(file: StateFile) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_tensors(read_known(file.path, file.nbytes, file.sha256))
    return tensors


def _params_bytes(params: Parameters) -> bytes:
    data: bytes = save_tensors({name: tensor.clone() for name, tensor in tensors_of(params).items()})
    return data


def _replica_bytes(own: ReplicaState) -> bytes:
    more = {RESIDUAL: own.residual, CONTROL: own.control}
    kept = {name: torch.from_numpy(values.copy()) for name, values in more.items() if values is not None}
    data: bytes = save_tensors({**_inner_tensors(own.inner), **kept})
    return data


def _outer_bytes(piece: InnerState) -> bytes:
    data: bytes = save_tensors(_inner_tensors(piece))
    return data


def _control_bytes(control: Flat) -> bytes:
    data: bytes = save_tensors({CONTROL: torch.from_numpy(control.copy())})
    return data


def _inner_tensors(inner: InnerState) -> dict[str, torch.Tensor]:
    return {
        _tensor_name(slot): torch.from_numpy(inner.data[slot.offset : slot.offset + slot.size].copy())
        .view(getattr(torch, slot.dtype))
        .reshape(slot.shape)
        for slot in inner.slots
        if slot.dtype
    }


def _inner_state(slots: Sequence[Slot], tensors: Mapping[str, torch.Tensor]) -> InnerState:
    size = max((slot.offset + slot.size + (-slot.size % 8) for slot in slots), default=0)
    data = np.zeros(size, np.uint8)
    for slot in slots:
        if slot.dtype:
            raw = tensors[_tensor_name(slot)].contiguous().reshape(-1).view(torch.uint8).numpy()
            data[slot.offset : slot.offset + slot.size] = raw
    return InnerState(tuple(slots), data)


# What JSON keeps ------------------------------------------------------------------------------------------


def _with_slots(file: StateFile, described: Sequence[dict[str, Any]]) -> StateFile:
    return replace(file, slots=tuple(map(_slot, described)))


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
