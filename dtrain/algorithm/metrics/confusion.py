"""Metrics of classes: f1, iou and dice, from counts by class.

Outputs are logits: of classes, for integer targets that lack the class axis; of one class and its absence, for targets
of the outputs' shape, which are 0 or 1. Targets of -100 are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from dtrain.algorithm.losses import Weight, classes_first, described
from dtrain.algorithm.metrics.state import Floats, Metric, Parts
from dtrain.config.names import IGNORED_CLASS
from dtrain.config.schema import ClassAxis
from dtrain.errors import ShapesDiffer


class Labelled(NamedTuple):
    """The terms of a batch that count."""

    logits: torch.Tensor
    """float[term, class]; of one class and its absence, float[term, 1]."""
    labels: torch.Tensor
    """int64[term]: the class; of one class and its absence, 1 or 0."""
    weights: torch.Tensor | None
    """float64[term]"""

    @property
    def is_binary(self) -> bool:
        """Whether there is one class and its absence."""
        return self.logits.shape[1] == 1


def labelled_terms(
    name: str, outputs: Any, targets: Any, weight: Weight, class_axis: ClassAxis, finite_targets: bool
) -> Labelled:
    """Return logits and labels of the terms that count.

    Raises
    ------
    ShapesDiffer
        The shapes do not fit, or the targets are no labels of these logits.
    """
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise ShapesDiffer(
            f"{name} needs one output and one target tensor, got {described(outputs)} and {described(targets)}.",
            SEVERAL,
        )
    if targets.is_floating_point() or outputs.shape == targets.shape:
        if outputs.shape != targets.shape:
            raise ShapesDiffer(
                f"{name}: the model's output is {described(outputs)}, the target {described(targets)}; a target of "
                "floats must have the output's shape.",
                "Store classes as integers, or reshape the output in the model's forward.",
            )
        logits = outputs.unsqueeze(-1)
    else:
        logits = classes_first(outputs, targets, class_axis, name).movedim(1, -1)
    counted = targets != IGNORED_CLASS
    if finite_targets and targets.is_floating_point():
        counted &= torch.isfinite(targets)
    if weight is not None:
        counted &= weight != 0
    labels = targets[counted]
    _check_labels(name, labels, logits.shape[-1])
    return Labelled(logits[counted], labels.long(), None if weight is None else weight[counted].double())


def _check_labels(name: str, labels: torch.Tensor, classes: int) -> None:
    if classes == 1:
        odd = labels[(labels != 0) & (labels != 1)]
        if len(odd):
            raise ShapesDiffer(
                f"{name} is of labels: of a target that has the output's shape they are 0 or 1, and it holds "
                f"{odd[0].item():g}.",
                "For numbers there are mse, mae, rmse, r2 and anomaly_correlation.",
            )
        return
    odd = labels[(labels < 0) | (labels >= classes)]
    if len(odd):
        raise ShapesDiffer(
            f"{name}: the target holds class {odd[0].item()}, and the model's output has the classes 0 to "
            f"{classes - 1}.",
            f"Widen the model's output, or store what does not count as {IGNORED_CLASS}.",
        )


SEVERAL = "Give several outputs or targets a metric of your own, or evaluate each alone: dtrain eval --by variable."


def by_class_metric(name: str, class_axis: ClassAxis = "auto", finite_targets: bool = False) -> Metric:
    """Return a metric of counts by class: the mean over the classes that occur in targets or predictions.

    The state is float64[class, 3]: the terms that are both predicted and true, predicted, and true.

    Parameters
    ----------
    name : {"f1", "iou", "dice"}
    """

    def of_batch(outputs: Any, targets: Any, weight: Weight = None) -> Parts:
        terms = labelled_terms(name, outputs, targets, weight, class_axis, finite_targets)
        if terms.is_binary:
            predicted, classes = (terms.logits[:, 0] > 0).long(), 2
        else:
            predicted, classes = terms.logits.argmax(1), terms.logits.shape[1]
        count = partial(torch.bincount, minlength=classes)
        is_right = predicted == terms.labels
        weights = terms.weights
        both = count(terms.labels[is_right], None if weights is None else weights[is_right])
        counts = torch.stack([both, count(predicted, weights), count(terms.labels, weights)], dim=1).double()
        return ((counts[1:] if terms.is_binary else counts).cpu().numpy(),)

    return Metric(of_batch, partial(mean_over_classes, OVERLAPS[name]))


def mean_over_classes(overlap: Callable[..., Floats], counts: Floats) -> float:
    """Return the mean of a measure over the classes that occur; NaN if none does."""
    both, predicted, true = counts[counts[:, 1] + counts[:, 2] > 0].T
    return float(overlap(both, predicted, true).mean()) if len(both) else math.nan


def f1(both: Floats, predicted: Floats, true: Floats) -> Floats:
    """Return the harmonic mean of precision and recall: for sets, Dice's coefficient."""
    return np.asarray(2 * both / (predicted + true))


def iou(both: Floats, predicted: Floats, true: Floats) -> Floats:
    """Return intersection over union, Jaccard's index."""
    return np.asarray(both / (predicted + true - both))


OVERLAPS: dict[str, Callable[..., Floats]] = {"f1": f1, "iou": iou, "dice": f1}
