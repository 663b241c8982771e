"""What a chunk that is not stored stands for, by ``data.missing`` and by the metadata of its array alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from dtrain.data.samples import Samples
from dtrain.data.variable import Variable

Absence: TypeAlias = Literal["error", "fill", "skip", "nan"]
"""A fault; the fill value; rows that are not used; or NaN, about which ``data.non_finite`` decides."""


@dataclass(frozen=True, slots=True)
class AbsentChunks:
    """The chunks of a variable that would be read and are not stored."""

    chunks: int
    of: int
    """How many would be read."""


def absence_of(samples: Samples, variable: Variable) -> Absence:
    """Return what a chunk of a variable that is not stored stands for.

    No sample can do without a variable that has no sample dimension: under ``skip`` it is judged as under ``auto``.
    """
    wanted = samples.config.missing
    matrix = samples.variable(variable.part_of).sparse if variable.part_of else None
    if matrix is not None and not matrix.count:
        return "fill"  # every row begins at 0: writers leave that out
    if wanted == "auto" or (wanted == "skip" and variable.is_static):
        return _judged(samples, variable)
    return wanted


def _judged(samples: Samples, variable: Variable) -> Absence:
    """Judge by what the chunk decodes to: writers leave out zeros of masks and labels, never measured values."""
    if math.isnan(variable.absent_value):
        return "nan"
    kind, config = "b" if variable.means_bool else np.dtype(variable.dtype).kind, samples.config
    if kind == "f" or (variable.encoding is not None and variable.encoding.is_packed):
        return "error"
    is_label = variable.name in config.targets and variable.name not in config.inputs
    return "fill" if kind == "b" or is_label or variable.is_static else "error"


def stands_for(variable: Variable) -> str:
    """Return the value that a chunk which is not stored decodes to, as text."""
    value, encoding = variable.absent_value, variable.encoding
    if encoding is not None and value == encoding.ignored:
        return f"missing labels, class {value}"
    return f"{value:g}" if isinstance(value, float) else str(value)
