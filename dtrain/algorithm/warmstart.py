"""Warm start: the parameters of round 0 from a safetensors file.

Each tensor of the file must have its place in the model: name, shape and dtype. The model may have more than the file
where ``train.freeze`` says that it is fine-tuned: parameters that are trained, such as adapters or a new head, and
buffers. They keep the values that the user's function gave them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import load as load_tensors

from dtrain.algorithm.params import from_tensors, tensors_of
from dtrain.errors import InvalidConfig, RunDamaged, did_you_mean, listed, one_line
from dtrain.types import Entry, InitFile, Layout, Parameters

NARROW = ("bfloat16", "float16")
"""Dtypes that float32 holds exactly."""


class WarmStart(NamedTuple):
    """The parameters of round 0, and where they come from."""

    params: Parameters
    tensors: int
    """Tensors of the file."""
    new: tuple[str, ...]
    """Tensors of the model that the file lacks, tied ones once."""
    cast: tuple[str, ...]
    """Dtypes that were cast to float32."""


def warm_start(built: Parameters, init: InitFile, freeze: Sequence[str]) -> WarmStart:
    """Take the tensors of a file into the parameters of a model.

    Parameters
    ----------
    built : Parameters
        Of the module as the user's function builds it, with the frozen ones.
    init : InitFile
    freeze : sequence of str
        ``train.freeze``. If it is empty, the file must have all tensors of the model.

    Raises
    ------
    RunDamaged
        The file is not in the format safetensors.
    InvalidConfig
        A tensor of the file has no place in the model, or the model needs one that the file lacks.
    """
    tensors, layout = _tensors(init), built.layout
    entries = {entry.name: entry for entry in layout.entries}
    _check_names(tensors, entries, init.name)
    tensors = {name: tensors[name] for name in entries if name in tensors}  # a file has them in an order of its own
    _check_fit(tensors, entries, init.name)
    owners = _owners(layout)
    taken = _taken(tensors, entries, owners, init.name)
    new = [entry for entry in layout.entries if not entry.alias and entry.name not in taken]
    _check_new(new, len(entries), freeze, init.name)
    by_owner = {**tensors_of(built), **taken}
    params = from_tensors({name: by_owner[owner] for name, owner in owners.items()}, layout)
    cast = {_dtype(tensor) for name, tensor in tensors.items() if _dtype(tensor) != entries[name].dtype}
    return WarmStart(params, len(tensors), tuple(entry.name for entry in new), tuple(sorted(cast)))


def _tensors(init: InitFile) -> Mapping[str, torch.Tensor]:
    try:
        tensors: Mapping[str, torch.Tensor] = load_tensors(init.data.tobytes())
    except (ValueError, LookupError, AttributeError, safetensors.SafetensorError) as error:
        raise RunDamaged(
            f"train.init: {init.name} cannot be read as safetensors: {one_line(error)}",
            "Restore it from a copy; a file of another format is to be converted (safetensors.torch.save_file).",
        ) from error
    return tensors


def _taken(
    tensors: Mapping[str, torch.Tensor], entries: Mapping[str, Entry], owners: Mapping[str, str], path: str
) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by the names that own them; tied ones that differ are refused."""
    taken: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        wide = tensor.float() if _dtype(tensor) != entries[name].dtype else tensor
        other = taken.setdefault(owners[name], wide)
        if other is not wide and not torch.equal(other, wide):
            raise InvalidConfig(
                f"train.init: {owners[name]} and {name} are one tensor in the model, and differ in {path}.",
                f"Do not tie them in the model, or leave one out: {_saved_without(path, [name])}.",
            )
    return taken


def _owners(layout: Layout) -> dict[str, str]:
    """Return, by name, the name under which its tensor stands in the layout; another one for tied tensors only."""
    first = {(e.kind, e.offset, e.size, e.shape): e.name for e in reversed(layout.entries) if not e.alias}
    return {e.name: first[e.kind, e.offset, e.size, e.shape] if e.alias else e.name for e in layout.entries}


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# What is refused ------------------------------------------------------------------------------------------


