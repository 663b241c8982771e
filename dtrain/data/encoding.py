"""Decode stored values for the model: CF packing and missing values, then normalisation.

xarray says once which dtype a packed variable decodes to (`dtrain.data.cf`). Workers decode by this file alone, and
need not import xarray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
DType: TypeAlias = np.dtype[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How a variable is packed, after the CF conventions (section 8.1 and 2.5.1)."""

    dtype: str
    """Dtype of decoded values, before they are cast for the model."""
    scale: float | None = None
    offset: float | None = None
    missing: tuple[float, ...] = ()
    """Stored values that mark a missing value; they decode to NaN."""
    unsigned: str = ""
    """Dtype with other signs as which stored integers are read; empty for the stored dtype."""


def unpack(values: Array, encoding: Encoding | None) -> Array:
    """Return decoded values, in the order of operations that xarray uses; `values` are not changed."""
    if encoding is None:
        return values
    if encoding.unsigned:
        values = values.view(encoding.unsigned)
    decoded = values.astype(encoding.dtype)
    if encoding.missing:
        decoded[is_missing(values, encoding)] = np.nan
    if encoding.scale is not None:
        decoded *= encoding.scale
    if encoding.offset is not None:
        decoded += encoding.offset
    return decoded


def is_missing(values: Array, encoding: Encoding) -> Array:
    """Return where stored values mark a missing value.

    Parameters
    ----------
    values : array
        Stored values; with ``encoding.unsigned``, viewed as that dtype.
    encoding : Encoding
    """
    missing = np.zeros(values.shape, bool)
    for value in encoding.missing:
        if value != value:
            missing |= np.isnan(values)
        elif values.dtype.kind in "iu" and values.dtype.itemsize == 8:
            missing |= values.astype(np.float64) == float(value)  # as xarray compares them
        elif (mark := _as_stored(value, values.dtype)) is not None:
            missing |= values == mark
    return missing


def _as_stored(value: float, dtype: DType) -> Array | None:
    """Cast a mark to the dtype; None if it cannot be represented, and no value is marked."""
    if dtype.kind not in "iu":
        return np.asarray(value, dtype)
    info = np.iinfo(dtype)
    return np.asarray(int(value), dtype) if info.min <= value <= info.max and value == int(value) else None


@dataclass(frozen=True, slots=True)
class Scaling:
    """Mean and standard deviation by which a variable is standardised."""

    mean: tuple[float, ...]
    """Mean of each entry of the channel axis, or a single mean of all values."""
    std: tuple[float, ...]
    axis: int | None
    """The channel axis among a row's axes; None: one mean for all."""


def standardise(values: Array, scaling: Scaling, row_ndim: int) -> None:
    """Turn `values` into (values - mean) / std in place.

    Parameters
    ----------
    values : float32[..., *row]
        A batch, with or without a window axis.
    scaling : Scaling
    row_ndim : int
        Number of a row's axes.
    """
    shape = [1] * row_ndim
    if scaling.axis is not None:
        shape[scaling.axis] = -1
    values -= np.array(scaling.mean, np.float32).reshape(shape)
    values /= np.array(scaling.std, np.float32).reshape(shape)
