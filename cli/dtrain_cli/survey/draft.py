"""What to train on, before shapes are looked at: inputs, one target, and the kind of task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from dtrain_cli.survey.roles import ArrayFacts, Contents

PATCH = {1: 4096, 2: 64, 3: 32}
"""Places along a side of a patch, by number of dimensions."""
LONG_SIDE = {1: 16384, 2: 128, 3: 64}
"""Images and maps with a longer side are cut into patches."""

OffsetsTable: TypeAlias = "int | list[int] | dict[str, int]"
"""``data.input_offsets``, as TOML has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """Inputs, a target and a task. Comments say what was guessed."""

    template: str
    """``tabular``, ``forecast``, ``image`` or ``text``."""
    title: str
    """One sentence: what is learned from what."""
    inputs: tuple[str, ...]
    target: str
    sample_dim: str
    space: tuple[str, ...] = ()
    """The dimensions over which the model convolves; none: it sees all values of a sample at once."""
    classes: int = 0
    """Number of classes of the target; 0: it is a number."""
    why_classes: str = ""
    """Where the number of classes comes from."""
    vocabulary: int = 0
    """Number of tokens, if the inputs are text."""
    input_offsets: OffsetsTable = 0
    target_offsets: OffsetsTable = 0
    stride: int = 1
    isel: Mapping[str, int] = field(default_factory=dict)
    patch: Mapping[str, int] = field(default_factory=dict)
    loss: str = ""
    """A loss of the model's file, where no built-in one fits."""
    transform: str = ""
    always_normalize: bool = False
    """True: numbers are standardised even where a sample says that they are near 0 already."""
    no_means: bool = False
    """True: the model scales the inputs itself."""
    others: tuple[str, ...] = ()
    """Variables that could be inputs or targets too, and are not used."""
    model: str = ""
    """Name of the model's file in ``templates/``, if it is not that of the template."""
    args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the model beside shapes."""
    split: Mapping[str, Any] = field(default_factory=dict)
    """Keys of ``data.split`` beside the shares."""
    largest_row: int = 64 << 20
    """Of rows of more bytes, only a part is taken."""
    off: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """By key of the config file: a value that is written as a comment, and when it is needed."""
    notes: Mapping[str, str] = field(default_factory=dict)
    """By key of the config file: why it has this value."""


def unused(contents: Contents, *used: str) -> tuple[str, ...]:
    """Return the arrays that are not used."""
    return tuple(name for name in contents.arrays if name not in used)


def patches(array: ArrayFacts, space: tuple[str, ...]) -> dict[str, int]:
    """Return ``data.patch`` for an array: its long dimensions are cut."""
    sizes = array.sizes
    return {dim: PATCH[len(space)] for dim in space if sizes[dim] > LONG_SIDE[len(space)]}


def row_bytes(array: ArrayFacts, sample_dim: str, part: Mapping[str, int] | None = None) -> int:
    """Return the bytes of a row as float32; 0 for an array without the sample dimension.

    Parameters
    ----------
    array : ArrayFacts
    sample_dim : str
    part : mapping of str to int, optional
        Lengths of dimensions of which only a part is taken.
    """
    sizes = {**array.sizes, **(part or {})}
    row = math.prod(sizes[dim] for dim in array.without(sample_dim))
    return 4 * row if sample_dim in array.dims else 0
