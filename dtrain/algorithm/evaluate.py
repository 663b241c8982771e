"""Loss and metrics of a model as sums that merge exactly: pieces can be evaluated anywhere and added in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import nn

from dtrain.algorithm.batch import Targets, TensorBatch, autocast
from dtrain.algorithm.losses import Loss, Weight, classes_first, compared, is_count, mae, mean_of_batch, mse
from dtrain.algorithm.masked import counts_of_finite_targets, of_finite_targets
from dtrain.algorithm.weighted import sum_of
from dtrain.config.functions import Function, takes_weight
from dtrain.config.names import IGNORED_CLASS, metric_key
from dtrain.config.schema import ClassAxis
from dtrain.errors import InvalidConfig, ShapesDiffer

Term: TypeAlias = tuple[float, float]
"""The sum of a quantity, and the number of its terms (or the sum of their weights)."""
Metric: TypeAlias = Callable[..., Term]
"""(outputs, targets), or (outputs, targets, weight) -> sum over the batch, and the number of its terms."""
Decode: TypeAlias = Callable[[Any, Any], tuple[Any, Any]]
"""(outputs, targets) of the model -> the same in the units of the decoded data."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Loss and metrics over some samples."""

    samples: int
    loss: Term
    metrics: Mapping[str, Term]
    """By reported name."""
    seconds: float = field(default=0.0, compare=False)
    """That the evaluation took."""


def evaluate(
    module: nn.Module,
    loss: Loss,
    metrics: Mapping[str, Metric],
    batches: Iterable[TensorBatch],
    precision: str = "float32",
    decode: Decode = lambda outputs, targets: (outputs, targets),
) -> Sums:
    """Return the sums of loss and metrics over batches.

    Parameters
    ----------
    module : nn.Module
    loss : callable
    metrics : mapping of str to callable
    batches : iterable of TensorBatch
    precision : str
        As in `Recipe`.
    decode : callable
        Applied to outputs and targets before metrics are computed; the loss is in the model's units.
    """
    module.eval()
    sums = Sums(0, (0.0, 0), dict.fromkeys(metrics, (0.0, 0)))
    with torch.inference_mode():
        for batch in batches:
            with autocast(precision, batch):
                outputs = module(*batch.inputs)
                mean = mean_of_batch(compared(loss, outputs, batch.targets, batch.weight), batch.size)
            outputs, targets = decode(outputs, batch.targets)
            own = {name: compared(metric, outputs, targets, batch.weight) for name, metric in metrics.items()}
            sums = merge([sums, Sums(batch.size, (mean.sum, mean.count), own)])
    return sums


def merge(pieces: Sequence[Sums]) -> Sums:
    """Add sums in the order given."""
    return Sums(
        sum(piece.samples for piece in pieces),
        _added([piece.loss for piece in pieces]),
        {name: _added([piece.metrics[name] for piece in pieces]) for name in pieces[0].metrics},
        in_order(piece.seconds for piece in pieces),
    )


def _added(terms: Sequence[Term]) -> Term:
    return in_order(term[0] for term in terms), in_order(term[1] for term in terms)


def in_order(values: Iterable[float]) -> float:
    """Return the sum of numbers, added one by one: from Python 3.12 on, `sum` compensates what floats round off."""
    total: float = 0  # integers stay integers
    for value in values:
        total += value
    return total


def values(sums: Sums, wanted: Sequence[str]) -> dict[str, float]:
    """Return ``loss`` and the wanted metrics as means; NaN where no term counts."""
    loss = _mean(sums.loss)
    chosen = {"loss": loss}
    for name in wanted:
        key = metric_key(name)
        chosen[key] = FROM_LOSS[name](loss) if name in FROM_LOSS else _mean(sums.metrics[key])
    return chosen


def _mean(term: Term) -> float:
    return term[0] / term[1] if term[1] else math.nan


# Metrics --------------------------------------------------------------------------------------------------

FROM_LOSS: dict[str, Callable[[float], float]] = {
    "perplexity": lambda loss: math.inf if loss > 700 else math.exp(loss),
    "bits_per_byte": lambda loss: loss / math.log(2.0),
}
"""Metrics that are functions of the mean loss."""


def accuracy(
    outputs: torch.Tensor, targets: torch.Tensor, weight: Weight = None, *, class_axis: ClassAxis = "auto"
) -> Term:
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


def mean_metric(function: Callable[..., Any]) -> Metric:
    """Turn a function that returns the mean over the batch's samples, or (sum, count), into sums.

    It gets the weight of samples as third argument if it takes one (`takes_weight`).
    """
    is_weighted = takes_weight(function)

    def metric(outputs: Any, targets: Any, weight: Targets | None = None) -> Term:
        value = compared(function, outputs, targets, weight if is_weighted else None)
        if isinstance(value, tuple):
            if len(value) != 2 or not _is_number(value[0]) or not is_count(value[1]):
                raise _not_a_metric(function, value)
            return float(value[0]), float(value[1])
        if not _is_number(value):
            raise _not_a_metric(function, value)
        size = len(targets[0] if isinstance(targets, tuple) else targets)
        return float(value) * size, size

    return metric


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


METRICS: dict[str, Metric] = {"accuracy": accuracy, "mse": mean_metric(mse), "mae": mean_metric(mae)}
OF_FINITE_TARGETS: dict[str, Metric] = {
    "mse": mean_metric(of_finite_targets(mse)),
    "mae": mean_metric(of_finite_targets(mae)),
}


def metric_named(name: str, class_axis: ClassAxis = "auto", finite_targets: bool = False) -> Metric:
    """Return a built-in metric that is computed batch by batch; with `finite_targets`, of those alone."""
    if name == "accuracy":
        metric = partial(accuracy, class_axis=class_axis)
        return counts_of_finite_targets(metric) if finite_targets else metric
    return OF_FINITE_TARGETS[name] if finite_targets else METRICS[name]
