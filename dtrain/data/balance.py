"""Balanced classes (``data.balance``): how many times a pass samples come, so that classes have nearly equal shares.

class            a      b      c
samples      5,000  1,200     50       of the training split
factor           1      4    100       round(5,000 / samples), at most 255
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.column import ColumnReader
from dtrain.data.encoding import Array, is_missing
from dtrain.data.members import check_coding
from dtrain.data.plan.hashing import Ints
from dtrain.data.plan.labels import Labels
from dtrain.data.plan.multiplicity import MOST, anchor_numbers, multiplicities, num_anchors, repeats_of
from dtrain.data.plan.parts import Partition, cell_anchors
from dtrain.data.plan.units import DataPlan
from dtrain.data.samples import Coordinate, Samples
from dtrain.data.variable import Variable
from dtrain.errors import InvalidConfig, UnsuitableVariable

Class: TypeAlias = "int | str"
"""A class: the name of a category, else an integer."""
MOST_CLASSES = 1 << 16
SHOWN = 6
"""Classes that are printed."""


@dataclass(frozen=True, slots=True)
class Balance:
    """The classes of all stores."""

    by: str
    """The variable."""
    counts: Mapping[Class, int]
    """By class: its samples in the training split."""
    missing: int
    """Samples without a class; they come once."""

    @property
    def factors(self) -> dict[Class, int]:
        """By class: how many times a pass each of its samples comes."""
        most = max(self.counts.values(), default=0)
        return {key: min(MOST, max(1, round(most / count))) for key, count in self.counts.items()}

    def __str__(self) -> str:
        factors, own = self.factors, sorted(self.counts.items(), key=lambda pair: -pair[1])
        shown = [f"{key}: {count:,} x {factors[key]}" for key, count in own[:SHOWN]]
        shown += [f"{len(own) - SHOWN:,} more"] if len(own) > SHOWN else []
        shown += [f"without a class: {self.missing:,} x 1"] if self.missing else []
        capped = f" (a sample comes at most {MOST} times)" if MOST in factors.values() else ""
        return f"by {self.by}: {', '.join(shown)}{capped}"


def join_classes(stores: Sequence[Balance]) -> Balance:
    """Add the classes of several stores: those of one name or number are one."""
    counts: dict[Class, int] = {}
    for store in stores:
        for key, count in store.counts.items():
            counts[key] = counts.get(key, 0) + count
    return Balance(stores[0].by, counts, sum(store.missing for store in stores))


def count_classes(samples: Samples, plan: DataPlan) -> Balance:
    """Count the samples of each class in the training split of a store.

    The class of a sample is that of its anchor; of an input or target without a window, that of the row that it shows.

    Raises
    ------
    InvalidConfig, UnsuitableVariable
        The variable is not there, or holds no classes.
    ChunkMissing, ChunkUndecodable, DataChanged
        Names its chunk.
    """
    weights = _train_samples(plan)
    counts: dict[Class, int] = {}
    missing = 0
    for numbers, keys, place in _classes(samples, plan):
        found = np.bincount(place, weights[numbers], len(keys)).astype(np.int64)
        for key, count in zip(keys, found.tolist(), strict=True):
            if key is None:
                missing += count
            elif count:
                counts[key] = counts.get(key, 0) + count
        if len(counts) > MOST_CLASSES:
            raise UnsuitableVariable(
                f'data.balance = "{samples.config.balance}" has more than {MOST_CLASSES:,} classes in {samples.path}.',
                "Name a variable of few classes, for example the labels.",
            )
    return Balance(samples.config.balance, counts, missing)


def balanced(samples: Samples, plan: DataPlan, balance: Balance) -> Labels:
    """Return the multiplicities of a plan, uint8[anchor, patch], times the factor of each sample's class."""
    values, factors = multiplicities(plan), balance.factors
    for numbers, keys, place in _classes(samples, plan):
        of_key = np.array([1 if key is None else factors.get(key, 1) for key in keys], np.uint8)
        values[numbers] *= of_key[place][:, None]
    return values


