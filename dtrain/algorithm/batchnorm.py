r"""Batch norm under averaging: its running statistics, taken again for the averaged model.

The mean of the replicas' running statistics is not what the averaged parameters produce. With
``average.recalibrate_batchnorm`` the model is run on the first training batches of each replica, other layers in
evaluation mode; means and variances of batches, and of replicas, are combined as those of one sample. They are
evaluated and saved with the model, and never come back into training, where batches have statistics of their own.

    mean = sum_k n_k mean_k / n ;  var = sum_k n_k (var_k + (mean_k - mean)^2) / n ;  n = sum_k n_k

Variances are written as torch keeps them, times n / (n - 1). Instance norm keeps the mean of the variances within
samples, so that the differences between means do not count there.

References
----------
Izmailov et al. 2018, arXiv:1803.05407: statistics of averaged weights are taken anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from dtrain.algorithm.batch import TensorBatch, autocast
from dtrain.types import Parameters

BATCHES = 32
"""Batches of each replica, at most."""


@dataclass(frozen=True, slots=True)
class LayerStatistics:
    """Mean and variance of what a norm layer is given."""

    count: int
    """Values of a feature."""
    mean: npt.NDArray[np.float64]
    """float64[features]"""
    variance: npt.NDArray[np.float64]
    """float64[features]: of instance norm the mean of those within samples."""
    within: bool
    """Whether it is of instance norm."""


Statistics: TypeAlias = dict[str, LayerStatistics]
"""By name of the layer."""


def norm_layers(module: nn.Module) -> dict[str, _NormBase]:
    """Return the layers that keep running statistics in float32, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _NormBase) and layer.running_mean is not None and layer.running_mean.dtype == torch.float32
    }


def take_statistics(module: nn.Module, batches: Iterable[TensorBatch], precision: str) -> Statistics:
    """Return the statistics of the module's norm layers over all batches; changes the module.

    Layers that the module keeps in evaluation mode while it trains, and layers that are not called, are left out.
    """
    module.train()
    layers = {name: layer for name, layer in norm_layers(module).items() if layer.training}
    module.eval()
    batchwise: dict[str, list[LayerStatistics]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.train()
        layer.reset_running_stats()
        layer.momentum = 1.0  # those of the newest batch
        layer.register_forward_hook(partial(_take, batchwise[name]))
    with torch.no_grad():
        for batch in batches:
            with autocast(precision, batch):
                module(*batch.inputs)
    return {name: pooled(own) for name, own in batchwise.items() if own}


def _take(batchwise: list[LayerStatistics], layer: _NormBase, inputs: object, output: torch.Tensor) -> None:
    count, within = output.numel() // layer.num_features, isinstance(layer, _InstanceNorm)
    variance = _wide(layer.running_var) * (1.0 if within else (count - 1) / count)
    batchwise.append(LayerStatistics(count, _wide(layer.running_mean), variance, within))


def _wide(values: torch.Tensor | None) -> npt.NDArray[np.float64]:
    assert values is not None
    return values.double().cpu().numpy()


def pooled(parts: Sequence[LayerStatistics]) -> LayerStatistics:
    """Return the statistics of a layer over the values of all parts, in their order."""
    count, within = sum(part.count for part in parts), parts[0].within
    mean, variance = np.zeros_like(parts[0].mean), np.zeros_like(parts[0].variance)
    for part in parts:
        mean += part.mean * (part.count / count)
    for part in parts:
        between = 0.0 if within else np.square(part.mean - mean)
        variance += (part.variance + between) * (part.count / count)
    return LayerStatistics(count, mean, variance, within)


def with_statistics(params: Parameters, replicas: Sequence[Statistics]) -> Parameters:
    """Return parameters, or the slice of them that has the buffers, with the replicas' combined statistics."""
    flat, places = params.flat.copy(), {entry.name: entry for entry in params.layout.entries}
    for name in dict.fromkeys(name for own in replicas for name in own):
        layer = pooled([own[name] for own in replicas if name in own])
        unbiased = layer.variance * (1.0 if layer.within else layer.count / (layer.count - 1))
        for key, values in (("running_mean", layer.mean), ("running_var", unbiased)):
            entry = places[f"{name}.{key}".removeprefix(".")]
            begin = entry.offset - params.start
            flat[begin : begin + entry.size] = values
    return replace(params, flat=flat)
