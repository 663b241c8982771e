"""A multilayer perceptron over all values of a sample."""

import math
from dataclasses import replace

import torch
from torch import nn


class Perceptron(nn.Module):
    """Flattens and joins its inputs; the output has the given shape. A missing value (NaN) counts as 0."""

    def __init__(self, features: int, outputs: list[int], hidden: int) -> None:
        super().__init__()
        self.features, self.outputs = features, outputs
        self.layers = nn.Sequential(
            nn.Linear(features, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, math.prod(outputs)),
        )

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return float32[sample, *outputs] for inputs whose first axis is the sample axis."""
        joined = torch.cat([x.float().flatten(1) if x.ndim > 1 else x.float()[:, None] for x in inputs], dim=1)
        if joined.shape[1] != self.features:
            raise ValueError(
                f"a sample has {joined.shape[1]} values: write features = {joined.shape[1]} in [model_args]"
            )
        known = torch.nan_to_num(joined, nan=0.0, posinf=0.0, neginf=0.0)
        return self.layers(known).reshape(len(known), *self.outputs)


def build(features: int, outputs: list[int], hidden: int = 64) -> nn.Module:
    """Return the module for samples of `features` values."""
    return Perceptron(features, outputs, hidden)


# Targets of which some are missing: train.loss = "model:mse", train.metrics = ["model:mae"]


def mse(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of squared errors and their number, without missing targets."""
    known = torch.isfinite(targets)
    return ((outputs - targets)[known] ** 2).sum(), int(known.sum())


def mae(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of absolute errors and their number, without missing targets."""
    known = torch.isfinite(targets)
    return (outputs - targets)[known].abs().sum(), int(known.sum())


# Classes of which some are missing: data.transform = "model:classes"


def classes(batch, generator):
    """Return the batch with classes as integers; missing or negative is -100, which neither loss nor metrics count."""
    (targets,) = batch.targets
    is_class = targets >= 0  # NaN is not
    return replace(batch, targets=(torch.where(is_class, targets, -100).long(),))
