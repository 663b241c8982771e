"""What the CF attributes of a variable mean: xarray decodes one value, and says the dtype."""

from __future__ import annotations

import base64
import math
import struct
import warnings
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from dtrain.data.encoding import Array, DType, Encoding
from dtrain.errors import UnsuitableVariable

Attributes: TypeAlias = Mapping[Any, Any]
"""Undecoded, as xarray gives them."""

PACKING = ("scale_factor", "add_offset")
TIME_ATTRIBUTES = ("units", "calendar")
TIME_UNITS = {"D": "days", "h": "hours", "m": "minutes", "s": "seconds", "ms": "milliseconds", "us": "microseconds"}
MARKS = ("_FillValue", "missing_value")
CF_ATTRIBUTES = (*PACKING, *MARKS, "_Unsigned")


def encoding_of(path: str, name: str, attributes: Attributes, dtype: DType, *, zarr_format: int) -> Encoding | None:
    """Return how a variable is packed; None if values are stored unpacked.

    Parameters
    ----------
    path : str
        Names the store in errors.
    name : str
    attributes : mapping
        The attributes of the variable, undecoded.
    dtype : dtype
        As stored.
    zarr_format : int

    Raises
    ------
    UnsuitableVariable
        The attributes cannot be understood.
    """
    given = {key: attributes[key] for key in CF_ATTRIBUTES if key in attributes}
    packed = any(key in given for key in PACKING)
    if zarr_format == 2 and not packed and given.get("_FillValue") == 0:
        # zarr itself writes this fill value for a v2 array: it says nothing about missing values
        del given["_FillValue"]
    try:
        marks = {key: _numbers(key, given.pop(key), dtype) for key in MARKS if key in given}
        given |= {key: numbers[0] if len(numbers) == 1 else numbers for key, numbers in marks.items() if numbers}
        if not given:
            return None
        encoding = _encoding(name, given, dtype)
    except Exception as error:
        raise UnsuitableVariable(
            f"{path}: {name}: its CF attributes cannot be understood: {error}",
            f"Write {', '.join((*PACKING, *MARKS))} as numbers (array.attrs in zarr), or remove them.",
        ) from None
    if not packed and not encoding.unsigned and all(v != v for v in encoding.missing):
        return None  # NaN marks NaN
    return encoding


def _encoding(name: str, given: Attributes, dtype: DType) -> Encoding:
    packing = {key: _number(key, given[key]) for key in PACKING if key in given}
    # xarray knows true and false in lower case only
    words = {key: str(given[key]).lower() for key in ("_Unsigned",) if key in given}
    attributes = {**given, **packing, **words}
    unsigned = _other_signs(attributes, dtype)
    missing = _marks(attributes, dtype, unsigned)
    decoded = _decoded_dtype(name, attributes, dtype)
    if packing and missing and decoded.kind in "iu":
        decoded = np.dtype(np.float64)  # only a float can be NaN
    elif packing and decoded.kind in "iu":
        _check_range(packing, np.dtype(unsigned or dtype), decoded)
    scale, offset = (float(packing[key]) if key in packing else None for key in PACKING)
    return Encoding(dtype=str(decoded), scale=scale, offset=offset, missing=missing, unsigned=unsigned)


def float_encoding(dtype: DType) -> Encoding | None:
    """Return how integers become the floats that can be standardised; in memory they stay as they are stored."""
    if dtype.kind == "f":
        return None
    return Encoding(dtype="float32" if dtype.itemsize <= 2 else "float64")


def texts_of(name: str, values: Array, attributes: Attributes) -> list[str]:
    """Return stored values of a coordinate in its own words: dates and times, or numbers with their unit."""
    import xarray as xr  # takes half a second, which few stores need

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dates that numpy does not hold
        try:
            decoded = xr.conventions.decode_cf_variable(name, xr.Variable(("n",), values, dict(attributes))).values
        except Exception:  # a calendar for which a package is missing, or units that nobody knows
            return [f"{value} {attributes.get('units', '')}".rstrip() for value in values.tolist()]
    if decoded.dtype.kind == "M":
        times = np.datetime_as_string(decoded, unit="ms").tolist()
        return [text.replace("T", " ").removesuffix(".000").removesuffix(" 00:00:00") for text in times]
    texts = [str(value) for value in (decoded if decoded.dtype.kind in "mf" else decoded.tolist())]
    return [text.removesuffix(" 00:00:00") for text in texts] if decoded.dtype.kind == "O" else texts


