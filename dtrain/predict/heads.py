"""Outputs of the model x targets x ``values`` -> the arrays that are written.

values         cross_entropy                     bce                      other losses
auto           NAME (class), NAME_probability    NAME (probability)       NAME, in the target's units
classes        NAME                              NAME (0 or 1)            -
probabilities  NAME_probability(class)           NAME (probability)       -
raw            NAME_output: what the model returns, in its own units

An output that has not the shape of its target is written as it is: NAME_output, with dimensions of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from dtrain.algorithm.outputs import OutputFacts, class_count
from dtrain.config.names import LOSSES
from dtrain.config.schema import ClassAxis
from dtrain.data.plan.heads import Head, Kind, OutputArray
from dtrain.errors import InvalidConfig, ShapesDiffer, did_you_mean
from dtrain.predict.targets import Target

ValuesName: TypeAlias = Literal["auto", "classes", "probabilities", "raw"]
CLASS = "class"
PROBABILITY = "_probability"
OUTPUT = "_output"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How outputs are to be written."""

    values: ValuesName
    loss: str
    class_axis: ClassAxis
    sample_dim: str
    patch: Mapping[str, int]
    blended: bool
    """Whether predictions are put together of patches."""
    leaves_out: bool
    """Whether samples may be left out (``data.non_finite``)."""


def checked_values(values: str) -> ValuesName:
    """Return the argument ``values``.

    Raises
    ------
    InvalidConfig
        There is no such one.
    """
    for name in get_args(ValuesName):
        if values == name:
            return name  # type: ignore[no-any-return]
    allowed = get_args(ValuesName)
    raise InvalidConfig(f'values = "{values}": allowed are {", ".join(allowed)}{did_you_mean(str(values), allowed)}')


def heads_of(
    outputs: Sequence[OutputFacts], targets: Sequence[Target], unknown: str, asked: Asked, total: int
) -> tuple[Head, ...]:
    """Return what is made of each output.

    Parameters
    ----------
    outputs : sequence of OutputFacts
    targets : sequence of Target
        None if they are not known.
    unknown : str
        Why they are not.
    asked : Asked
    total : int
        Predictions along the dimension of the samples.

    Raises
    ------
    InvalidConfig, ShapesDiffer
        `values` does not fit the loss or the outputs, or targets are not known.
    """
    if not targets and asked.values != "raw":
        raise InvalidConfig(
            f"It is not known what the outputs mean: the store lacks the targets, and {unknown}.",
            'Make the run\'s own data readable, or ask for the outputs as they are: --values raw, values="raw".',
        )
    is_paired = len(outputs) == len(targets)
    heads = [
        _head(number, facts, targets[number] if is_paired else None, targets, asked, total)
        for number, facts in enumerate(outputs)
    ]
    names = [array.name for head in heads for array in head.arrays]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidConfig(f"Two arrays of predictions would be named {twice}.", "Give the targets other names.")
    return tuple(heads)


def _head(
    number: int, facts: OutputFacts, target: Target | None, targets: Sequence[Target], asked: Asked, total: int
) -> Head:
    """Return what is made of one output, whose target is known or not."""
    shape = None if target is None else target.patch_shape(asked.patch)
    if target is None or shape is None:
        if asked.values in ("classes", "probabilities"):
            raise _not_classes(asked, f"the model has {len(targets)} targets and other outputs")
        return _generic(number, facts, _output_name(facts, targets), asked, total)
    is_built_in = asked.loss in LOSSES
    if asked.loss == "cross_entropy" or (not is_built_in and asked.values in ("classes", "probabilities")):
        count = class_count(facts.shape, shape, asked.class_axis)
        if count is not None:
            return _of_classes(number, facts, target, asked, total, count)
    if facts.shape != shape or asked.loss == "cross_entropy":
        if is_built_in and asked.values != "raw":
            raise ShapesDiffer(
                f"The model's output has shape {list(facts.shape)} a sample, which does not fit {target.name} of shape "
                f'{list(shape)} for train.loss = "{asked.loss}".',
                "Give data whose samples have the shape of those that the run was trained on.",
            )
        if asked.values in ("classes", "probabilities"):
            raise _not_classes(asked, f"the output of {target.name} has shape {list(facts.shape)} a sample")
        return _generic(number, facts, f"{target.written}{OUTPUT}", asked, total)
    if asked.values == "raw":
        return _alike(number, facts, target, asked, total, "raw", f"{target.written}{OUTPUT}")
    if asked.loss == "bce":
        return _alike(number, facts, target, asked, total, "label" if asked.values == "classes" else "chance")
    if asked.values in ("classes", "probabilities"):
        raise _not_classes(asked, f'train.loss = "{asked.loss}" is for numbers')
    return _alike(number, facts, target, asked, total, "values")


