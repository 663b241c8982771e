"""Decode stored values for the model: CF packing and missing values, then normalisation.

xarray says once which dtype a packed variable decodes to (`dtrain.data.cf`). Workers decode by this file alone, and
need not import xarray.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.errors import LengthsDiffer

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float64]
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
    ignored: int | None = None
    """What a missing value of a label decodes to: labels stay integers. None: NaN, and integers become floats."""
    passes: bool = False
    """True if a missing value is no fault: losses and metrics leave out the labels of `ignored`."""

    @property
    def is_packed(self) -> bool:
        """True if values are stored as other numbers than they mean."""
        return self.scale is not None or self.offset is not None

    @property
    def is_cast(self) -> bool:
        """True if values are stored unpacked, and only their dtype changes (`dtrain.data.cf.float_encoding`)."""
        return not self.is_packed and not self.missing and not self.unsigned


def unpack(values: Array, encoding: Encoding | None) -> Array:
    """Return decoded values, in the order of operations that xarray uses; `values` are not changed.

    Only where xarray says float16 it is float32, which the model sees: float16 ends at 65,504.
    """
    if encoding is None:
        return values
    if encoding.unsigned:
        values = values.view(encoding.unsigned)
    if encoding.ignored is not None:
        labels: Array = values.astype(np.int64)
        labels[is_missing(values, encoding)] = encoding.ignored
        return labels
    is_half = encoding.is_packed and encoding.dtype == "float16"
    decoded = values.astype(np.float32 if is_half else encoding.dtype)
    if encoding.missing:
        decoded[is_missing(values, encoding)] = np.nan
    number = float if decoded.dtype.kind == "f" else int
    if encoding.scale is not None:
        decoded *= number(encoding.scale)
    if encoding.offset is not None:
        decoded += number(encoding.offset)
    return decoded


def cosine(angles: Array, unit: str) -> Floats:
    """Return cosines of angles in degrees or radians, in float64; 0 where rounding makes one negative."""
    exact = angles.astype(np.float64)
    return np.maximum(np.cos(np.deg2rad(exact) if unit == "degrees" else exact), 0.0)


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
        elif values.dtype.kind in "iu" and values.dtype.itemsize == 8 and encoding.ignored is None:
            missing |= values.astype(np.float64) == float(value)  # as xarray compares them
        elif (mark := _as_stored(value, values.dtype)) is not None:
            missing |= values == mark
    return missing


def _as_stored(value: float, dtype: DType) -> Array | None:
    """Cast a mark to the dtype; None if it cannot be represented, and no value is marked."""
    if dtype.kind == "b":
        return np.asarray(value, dtype) if value in (0, 1) else None
    if dtype.kind not in "iu":
        with np.errstate(over="ignore"):
            mark = np.asarray(value, dtype)
        return None if np.isinf(mark) and not np.isinf(value) else mark
    info = np.iinfo(dtype)
    fits = info.min <= value <= info.max and value == int(value)  # infinities are beyond
    return np.asarray(int(value), dtype) if fits else None


# Normalisation --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scaling:
    """Means and standard deviations by which a variable is standardised."""

    mean: tuple[float, ...]
    """One for each index of `axes`, in C order; a single one of all values if there are no axes."""
    std: tuple[float, ...]
    axes: tuple[int, ...] = ()
    """Axes of a row, ascending."""
    rest: tuple[float, ...] = ()
    """What float64 rounds off the means, to be subtracted too; empty where the model's float32 does not show it."""

    def against(self, name: str, row_shape: tuple[int, ...]) -> Standard:
        """Return means and standard deviations as arrays that broadcast against rows of a variable.

        Raises
        ------
        LengthsDiffer
            Rows of the variable do not have these axes.
        """
        lengths = tuple(row_shape[axis] for axis in self.axes if axis < len(row_shape))
        if len(lengths) != len(self.axes) or math.prod(lengths) != len(self.mean):
            raise LengthsDiffer(
                f"{name}: data.normalize has {len(self.mean):,} means, which do not fit a row of shape "
                f"{list(row_shape)}.",
                "Give the data of the same kind as the run was trained on, with the same data.isel.",
            )
        shape = [length if axis in self.axes else 1 for axis, length in enumerate(row_shape)]
        mean, std = (np.array(values, np.float64).reshape(shape) for values in (self.mean, self.std))
        rest = np.array(self.rest, np.float64).reshape(shape) if self.rest else None
        return Standard(mean, rest, std)


@dataclass(frozen=True, slots=True)
class Standard:
    """A `Scaling` as arrays that broadcast against rows."""

    mean: Floats
    rest: Floats | None
    """To be subtracted after `mean`; None: nothing."""
    std: Floats

    def apply(self, values: Array, encoding: Encoding | None) -> Floats:
        """Return stored values as (decoded - mean) / std, in float64: the model's float32 is the only rounding.

        Parameters
        ----------
        values : array[..., *row]
        encoding : Encoding or None
        """
        centred = difference(values, encoding, self.mean)
        if self.rest is not None:
            centred -= self.rest
        centred /= self.std
        return centred


def difference(values: Array, encoding: Encoding | None, mean: Floats) -> Floats:
    """Return decoded values minus a mean, in float64; NaN where a value is missing. `values` are not changed.

    Integers of 64 bits that are not packed are exact up to one rounding, also beyond 2**53.

    Parameters
    ----------
    values : array[..., *row]
        As stored.
    encoding : Encoding or None
    mean : array
        It broadcasts against `values`.
    """
    if encoding is not None and encoding.unsigned:
        values = values.view(encoding.unsigned)
    if holds_integers(values.dtype, encoding) and values.dtype.itemsize == 8:
        centred = _integer_difference(values, mean)
    else:
        centred = np.asarray(values.astype(np.float64))
        if encoding is not None and encoding.scale is not None:
            centred *= encoding.scale
        if encoding is not None and encoding.offset is not None:
            centred += encoding.offset
        centred -= mean
    if encoding is not None and encoding.missing:
        centred[is_missing(values, encoding)] = np.nan
    return centred


def holds_integers(dtype: DType, encoding: Encoding | None) -> bool:
    """Return True if decoded values are whole numbers, exactly as they are stored."""
    return dtype.kind in "iub" and not (encoding is not None and encoding.is_packed)


def _integer_difference(values: Array, mean: Floats) -> Floats:
    """Return integers of 64 bits minus a mean: upper and lower half one by one, since float64 holds 53 bits."""
    whole = np.rint(mean)
    upper = np.floor(whole / 2**32)
    centred = (values >> 32).astype(np.float64) - upper
    centred *= 2.0**32
    centred += (values & 0xFFFFFFFF).astype(np.float64) - (whole - upper * 2.0**32)
    centred -= mean - whole
    return np.asarray(centred)
