r"""How far replicas move in a round, and how much they agree.

    u_k = theta - theta_k              the update of replica k, as it is averaged (with a codec: as it was decoded)
    ||u_k||                            its norm, over the trained parameters
    cosine                             sum_{i<j} c_i c_j u_i.u_j / sum_{i<j} c_i c_j ||u_i|| ||u_j||

The cosine is the mean over all pairs of replicas, in which a pair counts by its weights and norms. It is 1 where all
replicas move alike, and falls towards 0 as they learn different things, or mostly noise. It needs only the norms of
the updates and that of their sum: ``||sum_k c_k u_k||^2 = sum_k c_k^2 ||u_k||^2 + 2 sum_{i<j} c_i c_j u_i.u_j``.

Squares are summed in float64 over blocks, and the sums of blocks exactly: the norm of an array is the same, bit for
bit, in however many slices it lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.types import Flat

BLOCK = 1 << 12
"""Elements of which the squares are summed at once; slices begin at multiples of it."""
AT_ONCE = 1 << 6
"""Blocks of one pass: bounds the float64 copy to 2 MB."""
Squares: TypeAlias = npt.NDArray[np.float64]
"""float64[blocks]: sums of squares."""


def block_squares(one: Flat, other: Flat) -> Squares:
    """Return, by block, the sum of the squared differences of float32 arrays; values that are equal differ by 0."""
    sums, size = np.empty(-(-len(one) // BLOCK)), BLOCK * AT_ONCE
    buffers = np.empty((2, min(len(one), size)))
    for start in range(0, len(one), size):
        part = slice(start, start + size)
        squares = _squares(one[part], other[part], *buffers[:, : len(one[part])])
        whole = len(squares) // BLOCK
        first = start // BLOCK
        sums[first : first + whole] = squares[: whole * BLOCK].reshape(whole, BLOCK).sum(axis=1)
        if rest := squares[whole * BLOCK :].size:
            sums[first + whole] = squares[-rest:].sum()
    return sums


def _squares(one: Flat, other: Flat, difference: Squares, wide: Squares) -> Squares:
    """Return the squared differences, in the first of two float64 arrays."""
    difference[:], wide[:] = one, other
    with np.errstate(invalid="ignore"):  # infinity less infinity
        difference -= wide
    if not np.isfinite(difference.sum()):
        difference[one == other] = 0.0
    difference *= difference
    return difference


def norm_of(blocks: Iterable[Squares]) -> float:
    """Return the Euclidean norm of an array from its `block_squares`, of all of its slices."""
    return math.sqrt(math.fsum(value for squares in blocks for value in squares.tolist()))


def cosine_terms(norms: Sequence[float], coefficients: Sequence[float], norm: float) -> tuple[float, float]:
    """Return numerator and denominator of the mean cosine between updates.

    Parameters
    ----------
    norms : sequence of float
        Of the updates.
    coefficients : sequence of float
        Of the updates in their sum.
    norm : float
        Of that sum.

    >>> cosine_terms([3.0, 4.0], [0.5, 0.5], 2.5)  # (3, 0) and (0, 4)
    (0.0, 3.0)
    >>> cosine_terms([3.0, 4.0], [0.5, 0.5], 3.5)  # (3, 0) and (4, 0)
    (3.0, 3.0)
    """
    scaled = [coefficient * own for coefficient, own in zip(coefficients, norms, strict=True)]
    own, total = math.fsum(value * value for value in scaled), math.fsum(scaled)
    return (norm * norm - own) / 2, (total * total - own) / 2  # of one update exactly 0; x ** 2 may be off by one bit


def mean_cosine(terms: Sequence[tuple[float, float]]) -> float | None:
    """Return the mean cosine from the terms of several sums; None where there is no pair of updates, or none moved."""
    numerator, denominator = (math.fsum(values) for values in zip(*terms, strict=True)) if terms else (0.0, 0.0)
    if denominator <= 0 or not math.isfinite(numerator):
        return None
    return max(-1.0, min(1.0, numerator / denominator))
