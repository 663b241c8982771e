"""What is stored of some samples, of one store or of several that are one: looked for before training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from dtrain.data.plan.missing import AbsentChunks
from dtrain.data.plan.splits import Runs
from dtrain.data.read.presence import absent_rows, check_presence, check_some, chunks_read, look_up
from dtrain.data.samples import Samples

TOGETHER = 16
"""Stores that are looked at at a time."""
DIGEST_LETTERS = 16
"""Of the digest of each of several stores."""
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Inventory:
    """What is stored of some samples."""

    digests: Mapping[str, str]
    """By variable (`content_digest`); of several stores, by the number of each."""
    absent: Mapping[str, AbsentChunks]
    """By variable: the chunks that are not there and are no fault, if they were looked for."""


def take_inventory(samples: Samples, *, full: bool, digests: bool, presence: bool) -> Inventory:
    """Look for what is stored; files are looked up once for both the digests and the presence of chunks.

    Parameters
    ----------
    samples : Samples
    full : bool
        As of `check_presence`.
    digests, presence : bool
        What is looked for.

    Raises
    ------
    ChunkMissing, NonFiniteData, DataNotFound
        As `check_presence`.
    """
    found = of_each(samples, partial(_take, full=full, digests=digests, presence=presence))
    if not samples.members:
        return found[0]
    names = dict.fromkeys(name for one in found for name in one.absent)
    return Inventory(
        {str(number): short_digest(one.digests) for number, one in enumerate(found) if one.digests},
        {name: _added(samples, name, [one.absent[name] for one in found if name in one.absent]) for name in names},
    )


def _added(samples: Samples, name: str, absent: Sequence[AbsentChunks]) -> AbsentChunks:
    of = sum(chunks_read(one, one.variable(name)) for one in samples.members)
    return AbsentChunks(sum(one.chunks for one in absent), of)


def _take(samples: Samples, *, full: bool, digests: bool, presence: bool) -> Inventory:
    if presence:
        check_some(samples)
    found, missing = look_up(samples) if digests else ({}, {})
    return Inventory(found, check_presence(samples, full=full, missing=missing) if presence else {})


def short_digest(digests: Mapping[str, str]) -> str:
    """Return the digest that stands for one of several stores."""
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:DIGEST_LETTERS]


def rows_absent(samples: Samples) -> Runs:
    """Return the runs of rows for which a variable has no chunk (`absent_rows`)."""
    if not samples.members:
        return absent_rows(samples)
    pairs = zip(samples.begins, of_each(samples, absent_rows), strict=True)
    return tuple((begin + start, begin + stop) for begin, runs in pairs for start, stop in runs)


def of_each(samples: Samples, function: Callable[..., Value], *others: Iterable[Any]) -> list[Value]:
    """Return what a function gives for each store; of several, it is called for some at a time.

    Further arguments come from `others`, one of each for each store.
    """
    if not samples.members:
        return [function(samples, *own) for own in zip(*others, strict=True)] if others else [function(samples)]
    with ThreadPoolExecutor(TOGETHER, "dtrain-stores") as pool:
        return list(pool.map(function, samples.members, *others))
