"""The area under the ROC curve from fixed thresholds: histograms of the logits of positives and of negatives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from dtrain.algorithm.losses import Weight
from dtrain.algorithm.metrics.confusion import labelled_terms
from dtrain.algorithm.metrics.state import Floats, Metric, Parts
from dtrain.config.schema import ClassAxis

BINS = 512
"""Thresholds of a histogram; they divide logit / (1 + |logit|) evenly, so that small probabilities are told apart."""


def auroc_metric(class_axis: ClassAxis = "auto", finite_targets: bool = False) -> Metric:
    """Return the area under the ROC curve; of several classes the mean over each against the rest.

    The state is float64[class, 2, BINS]: weights of negatives and of positives by bin. A positive and a negative in one
    bin count as half in order, so that the value is exact to within `auroc_error`.
    """

    def of_batch(outputs: Any, targets: Any, weight: Weight = None) -> Parts:
        terms = labelled_terms("auroc", outputs, targets, weight, class_axis, finite_targets)
        logits = terms.logits.double()
        classes, rest = logits.shape[1], torch.logsumexp(logits, 1)
        histograms = np.empty((classes, 2, BINS))
        for number in range(classes):
            own = logits[:, number]
            if not terms.is_binary:  # the logit of softmax's probability
                own = own - rest
                own = own - torch.log1p(-torch.exp(own.clamp(max=-1e-300)))
            is_own = terms.labels if terms.is_binary else (terms.labels == number).long()
            place = is_own * BINS + _bins(own)
            histogram = torch.bincount(place, terms.weights, minlength=2 * BINS).double()
            histograms[number] = histogram.cpu().numpy().reshape(2, BINS)
        if bool(torch.isnan(logits).any()):
            histograms[:] = math.nan
        return (histograms,)

    return Metric(of_batch, auroc_value)


def _bins(logits: torch.Tensor) -> torch.Tensor:
    """Return the bin of each logit, int64[term]."""
    finite = torch.nan_to_num(logits, nan=0.0).clamp(-1e9, 1e9)
    share = (finite / (1 + finite.abs()) + 1) / 2
    return (share * BINS).long().clamp(max=BINS - 1)


def auroc_value(histograms: Floats) -> float:
    """Return the mean over the classes that have positives and negatives; NaN if none has."""
    negative, positive = histograms[:, 0], histograms[:, 1]
    below = np.cumsum(negative, axis=1) - negative / 2
    return _mean_over_pairs((positive * below).sum(axis=1), negative.sum(axis=1) * positive.sum(axis=1))


def auroc_error(histograms: Floats) -> float:
    """Return how far the value may be from that of all thresholds: half of the share of pairs that share a bin."""
    negative, positive = histograms[:, 0], histograms[:, 1]
    return _mean_over_pairs((positive * negative).sum(axis=1) / 2, negative.sum(axis=1) * positive.sum(axis=1))


def _mean_over_pairs(totals: Floats, pairs: Floats) -> float:
    counted = pairs != 0
    return float((totals[counted] / pairs[counted]).mean()) if counted.any() else math.nan
