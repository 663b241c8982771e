"""The built-in metrics by name; `dtrain.config.names.METRICS` has facts about them that need no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from dtrain.algorithm.losses import Value, Weight, alike, mae, mse
from dtrain.algorithm.masked import counts_of_finite_targets, of_finite_targets
from dtrain.algorithm.metrics.confusion import by_class_metric
from dtrain.algorithm.metrics.curve import auroc_metric
from dtrain.algorithm.metrics.moments import anomaly_correlation_metric, r2_metric
from dtrain.algorithm.metrics.state import Metric, of_sums
from dtrain.algorithm.metrics.terms import accuracy, mean_over_batch
from dtrain.config.schema import ClassAxis

FROM_LOSS: dict[str, Callable[[float], float]] = {
    "perplexity": lambda loss: math.inf if loss > 700 else math.exp(loss),
    "bits_per_byte": lambda loss: loss / math.log(2.0),
}
"""Metrics that are functions of the mean loss."""


def metric_named(name: str, class_axis: ClassAxis = "auto", finite_targets: bool = False) -> Metric:
    """Return a built-in metric that is computed batch by batch; with `finite_targets`, of those alone."""
    return METRICS[name](class_axis, finite_targets)


def _accuracy(class_axis: ClassAxis, finite_targets: bool) -> Metric:
    counts = partial(accuracy, class_axis=class_axis)
    return of_sums(counts_of_finite_targets(counts) if finite_targets else counts)


def _mean(loss: Callable[..., object], value: Callable[[float], float], _: ClassAxis, finite_targets: bool) -> Metric:
    return of_sums(mean_over_batch(of_finite_targets(loss) if finite_targets else loss), value)


def _squared_errors(outputs: Any, targets: Any, weight: Weight = None) -> Value:
    return mse(*alike(outputs, targets, "rmse"), weight)


METRICS: Mapping[str, Callable[[ClassAxis, bool], Metric]] = {
    "accuracy": _accuracy,
    "f1": partial(by_class_metric, "f1"),
    "iou": partial(by_class_metric, "iou"),
    "dice": partial(by_class_metric, "dice"),
    "auroc": auroc_metric,
    "mse": partial(_mean, mse, float),
    "mae": partial(_mean, mae, float),
    "rmse": partial(_mean, _squared_errors, math.sqrt),
    "r2": lambda _, finite_targets: r2_metric(finite_targets),
    "anomaly_correlation": lambda _, finite_targets: anomaly_correlation_metric(finite_targets),
}
