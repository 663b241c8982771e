"""Values of a configuration: by dotted key, in plain types, as bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from datetime import date, time
from typing import Any, TypeAlias

from pydantic import BaseModel, ByteSize, ConfigDict, TypeAdapter, ValidationError

from dtrain.errors import InvalidConfig, UsageError
from dtrain.urls import REDACTED

Plain: TypeAlias = "str | int | float | bool | date | time | list[Plain] | dict[str, Plain] | None"
"""A value that a config file can hold."""
Tables: TypeAlias = dict[str, Plain]
"""Nested tables of keys."""

MOST_DEPTH, MOST_VALUES = 64, 1_000_000
"""Of a configuration: levels of nesting, and values in all."""

TO_PLAIN: TypeAdapter[Any] = TypeAdapter(Any, config=ConfigDict(ser_json_inf_nan="constants"))


def plain_value(value: Any) -> Any:
    """Return a value that comes from Python in plain types: NumPy scalars as numbers and times, paths as text.

    Values of other types stay as they are: the schema refuses them by name.

    >>> from pathlib import PurePosixPath
    >>> plain_value({"init": PurePosixPath("runs/a"), "rounds": range(3)})
    {'init': 'runs/a', 'rounds': range(0, 3)}
    """
    if isinstance(value, Mapping):
        return {plain_value(key): plain_value(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain_value(inner) for inner in value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    is_scalar = type(value).__module__ == "numpy" and getattr(value, "ndim", None) == 0
    if is_scalar and value.dtype.kind == "M":
        exact = value.astype("M8[us]")  # Python's datetime knows no nanoseconds
        return exact.item() if exact == value else str(value)
    return value.item() if is_scalar else value


def value_of(config: BaseModel, key: str) -> Any:
    """Return the value at a dotted key."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check_size(tables: Mapping[Any, Any]) -> None:
    """Refuse tables that are nested too deeply or hold too many values, as aliases of YAML can make them.

    Raises
    ------
    InvalidConfig
        They do.
    """
    try:
        count, depth = _count(tables, {})
    except RecursionError:
        count, depth = 0, MOST_DEPTH + 1
    if depth > MOST_DEPTH:
        raise InvalidConfig(f"The configuration is nested too deeply; at most {MOST_DEPTH} levels are allowed.")
    if count > MOST_VALUES:
        raise InvalidConfig(f"The configuration holds {count:,} values; at most {MOST_VALUES:,} are allowed.")


def _count(value: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the values inside a value and its depth; a value that stands in several places is counted in each."""
    if not isinstance(value, Mapping | list | tuple):
        return 1, 0
    if id(value) not in known:
        known[id(value)] = (0, MOST_DEPTH)  # what refers to itself has no end
        inside = [_count(one, known) for one in (value.values() if isinstance(value, Mapping) else value)]
        known[id(value)] = (1 + sum(n for n, _ in inside), 1 + max((depth for _, depth in inside), default=0))
    return known[id(value)]


def flat_values(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, Plain]]:
    """Yield every dotted key and its value in plain types, in the order of the schema."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from flat_values(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", TO_PLAIN.dump_python(value, mode="json")


def cache_bytes(text: str) -> int:
    """Return the bytes of ``data.cache``; 0 turns the cache off."""
    return 0 if _bytes(text) == 0 else parse_bytes(text, "data.cache")


def parse_bytes(text: str, key: str) -> int:
    """Return the bytes of a size such as ``512MB`` or ``2GiB``.

    Raises
    ------
    InvalidConfig
        The text is not a positive number of bytes.
    """
    value = _bytes(text)
    if value is None or value <= 0:
        raise InvalidConfig(f'{key} = "{text}" is not a size; write "auto" or for example "512MB" or "2GiB".')
    return value


def _bytes(text: str) -> int | None:
    """Return a number of bytes, whatever its unit; None if the text is none."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text.strip()))
    except ValidationError:
        return None


BANDWIDTH = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(bit(?:/s)?|bps|B(?:/s)?)")
"""Number, prefix and unit of a bandwidth."""
PREFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_bandwidth(text: str) -> float:
    """Return the bytes a second of a bandwidth.

    Raises
    ------
    UsageError
        The text is not a positive number with a unit.

    >>> parse_bandwidth("200Mbit"), parse_bandwidth("5Gbit/s"), parse_bandwidth("25MB/s")
    (25000000.0, 625000000.0, 25000000.0)
    """
    match = BANDWIDTH.fullmatch(text.strip()) if isinstance(text, str) else None
    if match is None or not float(match[1]):
        raise UsageError(
            f"bandwidth {text!r}: allowed are a number and a unit, such as 200Mbit, 5Gbit/s or 25MB/s.",
            "Give the speed of a worker's link; bit are bits and B bytes.",
        )
    return float(match[1]) * PREFIXES[match[2]] / (1 if match[3].startswith("B") else 8)


def without_redacted(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options without those that a run has not kept, at any depth.

    >>> without_redacted({"anon": False, "key": "***", "client_kwargs": {"token": "***", "verify": True}})
    {'anon': False, 'client_kwargs': {'verify': True}}
    """
    kept = {key: value for key, value in options.items() if not _is_redacted(value)}
    return {key: without_redacted(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def _is_redacted(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_is_redacted, value))
    return isinstance(value, str) and REDACTED in value
