"""A counter hash: the one source of every seeded draw over the data (splits, partitions, order, cache, transforms).

It is written out in numpy, since the streams of ``numpy.random.Generator`` are not promised to be stable between
versions.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

SPLIT, DEAL, PART, ROW, CACHE, TRANSFORM = range(6)
"""The purpose of a draw is one of its keys, so that no two draws are the same."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(*keys: int | Ints, start: Hashes | int = 0) -> Hashes:
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


def permutation(length: int, *keys: int) -> Ints:
    """Return a permutation of ``range(length)`` that depends on the keys alone."""
    return np.argsort(hash64(*keys, np.arange(length)), kind="stable")
