"""What has been looked at of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

Tell: TypeAlias = Callable[[int, int, int], None]
"""Called with the objects looked at, the objects in all, and the stored bytes looked at."""
Compared: TypeAlias = Literal["", "written", "not written", "the same", "differs"]
"""What has become of a manifest; empty where there is none."""


@dataclass(frozen=True, slots=True)
class ArrayVerified:
    """What there is of an array."""

    name: str
    chunks: int
    absent: int
    """Chunks that are not stored."""
    reads_as: str
    """What they decode to."""
    checksums: bool
    """Whether a flipped bit is noticed without a manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreVerified:
    """What has been looked at of a store."""

    path: str
    snapshot: str
    groups: int
    arrays: tuple[ArrayVerified, ...]
    objects: int
    nbytes: int
    """Stored bytes of objects and documents."""
    faults: Mapping[str, int]
    """How many, by what they are."""
    manifest: Compared
    notes: tuple[str, ...]
    """Sentences that a person should know."""
