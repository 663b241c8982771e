"""What outlives a reader: it is read or noted once, also if the store is opened several times."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dtrain.data.encoding import Array
from dtrain.data.sparse import SparseRows, Starts


@dataclass(frozen=True)
class Kept:
    """Of one store."""

    preloaded: frozenset[str]
    """The variables that are preloaded."""
    rows: dict[str, Array] = field(default_factory=dict)
    """By preloaded dense variable: all rows."""
    sparse: dict[str, SparseRows] = field(default_factory=dict)
    """By preloaded sparse variable: all rows."""
    starts: dict[str, Starts] = field(default_factory=dict)
    """By sparse variable: where rows begin."""
    versions: dict[str, npt.NDArray[np.uint64]] = field(default_factory=dict)
    """By array: marks of the versions of files that were read first (`Faults`)."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of `rows` and `sparse`."""
    starting: threading.Lock = field(default_factory=threading.Lock)
    """Of `starts`; of several stores the same one, so that the memory for reading them is needed once."""
