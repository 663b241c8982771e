"""Metrics of numbers whose state is more than a mean: r2 and the anomaly correlation, summed in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from dtrain.algorithm.losses import Weight, alike
from dtrain.algorithm.metrics.state import Floats, Metric, Parts


def r2_metric(finite_targets: bool = False) -> Metric:
    """Return the coefficient of determination over all terms: 1 - squared errors / squared differences from the mean.

    NaN where all targets are equal. The mean of the targets is merged with the squared differences from it, so that a
    large mean does not drown them.
    """

    def of_batch(outputs: Any, targets: Any, weight: Weight = None) -> Parts:
        errors, values, weights = _terms(*alike(outputs, targets, "r2"), weight, finite_targets)
        count = weights.sum()
        mean = (weights * values).sum() / count if count else count
        squares = (weights * (values - mean) ** 2).sum()
        moments = np.array([count.item(), mean.item(), squares.item()])
        return moments, np.array((weights * errors**2).sum().item())

    return Metric(of_batch, r2_value, ("moments", "sum"))


def r2_value(moments: Floats, errors: Floats) -> float:
    """Return r2 of count, mean and squared differences of the targets, and of the sum of squared errors."""
    squares = float(moments[2])
    return 1.0 - float(errors) / squares if squares else math.nan


def anomaly_correlation_metric(finite_targets: bool = False) -> Metric:
    """Return the correlation of the anomalies of forecasts and targets: their differences from a climatology.

    It is not centred, and pooled over all terms: sum f t / sqrt(sum f^2 * sum t^2), weighted by ``data.weight``.

    References
    ----------
    Wilks: Statistical Methods in the Atmospheric Sciences, section 8.6.4 (uncentred anomaly correlation).
    """

    def of_batch(outputs: Any, targets: Any, weight: Weight = None, *, climate: torch.Tensor) -> Parts:
        outputs, targets = alike(outputs, targets, "anomaly_correlation")
        if finite_targets:  # where the climatology knows no value, there is no anomaly
            targets = torch.where(torch.isfinite(climate), targets, math.nan)
        errors, values, weights = _terms(outputs, targets, weight, finite_targets, climate)
        forecast = values + errors
        products = (forecast * values, forecast**2, values**2)
        return (np.array([(weights * product).sum().item() for product in products]),)

    return Metric(of_batch, anomaly_correlation_value, needs_climate=True)


def anomaly_correlation_value(sums: Floats) -> float:
    """Return the correlation of the sums of the product of anomalies, and of their squares."""
    product, forecast, target = sums.tolist()
    return product / math.sqrt(forecast * target) if forecast * target else math.nan


def _terms(
    outputs: torch.Tensor,
    targets: torch.Tensor,
    weight: Weight,
    finite_targets: bool,
    origin: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return outputs minus targets, targets minus `origin`, and weights of the terms that count: float64[term]."""
    values = targets.double() if origin is None else targets.double() - origin
    errors, weights = outputs.double() - targets, torch.ones_like(values) if weight is None else weight.double()
    counted = weights != 0
    if finite_targets:
        counted &= torch.isfinite(targets)
    return errors[counted], values[counted], weights[counted]
