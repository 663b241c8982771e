"""What is known of an exported module: its inputs and outputs in words, and what its file carries as metadata."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dtrain.data.samples import Field, Samples
from dtrain.resolved import Resolved

METADATA = "dtrain.json"
"""The name of the metadata in a file."""
RESERVED = ("torch", "np", "onnxruntime", "load_file", "model", "session", "tensors", "outputs", "name", "t", "build")
"""Names that the lines of Python in a model card use for something else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """An input or an output."""

    name: str
    """The variable; of an output, the target of the same place."""
    argument: str
    """The name that a program can use for it; no other one has it."""
    dims: tuple[str, ...]
    """Names of its axes, as far as they are known."""
    shape: tuple[int, ...]
    """Of one sample."""
    dtype: str
    """``float32``, ``int64`` ..."""
    is_scaled: bool
    """Whether the module standardises it, or restores its units."""
    rows: tuple[int, ...] = ()
    """Of a window: its rows, counted from the sample's."""
    classes: tuple[str, ...] = ()
    """What the codes of a categorical stand for; of an output, those of its target."""
    genes: str = ""
    """A digest of the names of the columns, in their order."""

    @property
    def is_float(self) -> bool:
        """Whether its values are floats."""
        return self.dtype.startswith(("float", "bfloat"))

    @property
    def axes(self) -> str:
        """The axes of a batch, in words: ``sample, y 8, x 8``."""
        names = self.dims if len(self.dims) == len(self.shape) else ("",) * len(self.shape)
        return ", ".join(["sample", *(f"{name} {n}".lstrip() for name, n in zip(names, self.shape, strict=True))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """An exported module, in words."""

    model: str
    """``module:function`` that builds the model."""
    model_args: Mapping[str, Any]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    standardised: frozenset[str]
    """The variables of ``data.normalize``."""
    fills: bool
    """Whether values of the inputs that are not finite become 0 after normalising."""
    nbytes: int
    """Bytes of all parameters and buffers."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Where it comes from: run, round, versions, digest of the parameters."""

    @property
    def metadata(self) -> dict[str, str]:
        """What the file carries beside its tensors."""
        tensors = {"inputs": [_described(one) for one in self.inputs], "outputs": [_described(o) for o in self.outputs]}
        return {METADATA: json.dumps({**self.about, "model": self.model, "model_args": self.model_args, **tensors})}

    @property
    def zeros(self) -> list[str]:
        """Lines of Python that make one sample of zeros for each input."""
        return [
            f"{one.argument} = torch.zeros({(1, *one.shape)}, dtype=torch.{one.dtype})  # {one.axes}"
            for one in self.inputs
        ]


def _described(one: Tensor) -> dict[str, Any]:
    values = {
        "name": one.name,
        "argument": one.argument,
        "dims": ["sample", *one.dims] if len(one.dims) == len(one.shape) else None,
        "shape": list(one.shape),
        "dtype": one.dtype,
        "rows": list(one.rows),
        "classes": list(one.classes),
        "genes": one.genes,
    }
    return {key: value for key, value in values.items() if value not in (None, [], "")}


def inputs_of(samples: Samples, tensors: Sequence[torch.Tensor], resolved: Resolved) -> tuple[Tensor, ...]:
    """Describe the inputs of a model."""
    fields = samples.fields[: len(samples.config.inputs)]
    names = arguments([one.name for one in fields])
    return tuple(
        _tensor(samples, one, name, tensor, resolved, is_scaled=one.name in resolved.scalings)
        for one, name, tensor in zip(fields, names, tensors, strict=True)
    )


def outputs_of(
    samples: Samples, tensors: Sequence[torch.Tensor], restored: Sequence[bool], resolved: Resolved
) -> tuple[Tensor, ...]:
    """Describe the outputs of a model: by the target of the same place, where there are as many."""
    first, count = len(samples.config.inputs), len(samples.config.targets)
    fields = samples.fields[first : first + count]
    if len(tensors) != count:
        return tuple(
            Tensor(
                name="",
                argument=f"output_{number}",
                dims=(),
                shape=tuple(tensor.shape[1:]),
                dtype=_dtype(tensor),
                is_scaled=False,
            )
            for number, tensor in enumerate(tensors)
        )
    names = arguments([f"{one.name}_output" for one in fields])
    return tuple(
        _tensor(samples, one, name, tensor, resolved, is_scaled=scaled)
        for one, name, tensor, scaled in zip(fields, names, tensors, restored, strict=True)
    )


def _tensor(
    samples: Samples, one: Field, argument: str, tensor: torch.Tensor, resolved: Resolved, *, is_scaled: bool
) -> Tensor:
    variable = samples.variable(one.name)
    dims, categories = (*(("window",) if one.window else ()), *variable.row_dims), resolved.categories.get(one.name)
    shape = tuple(tensor.shape[1:])
    return Tensor(
        name=one.name,
        argument=argument,
        dims=dims if shape == samples.field_shape(one) and len(dims) == len(shape) else (),
        shape=shape,
        dtype=_dtype(tensor),
        is_scaled=is_scaled,
        rows=one.offsets if one.window else (),
        classes=() if categories is None else categories.names,
        genes=resolved.genes.get(one.name, ""),
    )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def arguments(names: Sequence[str]) -> list[str]:
    """Return a name for each variable that a program can use, none of them twice.

    >>> arguments(["t2m", "labels/nuclei/0", "0", "t2m", "class"])
    ['t2m', 'labels_nuclei_0', 'input_0', 't2m_2', 'class_2']
    """
    chosen: list[str] = []
    for name in names:
        plain = re.sub(r"\W+", "_", name).strip("_") or "values"
        plain = f"input_{plain}" if plain[0].isdigit() else plain
        candidates = (plain, *(f"{plain}_{number}" for number in range(2, len(names) + 2)))
        chosen.append(next(c for c in candidates if c not in (*chosen, *RESERVED) and not keyword.iskeyword(c)))
    return chosen
