"""What a loader counts, and how the time that steps spend on data is shared among fetching, decoding and gathering.

    steps wait for the assembler      which gathers (gather), or waits for a part or reads it itself (parts)
    a part comes from a read thread   which waits for the store (fetch), or decodes (decode)

So the seconds that steps wait are split as the assembler's gather : parts, and of those for parts as the read threads'
fetch : decode. Steps that never wait may still share their core with these threads.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Counted:
    """The units that a loader has read, and the seconds of its consumer and threads."""

    units: int = 0
    bytes: int = 0
    """Decoded."""
    waited: float = 0.0
    """Of the consumer, for batches."""
    fetch: float = 0.0
    """Of all that read, together: at least one request to the store was under way."""
    decode: float = 0.0
    """Of all that read, together: beside requests. zarrs requests by itself: all of its time is here."""
    gather: float = 0.0
    """Of the assembler: it copied samples."""
    parts: float = 0.0
    """Of the assembler: it could not gather before a part was read."""
    read_cpu: float = 0.0
    """Of all that read, together: they were running. Without zarr's own threads."""
    gather_cpu: float = 0.0
    """Of the assembler: it was running while it copied samples."""

    def since(self, before: Counted) -> Counted:
        """Return what has been counted since then."""
        return Counted(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSeconds:
    """Seconds of a replica's steps that it spent on its data."""

    fetch: float
    decode: float
    gather: float

    @property
    def total(self) -> float:
        """Of all three."""
        return self.fetch + self.decode + self.gather


def data_seconds(counted: Counted, stolen: float = 0.0) -> DataSeconds:
    """Return the seconds that steps spent on data.

    Parameters
    ----------
    counted : Counted
    stolen : float
        Seconds that the thread of the steps was not running, although it waited for no batch. Of them count no more
        than the loader's threads were running: other programs use the processor too.

    Examples
    --------
    Of 6 s the assembler gathers for a third, and parts come from threads that wait for the store 3 s of 4:

    >>> data_seconds(Counted(waited=6.0, fetch=3.0, decode=1.0, gather=1.0, parts=2.0))
    DataSeconds(fetch=3.0, decode=1.0, gather=2.0)
    """
    for_parts = counted.waited * _share(counted.parts, counted.parts + counted.gather)
    fetch = for_parts * _share(counted.fetch, counted.fetch + counted.decode)
    running = counted.read_cpu + counted.gather_cpu
    taken = min(max(stolen, 0.0), running)
    by_reading = taken * _share(counted.read_cpu, running)
    return DataSeconds(
        fetch=fetch,
        decode=for_parts - fetch + by_reading,
        gather=counted.waited - for_parts + taken - by_reading,
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
