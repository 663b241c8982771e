"""Chunks that a store does not have: which of them stand for a value, and which are lost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from dtrain.data.encoding import is_missing
from dtrain.data.read.open import open_arrays
from dtrain.data.read.presence import absent_chunks
from dtrain.data.read.shards import ArrayLike
from dtrain.data.samples import Samples, Variable

MOST_LISTED, MOST_REQUESTED = 200_000, 4096
"""Objects of a variable are looked for if they are at most so many, or so many where each needs a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gaps:
    """What to write for the chunks that are not stored."""

    missing: str = ""
    """``fill`` if all of them stand for a value; else empty, and `dtrain plan` names the first that is lost."""
    why: str = ""
    lost: str = ""
    """Names a chunk that may be lost."""


def gaps_of(samples: Samples, target: str, with_nan: Collection[str]) -> Gaps:
    """Look for the chunks that training would read; only names are listed, and indices of shards are read.

    Parameters
    ----------
    samples : Samples
    target : str
        Name of the target.
    with_nan : collection of str
        Variables of which stored chunks hold NaN: then chunks of NaN alone are left out, and not lost.
    """
    store, arrays = open_arrays(samples)
    counts: dict[str, int] = {}
    lost: list[str] = []
    most = MOST_LISTED if store.facts.can_list else MOST_REQUESTED
    for variable in samples.variables:
        if variable.num_objects > most:
            continue
        absent = list(absent_chunks(samples, store, arrays, variable, full=False))
        if not absent:
            continue
        counts[variable.name] = len(absent)
        reading = reads_as(variable, arrays[variable.name], is_target=variable.name == target)
        if reading == "lost" or (reading == "nan" and variable.name not in with_nan):
            more = f" and {len(absent) - 1:,} more are" if len(absent) > 1 else " is"
            lost.append(f"chunk {absent[0].key} of {variable.name}{more} missing")
    if lost:
        others = f", and chunks of {len(lost) - 1} more variables" if len(lost) > 1 else ""
        return Gaps(lost=f"{lost[0]}{others}")
    texts = [f"{count:,} of {samples.variable(name).num_objects:,} of {name}" for name, count in counts.items()]
    why = f"chunks that the store leaves out are read as the fill value: {', '.join(texts)}"
    return Gaps(missing="fill", why=why) if counts else Gaps()


def reads_as(variable: Variable, array: ArrayLike, *, is_target: bool) -> str:
    """Return what a missing chunk of a variable stands for: ``fill``, ``nan``, or ``lost`` if it may be data.

    It is judged by what the fill value decodes to. Writers leave out chunks of NaN, and masks of zeros; packed numbers,
    floats, images and tokens of one value are more likely lost.
    """
    encoding, stored = variable.encoding, np.asarray(array.fill_value if array.fill_value is not None else 0)
    if stored.dtype.kind == "f" and np.isnan(stored):
        return "nan"
    if encoding is not None and encoding.missing:
        meant = stored.astype(variable.dtype)
        meant = meant.view(encoding.unsigned) if encoding.unsigned else meant
        if bool(is_missing(meant, encoding)):
            return "nan"
    dtype = np.dtype(variable.dtype)
    is_plain = dtype.kind in "iu" and (encoding is None or not encoding.is_packed)
    return "fill" if dtype.kind == "b" or (is_plain and (is_target or variable.is_static)) else "lost"
