"""Text for people: numbers, lines that fit a terminal, tables, and tables as HTML for notebooks."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TextIO

from dtrain.urls import redacted_url

WIDTH = 80
"""Columns of lines that do not go to a terminal."""
NARROWEST = 20
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")
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


def clock(seconds: float) -> str:
    """Return seconds as a clock shows them.

    >>> clock(4.4), clock(62), clock(3723), clock(200000)
    ('0:04', '1:02', '1:02:03', '2 d 7:33')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def bytes_text(count: float) -> str:
    """Return a number of bytes in decimal units.

    >>> bytes_text(999), bytes_text(1_500), bytes_text(33e9)
    ('999 B', '1.5 kB', '33.0 GB')
    """
    for unit in BYTE_UNITS[:-1]:
        if count < 1000:
            return f"{count:,.0f} B" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} {BYTE_UNITS[-1]}"


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


def columns_table(header: Sequence[str], rows: Sequence[Sequence[str]], keys: int, width: int = WIDTH) -> str:
    """Return a table of numbers, aligned to the right; columns that do not fit go on below, beside the keys again.

    Parameters
    ----------
    header : sequence of str
    rows : sequence of sequence of str
    keys : int
        Columns at the left that say what a row is; they are aligned to the left.
    width : int
    """
    widths = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    most, blocks = max(1, width - sum(widths[:keys]) - 2 * keys), [list[int]()]
    for place in range(keys, len(header)):
        if blocks[-1] and sum(widths[one] + 2 for one in (*blocks[-1], place)) > most + 2:
            blocks.append([])
        blocks[-1].append(place)
    lines: list[str] = []
    for block in blocks:
        lines += [""] if lines else []
        for row in (header, *rows):
            cells = [row[place].ljust(widths[place]) for place in range(keys)]
            lines.append("  ".join([*cells, *(row[place].rjust(widths[place]) for place in block)]).rstrip())
    return "\n".join(lines)


def shown(path: Path | str) -> str:
    """Return a path as a person would type it here; a URL without what may be a secret."""
    if "://" in str(path):
        return redacted_url(str(path))
    absolute, here = Path(path).absolute(), Path.cwd()
    if ".." in absolute.parts:
        absolute = absolute.resolve()
    return os.path.relpath(absolute, here) if absolute.is_relative_to(here) else str(absolute)


# HTML -----------------------------------------------------------------------------------------------------
# Notebooks show it with their own colours: text inherits its colour, so that it fits light and dark themes, and the
# rest takes the variables of JupyterLab and VS Code. Style is inline: JupyterLab removes scripts and style elements.


def html_card(title: str, parts: Iterable[str], aside: str = "") -> str:
    """Return what stands in a notebook for an object of dtrain: a title and, below it, parts that are HTML.

    Parameters
    ----------
    title : str
        Text; it is escaped.
    parts : iterable of str
        HTML; empty ones are left out.
    aside : str
        HTML beside the title.
    """
    head = f"<div style='{HEAD}'><b>{escape(title)}</b>{f'<span>{aside}</span>' if aside else ''}</div>"
    return f"<div style='{CARD}'>{head}{''.join(f'<div>{part}</div>' for part in parts if part)}</div>"


def html_beside(parts: Iterable[str]) -> str:
    """Return HTML with parts beside each other, or below where they do not fit; empty ones are left out."""
    inner = "".join(f"<div>{part}</div>" for part in parts if part)
    return (
        f"<div style='display:flex;flex-wrap:wrap;gap:4px 24px;align-items:flex-start'>{inner}</div>" if inner else ""
    )


def html_table(
    caption: str, rows: Iterable[Sequence[str]], header: Sequence[str] = (), *, numbers: bool = False
) -> str:
    """Return an HTML table; the first cell of each row is its heading. All text is escaped.

    Parameters
    ----------
    caption : str
        Empty: none.
    rows : iterable of sequence of str
    header : sequence of str
    numbers : bool
        Whether the cells are numbers: they are aligned to the right.
    """
    side = "right;font-variant-numeric:tabular-nums" if numbers else "left"
    head = f"<tr>{_cells('th', header, side)}</tr>" if header else ""
    body = "".join(f"<tr>{_cells('th', row[:1], side)}{_cells('td', row[1:], side)}</tr>" for row in rows)
    named = f"<caption style='text-align:left;white-space:nowrap'>{escape(caption)}</caption>" if caption else ""
    return f"<table style='{TABLE}'>{named}{head}{body}</table>"


def _cells(tag: str, texts: Sequence[str], side: str) -> str:
    weight = ";font-weight:500;white-space:nowrap" if tag == "th" else ""
    style = f"text-align:{side};padding:1px 10px 1px 0;border:0;background:none{weight}"
    return "".join(f"<{tag} style='{style}'>{escape(text)}</{tag}>" for text in texts)


CARD = (
    "font-family:var(--jp-ui-font-family, var(--vscode-font-family, system-ui, sans-serif));font-size:13px;"
    "line-height:1.45;border-left:3px solid var(--jp-brand-color1, var(--vscode-charts-blue, #1e88e5));"
    "padding:2px 0 2px 10px;margin:4px 0"
)
TABLE = "border-collapse:collapse;margin:2px 0;font-size:inherit;color:inherit"
HEAD = "display:flex;flex-wrap:wrap;gap:0 16px"
COLOURS = (
    "var(--jp-brand-color1, var(--vscode-charts-blue, #1e88e5))",
    "var(--jp-warn-color1, var(--vscode-charts-orange, #ef6c00))",
    "var(--jp-success-color1, var(--vscode-charts-green, #43a047))",
)
"""Of curves and bars: they can be told apart on light and on dark ground."""
FAULT = "color:var(--jp-error-color1, var(--vscode-errorForeground, #e53935))"
