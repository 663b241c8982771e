"""Models that tests predict with: what they return can be computed by hand."""

from __future__ import annotations

import torch
from torch import nn


class _Steps(nn.Module):
    """Of a window [sample, window, ...]: its last row plus the lead, for each lead."""

    def __init__(self, leads: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))
        self.leads = leads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        last = x[:, -1] * self.slope
        ahead = torch.arange(1, self.leads + 1, dtype=x.dtype)
        return last[:, None] + ahead.reshape(1, -1, *[1] * (x.ndim - 2))


def steps(leads: int = 3) -> nn.Module:
    return _Steps(leads)


class _Identity(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() * self.factor


def identity(factor: float = 1.0) -> nn.Module:
    return _Identity(factor)


class _Last(nn.Module):
    """Of a window: its last row."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, -1] * self.factor


def last() -> nn.Module:
    return _Last()


class _Pixels(nn.Module):
    """Logits of classes of each place: how near the value is to 0, 1, 2 ..."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(-2.0))
        self.classes = classes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centres = torch.arange(self.classes, dtype=torch.float32).reshape(1, -1, *[1] * (x.ndim - 1))
        return self.scale * (x.float()[:, None] - centres) ** 2


def pixels(classes: int = 3) -> nn.Module:
    return _Pixels(classes)


def linear(inputs: int = 6, outputs: int = 3) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, outputs))


class _Context(nn.Module):
    """A convolution: what it says of a place depends on the place in the patch."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        convolution = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[ndim]
        self.inner = convolution(1, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.float()[:, None])[:, 0]


def context(ndim: int = 2) -> nn.Module:
    return _Context(ndim)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * self.factor, x.sum(1) * self.factor


def two() -> nn.Module:
    return _Two()


class _Mean(nn.Module):
    """Of all values of a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1).mean(1) * self.factor


def mean() -> nn.Module:
    return _Mean()


class _Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return x * mask.float() * self.factor


def product() -> nn.Module:
    return _Product()


class _Growing(nn.Module):
    """Its output is as wide as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(1)[:, None] * self.factor * torch.ones(len(x))


def growing() -> nn.Module:
    return _Growing()
