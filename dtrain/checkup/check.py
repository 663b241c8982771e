"""A check and its result; and time limits, since what is asked may never answer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from dtrain.errors import DtrainError, one_line

Status: TypeAlias = Literal["ok", "warning", "error"]
Value = TypeVar("Value")

LEAVE_SECONDS = 30.0
"""How long a cluster may take to close."""
CLUSTER_FAILED, DATA_FAILED = 6, 5
"""Exit codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of a check: one line for people."""

    name: str
    status: Status
    text: str
    cure: str = ""
    code: int = 0
    """The exit code that an error leads to."""

    def __post_init__(self) -> None:
        if self.status != "error":
            object.__setattr__(self, "code", 0)


class TimeOver(Exception):
    """A check has taken longer than it may."""


def limited(function: Callable[[], Value], seconds: float) -> Value:
    """Return what a function gives; its thread is left alone where it takes too long.

    Raises
    ------
    TimeOver
        It did not end in time.
    """
    results: list[Value] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, name="dtrain-check", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeOver(f"no answer within {seconds:.0f} s")
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def held(opened: AbstractContextManager[Value], seconds: float) -> Iterator[Value]:
    """Give what a context manager gives; it is entered and left in a thread of its own, within a time limit.

    Raises
    ------
    TimeOver
        It was not entered in time.
    """
    entered: queue.Queue[tuple[Value | None, BaseException | None]] = queue.Queue()
    over = threading.Event()

    def keep() -> None:
        try:
            with opened as value:
                entered.put((value, None))
                over.wait()
        except BaseException as error:
            entered.put((None, error))

    thread = threading.Thread(target=keep, name="dtrain-check-cluster", daemon=True)
    thread.start()
    try:
        try:
            value, error = entered.get(timeout=seconds)
        except queue.Empty:
            raise TimeOver(f"no answer within {seconds:.0f} s") from None
        if error is not None:
            raise error
        yield value  # type: ignore[misc]
    finally:
        over.set()
        thread.join(LEAVE_SECONDS)


def failed(name: str, error: BaseException, code: int, cure: str) -> Check:
    """Return an error in words."""
    if isinstance(error, DtrainError):
        return Check(name=name, status="error", text=error.message, cure=error.hint or cure, code=code)
    kind = "" if isinstance(error, TimeOver) else f"{type(error).__name__}: "
    return Check(name=name, status="error", text=f"{kind}{one_line(error)}", cure=cure, code=code)


def exit_code(checks: Sequence[Check]) -> int:
    """Return the exit code of all checks: 0, or that of the first error."""
    return next((check.code for check in checks if check.status == "error"), 0)
