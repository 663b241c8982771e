"""The state of a metric: float64 arrays of fixed size that merge exactly, in order; its value is a function of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Parts: TypeAlias = tuple[Floats, ...]
"""The arrays of a state of one group."""
Rule: TypeAlias = Literal["sum", "max", "min", "moments"]
"""How an array of two states becomes that of both together. The last axis of ``moments`` is count, mean and sum of
squared differences from the mean."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric that is computed batch by batch."""

    of_batch: Callable[..., Parts]
    """(outputs, targets), or (outputs, targets, weight) -> the state of the batch."""
    value: Callable[..., float]
    """The arrays of a state -> the value of the metric; NaN where no term counts."""
    rules: tuple[Rule, ...] = ("sum",)
    """By array of a state."""
    needs_climate: bool = False
    """Whether `of_batch` also takes `climate`, the climatology at the places and times of the targets."""


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What a metric has seen, by group."""

    parts: Parts
    """float64[group, ...]"""
    rules: tuple[Rule, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(part.nbytes for part in self.parts)

    def of_group(self, group: int) -> Parts:
        """Return the arrays of one group."""
        return tuple(part[group] for part in self.parts)


EMPTY: Mapping[Rule, float] = {"sum": 0.0, "moments": 0.0, "max": -math.inf, "min": math.inf}
"""What an array holds before anything is merged into it."""


def empty_state(like: Parts, rules: tuple[Rule, ...], groups: int) -> State:
    """Return a state that has seen nothing, for states of one group with arrays of these shapes."""
    pairs = zip(like, rules, strict=True)
    return State(tuple(np.full((groups, *part.shape), EMPTY[rule]) for part, rule in pairs), rules)


def merged(states: Sequence[State]) -> State:
    """Merge states of the same groups in the order given."""
    rules = states[0].rules
    parts = empty_state(states[0].of_group(0), rules, len(states[0].parts[0])).parts
    for state in states:
        parts = merge_parts(parts, state.parts, rules)
    return State(parts, rules)


def merge_parts(ones: Parts, others: Parts, rules: tuple[Rule, ...]) -> Parts:
    """Merge the arrays of two states."""
    return tuple(MERGES[rule](one, other) for one, other, rule in zip(ones, others, rules, strict=True))


def add_moments(one: Floats, other: Floats) -> Floats:
    """Merge count, mean and squared differences, float64[..., 3].

    References
    ----------
    Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """
    (count, mean, squares), (more, other_mean, other_squares) = np.moveaxis(one, -1, 0), np.moveaxis(other, -1, 0)
    total = count + more
    share = np.divide(more, total, out=np.zeros_like(total), where=total != 0)
    step = np.where(count != 0, other_mean - mean, 0.0)
    mean = np.where(count != 0, mean + step * share, other_mean)
    return np.stack([total, mean, squares + other_squares + step * step * count * share], axis=-1)


MERGES: Mapping[Rule, Callable[[Floats, Floats], Floats]] = {
    "sum": np.add,
    "max": np.maximum,
    "min": np.minimum,
    "moments": add_moments,
}


def of_sums(function: Callable[..., tuple[float, float]], value: Callable[[float], float] = float) -> Metric:
    """Return the metric of a function that returns a sum and the number of its terms, or the sum of their weights.

    Parameters
    ----------
    function : callable
        (outputs, targets), or (outputs, targets, weight) -> sum, count.
    value : callable
        Of the mean of all terms.
    """

    def of_batch(outputs: Any, targets: Any, weight: Any = None) -> Parts:
        pair = function(outputs, targets) if weight is None else function(outputs, targets, weight)
        return (np.array(pair, np.float64),)

    return Metric(of_batch, lambda pair: value(ratio(*pair.tolist())))


def ratio(total: float, count: float) -> float:
    """Return a mean; NaN of nothing."""
    return total / count if count else math.nan
