"""A name that is no array of a group: the error says which names are, or where it lies."""

from __future__ import annotations

import posixpath

from dtrain.data.layouts.find import variable_paths
from dtrain.data.read.store import ReadStore
from dtrain.data.read.tree import array_paths, nodes_in
from dtrain.errors import UnknownVariable, did_you_mean, listed

MOST_NAMES = 20
"""Names that a message lists."""


def unknown_variable(store: ReadStore, group: str, name: str, opened: list[str], *, is_group: bool) -> UnknownVariable:
    """Return the error for a name that is no array of a group.

    Parameters
    ----------
    store : ReadStore
    group : str
        ``data.group``.
    name : str
    opened : list of str
        Names that are arrays.
    is_group : bool
        True if it is a group.
    """
    if is_group:
        inside = [f"{name}/{found}" for found in _paths_below(store, f"{group}/{name}")]
        return UnknownVariable(
            f'{store.path}: "{name}" is a group, not a variable.',
            f"It holds {listed(inside, MOST_NAMES) or 'no variables'}.",
        )
    beside = (found for found, kind in nodes_in(store, group).items() if kind == "array")
    known = sorted({*opened, *beside, *_paths_below(store, group)})
    meant, last = did_you_mean(name, known), name.rpartition("/")[2]
    message = f'{store.path}: variable "{name}" not found{meant}'
    elsewhere = [path for path in sorted(variable_paths(array_paths(store))) if path.rpartition("/")[2] == last]
    if elsewhere and not ("/" in name and meant):
        return UnknownVariable(message, _way_to(group.strip("/"), elsewhere, opened))
    if known or store.facts.can_list:
        return UnknownVariable(message, f"It has {listed(known, MOST_NAMES) or 'no variables'}.")
    return UnknownVariable(
        message, "The server lists no variables: consolidate the metadata (zarr.consolidate_metadata) to see them."
    )


def _paths_below(store: ReadStore, group: str) -> list[str]:
    """Return the paths of arrays in a group and below it, from there; the search is bounded."""
    path = group.strip("/")
    prefix = f"{path}/" if path else ""
    return sorted(found.removeprefix(prefix) for found in variable_paths(array_paths(store, path)))


def _way_to(group: str, elsewhere: list[str], opened: list[str]) -> str:
    """Say how an array of another group is named: by its path below ``data.group``."""
    path = elsewhere[0]
    found = f"{listed(elsewhere, MOST_NAMES)} {'has' if len(elsewhere) == 1 else 'have'} that name"
    if not group:
        whole = posixpath.dirname(path)
        also = f', or set data.group = "{whole}" if all variables are there' if whole and not opened else ""
        return f'{found}: write "{path}"{also}.'
    if path.startswith(f"{group}/"):
        return f'{found}: write "{path.removeprefix(f"{group}/")}".'
    common = posixpath.commonpath([group, posixpath.dirname(path)])
    names = [posixpath.relpath(one, common or ".") for one in (path, *(f"{group}/{name}" for name in opened))]
    others = "".join(f', and "{name}" in place of {old}' for name, old in zip(names[1:], opened, strict=True))
    return f'{found}: set data.group = "{common}" and write "{names[0]}"{others}.'
