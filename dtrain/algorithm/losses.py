"""Losses: the mean over a batch, and the number of terms that it is the mean of.

Terms that do not count (targets of -100) are in neither, so that batches, micro-batches and replicas add up to the
whole. With a weight (``data.weight``), losses are sums of weighted terms and sums of weights
(`dtrain.algorithm.weighted`). Shapes are checked, so that torch does not broadcast them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from dtrain.algorithm.batch import Targets
from dtrain.algorithm.weighted import weighted_labels, weighted_terms
from dtrain.config.names import IGNORED_CLASS
from dtrain.config.schema import ClassAxis
from dtrain.errors import ShapesDiffer

Value: TypeAlias = "torch.Tensor | tuple[torch.Tensor, torch.Tensor | float]"
"""What a loss returns: the mean over the batch's samples, or a sum and the number of its terms."""
Loss: TypeAlias = Callable[..., Value]
"""(outputs, targets), or (outputs, targets, weight) -> mean over the batch's samples, or (sum, count)."""
Weight: TypeAlias = "torch.Tensor | None"
"""Of each term, in the shape of the targets."""


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of the terms of a batch."""

    value: torch.Tensor
    """A scalar; 0 if no term counts."""
    count: float
    """The number of terms, or the sum of their weights."""

    @property
    def sum(self) -> float:
        """The sum of the terms."""
        return float(self.value.item()) * self.count


def compared(function: Callable[..., Any], outputs: Any, targets: Any, weight: Targets | None) -> Any:
    """Call a loss or a metric: with a third argument where samples have a weight."""
    return function(outputs, targets) if weight is None else function(outputs, targets, weight)


def mean_of_batch(value: Value, size: int) -> Mean:
    """Return what a loss gave for a batch as a mean.

    Parameters
    ----------
    value : tensor or (tensor, count)
        The mean over the samples, or a sum and its count.
    size : int
        The number of samples: the count of a mean.

    Raises
    ------
    ShapesDiffer
        It is neither.
    """
    if isinstance(value, torch.Tensor) and not value.ndim:
        return Mean(value, size)
    if isinstance(value, tuple) and len(value) == 2 and _is_scalar(value[0]) and is_count(value[1]):
        total, count = value[0], float(value[1])
        return Mean(total / count if count else total * 0.0, count)
    raise ShapesDiffer(
        f"The loss returned {described(value)}; it must return a scalar tensor, the mean over the batch, or "
        "(sum, count): a scalar tensor and a number that is not negative."
    )


def _is_scalar(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.ndim


def is_count(value: object) -> bool:
    """Whether a value is a finite number >= 0, or a tensor of one."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.Tensor):
        return False
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        return False
    return 0 <= float(value) < float("inf")


# Built-in losses ------------------------------------------------------------------------------------------


def mse(outputs: torch.Tensor, targets: torch.Tensor, weight: Weight = None) -> Value:
    """Mean squared error."""
    pair = alike(outputs, targets, "mse")
    return F.mse_loss(*pair) if weight is None else weighted_terms(F.mse_loss, *pair, weight)


def mae(outputs: torch.Tensor, targets: torch.Tensor, weight: Weight = None) -> Value:
    """Mean absolute error."""
    pair = alike(outputs, targets, "mae")
    return F.l1_loss(*pair) if weight is None else weighted_terms(F.l1_loss, *pair, weight)


def huber(outputs: torch.Tensor, targets: torch.Tensor, weight: Weight = None) -> Value:
    """Huber loss with delta = 1."""
    pair = alike(outputs, targets, "huber")
    return F.huber_loss(*pair) if weight is None else weighted_terms(F.huber_loss, *pair, weight)


def bce(outputs: torch.Tensor, targets: torch.Tensor, weight: Weight = None) -> Value:
    """Binary cross entropy; the outputs are logits; integer targets of -100 are left out."""
    logits, wanted = alike(outputs, targets, "bce")
    counted = targets != IGNORED_CLASS
    if weight is not None:
        weight = weight if targets.is_floating_point() else torch.where(counted, weight, 0)
        return weighted_terms(F.binary_cross_entropy_with_logits, logits, wanted, weight)
    if targets.is_floating_point() or bool(counted.all()):
        return F.binary_cross_entropy_with_logits(logits, wanted)
    total = F.binary_cross_entropy_with_logits(logits[counted], wanted[counted], reduction="sum")
    each = targets.numel() / len(targets)  # terms of a sample: means of other batches count samples
    return total / each, int(counted.sum()) / each


