"""A small 3-D U-Net (Çiçek et al. 2016, arXiv:1606.06650), about 60,000 parameters.

No layer normalises a patch: how bright a voxel is says what tissue it is.
"""

import torch
from torch import nn


def convolutions(before: int, after: int, sizes: tuple[int, ...] = (3, 3)) -> nn.Sequential:
    """Return convolutions that keep the size of a volume."""
    layers = nn.Sequential()
    for i, size in enumerate(sizes):
        layers.append(nn.Conv3d(after if i else before, after, size, padding=size // 2))
        layers.append(nn.ReLU())
    return layers


class UNet(nn.Module):
    """Volumes -> logits of a class at each voxel. The sides of a volume are multiples of 4.

    Brightness comes as `steps` soft steps, as a histogram has them: tissues are ranges of brightness, which a network
    learns slowly from a single number.
    """

    def __init__(self, classes: int, width: int, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.fine = convolutions(steps, width, (1, 3))
        self.middle = convolutions(width, 2 * width)
        self.coarse = convolutions(2 * width, 4 * width)
        self.narrow_coarse = nn.Conv3d(4 * width, 2 * width, 1)
        self.narrow_middle = nn.Conv3d(2 * width, width, 1)
        self.back_to_middle = convolutions(2 * width, 2 * width, (3,))
        self.back_to_fine = convolutions(width, width, (3,))
        self.last = nn.Conv3d(width, classes, 1)
        self.down, self.up = nn.MaxPool3d(2), nn.Upsample(scale_factor=2)
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        """Return float32[sample, class, z, y, x] for the brightness int64[sample, z, y, x], from 0 to 255."""
        centres = torch.linspace(0, 255, self.steps).view(-1, 1, 1, 1)
        fine = self.fine(torch.exp(-(((volume[:, None] - centres) * self.steps / 255) ** 2)))
        middle = self.middle(self.down(fine))
        coarse = self.coarse(self.down(middle))
        middle = self.back_to_middle(middle + self.up(self.narrow_coarse(coarse)))
        return self.last(self.back_to_fine(fine + self.up(self.narrow_middle(middle))))


def build(classes: int = 3, width: int = 8, steps: int = 8) -> nn.Module:
    """Return the module."""
    return UNet(classes, width, steps)