def _not_classes(asked: Asked, why: str) -> InvalidConfig:
    return InvalidConfig(
        f"--values {asked.values}: {why}, so that there are no classes.", "Ask for --values auto or raw."
    )


def _output_name(facts: OutputFacts, targets: Sequence[Target]) -> str:
    """Return the name of an output without a target of its own."""
    if facts.key and not facts.key.isdigit():
        return facts.key.replace("/", "_")
    first = f"{targets[0].written}{OUTPUT}" if len(targets) == 1 else "output"
    return f"{first}_{facts.key}" if facts.key else first


# Heads ------------------------------------------------------------------------------------------------------


def _of_classes(number: int, facts: OutputFacts, target: Target, asked: Asked, total: int, count: int) -> Head:
    dtype = class_dtype(target.dtype, count, asked.leaves_out)
    fill = _class_fill(target, dtype, count) if asked.leaves_out else None
    chance = {"long_name": f"probability of {target.written}", "units": "1"}
    classes = _array(target, target.written, asked, total, dtype, fill, _class_attributes(target, count))
    probability = _array(target, f"{target.written}{PROBABILITY}", asked, total, "float32", float("nan"), chance)
    axis = CLASS if CLASS not in target.stored else f"{target.written}_{CLASS}"
    every = _with_classes(probability, axis, count, asked)
    kind: Kind = "classes"
    arrays: tuple[OutputArray, ...] = (classes, probability)
    if asked.values == "classes":
        arrays = (classes,)
    elif asked.values == "probabilities":
        kind, arrays = "probabilities", (every,)
    elif asked.values == "raw":
        kind = "raw"
        output = _array(target, f"{target.written}{OUTPUT}", asked, total, attributes=_raw_attributes(target))
        arrays = (_with_classes(output, axis, count, asked),)
    return Head(
        tensor=number,
        kind=kind,
        dims=(axis, *target.dims),
        shape=(count, *target.shape),
        output=facts.shape,
        arrays=arrays,
        target=target.patch_shape(asked.patch),
    )


def _with_classes(array: OutputArray, axis: str, count: int, asked: Asked) -> OutputArray:
    """Return an array with the axis of the classes after that of the samples."""
    at = array.dims.index(asked.sample_dim) + 1
    return OutputArray(
        name=array.name,
        dims=(*array.dims[:at], axis, *array.dims[at:]),
        computed=(array.computed[0], axis, *array.computed[1:]),
        shape=(*array.shape[:at], count, *array.shape[at:]),
        dtype=array.dtype,
        fill=array.fill,
        attributes=array.attributes,
    )


def _alike(
    number: int, facts: OutputFacts, target: Target, asked: Asked, total: int, kind: Kind, name: str = ""
) -> Head:
    """Return the head of an output that has the shape of its target."""
    dtype, fill, attributes = "float32", float("nan"), dict(target.attributes)
    known: float | int | None = fill
    if kind == "label":
        dtype = class_dtype(target.dtype, 2, asked.leaves_out)
        known = _class_fill(target, dtype, 2) if asked.leaves_out else None
        attributes = _class_attributes(target, 2)
    elif kind == "chance":
        attributes = {"long_name": f"probability of {target.written}", "units": "1"}
    elif kind == "raw" or not target.is_number:
        attributes = _raw_attributes(target)
    return Head(
        tensor=number,
        kind=kind,
        dims=target.dims,
        shape=target.shape,
        output=facts.shape,
        arrays=(_array(target, name or target.written, asked, total, dtype, known, attributes),),
        target=target.patch_shape(asked.patch),
        scaling=target.scaling if kind == "values" else None,
    )


