"""Text for people: numbers, lines that fit a terminal, tables, and tables as HTML for notebooks."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TextIO

WIDTH = 80
"""Columns of lines that do not go to a terminal."""
NARROWEST = 20
WIDEST = 100
"""Columns of lines on a wider terminal: longer ones are hard to read."""


def number(value: float) -> str:
    """Return a number with four decimals, or in scientific notation where they would hide it.

    >>> number(0.5), number(0.0), number(0.0000123), number(-1e9), number(float("nan"))
    ('0.5000', '0.0000', '1.230e-05', '-1.000e+09', 'nan')
    """
    is_hidden = value != 0 and not 1e-3 <= abs(value) < 1e6
    return f"{value:.3e}" if is_hidden else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Return seconds to about two digits.

    >>> duration(0.00012), duration(0.0123), duration(1.26), duration(31.6)
    ('0.12 ms', '12 ms', '1.3 s', '32 s')
    """
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2g} ms"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def columns_of(stream: TextIO) -> int | None:
    """Return the columns of the terminal that a stream goes to, or what COLUMNS says; None without a terminal."""
    wanted = os.environ.get("COLUMNS", "")
    if wanted.isdigit() and int(wanted):
        return int(wanted)
    try:
        return os.get_terminal_size(stream.fileno()).columns or WIDTH
    except (OSError, ValueError, AttributeError):  # a file, a pipe, or no stream of the system's at all
        return None


def width_of(stream: TextIO) -> int:
    """Return the columns that lines on a stream may take."""
    return max(NARROWEST, min(columns_of(stream) or WIDTH, WIDEST))


def wrapped(text: str, width: int = WIDTH, indent: str = "  ") -> str:
    """Return a text in lines that end between words; `indent` begins the lines after the first."""
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def joined(parts: Sequence[str], width: int = WIDTH, between: str = "  ", indent: str = "  ") -> str:
    r"""Return parts in one line, or in several where they do not fit; a part is not broken.

    >>> joined(["round 1", "train_loss 0.5", "val_loss 0.5"], width=24)
    'round 1  train_loss 0.5\n  val_loss 0.5'
    """
    lines = [""]
    for part in parts:
        longer = f"{lines[-1]}{between}{part}" if lines[-1].strip() else f"{lines[-1]}{part}"
        if len(longer) > width and lines[-1].strip():
            lines.append(f"{indent}{part}")
        else:
            lines[-1] = longer
    return "\n".join(lines)


def text_table(rows: Sequence[tuple[str, str]], width: int = WIDTH) -> str:
    """Return rows of label and text as lines; a text that is too long goes on below its beginning."""
    column = max((len(label) for label, _ in rows), default=0) + 2
    return "\n".join(
        f"{label:<{column}}" + textwrap.indent(wrapped(text, max(NARROWEST, width - column), ""), " " * column).lstrip()
        for label, text in rows
    )


def shown(path: Path | str) -> str:
    """Return a path as a person would type it here; a URL as it is."""
    if "://" in str(path):
        return str(path)
    absolute, here = Path(path).absolute(), Path.cwd()
    if ".." in absolute.parts:
        absolute = absolute.resolve()
    return os.path.relpath(absolute, here) if absolute.is_relative_to(here) else str(absolute)


def html_table(caption: str, rows: Iterable[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Return an HTML table; the first cell of each row is its heading. All text is escaped."""
    head = f"<tr>{_cells('th', header)}</tr>" if header else ""
    body = "".join(f"<tr>{_cells('th', row[:1])}{_cells('td', row[1:])}</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption>{head}{body}</table>"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "".join(f"<{tag} style='text-align:left'>{escape(text)}</{tag}>" for text in texts)
