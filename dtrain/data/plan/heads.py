"""What is made of the outputs of a model, and which arrays are written: names, dimensions, dtypes; plain values.

A head is one output tensor. Its estimate is what is blended where patches overlap: values, probabilities, or the tensor
as it is. Its arrays are computed from the estimate, place by place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np

from dtrain.data.encoding import DType, Floats

Kind: TypeAlias = Literal["values", "classes", "probabilities", "chance", "label", "raw"]
"""Of an estimate: numbers in the target's units; class and its probability; the probabilities of all classes; one
probability; the class 0 or 1 that it means; the output as it is."""
Extents: TypeAlias = Mapping[str, int]
"""By patched dimension: the places of a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputArray:
    """An array of predictions."""

    name: str
    dims: tuple[str, ...]
    """As they are stored."""
    computed: tuple[str, ...]
    """The same in the order in which they are computed: the dimension of the samples first."""
    shape: tuple[int, ...]
    """Of `dims`."""
    dtype: str
    fill: float | int | None = None
    """Stands for predictions of samples that are left out; None: there are none."""
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def lengths(self) -> dict[str, int]:
        """By dimension: its length."""
        return dict(zip(self.dims, self.shape, strict=True))

    @property
    def numpy_dtype(self) -> DType:
        """The dtype."""
        return np.dtype(self.dtype)

    def anchor_bytes(self, sample_dim: str, extents: Extents) -> int:
        """Return the bytes of the predictions of one anchor in a block."""
        return self.numpy_dtype.itemsize * math.prod(
            extents.get(dim, length) for dim, length in self.lengths.items() if dim != sample_dim
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What is made of one output tensor."""

    tensor: int
    """Its number among the outputs."""
    kind: Kind
    dims: tuple[str, ...]
    """Of the estimate of one anchor; the classes are first, then the lead."""
    shape: tuple[int, ...]
    """Of a whole row."""
    output: tuple[int, ...]
    """The shape of the tensor for one sample."""
    arrays: tuple[OutputArray, ...]
    target: tuple[int, ...] = ()
    """The shape of the target of one sample, cut to a patch: it tells which axis is that of the classes."""
    scaling: tuple[Floats, Floats] | None = None
    """Mean and standard deviation that undo the normalisation; they broadcast against the estimates of some anchors."""

    def estimate_shape(self, extents: Extents) -> tuple[int, ...]:
        """Return the shape of the estimate of one anchor in a block, or in a patch."""
        return tuple(extents.get(dim, length) for dim, length in zip(self.dims, self.shape, strict=True))
