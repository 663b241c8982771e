"""What lies at a path: a run, a round or a store; found by names alone."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

from dtrain.runfiles import CONFIG, HISTORY, PLAN, ROUND, ROUNDS

ZARR = (".zarray", ".zgroup", ".zmetadata", "zarr.json")
PATHLIKE = re.compile(r"[/.\\]|://")


class Found(NamedTuple):
    """What lies at a path."""

    kind: Literal["run", "round", "store", "name"]
    """``name``: nothing of the three lies there, and it may be the name of a run."""
    path: str


def find(text: str) -> Found:
    """Return what lies at a path or URL; what is neither a run nor a round is taken for a store.

    A run whose config.toml is lost is known by its other files.
    """
    if "://" in text and not text.startswith("file://"):
        return Found("store", text)
    path, is_name = Path(os.path.expanduser(text)), not PATHLIKE.search(text)
    if not path.is_dir():
        return Found("store" if os.path.lexists(path) or not is_name else "name", text)
    if any(os.path.lexists(path / name) for name in ZARR):
        return Found("store", text)
    whole = Path(os.path.abspath(path))
    if ROUND.fullmatch(whole.name) and whole.parent.name == ROUNDS:
        return Found("round", str(path if len(path.parts) > 2 else whole))
    if any(os.path.lexists(path / name) for name in (CONFIG, PLAN, HISTORY)) or (path / ROUNDS).is_dir():
        return Found("run", str(path))
    return Found("name" if is_name else "store", text)  # a project's directory often has the name of its run
