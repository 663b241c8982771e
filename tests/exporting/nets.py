"""Models that are exported; a program without dtrain imports them too."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class Forecast(nn.Module):
    """Two time steps of all levels -> the next one."""

    def __init__(self, levels: int = 3) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2 * levels, levels, 3, padding=1)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return t[:, -1] + self.mix(t.flatten(1, 2))


class Several(nn.Module):
    """A field, a mask that is the same for all samples, and a code -> two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.field = nn.Linear(6, 6)
        self.scalar = nn.Linear(10, 1)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        field = self.field(x * mask)
        return field, self.scalar(torch.cat([field, self.embedding(code)], 1))[:, 0]


def both(outputs: tuple[torch.Tensor, ...], targets: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return functional.mse_loss(outputs[0], targets[0]) + functional.mse_loss(outputs[1], targets[1])


class Tokens(nn.Module):
    """The next token of each place of a window."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, width)
        self.head = nn.Linear(width, 17, bias=False)
        self.head.weight = self.embedding.weight  # tied

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens).cumsum(1))


class Classes(nn.Module):
    def __init__(self, genes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(genes, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Bands(nn.Module):
    """Two bands -> their mix."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(2, 1, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.mix(image)[:, 0]


def linear() -> nn.Module:
    return nn.Linear(6, 1)


class Random(nn.Module):
    """Draws at random also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(functional.dropout(x, 0.5, training=True))


class Branches(nn.Module):
    """Its code depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x if x.sum() > 0 else -x)
