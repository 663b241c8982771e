"""The classes of errors and their exit codes; the message and the hint stand where an error is raised.

There is one class for each mistake or fault that a user can meet. Any other exception is a bug of dtrain (exit code 1).
A message names what was given and what is allowed; the hint says what to do. Both are printed, logged and kept: of URLs
in them, also in what other packages say, user, password, query and fragment are left out (`dtrain.urls`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from dtrain.urls import redacted


class DtrainError(Exception):
    """Base of all errors that dtrain raises on purpose.

    Parameters
    ----------
    message : str
        Names what was given and what is allowed.
    hint : str, optional
        Says what to do.
    """

    code = 1
    """Exit code of the command line."""

    def __init__(self, message: str, hint: str = "") -> None:
        self.message, self.hint = redacted(message), redacted(hint)
        super().__init__(self.message, self.hint)

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


# 2: usage -----------------------------------------------------------------------------------------------


class ConfigFileNotFound(DtrainError, FileNotFoundError):
    """The config file does not exist."""

    code = 2


class RunNotFound(DtrainError, FileNotFoundError):
    """There is no such run."""

    code = 2


class RoundNotFound(DtrainError, LookupError):
    """The run keeps no such round."""

    code = 2


class UsageError(DtrainError, ValueError):
    """An argument on the command line is wrong."""

    code = 2


# 3: config or plan invalid ------------------------------------------------------------------------------


class InvalidConfig(DtrainError, ValueError):
    """A key or value of the configuration is not allowed."""

    code = 3


class NothingSelected(InvalidConfig):
    """A coordinate has none of the values that are chosen."""


class UnknownVariable(DtrainError, LookupError):
    """The Zarr group has no variable of that name."""

    code = 3


class LengthsDiffer(DtrainError, ValueError):
    """Variables disagree about the number of samples."""

    code = 3


class UnsuitableVariable(DtrainError, ValueError):
    """A variable's dtype, dimensions or encoding cannot be trained on."""

    code = 3


class ShapesDiffer(DtrainError, ValueError):
    """The model's output does not fit the target, or its input does not fit the model."""

    code = 3


class NotAModule(DtrainError, TypeError):
    """The function given as model did not return a torch.nn.Module."""

    code = 3


class UnsuitableModel(DtrainError, TypeError):
    """The module cannot be trained as it is."""

    code = 3


class UserCodeFailed(DtrainError, RuntimeError):
    """A function of the user could not be found or raised an exception."""

    code = 3


class ChunkTooLarge(DtrainError, ValueError):
    """One stored chunk does not fit the memory of a worker."""

    code = 3


class TooFewSamples(DtrainError, ValueError):
    """There are fewer samples than replicas, or a split is empty."""

    code = 3


class CoordinateJumps(DtrainError, ValueError):
    """The coordinate of the sample dimension jumps, so that windows would hold rows that are not neighbours."""

    code = 3


class FirstLossNotFinite(DtrainError, ArithmeticError):
    """The loss of the first batch is not finite."""

    code = 3


# 4: run conflict ----------------------------------------------------------------------------------------


class RunConflict(DtrainError, ValueError):
    """The run exists with another configuration, data or code."""

    code = 4


class RunLocked(DtrainError, RuntimeError):
    """Another process is training this run."""

    code = 4


class OutputExists(DtrainError, FileExistsError):
    """A file to be written is already there."""

    code = 4


class ManifestConflict(DtrainError, ValueError):
    """Another version of dtrain has written the manifest of a store."""

    code = 4


# 5: data missing or corrupt -----------------------------------------------------------------------------


class DataNotFound(DtrainError, FileNotFoundError):
    """Nothing lies at the data's path."""

    code = 5


class StoreForbidden(DtrainError, PermissionError):
    """A server refuses access to the data."""

    code = 5


class NotZarr(DtrainError, ValueError):
    """The data's path does not hold a Zarr group."""

    code = 5


class ChunkMissing(DtrainError, FileNotFoundError):
    """A chunk that training reads is not stored; Zarr would silently give the fill value."""

    code = 5


class ChunkUndecodable(DtrainError, OSError):
    """A stored chunk cannot be read or decoded."""

    code = 5


class NonFiniteData(DtrainError, ArithmeticError):
    """A float variable holds NaN or infinity."""

    code = 5


class DataChanged(DtrainError, RuntimeError):
    """The store differs from the one that the run was planned on."""

    code = 5


class RunDamaged(DtrainError, OSError):
    """No committed round of a run can be read."""

    code = 5


class ManifestDamaged(DtrainError, OSError):
    """The manifest of a store cannot be read, or has been modified."""

    code = 5


# 6: cluster ---------------------------------------------------------------------------------------------


class ClusterUnreachable(DtrainError, ConnectionError):
    """No scheduler answers at the given address, or it has no worker."""

    code = 6


class ClusterUnsuitable(DtrainError, RuntimeError):
    """Client and workers differ in versions, or a worker lacks a package."""

    code = 6


# 7: diverged --------------------------------------------------------------------------------------------


class Diverged(DtrainError, ArithmeticError):
    """Too many replicas gave parameters that are not finite."""

    code = 7


# 8: memory or disk --------------------------------------------------------------------------------------


class OutOfMemory(DtrainError, RuntimeError):
    """A worker has less memory than its task needs."""

    code = 8


class DiskFull(DtrainError, OSError):
    """The run directory cannot be written."""

    code = 8


# 75: temporary; the same command continues ---------------------------------------------------------------


class ClusterLost(DtrainError, ConnectionError):
    """The scheduler or all workers went away; committed rounds are safe."""

    code = 75


class StoreUnavailable(DtrainError, ConnectionError):
    """A server that holds the data fails or does not answer, even after retries."""

    code = 75


class Stopped(DtrainError, RuntimeError):
    """The process was asked to stop (SIGTERM or a time limit); committed rounds are safe."""

    code = 75


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or Interrupt Kernel in a notebook, has ended a training; says how to go on.

    Parameters
    ----------
    message : str
        Says what is kept.
    hint : str
        Says how to go on.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}"

    def _render_traceback_(self) -> list[str]:
        """Return the lines that a notebook prints in place of the traceback."""
        return [self.message, self.hint]


def one_line(error: BaseException) -> str:
    """Return the message of an exception in one line, or its type if it has no message; its URLs are redacted.

    >>> one_line(ValueError("of  two   lines")), one_line(KeyError())
    ('of two lines', 'KeyError')
    """
    return redacted(" ".join(str(error).split())) or type(error).__name__


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return ``; did you mean "..."?`` for the closest allowed name, or an empty string."""
    close = difflib.get_close_matches(given, list(allowed), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def listed(names: Sequence[object], most: int = 6) -> str:
    """Return names for a sentence, the first ones of many.

    >>> listed(["a", "b", "c"]), listed(range(9), most=2)
    ('a, b, c', '0, 1 and 7 more')
    """
    if len(names) <= most + 1:
        return ", ".join(map(str, names))
    return f"{', '.join(map(str, names[:most]))} and {len(names) - most:,} more"


def shortened(text: str, most: int) -> str:
    """Return a text with its end left out, if it has more than so many characters.

    >>> shortened("short", 9), shortened("rather long", 9)
    ('short', 'rather...')
    """
    return text if len(text) <= most else f"{text[: most - 3]}..."
