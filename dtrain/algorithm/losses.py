"""Losses: the mean over the samples of a batch. Shapes are checked, so that torch does not broadcast them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from dtrain.errors import ShapesDiffer

Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]
"""(outputs, targets) -> scalar, mean over the batch's samples."""


def mse(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean squared error."""
    return F.mse_loss(outputs, _like(outputs, targets, "mse"))


def mae(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean absolute error."""
    return F.l1_loss(outputs, _like(outputs, targets, "mae"))


def huber(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Huber loss with delta = 1."""
    return F.huber_loss(outputs, _like(outputs, targets, "huber"))


def bce(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy; the outputs are logits."""
    return F.binary_cross_entropy_with_logits(outputs, _like(outputs, targets, "bce"))


def cross_entropy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy of logits with integer classes; the class axis is 1, else the last if only that fits."""
    return F.cross_entropy(classes_first(outputs, targets), targets)


def classes_first(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the outputs with the class axis at 1.

    Raises
    ------
    ShapesDiffer
        No axis of the outputs can be the classes of these targets, or the targets are not integers.
    """
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise ShapesDiffer(
            f"cross_entropy needs one output and one target tensor, got {_described(outputs)} and "
            f"{_described(targets)}.",
            "Give several outputs or targets a loss of your own.",
        )
    if targets.is_floating_point():
        raise ShapesDiffer(
            f"cross_entropy needs integer classes, but the target is {_described(targets)}.",
            "Use bce or mse, or store the classes as integers.",
        )
    if outputs.ndim == targets.ndim + 1:
        if outputs.shape[:1] + outputs.shape[2:] == targets.shape:
            return outputs
        if outputs.shape[:-1] == targets.shape:
            return outputs.movedim(-1, 1)
    raise ShapesDiffer(
        f"cross_entropy: the model's output is {_described(outputs)}, the target {_described(targets)}; the output "
        "needs the target's shape and one class axis more, as axis 1 or last."
    )


def _like(outputs: Any, targets: Any, name: str) -> torch.Tensor:
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise ShapesDiffer(
            f"{name} needs one output and one target tensor, got {_described(outputs)} and {_described(targets)}.",
            "Give several outputs or targets a loss of your own.",
        )
    if outputs.shape != targets.shape:
        raise ShapesDiffer(
            f"{name}: the model's output is {_described(outputs)}, the target {_described(targets)}; they must be "
            "equal.",
            "Reshape the output in the model's forward, for example with squeeze(-1).",
        )
    return targets.to(outputs.dtype)


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


LOSSES: dict[str, Loss] = {"mse": mse, "mae": mae, "huber": huber, "cross_entropy": cross_entropy, "bce": bce}
