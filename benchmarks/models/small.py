"""The models of MNIST-1D, a perceptron, and a small transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """Adds the output of a module to its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = x + self.inner(x)
        return added


def digits(kind: str) -> nn.Module:
    """Return a model of the MNIST-1D paper: ``logistic``, ``MLP`` or ``CNN``, of 410, 15,210 and 5,210 parameters.

    Inputs are float32[batch, 40], outputs float32[batch, 10] (Greydanus 2020, arXiv:2011.14439).
    """
    if kind == "logistic":
        return nn.Linear(40, 10)
    if kind == "MLP":
        hidden = Residual(nn.Sequential(nn.Linear(100, 100), nn.ReLU()))
        return nn.Sequential(nn.Linear(40, 100), nn.ReLU(), hidden, nn.Linear(100, 10))
    return nn.Sequential(
        nn.Unflatten(1, (1, 40)),
        nn.Conv1d(1, 25, 5, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(25, 25, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv1d(25, 25, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(125, 10),
    )


def perceptron(features: int, hidden: int, classes: int) -> nn.Module:
    """Return two hidden layers."""
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.queries_keys_values(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Transformer(nn.Module):
    """A decoder-only transformer: int64[batch, length] -> float32[batch, length, symbols]."""

    def __init__(self, symbols: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.places = nn.Embedding(length, width)
        feed = [
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)
        ]
        parts = [part for one in feed for part in (Attention(width, width // 16), one)]
        self.body = nn.Sequential(*(Residual(nn.Sequential(nn.LayerNorm(width), part)) for part in parts))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, symbols))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.body(self.symbols(x) + self.places.weight[: x.shape[1]]))
        return logits
