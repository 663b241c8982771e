"""Where the coordinate of the sample dimension jumps: the rule, and its arithmetic in bounded memory.

A jump is a step from one row to the next outside (0, 1.5 x median of all steps], or a step from or to a value that is
missing or not finite. The median is exact, also of more steps than memory holds: steps are read block by block, as
often as it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.plan.hashing import Hashes, Ints

LARGEST_SHARE = 0.05
"""Of jumps among steps, that ``data.gaps = "auto"`` leaves out."""
KEPT_STEPS = 1 << 18
"""So many steps are kept in memory."""
DISTINCT_STEPS = 1 << 14
"""So many different steps are counted one by one: mostly a coordinate has a few."""
DIGIT = 16
"""Bits of a step by which many different ones are told apart at a time."""

Floats: TypeAlias = npt.NDArray[np.float64]
Flags: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps between neighbouring rows."""

    first: int
    """The row that the first step leads to."""
    values: Ints | Floats
    known: Flags
    """False where one of both values is missing or not finite."""


Middle: TypeAlias = tuple[int | float, int | float]
"""The two steps in the middle of all steps in ascending order; the median is their mean."""
Blocks: TypeAlias = Callable[[], Iterator[Steps]]
"""Gives all steps in order, anew at each call."""


def steps_between(first: int, values: npt.NDArray[np.generic], is_missing: Flags, sign: int = 1) -> Steps:
    """Return the steps between some neighbouring values of a coordinate.

    Parameters
    ----------
    first : int
        The row of the first value.
    values : array[row]
        Numbers, dates or times; a step beyond 64 bits becomes the largest one.
    is_missing : bool[row]
        Where a value is marked as missing; dates that are none and numbers that are not finite need no mark.
    sign : int
        -1 if decoded values descend where stored ones ascend, 0 if all decode to the same value.
    """
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore", over="ignore"):
            steps: Ints | Floats = np.diff(values.astype(np.float64)) * sign
        is_known = np.isfinite(values) & ~is_missing
        return Steps(first + 1, steps, is_known[1:] & is_known[:-1] & np.isfinite(steps))
    is_known = ~(is_missing | np.isnat(values)) if values.dtype.kind in "mM" else ~is_missing
    return Steps(first + 1, _differences(_as_int64(values)) * sign, is_known[1:] & is_known[:-1])


def _as_int64(values: npt.NDArray[np.generic]) -> Ints:
    """Return integers, dates or times as int64 with the same differences."""
    if values.dtype.kind in "mM":
        return values.astype(values.dtype.newbyteorder("=")).view(np.int64)
    if values.dtype == np.uint64:
        return (values.astype(np.uint64) ^ np.uint64(1 << 63)).view(np.int64)
    return values.astype(np.int64)


def _differences(values: Ints) -> Ints:
    before, after = values[:-1], values[1:]
    steps = after - before  # wraps around
    wrapped = ((before ^ after) & (after ^ steps)) < 0
    return np.maximum(np.where(wrapped, np.where(after > before, _MOST, -_MOST), steps), -_MOST)


_MOST = np.int64(np.iinfo(np.int64).max)


# The rule -------------------------------------------------------------------------------------------------


def largest_step(middle: Middle) -> int | float:
    """Return 1.5 times the median; an integer, rounded down, if steps are integers."""
    lower, upper = middle
    if isinstance(lower, int) and isinstance(upper, int):
        return 3 * (lower + upper) // 4
    return 0.75 * (lower + upper)


def jumps_of(blocks: Blocks, largest: int | float) -> Iterator[Ints]:
    """Yield the rows that a jump leads to, block by block."""
    for steps in blocks():
        is_jump = ~steps.known | (steps.values <= 0) | (steps.values > largest)
        yield steps.first + np.flatnonzero(is_jump)


def too_many(jumps: int, steps: int) -> bool:
    """Return True if ``data.gaps = "auto"`` does not leave out so many."""
    return jumps > LARGEST_SHARE * steps


def as_text(rows: list[Ints]) -> str:
    """Return rows as `DataPlan.jumps` keeps them."""
    return " ".join(" ".join(map(str, some.tolist())) for some in rows if len(some))


# The median -----------------------------------------------------------------------------------------------


