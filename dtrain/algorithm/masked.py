"""Built-in losses and metrics over finite targets alone (``data.non_finite = { min_valid = 0.5 }``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def of_finite_targets(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss of which targets that are not finite are no terms: neither in its sum nor in its count.

    A batch whose targets are all finite has the same value as before. Of others, the loss returns a sum and a count of
    samples: a finite value counts as its share of a sample, so that batches with and without such targets add up.

    Parameters
    ----------
    function : callable
        (outputs, targets) of one shape -> mean over the values. Targets that are integers are left to it.
    """

    def masked(outputs: Any, targets: Any, weight: Any = None) -> Any:
        counted = finite_targets(outputs, targets)
        if weight is not None:
            return function(outputs, targets, _of_counted(weight, counted))
        if counted is None:
            return function(outputs, targets)
        count = int(counted.sum())
        if not count:
            return outputs.sum() * 0.0, 0.0
        samples = count * len(targets) / targets.numel()
        return function(outputs[counted], targets[counted]) * samples, samples

    return masked


def counts_of_finite_targets(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a metric that counts values, such as accuracy, over those with a finite target.

    Parameters
    ----------
    function : callable
        (outputs, targets) -> sum over the values, and their number.
    """

    def masked(outputs: Any, targets: Any, weight: Any = None) -> Any:
        counted = finite_targets(outputs, targets)
        if weight is not None:
            return function(outputs, targets, _of_counted(weight, counted))
        return function(outputs, targets) if counted is None else function(outputs[counted], targets[counted])

    return masked


def _of_counted(weight: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Return weights that are 0 where a target does not count: then it is no term."""
    return weight if counted is None else torch.where(counted, weight, 0.0)


def finite_targets(outputs: Any, targets: Any) -> torch.Tensor | None:
    """Return where targets are finite, bool; None if everywhere, or if the function itself must judge the tensors."""
    is_alike = (
        isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor) and outputs.shape == targets.shape
    )
    if not is_alike or not targets.is_floating_point():
        return None
    counted = torch.isfinite(targets)
    return None if bool(counted.all()) else counted
