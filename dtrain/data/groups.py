"""Splits by group (``data.split.by``): rows with one value of a variable, such as a donor, lie in one split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dtrain.data.column import ColumnReader
from dtrain.data.encoding import Array
from dtrain.data.plan.hashing import GROUP, Hashes, Ints, hash64
from dtrain.data.plan.labels import LABELS, LEFT_OUT, REST, Labels, as_text
from dtrain.data.plan.splits import Runs
from dtrain.data.read.inventory import of_each
from dtrain.data.samples import Coordinate, Samples
from dtrain.data.variable import Variable
from dtrain.errors import InvalidConfig, TooFewSamples, UnsuitableVariable

PENDING = 1 << 18
"""Groups are merged with those that are known once they are so many, and as many."""


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a store."""

    keys: Hashes
    """One for each value, ascending: integers themselves, the hash of a text or of a category's name."""
    rows: Ints
    """By group: the number of its rows."""
    absent: int = 0
    """Chunks that are not stored: their rows are of the group of the fill value."""
    are_codes: bool = False
    """The keys are codes of categories, which may stand for others in another store."""


@dataclass(frozen=True, slots=True)
class DealtGroups:
    """Which split each group of all stores lies in."""

    keys: Hashes
    """Ascending."""
    labels: Labels

    def of(self, keys: Hashes) -> Labels:
        """Return the labels of some groups; one that is not known, since none of its rows is used, is left out."""
        place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[place] == keys, self.labels[place], LEFT_OUT).astype(np.uint8)


# Dealt ----------------------------------------------------------------------------------------------------


def deal_groups(stores: Sequence[Groups], shares: Mapping[str, float], seed: int) -> DealtGroups:
    """Deal groups to splits, so that these hold their shares of rows, as well as groups allow.

    Test takes groups in a seeded order, each that brings it nearer to its share, and at least one; then validation.
    Stores may share groups: those of one value lie in one split.

    Parameters
    ----------
    stores : sequence of Groups
    shares : mapping of str to float
        Of ``val`` and ``test``.
    seed : int

    Raises
    ------
    TooFewSamples
        There are fewer groups than splits.
    UnsuitableVariable
        Several stores hold codes of so many categories that their names are not compared.
    """
    _check_codes(stores)
    keys, rows = _merged([(store.keys, store.rows) for store in stores])
    names = [name for name in ("test", "val") if shares.get(name, 0.0) > 0]
    if len(keys) <= len(names):
        raise TooFewSamples(
            f"data.split.by: there are {len(keys):,} groups, for {len(names) + 1} splits.",
            "Hold out less (val = 0), or split by share.",
        )
    labels = np.full(len(keys), REST, np.uint8)
    order = np.argsort(hash64(seed, GROUP, keys))  # different groups have different hashes: nothing is tied
    for number, name in enumerate(names):
        free = order[labels[order] == REST]
        most = len(free) - (len(names) - number)  # each later split, and training, needs one
        labels[_filled(free, rows, shares[name] * int(rows.sum()), most)] = LABELS[name]
    return DealtGroups(keys, labels)


def _check_codes(stores: Sequence[Groups]) -> None:
    """Refuse codes of several stores whose categories are not compared."""
    if len(stores) > 1 and any(store.are_codes for store in stores):
        raise UnsuitableVariable(
            "data.split.by: several stores hold categories that are too many to compare: one code may stand for "
            "different groups.",
            "Write the groups as texts, or as integers that mean the same in all stores.",
        )


def _filled(order: Ints, rows: Ints, wanted: float, most: int) -> list[int]:
    """Return groups whose rows are as near to a number as a walk through all of them finds."""
    chosen: list[int] = []
    have, smallest = 0, int(rows[order].min())
    for group, size in zip(order.tolist(), rows[order].tolist(), strict=True):
        if len(chosen) == most or have + smallest / 2 > wanted:
            break
        if have + size / 2 <= wanted:
            chosen.append(group)
            have += size
    return chosen or [int(order[np.argmin(rows[order])])]


# Read -----------------------------------------------------------------------------------------------------


