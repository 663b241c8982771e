"""Which arrays and groups a store holds, by their metadata documents alone: what zarr cannot open is there too."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync

from dtrain.data.read.documents import NAMES
from dtrain.data.read.store import ReadStore
from dtrain.errors import NotZarr

Kind: TypeAlias = Literal["array", "group"]

MOST_NODES = 500
"""A search looks at so many arrays and groups, at most."""
CONCURRENT_REQUESTS = 32


def nodes_in(store: ReadStore, group: str) -> dict[str, Kind]:
    """Return name and kind of each array and group in a group.

    Parameters
    ----------
    store : ReadStore
    group : str
        Its path; empty for the root.
    """
    group = group.strip("/")
    known = _consolidated(store) or _kinds(store, _listed(store, group))
    return {path.rpartition("/")[2]: kind for path, kind in known.items() if path.rpartition("/")[0] == group}


def array_paths(store: ReadStore, group: str = "") -> list[str]:
    """Return the paths of arrays in a group and below it, from the root of the store; the search is bounded."""
    known = _consolidated(store)
    todo = [] if known else [group]
    while todo and len(known) < MOST_NODES:
        kinds = _kinds(store, _listed(store, todo.pop(0))[: MOST_NODES - len(known)])
        todo += [path for path, kind in kinds.items() if kind == "group" and path not in known]
        known |= kinds
    prefix = f"{group}/" if group else ""
    return sorted(path for path, kind in known.items() if kind == "array" and path.startswith(prefix))


def kind_at(store: ReadStore, path: str) -> Kind | None:
    """Return whether a path is an array or a group; None if nothing is there."""
    return _kinds(store, [path]).get(path)


def _listed(store: ReadStore, group: str) -> list[str]:
    """Return the paths that a store lists in a group: of arrays, groups and other files."""
    names = (name.strip("/") for name in store.names(group))
    return [f"{group}/{name}".lstrip("/") for name in dict.fromkeys(names) if name and name not in NAMES]


def _kinds(store: ReadStore, paths: Sequence[str]) -> dict[str, Kind]:
    """Return the kind of each path that is an array or a group."""

    async def look() -> dict[str, Kind]:
        limit = asyncio.Semaphore(CONCURRENT_REQUESTS)

        async def kind(path: str) -> Kind | None:
            async with limit:
                return await _kind(store, path)

        kinds = await asyncio.gather(*map(kind, paths))
        return {path: kind for path, kind in zip(paths, kinds, strict=True) if kind is not None}

    return sync(look())


async def _kind(store: ReadStore, path: str) -> Kind | None:
    prototype = default_buffer_prototype()
    try:
        document = await store.get(f"{path}/zarr.json", prototype)
    except NotZarr:  # far too large, or no file: it is named where it is used
        return "array"
    if document is not None:
        return "group" if _parsed(document).get("node_type") == "group" else "array"
    if await store.get(f"{path}/.zarray", prototype) is not None:
        return "array"
    return "group" if await store.get(f"{path}/.zgroup", prototype) is not None else None


def _consolidated(store: ReadStore) -> dict[str, Kind]:
    """Return the kind of each node that the consolidated metadata of the root list; of a local store, nothing.

    They may be older than the store, which a directory says by itself.
    """
    if store.facts.is_local:
        return {}
    prototype = default_buffer_prototype()
    return consolidated_kinds(*(sync(store.get(key, prototype)) for key in ("zarr.json", ".zmetadata")))


def consolidated_kinds(v3_document: Buffer | None, v2_document: Buffer | None) -> dict[str, Kind]:
    """Return the kind of each node that a root's ``zarr.json`` and ``.zmetadata`` list; either may be missing."""
    kinds: dict[str, Kind] = {}
    v3 = _parsed(v3_document).get("consolidated_metadata")
    for path, node in _table(_table(v3).get("metadata")).items():
        kinds[path] = "group" if _table(node).get("node_type") == "group" else "array"
    for key in _table(_parsed(v2_document).get("metadata")):
        path, _, document = key.rpartition("/")
        if path and document in (".zarray", ".zgroup"):
            kinds[path] = "array" if document == ".zarray" else "group"
    return kinds


def _parsed(document: Buffer | None) -> Mapping[str, Any]:
    """Return a metadata document; nothing if it is not there or damaged."""
    try:
        return _table(json.loads(document.to_bytes())) if document is not None else {}
    except (ValueError, RecursionError):
        return {}


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
