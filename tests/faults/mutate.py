"""Damage to files, drawn from a generator: bytes that flip, go or come, and JSON with other values."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 3, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf")),
    *("", "x", "\0", "../up", "a\nb", "\u202e", "\x1b[31m", "9" * 400, [], [[]], [None], {}, {"": 0}, [1] * 50),
)


def damaged_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """Return data with some bytes changed, cut off, repeated or put in."""
    start = int(rng.integers(len(data) + 1))
    stop = min(len(data), start + int(rng.integers(1, 40)))
    match rng.integers(6):
        case 0:
            flipped = bytearray(data or b"\0")
            flipped[int(rng.integers(len(flipped)))] ^= 1 << int(rng.integers(8))
            return bytes(flipped)
        case 1:
            return data[:start]
        case 2:
            return data[:start] + data[stop:]
        case 3:
            return data[:stop] + data[start:]
        case 4:
            return data[:start] + rng.bytes(int(rng.integers(1, 40))) + data[start:]
        case _:
            return data[:start] + bytes(stop - start) + data[stop:]


def damaged_value(value: Any, rng: np.random.Generator) -> Any:
    """Return a JSON value with an odd one in some place, or without some key or item."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = list(value)[int(rng.integers(len(value)))]
        if rng.random() < 0.15:
            return {name: own for name, own in value.items() if name != key}
        return {**value, key: damaged_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        at = int(rng.integers(len(value)))
        if rng.random() < 0.15:
            return value[:at] + value[at + 1 :]
        return [*value[:at], damaged_value(value[at], rng), *value[at + 1 :]]
    return ODD[int(rng.integers(len(ODD)))]


def damaged_json(data: bytes, rng: np.random.Generator, seal: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    """Return a JSON file with other values; `seal` puts a digest into an object."""
    value = json.loads(data)
    own = {key: one for key, one in value.items() if key != "sha256"} if isinstance(value, dict) else value
    other = damaged_value(own, rng)
    return json.dumps(seal(other) if isinstance(other, dict) else other).encode()
