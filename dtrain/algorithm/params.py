"""A module's state as one flat float32 array, and back.

All trained parameters and float32 buffers lie in one contiguous float32 array, parameters first: a state_dict costs
10 to 20 times as much to send. Buffers of other dtypes lie in a second byte array with their own dtypes. Parameters
that do not require a gradient lie in an array of their own, which is kept apart while rounds are trained. Tied
parameters stand once and are listed as aliases.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dtrain.errors import UnsuitableModel
from dtrain.types import Entry, Flat, Layout, Parameters

ALIGNMENT = 8


def layout_of(module: nn.Module) -> Layout:
    """Return the layout of a module's state.

    Raises
    ------
    UnsuitableModel
        A parameter is not float32, is not initialised, or the state_dict holds something that is no tensor.
    """
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    frozen = {id(p) for p in module.parameters() if not p.requires_grad}
    seen: dict[int, Entry] = {}
    entries: list[Entry] = []
    state = module.state_dict(keep_vars=True)
    _check_parameters(module, state)
    num_flat = num_extra = num_frozen = 0
    # trained parameters first, so that the outer optimizer works on flat[:num_params]
    ordered = sorted(state.items(), key=lambda item: id(item[1]) not in trained)
    num_params = 0
    for name, tensor in ordered:
        if not isinstance(tensor, torch.Tensor):
            raise UnsuitableModel(
                f"state_dict()[{name!r}] is {type(tensor).__name__}; only tensors can be averaged.",
                "Return a tensor from get_extra_state, or keep the value out of the state.",
            )
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            condition = "without values, on the device meta" if tensor.is_meta else "sparse or quantized"
            raise UnsuitableModel(
                f"{name} is {condition}; dtrain averages dense tensors.",
                "Build the module with dense tensors on the CPU.",
            )
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if id(tensor) in seen:
            first = seen[id(tensor)]
            entries.append(Entry(name, first.kind, dtype, shape, first.offset, first.size, alias=True))
            continue
        if id(tensor) in frozen:
            entry = Entry(name, "frozen", dtype, shape, num_frozen, tensor.numel())
            num_frozen += tensor.numel()
        elif tensor.dtype == torch.float32:
            kind: Literal["param", "buffer"] = "param" if id(tensor) in trained else "buffer"
            entry = Entry(name, kind, dtype, shape, num_flat, tensor.numel())
            num_flat += tensor.numel()
            num_params = num_flat if kind == "param" else num_params
        else:
            size = tensor.numel() * tensor.element_size()
            entry = Entry(name, "extra", dtype, shape, num_extra, size)
            num_extra += -(-size // ALIGNMENT) * ALIGNMENT
        seen[id(tensor)] = entry
        entries.append(entry)
    return Layout(tuple(entries), num_params, num_flat, num_extra, num_frozen)


def _check_parameters(module: nn.Module, state: Mapping[str, Any]) -> None:
    names = dict(module.named_parameters(remove_duplicate=False))
    if not names:
        raise UnsuitableModel(f"{type(module).__name__} has no parameters; there is nothing to train.")
    if not any(parameter.requires_grad for parameter in names.values()):
        raise UnsuitableModel(
            f"No parameter of {type(module).__name__} requires a gradient; there is nothing to train.",
            "Leave requires_grad of some parameters True, and check train.freeze.",
        )
    for name, parameter in names.items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise UnsuitableModel(
                f"parameter {name} has no shape yet (a lazy module).",
                "Run one batch through the module in the function that builds it, or give the sizes.",
            )
        if parameter.is_meta:
            raise UnsuitableModel(
                f"parameter {name} is on the device meta: it has no values.",
                'Build the module without torch.device("meta"), or fill it with to_empty(device="cpu") and values.',
            )
        if parameter.dtype != torch.float32:
            raise UnsuitableModel(
                f"parameter {name} is {str(parameter.dtype).removeprefix('torch.')}; parameters must be float32.",
                "Remove .half(), .double() or .bfloat16() from the function that builds the module.",
            )
        if name not in state:
            raise UnsuitableModel(f"parameter {name} is not in state_dict(); it could not be saved.")


def flatten(module: nn.Module, layout: Layout) -> Parameters:
    """Copy a module's state into new flat arrays."""
    return from_tensors(module.state_dict(), layout)


