"""Groups of the values of a target: the parts of outputs and targets that belong to each group.

Every value of a target has a label along each grouping, and the labels together say its group. They vary from sample to
sample, along one more axis of the target, or both: then samples of the same labels are taken together. So the values of
a group are a few *boxes*: some samples, times some places along each axis. A metric is called with each box, and its
states are merged.

    labels of a window of two steps          boxes of group (month 2, lead 1)
    sample 0    Jan  Jan
    sample 1    Jan  Feb                     samples 1, 2; place 1
    sample 2    Jan  Feb
    sample 3    Feb  Feb                     sample 3;     place 1
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from dtrain.algorithm.losses import described
from dtrain.config.schema import ClassAxis
from dtrain.errors import ShapesDiffer

Ints: TypeAlias = npt.NDArray[np.int64]
Index: TypeAlias = "slice | Ints"


@dataclass(frozen=True, slots=True)
class Labels:
    """The labels of a target's values along one grouping."""

    name: str
    axis: int
    """The axis of the target along which they vary; 0: from sample to sample alone."""
    values: Ints
    """int64[sample or 1, place or 1], from 0 on; -1: the value belongs to no group."""
    count: int
    """Number of labels of the grouping."""
    differs: bool = False
    """Whether samples have different numbers of places in a group: then each place is a box of its own, since a mean
    counts samples, however many values of each it has."""


@dataclass(frozen=True, slots=True)
class Box:
    """Values of one group."""

    group: int
    size: int
    """Number of samples."""
    samples: Index
    places: Mapping[int, Index]
    """By axis of the target; axes that are not named are whole."""
    by: str
    """The groupings that cut samples, for errors."""


def num_groups(counts: Sequence[int]) -> int:
    """Return the number of groups of groupings with so many labels: the last one moves first."""
    return math.prod(counts)


def boxes(labels: Sequence[Labels], size: int) -> Iterator[Box]:
    """Yield the boxes of all groups that occur.

    Parameters
    ----------
    labels : sequence of Labels
        Of one target.
    size : int
        Number of samples.
    """
    steps = [num_groups([one.count for one in labels[place + 1 :]]) for place in range(len(labels))]
    by = ", ".join(one.name for one in labels if one.axis)
    for samples in _alike(labels, size):
        first = int(samples[0])
        group, places = 0, dict[int, Ints]()
        for one, step in zip(labels, steps, strict=True):
            own = one.values[first if len(one.values) > 1 else 0]
            codes = np.where(own < 0, -1, own * step)
            if one.axis == 0:
                group = -1 if group < 0 or codes[0] < 0 else group + int(codes[0])
            else:
                before = places.get(one.axis, np.zeros_like(codes))
                places[one.axis] = np.where((codes < 0) | (before < 0), -1, codes + before)
        if group < 0:
            continue
        index = _index(samples, size)
        apart = {one.axis for one in labels if one.differs}
        axes = [[(axis, code, at) for code, at in _by_code(codes, axis in apart)] for axis, codes in places.items()]
        for chosen in itertools.product(*axes):
            number = group + sum(code for _, code, _ in chosen)
            yield Box(number, len(samples), index, {axis: at for axis, _, at in chosen}, by)


def _alike(labels: Sequence[Labels], size: int) -> Iterator[Ints]:
    """Yield the samples of a batch that have the same labels."""
    varying = [one.values for one in labels if len(one.values) > 1]
    if not varying or not size:
        yield from [np.arange(size)] if size else []
        return
    _, kind = np.unique(np.concatenate(varying, axis=1), axis=0, return_inverse=True)
    order = np.argsort(kind.ravel(), kind="stable")
    yield from np.split(order, np.flatnonzero(np.diff(kind.ravel()[order])) + 1)


def _by_code(codes: Ints, apart: bool) -> Iterator[tuple[int, Index]]:
    """Yield each code that occurs along an axis, and its places: together, or apart."""
    if apart:
        yield from ((code, slice(at, at + 1)) for at, code in enumerate(codes.tolist()) if code >= 0)
        return
    for code in np.unique(codes[codes >= 0]).tolist():
        yield code, _index(np.flatnonzero(codes == code), len(codes))


def _index(places: Ints, length: int) -> Index:
    """Return places as a slice, where they follow each other: tensors are then not copied."""
    if len(places) == length and np.array_equal(places, np.arange(length)):
        return slice(None)
    if places[-1] - places[0] == len(places) - 1 and np.all(np.diff(places) == 1):
        return slice(int(places[0]), int(places[-1]) + 1)
    return places


# Parts of tensors -------------------------------------------------------------------------------------------


def part_of(values: Any, box: Box, shift: Mapping[int, int] | None = None) -> Any:
    """Return the values of a box of a tensor, or of each tensor of a tuple, list or dict.

    Parameters
    ----------
    values : tensor, or a tuple, list or dict of tensors
    box : Box
    shift : mapping of int to int, optional
        By axis of the target: the axis of these values.

    Raises
    ------
    ShapesDiffer
        It is something else.
    """
    if isinstance(values, tuple | list):
        return type(values)(part_of(value, box, shift) for value in values)
    if isinstance(values, dict):
        return {key: part_of(value, box, shift) for key, value in values.items()}
    if not isinstance(values, torch.Tensor):
        raise ShapesDiffer(f"The model's output {described(values)} cannot be cut into groups.", "Return tensors.")
    part = _taken(values, 0, box.samples)
    for axis, places in box.places.items():
        part = _taken(part, axis if shift is None else shift[axis], places)
    return part


def _taken(values: torch.Tensor, axis: int, index: Index) -> torch.Tensor:
    if isinstance(index, slice):
        start, stop, _ = index.indices(values.shape[axis])
        return values.narrow(axis, start, stop - start)
    return values.index_select(axis, torch.from_numpy(index).to(values.device))


def output_axes(outputs: Any, targets: Any, class_axis: ClassAxis, by: str) -> Mapping[int, int]:
    """Return, by axis of a target, the axis of the output that it is: outputs may have an axis of classes more.

    Raises
    ------
    ShapesDiffer
        The output has no such axes.
    """
    if isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor):
        own, wanted = list(outputs.shape), list(targets.shape)
        if own == wanted:
            return {axis: axis for axis in range(len(wanted))}
        if class_axis != -1 and own[:1] + own[2:] == wanted:
            return {axis: axis + (axis > 0) for axis in range(len(wanted))}
        if class_axis != 1 and own[:-1] == wanted:
            return {axis: axis for axis in range(len(wanted))}
    raise ShapesDiffer(
        f"The model's output is {described(outputs)}, the target {described(targets)}: which part of the output "
        f"belongs to each {by} is not known.",
        "Outputs are cut by axes of the target where they have its shape, or one class axis more.",
    )