def middle_steps(blocks: Blocks) -> Middle | None:
    """Return the one or two known steps whose mean is the median; None if no step is known.

    Where few steps differ, each is counted. Else they are counted by their leading bits, then those with the bits of
    the median by their next ones, until they are few.
    """
    few, leading, of_floats = _count(blocks)
    number = int(leading.sum())
    if not number:
        return None
    ranks = ((number - 1) // 2, number // 2)
    if few is None:
        lower, upper = _select(blocks, 0, 0, leading, ranks)
    else:
        keys, counts = few
        lower, upper = keys[np.searchsorted(np.cumsum(counts), ranks, side="right")].tolist()
    return _step(lower, of_floats), _step(upper, of_floats)


def _count(blocks: Blocks) -> tuple[tuple[Hashes, Ints] | None, Ints, bool]:
    """Count all known steps: each, if that is possible, and by their leading bits; tell whether they are floats."""
    few: tuple[Hashes, Ints] | None = (np.zeros(0, np.uint64), np.zeros(0, np.int64))
    leading, of_floats = np.zeros(1 << DIGIT, np.int64), False
    for steps in blocks():
        of_floats = steps.values.dtype.kind == "f"
        keys = _keys(steps)
        leading += np.bincount((keys >> np.uint64(64 - DIGIT)).astype(np.int64), minlength=1 << DIGIT)
        few = None if few is None else _merged(few, keys)
        if few is not None and len(few[0]) > DISTINCT_STEPS:
            few = None
    return few, leading, of_floats


def _merged(few: tuple[Hashes, Ints], keys: Hashes) -> tuple[Hashes, Ints]:
    new, counts = np.unique(keys, return_counts=True)
    merged, place = np.unique(np.concatenate([few[0], new]), return_inverse=True)
    total = np.zeros(len(merged), np.int64)
    np.add.at(total, place, np.concatenate([few[1], counts]))
    return merged, total


def _select(blocks: Blocks, prefix: int, bits: int, counts: Ints, ranks: tuple[int, int]) -> tuple[int, int]:
    """Return the keys at two neighbouring ranks among those whose first bits are a prefix.

    Parameters
    ----------
    blocks : callable
    prefix, bits : int
        The first bits that the keys share, and how many they are.
    counts : int64[2 ** DIGIT]
        Number of keys by their next bits.
    ranks : (int, int)
        Equal, or neighbours; counted among the keys with the prefix.
    """
    ends = np.cumsum(counts)
    low, high = np.searchsorted(ends, ranks, side="right").tolist()
    if low != high:
        first, second = ((rank, rank) for rank in ranks)
        return _select(blocks, prefix, bits, counts, first)[0], _select(blocks, prefix, bits, counts, second)[0]
    before = int(ends[low] - counts[low])
    prefix, bits, inside = prefix << DIGIT | low, bits + DIGIT, (ranks[0] - before, ranks[1] - before)
    if bits == 64:
        return prefix, prefix
    matching = (keys[keys >> np.uint64(64 - bits) == prefix] for keys in map(_keys, blocks()))
    if counts[low] <= KEPT_STEPS:
        chosen = np.partition(np.concatenate(list(matching)), inside)
        return int(chosen[inside[0]]), int(chosen[inside[1]])
    following = np.zeros(1 << DIGIT, np.int64)
    for keys in matching:
        digits = keys >> np.uint64(64 - bits - DIGIT) & np.uint64((1 << DIGIT) - 1)
        following += np.bincount(digits.astype(np.int64), minlength=1 << DIGIT)
    return _select(blocks, prefix, bits, following, inside)


_SIGN = 1 << 63


def _keys(steps: Steps) -> Hashes:
    """Return the known steps as unsigned integers in the same order."""
    known = steps.values[steps.known]
    bits = known.view(np.uint64)
    if known.dtype.kind == "f":
        return bits ^ np.where(bits >> np.uint64(63), np.uint64(2 * _SIGN - 1), np.uint64(_SIGN))
    return bits ^ np.uint64(_SIGN)


def _step(key: int, of_floats: bool) -> int | float:
    """Return the step of a key."""
    if not of_floats:
        return key - _SIGN
    return float(np.uint64(key ^ (_SIGN if key & _SIGN else 2 * _SIGN - 1)).view(np.float64))