def decoded_times(name: str, values: Array, attributes: Attributes) -> Array | None:
    """Return stored values of a coordinate as dates: datetime64, or objects of cftime; None if they are none."""
    if values.dtype.kind == "M":
        return values
    if values.dtype.kind not in "iuf" or " since " not in str(attributes.get("units", "")):
        return None
    import xarray as xr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dates that numpy does not hold
        try:
            decoded = xr.conventions.decode_cf_variable(name, xr.Variable(("n",), values, dict(attributes))).values
        except Exception:  # a calendar for which a package is missing, or units that nobody knows
            return None
    return decoded if decoded.dtype.kind in "MO" else None


def missing_times(times: Array) -> Array:
    """Return where dates are missing."""
    return (
        np.isnat(times) if times.dtype.kind == "M" else np.array([time is None or time != time for time in times], bool)
    )


def date_part(times: Array, part: str) -> Array:
    """Return a part of each date, such as its month, as integers."""
    import xarray as xr

    found: Array = getattr(xr.DataArray(times, dims="n").dt, part).values
    return found


def step_text(step: float, dtype: DType, attributes: Attributes) -> str:
    """Return the difference of two stored values of a coordinate, with its unit."""
    if dtype.kind in "mM":
        exact = np.array(round(step)).view(dtype.str.replace("M", "m").replace(">", "<"))
        for unit, word in TIME_UNITS.items():
            if (rounded := exact.astype(f"m8[{unit}]")) == exact:
                return f"{int(rounded.astype(np.int64)):,} {word}"
        return str(exact)
    scaled = step * abs(_number("scale_factor", attributes.get("scale_factor", 1.0)) or 1.0)
    return f"{scaled:.6g} {str(attributes.get('units', '')).partition(' since ')[0]}".rstrip()


def _decoded_dtype(name: str, attributes: Attributes, dtype: DType) -> DType:
    """Return the dtype of decoded values: that of xarray, but for dtypes in which it loses values."""
    if not any(key in attributes for key in (*PACKING, "_Unsigned")):
        return _with_nan(dtype)
    import xarray as xr  # also dask.array, for the first variable: together a second, which most stores do not need

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of several fill values; all are missing
        decoded = xr.conventions.decode_cf_variable(
            name, xr.Variable((), np.zeros((), dtype), attributes), decode_times=False
        )
    if dtype.kind == "f" and decoded.dtype.kind != "f":  # an integer scale factor makes xarray truncate floats
        return np.result_type(dtype, np.float32)
    return np.dtype(np.float32) if decoded.dtype.kind == "O" else decoded.dtype  # bools of which some are missing


def _with_nan(dtype: DType) -> DType:
    """Return the dtype of unpacked values of which some are missing, as xarray has it (`float32` for bools)."""
    if dtype.kind == "f":
        return dtype
    return np.dtype(np.float32 if dtype.itemsize <= 2 else np.float64)


def _other_signs(attributes: Attributes, dtype: DType) -> str:
    """Return the dtype with other signs that stored integers are meant to have; empty if they have the right ones."""
    kind = {"true": "u", "false": "i"}.get(attributes.get("_Unsigned", ""), dtype.kind)
    return f"{kind}{dtype.itemsize}" if dtype.kind in "iu" and kind != dtype.kind else ""


def _marks(attributes: Attributes, dtype: DType, unsigned: str) -> tuple[float, ...]:
    """Return the stored values that mark a missing one."""
    fill, missing = (_listed(attributes.get(key)) for key in MARKS)
    if unsigned:  # the fill value is meant as it is stored, with other signs
        bits = 8 * dtype.itemsize
        wrapped = [int(v) % 2**bits for v in fill if math.isfinite(v)]
        fill = [v - 2**bits if unsigned[0] == "i" and v >= 2 ** (bits - 1) else v for v in wrapped]
    return tuple(dict.fromkeys([*fill, *missing]))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _numbers(key: str, value: Any, dtype: DType) -> list[float]:
    """Return the numbers of an attribute that marks missing values: one, a list of them, or none (null)."""
    plain = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return [_mark(key, item, dtype) for item in _listed(plain) if item is not None]


def _mark(key: str, value: Any, dtype: DType) -> float:
    """Return a number as whoever wrote the attribute meant it.

    xarray writes the ``_FillValue`` of floats in Zarr v3 as 8 bytes in base64; others write numbers, or words as "NaN".
    """
    if isinstance(value, int):  # float64 does not hold all int64
        return value
    packed = _bytes(value) if dtype.kind == "f" else b""
    try:
        return float(struct.unpack("<d", packed)[0]) if len(packed) == 8 else float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key} = {value!r} is not a number") from None


