"""The module that is exported: it takes decoded values and gives outputs in the target's units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dtrain.data.encoding import Floats


class Standardise(nn.Module):
    """Decoded values -> (value - mean) / standard deviation, in float64, rounded once to float32."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Floats, std: Floats) -> None:
        super().__init__()
        self.register_buffer("mean", torch.from_numpy(mean.copy()))
        self.register_buffer("std", torch.from_numpy(std.copy()))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return float32 of the same shape."""
        return ((values.double() - self.mean) / self.std).float()


class Restore(Standardise):
    """The model's output -> output * standard deviation + mean, in float64, rounded once to float32."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return float32 of the same shape."""
        return (values.double() * self.std + self.mean).float()


class ZeroFill(nn.Module):
    """Values that are not finite -> 0, as ``data.non_finite = { min_valid = ... }`` does after normalising."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same shape and dtype."""
        return torch.where(torch.isfinite(values), values, 0.0)


class ExportedModule(nn.Module):
    """The model between what standardises its inputs and what restores the units of its outputs.

    Parameters
    ----------
    model : nn.Module
    inputs : sequence of nn.Module
        One for each input of the model.
    outputs : sequence of nn.Module
        One for each output; empty where outputs stay as they are.
    """

    def __init__(self, model: nn.Module, inputs: Sequence[nn.Module], outputs: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model = model
        self.inputs = nn.ModuleList(inputs)
        self.outputs = nn.ModuleList(outputs)
        self.eval()
        self.requires_grad_(False)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """Call the model with decoded values: floats as float32, integers as int64, axis 0 the samples."""
        given = self.model(*(prepare(values) for prepare, values in zip(self.inputs, inputs, strict=True)))
        if not len(self.outputs):
            return given
        if isinstance(given, tuple | list):
            return tuple(restore(output) for restore, output in zip(self.outputs, given, strict=True))
        return self.outputs[0](given)


def tensors_in(outputs: Any) -> list[torch.Tensor]:
    """Return the tensors of a model's output: one, or those of tuples, lists and dicts, in order.

    >>> [list(tensor.shape) for tensor in tensors_in((torch.zeros(2), {"a": torch.zeros(3)}, 5))]
    [[2], [3]]
    """
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def difference(given: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of outputs, relative to the largest absolute value of each output.

    It is infinite where numbers, shapes or places of values that are not finite differ.
    """
    if [tensor.shape for tensor in given] != [tensor.shape for tensor in wanted]:
        return float("inf")
    return max((_difference(*pair) for pair in zip(given, wanted, strict=True)), default=float("inf"))


def _difference(given: torch.Tensor, wanted: torch.Tensor) -> float:
    given, wanted = given.double(), wanted.double()
    finite = torch.isfinite(wanted)
    if not torch.equal(torch.nan_to_num(given[~finite]), torch.nan_to_num(wanted[~finite])):
        return float("inf")
    if not torch.isfinite(given[finite]).all():
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(wanted[finite].abs().max())
    return float((given[finite] - wanted[finite]).abs().max()) / (scale or 1.0)