def _array(
    target: Target,
    name: str,
    asked: Asked,
    total: int,
    dtype: str = "float32",
    fill: float | int | None = float("nan"),
    attributes: Mapping[str, Any] | None = None,
) -> OutputArray:
    lengths = {asked.sample_dim: total, **dict(zip(target.dims, target.shape, strict=True))}
    return OutputArray(
        name=name,
        dims=target.stored,
        computed=(asked.sample_dim, *target.dims),
        shape=tuple(lengths[dim] for dim in target.stored),
        dtype=dtype,
        fill=fill,
        attributes=attributes or {"long_name": f"predicted {target.written}"},
    )


def _generic(number: int, facts: OutputFacts, name: str, asked: Asked, total: int) -> Head:
    """Return the head of an output of a shape of its own.

    Raises
    ------
    ShapesDiffer
        It is of patches, which cannot be put together.
    """
    if asked.blended and facts.shape:
        raise ShapesDiffer(
            f"{name}: the output for a patch has shape {list(facts.shape)}, which is not that of a target: patches "
            "cannot be put together.",
            "Return an output of the shape of the target, or predict whole rows: --set data.patch={}.",
        )
    dims = tuple(f"{name}_axis_{axis}" for axis in range(len(facts.shape)))
    is_float = facts.dtype in ("float32", "float64", "float16", "bfloat16")
    dtype = "float32" if is_float or asked.blended else facts.dtype
    if dtype not in ("float32", "int8", "int16", "int32", "int64", "uint8", "bool"):
        raise ShapesDiffer(f"{name}: outputs of dtype {facts.dtype} cannot be written.", "Return floats or integers.")
    array = OutputArray(
        name=name,
        dims=(asked.sample_dim, *dims),
        computed=(asked.sample_dim, *dims),
        shape=(total, *facts.shape),
        dtype=dtype,
        fill=float("nan") if dtype == "float32" else (-1 if asked.leaves_out else None),
        attributes={"long_name": "output of the model"},
    )
    return Head(tensor=number, kind="raw", dims=dims, shape=facts.shape, output=facts.shape, arrays=(array,))


def _raw_attributes(target: Target) -> dict[str, Any]:
    return {"long_name": f"output of the model for {target.written}"}


# Classes ----------------------------------------------------------------------------------------------------


def class_dtype(dtype: str, count: int, leaves_out: bool = False) -> str:
    """Return the dtype of classes: the target's, or a longer one if it does not hold so many.

    Bools hold no value for samples that are left out.

    >>> class_dtype("int8", 10), class_dtype("int8", 300), class_dtype("bool", 2), class_dtype("float64", 3)
    ('int8', 'int16', 'bool', 'int64')
    """
    own = np.dtype(dtype)
    if own.kind == "b":
        return dtype if count <= 2 and not leaves_out else "int8"
    if own.kind not in "iu":
        return "int64"
    wider = [own, *(np.dtype(f"{own.kind}{size}") for size in (2, 4, 8) if size > own.itemsize)]
    return next(str(one) for one in wider if count - 1 <= np.iinfo(one).max)


def _class_fill(target: Target, dtype: str, count: int) -> int:
    """Return what stands for the class of a sample that is left out."""
    own = np.dtype(dtype)
    info = np.iinfo(own)
    if target.missing is not None and info.min <= target.missing <= info.max:
        return target.missing
    return -1 if own.kind == "i" else int(info.max) if count <= info.max else 0


def _class_attributes(target: Target, count: int) -> dict[str, Any]:
    """Return the attributes of classes: those of the target, and the names of its classes."""
    attributes = dict(target.attributes)
    if len(target.classes) and len(target.classes) <= max(count, len(target.classes)):
        attributes["flag_values"] = list(range(len(target.classes)))
        attributes["flag_meanings"] = " ".join("_".join(name.split()) for name in target.classes)
        attributes["class_names"] = list(target.classes)
    return attributes
