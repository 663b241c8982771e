"""Outputs of a model -> predictions: values in the target's units, classes, probabilities, or the tensors as they are.

Where patches overlap, what is blended is the estimate: probabilities, not classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from dtrain.algorithm.losses import classes_first, described, wide
from dtrain.config.schema import ClassAxis
from dtrain.errors import ShapesDiffer

Array: TypeAlias = npt.NDArray[Any]
Kind: TypeAlias = Literal["values", "classes", "probabilities", "chance", "label", "raw"]
"""As `dtrain.data.plan.heads.Kind`."""
Scaling: TypeAlias = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Mean and standard deviation that undo a normalisation."""


@dataclass(frozen=True, slots=True)
class OutputFacts:
    """An output tensor of a model."""

    key: str
    """Its name in a mapping, or its number among several; empty if it is the only one."""
    shape: tuple[int, ...]
    """Of one sample."""
    dtype: str


def named_tensors(outputs: Any) -> list[tuple[str, torch.Tensor]]:
    """Return the output tensors of a model with their names: one, several in a tuple or list, or a mapping.

    Raises
    ------
    ShapesDiffer
        It returned something else.
    """
    if isinstance(outputs, torch.Tensor):
        return [("", outputs)]
    named: list[tuple[str, Any]] = []
    if isinstance(outputs, Mapping):
        named = [(str(key), value) for key, value in outputs.items()]
    elif isinstance(outputs, tuple | list):
        named = [(str(number), value) for number, value in enumerate(outputs)]
    if not named or not all(isinstance(value, torch.Tensor) for _, value in named):
        raise ShapesDiffer(
            f"The model returned {described(outputs)}; predictions are made of a tensor, several in a tuple, or a dict "
            "of tensors.",
            "Return these from the model's forward.",
        )
    return named


def facts_of(outputs: Any, size: int) -> tuple[OutputFacts, ...]:
    """Return the facts of the outputs for a batch.

    Raises
    ------
    ShapesDiffer
        An output has no axis of the samples.
    """
    named = named_tensors(outputs)
    for key, tensor in named:
        if not tensor.ndim or tensor.shape[0] != size:
            raise ShapesDiffer(
                f"The model's output{f' {key}' if key else ''} is {described(tensor)} for {size} samples; its first "
                "axis must be that of the samples.",
                "Change the model's forward.",
            )
    return tuple(OutputFacts(key, tuple(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for key, t in named)


def class_count(shape: Sequence[int], target: Sequence[int], class_axis: ClassAxis) -> int | None:
    """Return the number of classes that an output of one sample has, given its target's shape; None if it has none."""
    try:
        return int(classes_first(_meta(1, shape, torch.float32), _meta(1, target, torch.int64), class_axis).shape[1])
    except ShapesDiffer:
        return None


def _meta(size: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty((size, *shape), dtype=dtype, device="meta")


def estimate_of(kind: Kind, output: torch.Tensor, target: Sequence[int], class_axis: ClassAxis) -> torch.Tensor:
    """Return what is blended of an output: tensor[sample, *estimate].

    Parameters
    ----------
    kind : str
    output : tensor
    target : sequence of int
        The shape of the target of one sample, as far as classes are told by it.
    class_axis : 1, -1 or "auto"

    Raises
    ------
    ShapesDiffer
        No axis of the output can be that of the classes.
    """
    if kind in ("classes", "probabilities"):
        like = torch.empty((len(output), *target), dtype=torch.int64, device="meta")
        return torch.softmax(wide(classes_first(output, like, class_axis)), 1)
    if kind in ("chance", "label"):
        return torch.sigmoid(wide(output))
    return wide(output)


def results_of(
    kind: Kind,
    output: torch.Tensor,
    target: Sequence[int],
    class_axis: ClassAxis,
    scaling: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, ...]:
    """Return the predictions of samples that are not put together of patches: a tensor for each array.

    Parameters
    ----------
    kind, output, target, class_axis
        As of `estimate_of`.
    scaling : (mean, std) or None
        float64; they broadcast against the output.
    """
    if kind == "classes":
        like = torch.empty((len(output), *target), dtype=torch.int64, device="meta")
        logits = wide(classes_first(output, like, class_axis))
        best = logits.argmax(1, keepdim=True)
        return best.squeeze(1), torch.softmax(logits, 1).gather(1, best).squeeze(1)
    if kind == "label":
        return (output > 0,)
    estimate = estimate_of(kind, output, target, class_axis)
    if kind == "values" and scaling is not None:
        mean, std = (values.to(estimate.device) for values in scaling)
        return ((estimate.double() * std + mean).float(),)
    return (estimate,)


def blended_results(kind: Kind, estimate: npt.NDArray[np.float64], scaling: Scaling | None) -> tuple[Array, ...]:
    """Return the same of a blended estimate, float64[place, *estimate], which is changed."""
    if kind == "classes":
        best = estimate.argmax(axis=1, keepdims=True)
        return best.squeeze(1), np.take_along_axis(estimate, best, 1).squeeze(1)
    if kind == "label":
        return (estimate > 0.5,)
    if kind == "values" and scaling is not None:
        mean, std = scaling
        estimate *= std
        estimate += mean
    return (estimate,)
