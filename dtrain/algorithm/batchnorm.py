r"""Batch norm under averaging: its running statistics, taken again for the averaged model.

The mean of the replicas' running statistics is not what the averaged parameters produce. With
``average.recalibrate_batchnorm`` the model is run on some training batches of each replica, other layers in
evaluation mode; means and variances of the replicas are combined as those of one sample. They are evaluated and saved
with the model, and never come back into training, where batches have statistics of their own.

    mean = sum_k w_k mean_k ;  var = sum_k w_k (var_k + mean_k^2) - mean^2

References
----------
Izmailov et al. 2018, arXiv:1803.05407: statistics of averaged weights are taken anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from dtrain.algorithm.batch import TensorBatch, autocast
from dtrain.types import Parameters

BATCHES = 32
"""Batches of each replica, at most."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Running statistics of some batches."""

    samples: int
    values: Mapping[str, tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]
    """By name of the layer: mean and variance, float64[features]."""


def norm_layers(module: nn.Module) -> dict[str, _NormBase]:
    """Return the layers that keep running statistics, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _NormBase) and layer.running_mean is not None
    }


def take_statistics(module: nn.Module, batches: Iterable[TensorBatch], precision: str) -> Statistics:
    """Return the mean over batches of the statistics of each; changes the module's buffers."""
    module.eval()
    layers, samples = norm_layers(module), 0
    for layer in layers.values():
        layer.train()
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
    with torch.no_grad():
        for batch in batches:
            with autocast(precision, batch):
                module(*batch.inputs)
            samples += batch.size
    return Statistics(
        samples, {name: (_wide(layer.running_mean), _wide(layer.running_var)) for name, layer in layers.items()}
    )


def _wide(values: torch.Tensor | None) -> npt.NDArray[np.float64]:
    assert values is not None
    return values.double().cpu().numpy()


def merged(replicas: Sequence[Statistics]) -> Statistics:
    """Combine the statistics of replicas, in replica order."""
    samples = sum(own.samples for own in replicas)
    values = {}
    for name in replicas[0].values:
        mean, square = np.zeros_like(replicas[0].values[name][0]), np.zeros_like(replicas[0].values[name][0])
        for own in replicas:
            own_mean, own_var = own.values[name]
            mean += own.samples * own_mean
            square += own.samples * (own_var + own_mean**2)
        mean /= samples
        values[name] = (mean, np.maximum(square / samples - mean**2, 0.0))
    return Statistics(samples, values)


def with_statistics(params: Parameters, replicas: Sequence[Statistics]) -> Parameters:
    """Return parameters, or the slice of them that has the buffers, with the replicas' combined statistics."""
    flat, places = params.flat.copy(), {entry.name: entry for entry in params.layout.entries}
    for name, (mean, variance) in merged(replicas).values.items():
        for key, values in (("running_mean", mean), ("running_var", variance)):
            entry = places[f"{name}.{key}".removeprefix(".")]
            begin = entry.offset - params.start
            flat[begin : begin + entry.size] = values
    return replace(params, flat=flat)
