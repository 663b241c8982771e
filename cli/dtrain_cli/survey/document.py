"""The config file of some settings: TOML with comments that say what was guessed and how to change it."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from dtrain.errors import listed
from dtrain_cli.survey.settings import Settings

WIDTH = 80
BARE = re.compile(r"^[A-Za-z0-9_-]+$")
"""A key of TOML that needs no quotes."""
ABOVE = {"model_args": "shapes of a sample; if data.inputs or data.targets change, dtrain plan says what to write"}
"""By table: the comment above it."""
LONG_TABLE = 3
"""Tables of more keys, in ``[data]``, are tables of their own."""


def document(settings: Settings, path: str) -> str:
    """Return the text of the config file.

    Parameters
    ----------
    settings : Settings
    path : str
        Of the store, as the config file has it.
    """
    tables = {**settings.tables, "data": {**settings.tables["data"], "path": path}}
    lines = [
        *_comment(settings.draft.title),
        *_comment("Guessed from names, shapes and a few chunks: change what does not fit."),
        "#   dtrain plan dtrain.toml      what training would do",
        "#   dtrain train dtrain.toml     train, or continue",
        "",
        'model = "model:build"',
    ]
    for name, table in tables.items():
        lines += ["", *_comment(ABOVE.get(name, "")), f"[{name}]", *_table(name, table, settings)]
    return "\n".join(lines) + "\n"


def _table(name: str, table: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    long = {key: value for key, value in table.items() if isinstance(value, dict) and len(value) > LONG_TABLE}
    for key, value in table.items():
        if key not in long:
            yield from _line(key, value, settings.why.get(f"{name}.{key}", ""))
        if f"{name}.{key}" == "data.targets" and settings.draft.others:
            yield from _comment(f"not used: {listed(settings.draft.others, 12)}")
    for key, (value, why) in settings.off.items():
        if key.startswith(f"{name}."):
            yield from _line(f"# {key.removeprefix(f'{name}.')}", value, why)
    for key, value in long.items():
        yield from ("", *_comment(settings.why.get(f"{name}.{key}", "")), f"[{name}.{key}]")
        yield from (f"{_key(inner)} = {toml(given)}" for inner, given in value.items())


def _line(key: str, value: Any, why: str) -> Iterator[str]:
    """Yield a key and its comment: beside it, or above it if both are too long for a line."""
    why = plain(why)
    text = f"{key} = {toml(value)}"
    if len(text) > WIDTH and isinstance(value, list):
        yield from _comment(why)
        yield from (f"{key} = [", *_packed([f"{toml(item)}," for item in value]), "]")
    elif why and len(text) + len(why) + 4 > WIDTH:
        yield from (*_comment(why), text)
    else:
        yield f"{text}  # {why}" if why else text


def _packed(parts: list[str]) -> Iterator[str]:
    """Yield indented lines of as many parts as they hold."""
    line = "   "
    for part in parts:
        if line.strip() and len(line) + 1 + len(part) > WIDTH:
            yield line
            line = "   "
        line += f" {part}"
    yield line


def plain(text: str) -> str:
    r"""Return a text in one line, without control characters: names come from the store, and are never more than names.

    >>> plain("a\n[data]\x1b  b")
    'a [data] b'
    """
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _comment(text: str) -> list[str]:
    return textwrap.wrap(plain(text), WIDTH, initial_indent="# ", subsequent_indent="# ")


def toml(value: Any) -> str:
    """Return a value as TOML writes it, in one line.

    >>> toml({"a b": [1, "x"], "c": True})
    '{ "a b" = [1, "x"], c = true }'
    """
    if isinstance(value, Mapping):
        return (
            f"{{ {', '.join(f'{_key(str(key))} = {toml(inner)}' for key, inner in value.items())} }}" if value else "{}"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)


def _key(key: str) -> str:
    return key if BARE.match(key) else toml(key)
