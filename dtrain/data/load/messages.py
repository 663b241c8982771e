"""The messages between the schedule of a loader and its threads: events go in, instructions come out.

    event           it says                          instruction      the threads
    Started         the loader begins                Read             read a part into a slot of the arena
    ReadDone        a part lies in its slot          Open             take memory for a bundle of batches
    ReadFailed      a part could not be read         Gather           copy samples from the arena into the open bundle
    Gathered        the last `Gather` is done        Emit             hand the open bundle to the consumer
    Taken           the consumer used up a bundle    Recycle          take the memory of a bundle back
    Freed           nobody refers to a bundle        Abandon          forget the memory of a bundle
                                                     Fail             raise an error in the consumer
                                                     Finish           tell the consumer that there are no more batches

A bundle is a run of neighbouring batches that are assembled together, so that small batches cost no more than large
ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from dtrain.data.load.slots import Rows
from dtrain.data.plan.units import Box

# Events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Started:
    """The loader begins."""


@dataclass(frozen=True, slots=True)
class ReadDone:
    """A part lies in its slot."""

    slot: int
    bytes: int
    """Decoded."""
    fetch: float = 0.0
    """Seconds at the store."""
    decode: float = 0.0
    """Seconds of the rest."""
    cpu: float = 0.0
    """Seconds that the thread which read was running."""


@dataclass(frozen=True, slots=True)
class ReadFailed:
    """A part could not be read."""

    slot: int
    error: BaseException


@dataclass(frozen=True, slots=True)
class Gathered:
    """The last `Gather` is done."""


@dataclass(frozen=True, slots=True)
class Taken:
    """The consumer has taken all batches of a bundle and asks for the next bundle."""

    bundle: int


@dataclass(frozen=True, slots=True)
class Freed:
    """Nobody refers to the memory of an emitted bundle any more."""

    bundle: int


Event: TypeAlias = Started | ReadDone | ReadFailed | Gathered | Taken | Freed

# Instructions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Read:
    """Read the rows of a box into a slot."""

    slot: int
    box: Box


@dataclass(frozen=True, slots=True)
class Open:
    """Take memory for a bundle: neighbouring batches of these sizes. It is the one that is filled from now on."""

    bundle: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Gather:
    """Copy samples into the open bundle, from its sample `start` on; then report `Gathered`."""

    start: int
    rows: Rows


@dataclass(frozen=True, slots=True)
class Emit:
    """Hand the open bundle to the consumer."""


@dataclass(frozen=True, slots=True)
class Recycle:
    """Take the memory of a bundle back."""

    bundle: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """Forget the memory of a bundle: it belongs to whoever refers to it."""

    bundle: int


@dataclass(frozen=True, slots=True)
class Fail:
    """Raise an error in the consumer: the next samples could not be read."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class Finish:
    """Tell the consumer that there are no further batches."""


Instruction: TypeAlias = Read | Open | Gather | Emit | Recycle | Abandon | Fail | Finish