def cross_entropy(
    outputs: torch.Tensor, targets: torch.Tensor, weight: Weight = None, *, class_axis: ClassAxis = "auto"
) -> tuple[torch.Tensor, float]:
    """Cross entropy of logits with integer classes, as sum and count; targets of -100 are in neither."""
    logits = classes_first(outputs, targets, class_axis)
    if weight is not None:
        return weighted_labels(wide(logits), targets, weight)
    total = F.cross_entropy(wide(logits), targets, ignore_index=IGNORED_CLASS, reduction="sum")
    return total, int((targets != IGNORED_CLASS).sum())


LOSSES: dict[str, Loss] = {"mse": mse, "mae": mae, "huber": huber, "cross_entropy": cross_entropy, "bce": bce}


def loss_named(name: str, class_axis: ClassAxis = "auto") -> Loss:
    """Return a built-in loss."""
    return partial(cross_entropy, class_axis=class_axis) if name == "cross_entropy" else LOSSES[name]


# Shapes ---------------------------------------------------------------------------------------------------


def classes_first(
    outputs: torch.Tensor, targets: torch.Tensor, class_axis: ClassAxis = "auto", name: str = "cross_entropy"
) -> torch.Tensor:
    """Return the outputs with the class axis at 1.

    Parameters
    ----------
    outputs : tensor
        The targets' shape and one axis more.
    targets : integer tensor
    class_axis : 1, -1 or "auto"
        ``auto``: axis 1, or the last one if only that fits.
    name : str
        Of the loss or metric, for errors.

    Raises
    ------
    ShapesDiffer
        No axis of the outputs can be the classes of these targets, both can, or the targets are not integers.
    """
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise ShapesDiffer(
            f"{name} needs one output and one target tensor, got {described(outputs)} and {described(targets)}.",
            "Give several outputs or targets a loss of your own.",
        )
    if targets.is_floating_point():
        raise ShapesDiffer(
            f"{name} needs integer classes, but the target is {described(targets)}.",
            "Use bce or mse, or store the classes as integers.",
        )
    is_first = outputs.ndim == targets.ndim + 1 and outputs.shape[:1] + outputs.shape[2:] == targets.shape
    is_last = outputs.ndim == targets.ndim + 1 and outputs.shape[:-1] == targets.shape
    if is_first and is_last and outputs.ndim > 2 and class_axis == "auto":
        raise ShapesDiffer(
            f"{name}: the model's output is {described(outputs)}, the target {described(targets)}; both axis 1 "
            "and the last axis of the output can be the classes.",
            "Set train.class_axis = 1, or train.class_axis = -1 if the classes are last.",
        )
    if is_first and class_axis != -1:
        return outputs
    if is_last and class_axis != 1:
        return outputs.movedim(-1, 1)
    where = "as axis 1 or last" if class_axis == "auto" else f"at axis {class_axis} (train.class_axis)"
    raise ShapesDiffer(
        f"{name}: the model's output is {described(outputs)}, the target {described(targets)}; the output "
        f"needs the target's shape and one class axis more, {where}."
    )


def wide(outputs: torch.Tensor) -> torch.Tensor:
    """Return outputs in float32, if they are in a shorter float: losses and metrics are computed in float32."""
    return outputs.float() if outputs.is_floating_point() and outputs.itemsize < 4 else outputs


def alike(outputs: Any, targets: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs and targets of the same shape in the same dtype."""
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise ShapesDiffer(
            f"{name} needs one output and one target tensor, got {described(outputs)} and {described(targets)}.",
            "Give several outputs or targets a loss of your own.",
        )
    if outputs.shape != targets.shape:
        raise ShapesDiffer(
            f"{name}: the model's output is {described(outputs)}, the target {described(targets)}; they must be equal.",
            "Reshape the output in the model's forward, for example with squeeze(-1).",
        )
    outputs = wide(outputs)
    return outputs, targets.to(outputs.dtype)


def described(value: Any) -> str:
    """Return dtype and shape of a tensor, or the type of another value."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__
