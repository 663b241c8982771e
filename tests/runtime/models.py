"""Models that the tests send to workers."""

from __future__ import annotations

import time

import torch
from torch import nn


def small() -> nn.Module:
    """Everything that has state: dropout (RNG), batch norm (buffers), a tied weight."""
    tied = nn.Linear(12, 12)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), tied, nn.Dropout(0.2), tied, nn.Linear(12, 3))


def wide() -> nn.Module:
    """As `small`, with parameters for several slices."""
    tied = nn.Linear(96, 96)
    layers = (nn.Linear(6, 96), nn.BatchNorm1d(96), nn.ReLU(), tied, nn.Dropout(0.2), tied, nn.Linear(96, 3))
    return nn.Sequential(*layers, nn.Linear(3, 4096), nn.ReLU(), nn.Linear(4096, 3))


class Slow(nn.Module):
    """Takes long enough to be killed in the middle."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.inner = small()
        self.seconds = seconds

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.inner(x)


def slow(seconds: float = 0.03) -> nn.Module:
    return Slow(seconds)


class NanOnce(nn.Module):
    """Its loss is NaN in batches that hold a sample with a first value above a threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.threshold = threshold

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * (float("nan") if bool((x[:, 0] > self.threshold).any()) and self.training else 1.0)


def nan_once(threshold: float) -> nn.Module:
    return NanOnce(threshold)


class _Forecast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(3, 1, 1)

    def forward(self, t: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.mix(torch.cat([t, mask[:, None]], dim=1))[:, 0]
        return mixed


def forecast() -> nn.Module:
    return _Forecast()


class Adapter(nn.Linear):
    """A linear layer with a product of two small matrices beside it: LoRA."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.lora_a.T @ self.lora_b.T


def plain(linear: type[nn.Linear] = nn.Linear) -> nn.Module:
    """Two layers, and a batch norm between them."""
    return nn.Sequential(linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), linear(12, 3))


def adapted() -> nn.Module:
    """As `plain`, with adapters."""
    return plain(Adapter)
