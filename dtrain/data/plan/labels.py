"""Which split each row or patch belongs to, where splits are given by coordinate or by group: a label each.

    coordinate    2015      2016      2017      2018      2019
    labels        0 0 0 0 0 0 0 0 0 3 1 1 1 1 3 2 2 2 2 2 2      val = 2017, test from 2018 on, gap = 1

A plan keeps labels as one text (`as_text`): plan.json stays small, also for millions of rows.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from dtrain.data.plan.hashing import Compact, Ints, compact
from dtrain.data.tiles import Cut

REST, VAL, TEST, LEFT_OUT = range(4)
"""`REST` is what shares are drawn from: what they leave is trained on. Nobody uses what is left out."""
LABELS: Mapping[str, int] = {"val": VAL, "test": TEST}

Labels: TypeAlias = npt.NDArray[np.uint8]

KEPT_TEXTS = 32
"""A process remembers where the labels of so many texts are, by label."""


@dataclass(frozen=True, slots=True)
class GivenSplits:
    """The splits that the configuration gives by coordinate or by group, as `DataPlan` keeps them."""

    rows: str = ""
    """A label for each row; empty if rows have none."""
    dim: str = ""
    """The patched dimension whose patches have labels."""
    tiles: str = ""
    """A label for each patch along that dimension."""


BY_SHARE = GivenSplits()
"""No split is given: all are shares."""


def as_text(labels: Labels) -> str:
    """Return labels as one text."""
    return base64.b64encode(zlib.compress(labels.tobytes())).decode()


def from_text(text: str) -> Labels:
    """Return the labels of a text."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8)


def same_labels(one: str, other: str) -> bool:
    """Return True if two texts hold the same labels; compressed, they may differ."""
    return one == other or (bool(one) == bool(other) and np.array_equal(from_text(one), from_text(other)))


def range_labels(length: int, ranges: Mapping[str, Sequence[tuple[int, int]]], gap: int) -> Labels:
    """Return the label of each place along a dimension.

    Places of different splits are more than `gap` places apart: training gives way to validation, and that to test.

    Parameters
    ----------
    length : int
    ranges : mapping of str to sequence of (int, int)
        By split: the first place of each range, and the one after its last. Those of two splits do not overlap.
    gap : int
    """
    labels = np.full(length, REST, np.uint8)
    for name in sorted(ranges, key=LABELS.__getitem__):
        for start, stop in ranges[name]:
            labels[max(0, start - gap) : stop + gap] = LEFT_OUT
        for start, stop in ranges[name]:
            labels[start:stop] = LABELS[name]
    return labels


def tile_labels(places: Labels, cut: Cut) -> Labels:
    """Return the label of each patch along a dimension: that of all its places, else it is left out."""
    starts = np.array([cut.start(index) for index in range(cut.count)])
    begins = np.r_[0, np.cumsum(np.diff(places) != 0)]
    is_one = begins[starts] == begins[starts + cut.size - 1]
    return np.where(is_one, places[starts], LEFT_OUT).astype(np.uint8)


def has_label(text: str, label: int) -> bool:
    """Return True if some row or patch has a label."""
    return bool(len(runs_of(text, label)[0]))


@lru_cache(maxsize=KEPT_TEXTS)
def runs_of(text: str, label: int) -> tuple[Compact, Compact]:
    """Return the runs of neighbours with a label: the first of each, and the one after its last, ascending."""
    labels = from_text(text)
    changes = np.flatnonzero(np.diff(labels == label, prepend=False, append=False))
    begins, ends = (compact(changes[part::2].astype(np.int64), len(labels)) for part in (0, 1))
    return begins, ends


def count_runs(text: str) -> int:
    """Return the number of runs of neighbours with one label."""
    return 1 + int(np.count_nonzero(np.diff(from_text(text))))


@lru_cache(maxsize=KEPT_TEXTS)
def places_of(text: str, label: int) -> Ints:
    """Return the places that have a label, ascending."""
    return np.flatnonzero(from_text(text) == label)
