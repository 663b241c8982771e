"""Metrics that are means of terms: accuracy, and functions that return a mean or a sum and a count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dtrain.algorithm.batch import Targets
from dtrain.algorithm.losses import Weight, classes_first, compared, is_count
from dtrain.algorithm.weighted import sum_of
from dtrain.config.functions import Function, takes_weight
from dtrain.config.names import IGNORED_CLASS
from dtrain.config.schema import ClassAxis
from dtrain.errors import InvalidConfig, ShapesDiffer


def accuracy(
    outputs: torch.Tensor, targets: torch.Tensor, weight: Weight = None, *, class_axis: ClassAxis = "auto"
) -> tuple[float, float]:
    """Count correct predictions: the class of the largest output; for targets of the outputs' shape, logit > 0.

    Targets of -100 count neither as right nor as wrong.
    """
    if targets.is_floating_point() or outputs.shape == targets.shape:
        if outputs.shape != targets.shape:
            raise InvalidConfig(
                f"metric accuracy: the output has shape {list(outputs.shape)}, the target {list(targets.shape)}."
            )
        right = (outputs > 0) == (targets > 0.5)
    else:
        right = classes_first(outputs, targets, class_axis).argmax(1) == targets
    counted = targets != IGNORED_CLASS
    if weight is not None:
        return sum_of(weight * (right & counted)), sum_of(weight * counted)
    return float((right & counted).sum().item()), int(counted.sum().item())


def mean_over_batch(function: Callable[..., Any]) -> Callable[..., tuple[float, float]]:
    """Turn a function that returns the mean over the batch's samples, or (sum, count), into one of sum and count.

    It gets the weight of samples as third argument if it takes one (`takes_weight`).
    """
    is_weighted = takes_weight(function)

    def sums(outputs: Any, targets: Any, weight: Targets | None = None) -> tuple[float, float]:
        value = compared(function, outputs, targets, weight if is_weighted else None)
        if isinstance(value, tuple):
            if len(value) != 2 or not _is_number(value[0]) or not is_count(value[1]):
                raise _not_a_metric(function, value)
            return float(value[0]), float(value[1])
        if not _is_number(value):
            raise _not_a_metric(function, value)
        size = len(targets[0] if isinstance(targets, tuple) else targets)
        return float(value) * size, size

    return sums


def _is_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return False
    return not isinstance(value, str)


def _not_a_metric(function: Function, value: object) -> ShapesDiffer:
    return ShapesDiffer(
        f"The metric {getattr(function, '__name__', 'function')} returned {value!r:.100}; it must return a number, the "
        "mean over the batch, or (sum, count)."
    )
