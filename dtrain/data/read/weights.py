"""Weights of samples (``data.weight``): decoded, and checked to be weights whatever ``data.non_finite`` says."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dtrain.data.encoding import Array, cosine, unpack
from dtrain.data.variable import Variable
from dtrain.errors import DtrainError, NonFiniteData, UnsuitableVariable

MOST: Mapping[str, float] = {"": float(np.finfo(np.float32).max), "degrees": 90.001, "radians": 1.5708}
"""By unit of an angle, or empty for other weights: the largest value. Angles may be rounded up, as float32 is."""


def decoded_weights(variable: Variable, values: Array) -> Array:
    """Return weights as losses count them, in float32.

    Parameters
    ----------
    variable : Variable
    values : array
        As they are kept in memory.
    """
    decoded = unpack(values, variable.encoding)
    return (cosine(decoded, variable.angle) if variable.angle else decoded).astype(np.float32)


def wrong_weights(variable: Variable, values: Array) -> Array | None:
    """Return where values are no weights, or angles beyond 90 degrees; None if nowhere."""
    most = MOST[variable.angle]
    least = -most if variable.angle else 0.0
    with np.errstate(all="ignore"):
        decoded = unpack(values, variable.encoding).astype(np.float32, copy=False)
    if not decoded.size or (decoded.min() >= least and decoded.max() <= most):  # neither holds if one is NaN
        return None
    return ~((decoded >= least) & (decoded <= most))


def not_a_weight(text: str, variable: Variable, value: Array) -> DtrainError:
    """Return the error for a value that is no weight.

    Parameters
    ----------
    text : str
        Names the value and its chunk.
    variable : Variable
    value : array
        As stored.
    """
    with np.errstate(all="ignore"):
        found = unpack(value, variable.encoding).astype(np.float32)
    needs = {"": "0 or a positive finite number", "degrees": "-90 to 90 degrees", "radians": "-pi/2 to pi/2 radians"}
    said = f'{text}; data.weight = "{variable.name}" needs {needs[variable.angle]}.'
    hint = "Repair it." if variable.angle else "Repair it; what has weight 0 does not count."
    return UnsuitableVariable(said, hint) if np.isfinite(found) else NonFiniteData(said, hint)


def check_not_all_zero(path: str, variable: Variable, values: Array) -> None:
    """Refuse weights without the sample dimension that are all 0.

    Raises
    ------
    UnsuitableVariable
    """
    if not decoded_weights(variable, values).any():
        raise UnsuitableVariable(
            f'{path}: all values of data.weight = "{variable.name}" are 0: no sample would count.',
            "Name a variable with positive values.",
        )