def from_tensors(tensors: Mapping[str, torch.Tensor], layout: Layout) -> Parameters:
    """Copy the tensors of a state_dict into new flat arrays.

    Raises
    ------
    UnsuitableModel
        Names, shapes or dtypes are not those of the layout.
    """
    flat, extra = np.empty(layout.num_flat, np.float32), np.zeros(layout.num_extra, np.uint8)
    params = Parameters(layout, flat, extra, np.empty(layout.num_frozen, np.float32))
    named = {entry.name for entry in layout.entries}
    if odd := sorted(named.symmetric_difference(tensors)):
        raise UnsuitableModel(f"The tensors are not those of the model: {', '.join(odd[:3])} differ in name.")
    for entry in layout.entries:
        tensor = tensors[entry.name].detach()
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tuple(tensor.shape) != entry.shape or dtype != entry.dtype:
            raise UnsuitableModel(
                f"{entry.name} is {dtype}{list(tensor.shape)}, but the model has {entry.dtype}{list(entry.shape)}."
            )
        if not entry.alias:
            _view(params, entry).copy_(tensor)
    return params


def tensors_of(params: Parameters) -> dict[str, torch.Tensor]:
    """Return the state_dict as views of the flat arrays, in the order of the layout; do not write to them.

    Frozen parameters that are kept apart are left out.
    """
    return {entry.name: _view(params, entry) for entry in _present(params)}


def extra_tensors(params: Parameters) -> dict[str, torch.Tensor]:
    """Return the buffers of other dtypes than float32 as views, tied ones once; of a slice too."""
    entries = [entry for entry in params.layout.entries if entry.kind == "extra" and not entry.alias]
    return {entry.name: _view(params, entry) for entry in entries if len(params.extra)}


def _present(params: Parameters) -> Iterator[Entry]:
    apart = len(params.frozen) < params.layout.num_frozen
    return (entry for entry in params.layout.entries if not (apart and entry.kind == "frozen"))


def without_frozen(params: Parameters) -> Parameters:
    """Return parameters whose frozen ones are kept apart."""
    return Parameters(params.layout, params.flat, params.extra) if params.layout.num_frozen else params


def with_frozen(params: Parameters, frozen: Flat | None) -> Parameters:
    """Return parameters together with the frozen ones that were kept apart; None: there are none."""
    return params if frozen is None or not len(frozen) else replace(params, frozen=frozen)


def load_into(module: nn.Module, params: Parameters) -> None:
    """Copy flat arrays into a module of the same layout, as torch loads a state_dict (`get_extra_state` included)."""
    assert len(params.frozen) == params.layout.num_frozen, "frozen parameters are kept apart"
    state = module.state_dict()  # it knows the versions of the module's parts
    state.update(tensors_of(params))
    module.load_state_dict(state)


def _source(params: Parameters, entry: Entry) -> Any:
    """Return the array that holds an entry."""
    return {"extra": params.extra, "frozen": params.frozen}.get(entry.kind, params.flat)


def _view(params: Parameters, entry: Entry) -> torch.Tensor:
    part = _shared(_source(params, entry)[entry.offset : entry.offset + entry.size])
    return part.view(getattr(torch, entry.dtype)).reshape(entry.shape)


def _shared(array: npt.NDArray[Any]) -> torch.Tensor:
    """Return a tensor on the array's memory; arrays that Dask received may be read-only, and nobody writes to them."""
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def params_sha256(params: Parameters) -> str:
    r"""Return the SHA-256 that names a set of parameters.

    Over, for name in sorted(state_dict): ``f"{name}\0{dtype}\0{','.join(shape)}\0"`` in UTF-8, then the
    C-order little-endian bytes; tied names each appear. Frozen parameters must be there.
    """
    digest = hashlib.sha256()
    for entry in sorted(params.layout.entries, key=lambda entry: entry.name):
        digest.update(f"{entry.name}\0{entry.dtype}\0{','.join(map(str, entry.shape))}\0".encode())
        source = _source(params, entry)
        digest.update(source[entry.offset : entry.offset + entry.size])
    return digest.hexdigest()


def is_finite(params: Parameters, before: Parameters | None = None) -> bool:
    """Whether all trained parameters and float buffers are finite, or infinite as `before` (a mask of -inf)."""
    fine = np.isfinite(params.flat)
    if not fine.all() and (before is None or not (fine | (params.flat == before.flat)).all()):
        return False
    earlier = extra_tensors(before) if before is not None else {}
    return all(finite_tensor(tensor, earlier.get(name)) for name, tensor in extra_tensors(params).items())


def finite_tensor(tensor: torch.Tensor, before: torch.Tensor | None = None) -> bool:
    """Whether a tensor is finite, or infinite as `before`."""
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    wide = tensor if tensor.itemsize > 1 else tensor.float()  # torch.isfinite knows no float8
    fine = torch.isfinite(wide)
    return bool(fine.all()) or (before is not None and bool((fine | (tensor == before)).all()))
