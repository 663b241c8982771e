"""A small U-Net (Ronneberger et al. 2015, arXiv:1505.04597), about 120,000 parameters."""

import torch
from torch import nn


def convolutions(before: int, after: int) -> nn.Sequential:
    """Return two convolutions that keep the size of an image."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1),
        nn.GroupNorm(4, after),
        nn.ReLU(),
        nn.Conv2d(after, after, 3, padding=1),
        nn.ReLU(),
    )


class UNet(nn.Module):
    """Images -> logits of a class at each pixel. The sides of an image are multiples of 4."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.channels = channels
        self.fine = convolutions(channels, width)
        self.middle = convolutions(width, 2 * width)
        self.coarse = convolutions(2 * width, 4 * width)
        self.back_to_middle = convolutions(6 * width, 2 * width)
        self.back_to_fine = convolutions(3 * width, width)
        self.last = nn.Conv2d(width, classes, 1)
        self.down, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return float32[sample, class, y, x] for numbers[sample, y, x] or [sample, channel, y, x]."""
        x = image.float() if image.ndim == 4 else image.float()[:, None]
        if x.shape[1] != self.channels:
            raise ValueError(f"images have {x.shape[1]} channels: write channels = {x.shape[1]} in model_args")
        fine = self.fine(x)
        middle = self.middle(self.down(fine))
        coarse = self.coarse(self.down(middle))
        middle = self.back_to_middle(torch.cat([self.up(coarse), middle], dim=1))
        return self.last(self.back_to_fine(torch.cat([self.up(middle), fine], dim=1)))


def build(channels: int, classes: int, width: int = 16) -> nn.Module:
    """Return the module."""
    return UNet(channels, classes, width)


def iou(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the pixels that are class 1 in outputs and targets, and those that are in either: their ratio is IoU."""
    said, is_one = outputs.argmax(1) == 1, targets == 1
    return (said & is_one).sum(), int((said | is_one).sum())
