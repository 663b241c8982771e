"""Sums of weighted terms, and sums of weights in place of numbers of terms.

``sum(w * term) / sum(w)`` is the mean over samples of which one of weight 2 stands for two. A term of weight 0 counts
in neither sum, whatever its target is: also where that is not finite, or no class. Where all weights are 1, losses are
those without weights to the bit, cross entropies and gradients to float32's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dtrain.config.names import IGNORED_CLASS


def weighted_terms(
    function: Callable[..., Any], outputs: torch.Tensor, targets: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return the weighted sum of a loss's terms, and the sum of their weights.

    Parameters
    ----------
    function : callable
        Of outputs and targets, with ``reduction="none"``: the terms.
    outputs, targets : float tensor
        Of one shape.
    weight : tensor
        Of the same shape, not negative.
    """
    finite = torch.where(weight == 0, outputs.detach(), targets)  # 0 * NaN is NaN, in the gradient too
    return (function(outputs, finite, reduction="none") * weight).sum(), sum_of(weight)


def weighted_labels(logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the weighted sum of cross entropies, and the sum of the weights of the labels that are not -100.

    Parameters
    ----------
    logits : float tensor
        Axis 1 holds the classes.
    labels : integer tensor
    weight : tensor
        Of the labels' shape, not negative.
    """
    counted = torch.where(weight == 0, IGNORED_CLASS, labels)
    terms = F.cross_entropy(logits, counted, ignore_index=IGNORED_CLASS, reduction="none")
    return (terms * weight).sum(), sum_of(torch.where(counted == IGNORED_CLASS, 0, weight))


def sum_of(weight: torch.Tensor) -> float:
    """Return the sum of weights, added in float64."""
    return float(weight.sum(dtype=torch.float64).item())
