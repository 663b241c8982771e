"""Chunks that a store does not have: which of them stand for a value, and which are lost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from dtrain.data.plan.missing import absence_of
from dtrain.data.read.open import open_arrays
from dtrain.data.read.presence import absent_chunks
from dtrain.data.samples import Samples

MOST_LISTED, MOST_REQUESTED = 200_000, 4096
"""Objects of a variable are looked for if they are at most so many, or so many where each needs a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """What is said about the chunks that are not stored."""

    missing: Literal["", "auto", "fill"] = ""
    """What reads them, if none is lost: ``fill`` where ``auto`` would refuse zeros of images, tokens or counts."""
    filled: str = ""
    """Which of them stand for their fill value, if none is lost."""
    lost: str = ""
    """Names a chunk that may be lost: `dtrain plan` refuses the store."""


def gaps_of(samples: Samples, with_nan: Collection[str]) -> Gaps:
    """Look for the chunks that training would read; only names are listed, and indices of shards are read.

    Parameters
    ----------
    samples : Samples
    with_nan : collection of str
        Variables of which stored chunks hold NaN: then chunks of NaN alone are left out, and not lost.
    """
    store, arrays = open_arrays(samples)
    counts: dict[str, int] = {}
    lost: list[str] = []
    missing: Literal["auto", "fill"] = "auto"
    most = MOST_LISTED if store.facts.can_list else MOST_REQUESTED
    for variable in samples.stored:
        if variable.num_objects > most:
            continue
        absent = list(absent_chunks(samples, store, arrays, variable, full=False))
        if not absent:
            continue
        counts[variable.name] = len(absent)
        absence = absence_of(samples, variable)
        if absence == "error" and variable.absent_value == 0 and not variable.part_of:
            missing = "fill"  # writers leave out zeros; a packed number that means 280 is lost
        elif absence == "error" or (absence == "nan" and variable.name not in with_nan):
            more = f" and {len(absent) - 1:,} more are" if len(absent) > 1 else " is"
            lost.append(f"chunk {absent[0].key} of {variable.name}{more} missing")
    if lost:
        others = f", and chunks of {len(lost) - 1} more variables" if len(lost) > 1 else ""
        return Gaps(lost=f"{lost[0]}{others}")
    objects = {variable.name: variable.num_objects for variable in samples.stored}
    texts = [f"{count:,} of {objects[name]:,} of {name}" for name, count in counts.items()]
    filled = f"chunks that the store leaves out are read as the fill value: {', '.join(texts)}"
    return Gaps(missing=missing, filled=filled) if counts else Gaps()
