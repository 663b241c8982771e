"""A forecast of the next years: the mean of the last years, and a change that is learned; about 2,000 parameters."""

import torch
import torch.nn.functional as F
from torch import nn

BASE = 5


class Forecast(nn.Module):
    """Maps of some years -> maps of the next years.

    The change is a weighted sum of the years of each place, and what convolutions find in the region around it. Both
    begin as 0, so that the model begins as the mean of the last `BASE` years.
    """

    def __init__(self, years: int, leads: int, width: int) -> None:
        super().__init__()
        self.place = nn.Conv2d(years, leads, 1, bias=False)
        self.region = nn.Sequential(
            nn.AvgPool2d(8, ceil_mode=True),
            nn.Conv2d(years, width, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(0.3),  # 164 years teach little, and many of a region's features are noise
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Conv2d(width, leads, 1),
        )
        for layer in (self.place, self.region[-1]):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.region[-1].bias)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Return float32[sample, lead, latitude, longitude] for float32[sample, year, latitude, longitude]."""
        base = maps[:, -BASE:].mean(1, keepdim=True)
        change = maps - base
        region = F.interpolate(self.region(change), maps.shape[2:], mode="bilinear")
        return base + self.place(change) + region


def build(years: int = 10, leads: int = 5, width: int = 8) -> nn.Module:
    """Return the module."""
    return Forecast(years, leads, width)
