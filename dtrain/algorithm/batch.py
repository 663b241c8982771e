"""A batch of tensors, and the precision of the forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias

import torch

Targets: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
"""One tensor, or a tuple of several."""


@dataclass(frozen=True, slots=True)
class TensorBatch:
    """One micro-batch: the tensors for the model and the loss."""

    inputs: tuple[torch.Tensor, ...]
    targets: Targets
    size: int
    split: str = "train"
    """``train``, ``val``, ``test`` or ``all``: a transform may treat samples for evaluation differently."""
    weight: Targets | None = None
    """With ``data.weight``: of each value of the targets, in their shapes; float32."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...] | Targets]:
        """Yield inputs and targets: ``for (x,), y in batches``."""
        yield self.inputs
        yield self.targets


def non_finite_values(batch: TensorBatch) -> int:
    """Return how many values of a batch's floating-point inputs and targets are NaN or infinite."""
    targets = batch.targets if isinstance(batch.targets, tuple) else (batch.targets,)
    floats = [tensor for tensor in (*batch.inputs, *targets) if tensor.is_floating_point()]
    return sum(int((~torch.isfinite(tensor)).sum()) for tensor in floats)


def autocast(precision: str, batch: TensorBatch) -> AbstractContextManager[object]:
    """Return the context in which model and loss are called."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(batch.inputs[0].device.type, dtype=torch.bfloat16)
