"""What is not intact, in a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from dtrain.errors import DtrainError, RunConflict, one_line

What: TypeAlias = Literal["missing", "damaged", "modified", "new", "unlisted"]
"""Absent; unreadable or undecodable; other bytes than listed; not listed in the manifest; not a file of the round."""


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
"""Called with each fault as it is found."""


def tell(report: Report, file: Path, check: Callable[[], object]) -> bool:
    """Call a check of a file, and tell the fault that it raises; return whether there is none.

    Raises
    ------
    RunConflict
        Another version of dtrain has written the file.
    """
    try:
        check()
    except RunConflict:
        raise
    except DtrainError as error:
        report(Fault("damaged", "", error.message))
    except MemoryError:
        report(Fault("damaged", str(file), "it is larger than the memory"))
    except Exception as error:  # the file has its digest, and holds what no version of dtrain writes
        report(Fault("damaged", str(file), f"it cannot be read: {one_line(error)}"))
    else:
        return True
    return False


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