def _check_names(tensors: Collection[str], entries: Mapping[str, Entry], path: str) -> None:
    """Refuse a file with tensors that the model does not have."""
    unknown = [name for name in tensors if name not in entries]
    if not unknown:
        return
    vacant = [name for name in entries if name not in tensors]
    cure = _renamed(unknown, vacant)
    raise InvalidConfig(
        f"train.init: the model has no {listed(unknown, 3)}, of the {len(tensors):,} tensors of {path}"
        f"{did_you_mean(unknown[0], vacant)}",
        cure or f"Name them as the model does, or leave them out: {_saved_without(path, unknown)}.",
    )


def _renamed(unknown: Sequence[str], vacant: Collection[str]) -> str:
    """Return how to rename tensors whose names differ from the model's by what they begin with; else nothing."""
    parts = unknown[0].split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end]) + "."
        if all(name.startswith(prefix) for name in unknown) and _most(unknown, vacant, "", prefix):
            return f'Only in the file names begin with "{prefix}": save it with name.removeprefix("{prefix}").'
    for name in vacant:
        prefix = name.removesuffix(unknown[0])
        if prefix.endswith(".") and prefix != name and _most(unknown, vacant, prefix, ""):
            return f'The model has them below "{prefix}": save the file with "{prefix}" + name.'
    return ""


def _most(unknown: Sequence[str], vacant: Collection[str], added: str, removed: str) -> bool:
    return 2 * sum(added + name.removeprefix(removed) in vacant for name in unknown) > len(unknown)


def _check_fit(tensors: Mapping[str, torch.Tensor], entries: Mapping[str, Entry], path: str) -> None:
    """Refuse tensors of another shape or dtype than the model's; float32 holds narrower floats exactly."""
    shapes = [name for name, tensor in tensors.items() if tuple(tensor.shape) != entries[name].shape]
    if shapes:
        own, wanted = list(tensors[shapes[0]].shape), list(entries[shapes[0]].shape)
        more = f"; {len(shapes) - 1:,} more do not fit" if len(shapes) > 1 else ""
        raise InvalidConfig(
            f"train.init: {shapes[0]} is {own} in {path}, and {wanted} in the model{more}.",
            f"Leave out what begins anew, which needs train.freeze: {_saved_without(path, shapes)}.",
        )
    for name, tensor in tensors.items():
        dtype, needed = _dtype(tensor), entries[name].dtype
        if dtype != needed and not (needed == "float32" and dtype in NARROW):
            raise InvalidConfig(
                f"train.init: {name} is {dtype} in {path}, and {needed} in the model. float16 and bfloat16 are cast to "
                "float32; nothing else is.",
                f"Save it as tensor.to(torch.{needed}).",
            )


def _check_new(new: Sequence[Entry], count: int, freeze: Sequence[str], path: str) -> None:
    """Refuse a model with more tensors than the file, unless it is fine-tuned and they are trained."""
    names = [entry.name for entry in new]
    if names and not freeze:
        raise InvalidConfig(
            f"train.init: {path} lacks {len(names):,} of the {count:,} tensors of the model: {listed(names, 3)}.",
            "If they are new, name in train.freeze what is not to be trained; they begin as the model is built. Or "
            "name a file that has them all.",
        )
    untrained = [entry.name for entry in new if entry.kind == "frozen"]
    if untrained:
        raise InvalidConfig(
            f"train.init: {path} has no values for {listed(untrained, 3)}, and frozen they would stay as the model is "
            "built.",
            "Leave them out of train.freeze, or name a file that has them.",
        )


def _saved_without(path: str, names: Sequence[str]) -> str:
    """Return the line of Python that saves a file without some of its tensors."""
    left_out = ", ".join([f'"{name}"' for name in names[:3]] + ["..."] * (len(names) > 3))
    kept = f'{{k: t for k, t in load_file("{path}").items() if k not in [{left_out}]}}'
    return f'save_file({kept}, "start.safetensors"), both of safetensors.torch'
