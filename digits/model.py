"""A small multilayer perceptron over images of 8 x 8 pixels."""

from torch import nn


def build(hidden: int = 128) -> nn.Module:
    """Return the module; it is called with float32[sample, 8, 8]."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )
