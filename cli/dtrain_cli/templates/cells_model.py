"""A multilayer perceptron over the genes of a cell."""

import math

import torch
from torch import nn

SCALE = 10_000


class Cells(nn.Module):
    """Genes of a cell -> logits of its type, or a number. A missing value (NaN) counts as 0.

    Parameters
    ----------
    features : int
        Genes, or values of an embedding.
    outputs : list of int
        Shape of the output of a cell.
    counts : bool
        Inputs are counts: each cell is scaled to a sum of `SCALE`, and the logarithm of 1 + x taken.
    hidden : int
    """

    def __init__(self, features: int, outputs: list[int], counts: bool, hidden: int) -> None:
        super().__init__()
        self.features, self.outputs, self.counts = features, outputs, counts
        self.layers = nn.Sequential(
            nn.Linear(features, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, math.prod(outputs)),
        )

    def forward(self, genes: torch.Tensor) -> torch.Tensor:
        """Return float32[cell, *outputs] for numbers[cell, gene]."""
        if genes.shape[1] != self.features:
            raise ValueError(f"a cell has {genes.shape[1]} values: write features = {genes.shape[1]} in [model_args]")
        x = torch.nan_to_num(genes.float(), nan=0.0, posinf=0.0, neginf=0.0)
        if self.counts:
            x = torch.log1p(SCALE * x / x.sum(1, keepdim=True).clamp(min=1))
        return self.layers(x).reshape(len(x), *self.outputs)


def build(features: int, outputs: list[int], counts: bool = False, hidden: int = 128) -> nn.Module:
    """Return the module for cells of `features` values."""
    return Cells(features, outputs, counts, hidden)


# Targets of which some are missing: train.loss = "model:mse", train.metrics = ["model:mae"]


def mse(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of squared errors and their number, without missing targets."""
    known = torch.isfinite(targets)
    return ((outputs - targets)[known] ** 2).sum(), int(known.sum())


def mae(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of absolute errors and their number, without missing targets."""
    known = torch.isfinite(targets)
    return (outputs - targets)[known].abs().sum(), int(known.sum())
