"""Print results to stdout, narration to stderr, and errors in at most four lines; URLs without what may be secret."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

if TYPE_CHECKING:
    from dtrain.events import Reporter

Value = TypeVar("Value")
WAITING_SECONDS = 1.0
UNBROKEN = 1 << 20
"""Columns of lines that go to no terminal."""


@dataclass(frozen=True, slots=True)
class Options:
    """The global options."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    color: bool = True
    debug: bool = False
    out: TextIO = field(default_factory=lambda: sys.stdout)
    """Where results go. With ``json``, all else that is printed goes to stderr, also by code of the user's."""


def result(options: Options, text: str, record: dict[str, Any]) -> None:
    """Print a result: text for people, or one JSON object a line."""
    if options.json:
        emit(options, record)
    else:
        print(_public(text), flush=True)


def emit(options: Options, record: dict[str, Any]) -> None:
    """Print a JSON object."""
    print(json.dumps(_public(record)), file=options.out, flush=True)


def _public(value: Value) -> Value:
    """Return a text or a record without what may be secret in its URLs."""
    from dtrain.urls import redacted_in

    public: Value = redacted_in(value)
    return public


def say(options: Options, text: str) -> None:
    """Print narration."""
    if not options.quiet:
        print(_fitted(_public(text)), file=sys.stderr, flush=True)


def _fitted(text: str) -> str:
    """Return a sentence in lines that fit the terminal; without one it is a line, which programs can look for."""
    from dtrain.display import columns_of, width_of, wrapped

    return text if columns_of(sys.stderr) is None else wrapped(text, width_of(sys.stderr))


@contextmanager
def waiting(options: Options, what: str) -> Iterator[None]:
    """Say what is being waited for, if it takes longer than `WAITING_SECONDS`; on a terminal the line goes again."""
    done, live = threading.Event(), options.color and sys.stderr.isatty()

    def tell() -> None:
        if done.wait(WAITING_SECONDS) or options.quiet:
            return
        print(f"{_public(what)} ...", end="" if live else "\n", file=sys.stderr, flush=True)
        if live:
            done.wait()
            print("\r\033[2K", end="", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def progress(options: Options) -> AbstractContextManager[Reporter]:
    """Return what shows the events of a run."""
    if options.quiet:
        return nullcontext(lambda event: None)
    from dtrain.report.progress import terminal_progress

    return terminal_progress(color=options.color, verbose=options.verbose)


def error(options: Options, code: int, message: str, hint: str = "", log: str = "") -> None:
    """Print an error."""
    message, hint, log = _public(message), _public(hint), _public(log)
    lines = [f"error: {' '.join(message.split())}", *(f"  {' '.join(text.split())}" for text in (hint, log) if text)]
    lines = [_fitted(line) for line in lines]
    if options.color and sys.stderr.isatty():
        lines[0] = lines[0].replace("error:", "\033[31merror:\033[0m", 1)
    print("\n".join(lines), file=sys.stderr, flush=True)
    if options.json:
        emit(options, {"event": "error", "code": code, "message": message, "hint": hint})


def table(rows: list[tuple[str, str]]) -> str:
    """Return rows of label and text as lines that fit the terminal."""
    from dtrain.display import text_table, width_of

    return text_table(rows, width_of(sys.stdout))


def columns(header: list[str], rows: list[list[str]], keys: int) -> str:
    """Return a table of numbers that fits the terminal, however wide that is; without one it is not broken."""
    from dtrain.display import columns_of, columns_table

    return columns_table(header, rows, keys, columns_of(sys.stdout) or UNBROKEN)


def shown(path: Path | str) -> str:
    """Return a path as a person would type it here."""
    from dtrain import display

    return display.shown(path)