def _bytes(value: Any) -> bytes:
    """Return what a text in base64 holds; nothing if it is no such text."""
    try:
        return base64.b64decode(value, validate=True) if isinstance(value, str) else b""
    except ValueError:
        return b""


def _number(key: str, value: Any) -> int | float:
    """Return a number that may stand in a list of one, as netCDF's attributes do."""
    numbers = np.asarray(value)
    if numbers.size != 1 or numbers.dtype.kind not in "iuf" or not np.isfinite(numbers).all():
        raise ValueError(f"{key} = {value!r} is not a finite number")
    number: int | float = numbers.reshape(()).item()
    return number


def _check_range(packing: Mapping[str, int | float], stored: DType, decoded: DType) -> None:
    """Refuse integers that unpacking by integers may make too large."""
    scale, offset = (int(packing.get(key, default)) for key, default in zip(PACKING, (1, 0), strict=True))
    bounds = [bound * scale + offset for bound in _bounds(stored)]
    if min(bounds) < np.iinfo(decoded).min or max(bounds) > np.iinfo(decoded).max:
        raise ValueError(
            f"unpacked {stored} may reach {max(bounds, key=abs)}, which {decoded} cannot hold; write scale_factor and "
            "add_offset as floats"
        )


def _bounds(dtype: DType) -> tuple[int, int]:
    if dtype.kind == "b":
        return 0, 1
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


# Coordinates that are written -------------------------------------------------------------------------------

NANOSECONDS = {
    "day": 86_400 * 10**9,
    "hour": 3_600 * 10**9,
    "minute": 60 * 10**9,
    "second": 10**9,
    "millisecond": 10**6,
    "microsecond": 10**3,
    "nanosecond": 1,
    "d": 86_400 * 10**9,
    "h": 3_600 * 10**9,
    "hr": 3_600 * 10**9,
    "min": 60 * 10**9,
    "s": 10**9,
    "sec": 10**9,
    "ms": 10**6,
    "us": 10**3,
    "ns": 1,
}
"""By unit of time, in the singular."""
NUMPY_UNITS = {**{key: f"{word}" for key, word in TIME_UNITS.items()}, "ns": "nanoseconds"}
EPOCH = "1970-01-01"


def unit_nanoseconds(units: object) -> int | None:
    """Return the nanoseconds of the unit of a time, ``hours since 2000-01-01``; None if it is none of equal length."""
    word, since, _ = str(units).partition(" since ")
    unit = word.strip().lower()
    return NANOSECONDS.get(unit, NANOSECONDS.get(unit.removesuffix("s"))) if since else None


def dates_as_numbers(values: Array) -> tuple[Array, dict[str, Any]]:
    """Return dates or times of numpy as integers, and the CF attributes that say what they mean."""
    unit, count = np.datetime_data(values.dtype)
    if unit not in NUMPY_UNITS or count != 1:
        values, unit = values.astype(f"{values.dtype.kind}8[ns]"), "ns"
    numbers = values.astype(values.dtype.newbyteorder("=")).view(np.int64)
    if values.dtype.kind == "m":
        return numbers, {"units": NUMPY_UNITS[unit], "dtype": f"timedelta64[{unit}]"}
    return numbers, {"units": f"{NUMPY_UNITS[unit]} since {EPOCH}", "calendar": "proleptic_gregorian"}


def in_units(values: Array, attributes: Attributes, wanted: Attributes) -> Array:
    """Return times of one CF unit as numbers of another one, float64.

    Raises
    ------
    ValueError
        xarray understands one of them not.
    """
    import xarray as xr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dates that numpy does not hold
        decoded = xr.conventions.decode_cf_variable("time", xr.Variable(("n",), values, dict(attributes)))
        encoding = {key: wanted[key] for key in TIME_ATTRIBUTES if key in wanted}
        decoded.encoding = {**encoding, "dtype": np.dtype(np.float64)}
        return np.asarray(xr.conventions.encode_cf_variable(decoded).values, np.float64)


def stored_mark(value: float, dtype: DType) -> Any:
    """Return a ``_FillValue`` as xarray writes it into Zarr v3."""
    if dtype.kind == "f":
        return base64.standard_b64encode(struct.pack("<d", value)).decode()
    return int(value)
