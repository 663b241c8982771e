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
    config = samples.config
    is_label = variable.name in config.targets and variable.name not in config.inputs
    return judged(variable, may_be_label=is_label or variable.is_static)


def judged(variable: Variable, *, may_be_label: bool) -> Absence:
    """Judge by what a chunk decodes to: writers leave out zeros of masks and labels, never measured values.

    Parameters
    ----------
    variable : Variable
    may_be_label : bool
        Whether integers of it may be a mask or labels.
    """
    if math.isnan(variable.absent_value):
        return "nan"
    kind = "b" if variable.means_bool else np.dtype(variable.dtype).kind
    if kind == "f" or (variable.encoding is not None and variable.encoding.is_packed):
        return "error"
    return "fill" if kind == "b" or may_be_label else "error"


def stands_for(variable: Variable) -> str:
    """Return the value that a chunk which is not stored decodes to, as text."""
    value, encoding = variable.absent_value, variable.encoding
    if encoding is not None and value == encoding.ignored:
        return f"missing labels, class {value}"
    return f"{value:g}" if isinstance(value, float) else str(value)
