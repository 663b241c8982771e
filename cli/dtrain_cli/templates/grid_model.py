"""Convolutions over the places of images or maps; the output is a value or a class a place, or one a sample."""

import math
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CLASS = "class"


class Grid(nn.Module):
    """Joins its inputs as channels, convolves them, and gives the output the axes of the target.

    Parameters
    ----------
    inputs : list of list of str
        The axes of each input after the sample axis. An axis of `space` that an input lacks is repeated.
    space : list of str
        The axes that are convolved.
    channels : int
        Values of all inputs at one place.
    target : list of str
        The axes of the target after the sample axis.
    sizes : list of int
        Lengths of the axes of the target that are not in `space`.
    classes : int
        0 if the target is a number.
    width, depth : int
        Channels and number of hidden layers.
    """

    def __init__(
        self,
        inputs: list[list[str]],
        space: list[str],
        channels: int,
        target: list[str],
        sizes: list[int],
        classes: int,
        width: int,
        depth: int,
    ) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[len(space)]
        self.inputs, self.space, self.channels = inputs, space, channels
        self.axes = [CLASS, *target] if classes else target
        self.sizes = [classes, *sizes] if classes else sizes
        self.is_map = all(dim in target for dim in space)
        stride = 1 if self.is_map else 2  # a label of a whole image needs no fine places
        widths = [channels, *[width] * depth]
        self.layers = nn.Sequential()
        for before, after in pairwise(widths):
            self.layers.append(convolution(before, after, 3, stride, padding=1))
            self.layers.append(nn.ReLU())
        outputs = math.prod(self.sizes)
        self.last = convolution(width, outputs, 1) if self.is_map else nn.Linear(width, outputs)
        self.short = convolution(channels, outputs, 1) if self.is_map else None  # the input as it is: a first guess

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs; a missing value (NaN) counts as 0."""
        x = self.joined(inputs)
        hidden = self.layers(x)
        if not self.is_map:
            return self.last(hidden.flatten(2).mean(2)).reshape(len(x), *self.sizes)
        y = (self.last(hidden) + self.short(x)).reshape(len(x), *self.sizes, *x.shape[2:])
        own = [axis for axis in self.axes if axis not in self.space] + self.space
        return y.permute(0, *[1 + own.index(axis) for axis in self.axes])

    def joined(self, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return float32[sample, channel, *space]."""
        if [x.ndim - 1 for x in inputs] != [len(axes) for axes in self.inputs]:
            shapes = ", ".join(str(list(x.shape[1:])) for x in inputs)
            raise ValueError(f"samples have the shapes {shapes}: name their axes in inputs of [model_args]")
        fields = [self.channels_first(x, axes) for x, axes in zip(inputs, self.inputs, strict=True)]
        places = [max(field.shape[2 + i] for field in fields) for i in range(len(self.space))]
        x = torch.cat([field.expand(-1, -1, *places) for field in fields], dim=1)
        if x.shape[1] != self.channels:
            raise ValueError(f"a place has {x.shape[1]} values: write channels = {x.shape[1]} in [model_args]")
        return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)

    def channels_first(self, x: torch.Tensor, axes: list[str]) -> torch.Tensor:
        """Return an input with all axes but those of `space` as one axis of channels."""
        first = [axis for axis in axes if axis not in self.space]
        order = first + [axis for axis in self.space if axis in axes]
        x = x.float().permute(0, *[1 + axes.index(axis) for axis in order])
        lengths = dict(zip(order, x.shape[1:], strict=True))
        return x.reshape(len(x), -1, *[lengths.get(axis, 1) for axis in self.space])


def build(
    inputs: list[list[str]],
    space: list[str],
    channels: int,
    target: list[str],
    sizes: list[int],
    classes: int = 0,
    width: int = 16,
    depth: int = 3,
) -> nn.Module:
    """Return the module; more `width` and `depth` learn more, and take longer."""
    return Grid(inputs, space, channels, target, sizes, classes, width, depth)


# Targets of which some are missing: train.loss = "model:mse", train.metrics = ["model:mae"]


def mse(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of squared errors and their number, without missing targets."""
    known = torch.isfinite(targets)
    return ((outputs - targets)[known] ** 2).sum(), int(known.sum())


def mae(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Return the sum of absolute errors and their number, without missing targets."""
    known = torch.isfinite(targets)
    return (outputs - targets)[known].abs().sum(), int(known.sum())


# Classes that the store holds in another form: data.transform = "model:classes" or "model:foreground"


def classes(batch, generator):
    """Return the batch with classes as integers; missing or negative is -100, which neither loss nor metrics count."""
    (targets,) = batch.targets
    is_class = targets >= 0  # NaN is not
    return replace(batch, targets=(torch.where(is_class, targets, -100).long(),))


def foreground(batch, generator):
    """Return the batch with the class 1 where the mask is above 0, else 0; missing or negative is -100."""
    (targets,) = batch.targets
    is_known = targets >= 0  # NaN is not
    return replace(batch, targets=(torch.where(is_known, (targets > 0).long(), -100),))


# Images without a target: data.transform = "model:noisy"


def noisy(batch, generator):
    """Return the batch with noise added to the inputs, half as large as their standard deviation."""
    noise = [torch.randn(x.shape, generator=generator) for x in batch.inputs]
    return replace(batch, inputs=tuple(x + x.std() * n / 2 for x, n in zip(batch.inputs, noise, strict=True)))
