"""Weights of samples beside each target: the same values, with the axes of the target."""

from __future__ import annotations

from dataclasses import dataclass

from dtrain.data.encoding import Array
from dtrain.data.samples import Field, Samples


@dataclass(frozen=True, slots=True)
class Alignment:
    """How a batch of weights becomes an array that broadcasts to a target."""

    order: tuple[int, ...]
    """The axes of the weights, in the target's order."""
    index: tuple[slice | None, ...]
    """A new axis of length 1 where the weights lack one of the target's."""

    def apply(self, weights: Array) -> Array:
        """Return a view of the weights with as many axes as the target."""
        return weights.transpose(self.order)[self.index]


def alignments(samples: Samples) -> tuple[Alignment, ...]:
    """Return, by target, how weights are aligned with it; nothing if samples have no weight."""
    if samples.weight is None:
        return ()
    weight, first = samples.fields[-1], len(samples.config.inputs)
    return tuple(_alignment(_axes(samples, weight), _axes(samples, target)) for target in samples.fields[first:-1])


def _axes(samples: Samples, field: Field) -> list[str]:
    """Return the names of a field's axes in a batch; no dimension is named as the window is."""
    return [samples.sample_dim, *([""] if field.window else []), *samples.variable(field.name).row_dims]


def _alignment(own: list[str], target: list[str]) -> Alignment:
    order = tuple(own.index(axis) for axis in target if axis in own)
    return Alignment(order, tuple(slice(None) if axis in own else None for axis in target))
