"""What is not intact, in a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

What: TypeAlias = Literal["missing", "damaged", "modified", "new", "unlisted"]
"""It is not there; it cannot be read or decoded; its bytes are others; it was not there; nobody should have put it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A file or an object that is not intact."""

    what: What
    key: str
    """Of an object in its store; of a file its path."""
    why: str
    array: str = ""
    """The array that the object is of."""

    def __str__(self) -> str:
        return f"{self.what}: {self.key}: {self.why}" if self.key else f"{self.what}: {self.why}"


Report: TypeAlias = Callable[[Fault], None]
"""Is told each fault as it is found."""


class Counting:
    """Counts the faults that it passes on.

    Parameters
    ----------
    report : callable
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self.counts: Counter[str] = Counter()
        """Faults by what they are."""

    def __call__(self, fault: Fault) -> None:
        """Pass a fault on."""
        self.counts[fault.what] += 1
        self._report(fault)
