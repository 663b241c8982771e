"""Loss and metrics of a model as sums that merge exactly: pieces can be evaluated anywhere and added in order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from dtrain.algorithm.batch import TensorBatch, autocast
from dtrain.algorithm.losses import Loss, classes_first, mae, mse
from dtrain.errors import InvalidConfig

Sums: TypeAlias = dict[str, tuple[float, int]]
"""By name: the sum of a quantity, and the number of its terms."""
Metric: TypeAlias = Callable[[Any, Any], tuple[float, int]]
"""(outputs, targets) -> sum over the batch, and the number of its terms."""

FROM_LOSS: dict[str, Callable[[float], float]] = {
    "perplexity": lambda loss: math.inf if loss > 700 else math.exp(loss),
    "bits_per_byte": lambda loss: loss / math.log(2.0),
}
"""Metrics that are functions of the mean loss."""


def evaluate(
    module: nn.Module,
    loss: Loss,
    metrics: Mapping[str, Metric],
    batches: Iterable[TensorBatch],
    precision: str = "float32",
) -> Sums:
    """Return the sums of loss and metrics over batches."""
    module.eval()
    sums: Sums = {"loss": (0.0, 0), **dict.fromkeys(metrics, (0.0, 0))}
    with torch.inference_mode():
        for batch in batches:
            with autocast(precision, batch):
                outputs = module(*batch.inputs)
                value = loss(outputs, batch.targets)
            own: Sums = {"loss": (value.item() * batch.size, batch.size)}
            own.update({name: metric(outputs, batch.targets) for name, metric in metrics.items()})
            sums = merge([sums, own])
    return sums


def merge(pieces: Sequence[Sums]) -> Sums:
    """Add sums in the order given."""
    return {
        name: (sum(piece[name][0] for piece in pieces), sum(piece[name][1] for piece in pieces)) for name in pieces[0]
    }


def values(sums: Sums, wanted: Sequence[str]) -> dict[str, float]:
    """Return ``loss`` and the wanted metrics as means."""
    means = {name: total / count if count else math.nan for name, (total, count) in sums.items()}
    chosen = {"loss": means["loss"]}
    for name in wanted:
        key = metric_key(name)
        chosen[key] = FROM_LOSS[name](means["loss"]) if name in FROM_LOSS else means[key]
    return chosen


def metric_key(name: str) -> str:
    """Return the reported name of a metric; for ``module:function`` this is the name of the function."""
    return name.rpartition(":")[2]


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
    """Count correct predictions: the class of the largest output; for targets of the outputs' shape, logit > 0."""
    if targets.is_floating_point() or outputs.shape == targets.shape:
        if outputs.shape != targets.shape:
            raise InvalidConfig(
                f"metric accuracy: the output has shape {list(outputs.shape)}, the target {list(targets.shape)}."
            )
        right = (outputs > 0) == (targets > 0.5)
    else:
        right = classes_first(outputs, targets).argmax(1) == targets
    return float(right.sum().item()), right.numel()


def mean_metric(function: Callable[[Any, Any], Any]) -> Metric:
    """Turn a function that returns the mean over the batch's samples into sums."""

    def metric(outputs: Any, targets: Any) -> tuple[float, int]:
        size = len(targets[0] if isinstance(targets, tuple) else targets)
        return float(function(outputs, targets)) * size, size

    return metric


METRICS: dict[str, Metric] = {"accuracy": accuracy, "mse": mean_metric(mse), "mae": mean_metric(mae)}