def count_groups(samples: Samples, absent: Runs = ()) -> Groups:
    """Count the rows of each group of a store.

    Parameters
    ----------
    samples : Samples
    absent : tuple of (int, int)
        Runs of rows that are not used.

    Raises
    ------
    InvalidConfig, UnsuitableVariable
        The variable is not there, or holds no groups.
    ChunkMissing, ChunkUndecodable, DataChanged
        Names its chunk.
    """
    if samples.members:
        return _of_stores(samples, absent)
    reader = _reader(samples)
    known: list[tuple[Hashes, Ints]] = [(np.zeros(0, np.uint64), np.zeros(0, np.int64))]
    pending = 0
    for first, keys in _keys(reader):
        is_used = np.ones(len(keys), bool)
        for start, stop in absent:
            is_used[max(0, start - first) : max(0, stop - first)] = False
        found, count = np.unique(keys[is_used], return_counts=True)
        known.append((found, count))
        pending += len(found)
        if pending > max(PENDING, len(known[0][0])):
            known, pending = [_merged(known)], 0
    return Groups(*_merged(known), reader.absent, _are_codes(reader.column.variable))


def _of_stores(samples: Samples, absent: Runs) -> Groups:
    """Count the rows of each group of several stores that are one: stores may share groups."""
    in_rows_of = (tuple((start - begin, stop - begin) for start, stop in absent) for begin in samples.begins)
    own = of_each(samples, count_groups, in_rows_of)
    _check_codes(own)
    return Groups(*_merged([(one.keys, one.rows) for one in own]), sum(one.absent for one in own), own[0].are_codes)


def label_rows(samples: Samples, dealt: DealtGroups) -> str:
    """Return the label of each row of a store as text (`DataPlan.row_labels`)."""
    labels = np.full(samples.num_samples, LEFT_OUT, np.uint8)
    for one, begin in zip(samples.stores, samples.begins or (0,), strict=True):
        for first, keys in _keys(_reader(one)):
            labels[begin + first : begin + first + len(keys)] = dealt.of(keys)
    return as_text(labels)


def _reader(samples: Samples) -> ColumnReader:
    column, by = samples.split_column, samples.config.split.by
    if not isinstance(column, Coordinate):
        raise InvalidConfig(
            f'data.split.by = "{by}": {samples.path}: {column}.',
            f"Name a variable that has the dimension {samples.sample_dim} alone.",
        )
    return ColumnReader(samples, column, samples.first_row, samples.num_samples, fills=True)


def _keys(reader: ColumnReader) -> Iterator[tuple[int, Hashes]]:
    for first, values in reader.blocks():
        yield first, _hashed(values, reader.column.variable)


def _are_codes(variable: Variable) -> bool:
    """Whether categories are known by their codes alone: there are very many."""
    return variable.categories is not None and len(variable.categories.names) < variable.categories.count


def _hashed(values: Array, variable: Variable) -> Hashes:
    """Return an integer for each value: the same one in every process and store."""
    if variable.categories is not None and not _are_codes(variable):
        names = np.array([*variable.categories.names, ""], object)  # the last is that of rows without a category
        is_named = (values >= 0) & (values < variable.categories.count)
        return _of_texts(names)[np.where(is_named, values, -1)]
    if values.dtype.kind in "iub":
        return values.astype(np.uint64 if values.dtype.kind == "u" else np.int64).view(np.uint64)
    if values.dtype.kind not in "TOU":
        raise UnsuitableVariable(
            f'data.split.by = "{variable.name}" has dtype {values.dtype}; groups are integers, bools or texts.',
            "Name another variable, or store each group as an integer.",
        )
    return _of_texts(values)


def _of_texts(values: Array) -> Hashes:
    texts, number = np.unique(values.astype(object).astype(str), return_inverse=True)
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts.tolist())
    hashes: Hashes = np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)[number]
    return hashes


def _merged(tables: Sequence[tuple[Hashes, Ints]]) -> tuple[Hashes, Ints]:
    """Add the rows of groups."""
    keys, place = np.unique(np.concatenate([keys for keys, _ in tables]), return_inverse=True)
    rows = np.zeros(len(keys), np.int64)
    np.add.at(rows, place, np.concatenate([rows for _, rows in tables]))
    return keys, rows