def _train_samples(plan: DataPlan) -> npt.NDArray[np.unsignedinteger]:
    """Return, by anchor, its samples in the training split."""
    train, repeats = cell_anchors(plan, "train"), repeats_of(plan, "train")
    anchors = num_anchors(plan)
    total = np.zeros(anchors, np.min_scalar_type(plan.patches))
    for block in range(len(plan.grid)):
        held = _held(train, block, anchors)
        if repeats is not None:
            held = held * repeats.of_block(block).sum(axis=1, dtype=total.dtype)
        else:
            tiles = train.grid.tiles_in(np.array([block]))[0] if plan.blocks else plan.patches
            held = held * total.dtype.type(tiles)
        total += held.astype(total.dtype)
    return total


def _held(train: Partition, block: int, anchors: int) -> npt.NDArray[np.uint8]:
    """Return, by anchor, 1 if the training split holds it in a block."""
    plan = train.plan
    own = slice(*np.searchsorted(plan.blocks_of(train.cells), [block, block + 1]))
    first = anchor_numbers(plan).of(train.first[own].astype(np.int64))
    steps = np.zeros(anchors + 1, np.int8)
    np.add.at(steps, first, 1)
    np.subtract.at(steps, first + train.count[own], 1)
    return np.cumsum(steps[:-1], dtype=np.int8).view(np.uint8)


def _classes(samples: Samples, plan: DataPlan) -> Iterator[tuple[Ints, list[Class | None], Ints]]:
    """Yield anchors by their number, the classes that occur among them, and of each anchor the place of its class."""
    offset, stride, first_store = _offset(samples), plan.stride, samples.stores[0]
    known = _column(first_store).variable
    for one, before in zip(samples.stores, anchor_numbers(plan).before.tolist(), strict=False):
        column = _column(one)
        check_coding(one.path, column.variable, first_store.path, known)
        for first, values in ColumnReader(one, column, one.first_row, one.num_samples, fills=True).blocks():
            number = np.arange(-(-(first - offset) // stride), (first + len(values) - 1 - offset) // stride + 1)
            number = number[(number >= 0) & (number * stride < one.num_samples)]
            codes, place = np.unique(values[number * stride + offset - first], return_inverse=True)
            yield before + number, [_key(code, column.variable) for code in codes], place


def _offset(samples: Samples) -> int:
    """Return the row that shows a sample's class, counted from its anchor."""
    fields = (field for field in reversed(samples.fields) if field.name == samples.config.balance)
    return next((field.offsets[0] for field in fields if field.offsets and not field.window), 0)


def _column(samples: Samples) -> Coordinate:
    """Return the variable of classes of a store."""
    column, by = samples.class_column, samples.config.balance
    if not isinstance(column, Coordinate):
        raise InvalidConfig(
            f'data.balance = "{by}": {samples.path}: {column}.',
            f"Name a variable of classes that has the dimension {samples.sample_dim} alone.",
        )
    variable = column.variable
    is_packed = variable.encoding is not None and variable.encoding.is_packed
    if np.dtype(variable.dtype if variable.dtype != "T" else object).kind not in "iub" or is_packed:
        dtype = f"{'text' if variable.dtype == 'T' else np.dtype(variable.dtype)}{', packed' if is_packed else ''}"
        raise UnsuitableVariable(
            f'data.balance = "{by}": {samples.path}: it has dtype {dtype}; classes are integers, bools or codes of '
            "categories.",
            "Name another variable, or store each class as an integer.",
        )
    return column


def _key(code: np.generic, variable: Variable) -> Class | None:
    """Return the class of a stored value; None if it is none."""
    categories, encoding = variable.categories, variable.encoding
    value: Array = np.asarray(code)
    if encoding is not None and encoding.unsigned:
        value = value.view(encoding.unsigned)
    if encoding is not None and bool(is_missing(value.reshape(1), encoding)[0]):
        return None
    number = int(value)
    if categories is None:
        return number
    if not 0 <= number < categories.count:
        return None
    return categories.names[number] if len(categories.names) == categories.count else number
