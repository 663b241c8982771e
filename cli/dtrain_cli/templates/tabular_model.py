"""A multilayer perceptron over all values of a sample."""

import math

import torch
from torch import nn


class Perceptron(nn.Module):
    """Flattens and joins its inputs; the output has the given shape."""

    def __init__(self, features: int, outputs: list[int], hidden: int) -> None:
        super().__init__()
        self.outputs = outputs
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
        return self.layers(joined).reshape(len(joined), *self.outputs)


def build(features: int, outputs: list[int], hidden: int = 64) -> nn.Module:
    """Return the module for samples of `features` values."""
    return Perceptron(features, outputs, hidden)
