"""A counter hash: the one source of every seeded draw over the data (splits, partitions, order, cache, transforms).

It is written out in numpy, since the streams of ``numpy.random.Generator`` are not promised to be stable between
versions.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Compact = npt.NDArray[np.int32] | Ints
"""Integers that are kept: 4 bytes each where that is enough (`compact`)."""

COMPACT_BELOW = 1 << 30
"""Smaller numbers are kept in 4 bytes; the sum of two of them fits there too."""
SLICE = 1 << 16
"""Long arrays are computed in slices of this length, so that intermediate results stay small."""

SPLIT, DEAL, PART, ROW, CACHE, TRANSFORM, GROUP, UNIT = range(8)
"""The purpose of a draw is one of its keys, so that no two draws are the same."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(*keys: int | npt.NDArray[np.integer], start: Hashes | int = 0) -> Hashes:
    """Hash integers (broadcast against each other) to uint64: splitmix64's finaliser, once a key.

    ``hash64(a, b)`` is ``hash64(b, start=hash64(a))``.

    References
    ----------
    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    state = np.asarray(start, np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def hash_each(numbers: range | Compact, *keys: int) -> Hashes:
    """Return ``hash64(*keys, numbers)``, with little memory besides the result."""
    hashes, start = np.empty(len(numbers), np.uint64), hash64(*keys)
    for part in slices(len(numbers)):
        chosen = numbers[part]
        each = np.arange(chosen.start, chosen.stop) if isinstance(chosen, range) else chosen
        hashes[part] = hash64(each, start=start)
    return hashes


def permutation(length: int, *keys: int) -> Ints:
    """Return a permutation of ``range(length)`` that depends on the keys alone."""
    return np.argsort(hash_each(range(length), *keys))  # different numbers have different hashes: nothing is tied


def compact(values: Ints, below: int) -> Compact:
    """Return integers from 0 to less than `below` in as few bytes as they are kept in."""
    return values.astype(np.int32) if below <= COMPACT_BELOW else values


def slices(length: int) -> Iterator[slice]:
    """Yield the slices of at most `SLICE` places that make up an array of some length."""
    return (slice(start, min(start + SLICE, length)) for start in range(0, length, SLICE))
