"""The types of cells from their genes: a linear model, or a perceptron with `hidden` units."""

from torch import nn


def build(genes: int = 765, types: int = 10, hidden: int = 0) -> nn.Module:
    """Return the module: float32[cell, gene] -> logits float32[cell, type]."""
    dropout = nn.Dropout(0.3)  # genes that a cell has are often not seen
    if not hidden:
        return nn.Sequential(dropout, nn.Linear(genes, types))
    return nn.Sequential(
        dropout, nn.Linear(genes, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Dropout(0.5), nn.Linear(hidden, types)
    )
