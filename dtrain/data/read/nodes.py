"""Every array and group of a store with its metadata documents, and what is wrong with those: nothing is left out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import zarr
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.core.sync import sync

from dtrain.data.read.codecs import Undecodable
from dtrain.data.read.documents import NAMES
from dtrain.data.read.local import oddity
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore
from dtrain.data.read.tree import Kind, consolidated_kinds
from dtrain.errors import ChunkMissing, ChunkUndecodable, DtrainError, one_line

MOST_DOCUMENT = 2**30
"""A larger metadata document of a directory is not read."""
MOST_NODES = 100_000
"""More arrays and groups are not looked at."""
CHUNK_NAME = re.compile(r"c|(c\.)?\d+(\.\d+)*")
"""Names in the directory of an array."""
KINDS = {"array": ".zarray", "group": ".zgroup"}
"""By kind of node: its document in Zarr v2."""
Places: TypeAlias = frozenset[tuple[int, int]]
"""Directories, whichever links lead to them."""


@dataclass(frozen=True, slots=True)
class Node:
    """An array or a group, or what is wrong in its place."""

    path: str
    """From the root of the store; empty for the root."""
    documents: Mapping[str, bytes] = field(default_factory=dict)
    """By key."""
    array: ArrayLike | None = None
    """None for a group, and where there is a fault."""
    key: str = ""
    """The document at fault."""
    fault: str = ""
    """What is wrong with it."""


def walk(store: ReadStore) -> Iterator[Node]:
    """Yield every array and group of a store, the root first, each with its own documents.

    Consolidated metadata say which nodes there should be: one of them without a document is a fault. So is a
    directory that has chunks and no document.

    Raises
    ------
    StoreForbidden, StoreUnavailable
        A server refuses or fails.
    """
    root = _node(store, "", None) or Node("", key="", fault="it has no document of a group")
    yield root
    promised = consolidated_kinds(*(_buffer(root.documents.get(key)) for key in ("zarr.json", ".zmetadata")))
    todo: list[tuple[str, Places]] = [("", _places(store, ""))]
    count = 1
    while todo:
        group, above = todo.pop()
        for path in _below(store, group, promised):
            count += 1
            if count > MOST_NODES:
                yield Node(group, fault=f"there are more than {MOST_NODES:,} names of arrays and groups", key=path)
                return
            node = _node(store, path, promised.get(path))
            if node is not None and node.array is None and not node.fault:
                own = _places(store, path)
                if own & above:
                    node = Node(path, fault="it is a link that leads back to a group in which it lies", key=path)
                else:
                    todo.append((path, above | own))
            if node is not None:
                yield node


def _below(store: ReadStore, group: str, promised: Mapping[str, Kind]) -> list[str]:
    """Return the paths that are listed in a group, or should be there."""
    names = dict.fromkeys(name.strip("/") for name in store.names(group))
    listed = {f"{group}/{name}".lstrip("/") for name in names if name and name not in NAMES}
    return sorted(listed | {path for path in promised if path and path.rpartition("/")[0] == group})


def _places(store: ReadStore, path: str) -> Places:
    """Return the directory of a group; nothing where there are no links."""
    if not store.facts.is_local:
        return frozenset()
    facts = os.stat(os.path.join(store.path, path))
    return frozenset({(facts.st_dev, facts.st_ino)})


def _buffer(document: bytes | None) -> Buffer | None:
    return None if document is None else default_buffer_prototype().buffer.from_bytes(document)


def _node(store: ReadStore, path: str, promised: Kind | None) -> Node | None:
    """Return what lies at a path; None if that is no part of Zarr."""
    prefix = f"{path}/" if path else ""
    documents: dict[str, bytes] = {}
    for name in sorted(NAMES):
        key = prefix + name
        try:
            if (document := _document(store, key)) is not None:
                documents[key] = document
                _check_json(document)
        except (Undecodable, ChunkMissing, ChunkUndecodable) as error:
            return Node(path, documents, None, key, str(error) if isinstance(error, Undecodable) else error.message)
        except DtrainError:
            raise
        except (OSError, ValueError, RecursionError) as error:
            return Node(path, documents, None, key, f"it cannot be read: {one_line(error)}")
    return _opened(store, path, documents, promised)


def _document(store: ReadStore, key: str) -> bytes | None:
    if store.facts.is_local and (odd := oddity(os.path.join(store.path, key), MOST_DOCUMENT)):
        raise Undecodable(odd)
    found = sync(store.get(key, default_buffer_prototype()))
    return None if found is None else found.to_bytes()


def _check_json(document: bytes) -> None:
    value = json.loads(document)
    if not isinstance(value, dict):
        raise ValueError(f"it holds no JSON object, but {value!r:.40}")


def _opened(store: ReadStore, path: str, documents: Mapping[str, bytes], promised: Kind | None) -> Node | None:
    """Open what documents describe."""
    prefix = f"{path}/" if path else ""
    zarr_format: Literal[2, 3] = 3 if f"{prefix}zarr.json" in documents else 2
    if zarr_format == 3:
        key, kind = f"{prefix}zarr.json", json.loads(documents[f"{prefix}zarr.json"]).get("node_type")
        if kind not in KINDS:
            return Node(path, documents, None, key, f"it describes neither an array nor a group, but {kind!r:.40}")
    else:
        kind = next((kind for kind, name in KINDS.items() if prefix + name in documents), "")
        if not kind:
            return _without_document(store, path, documents, promised)
        key = prefix + KINDS[kind]
    try:
        if kind == "group":
            zarr.open_group(store, path=path or None, mode="r", zarr_format=zarr_format, use_consolidated=False)
            return Node(path, documents)
        return Node(path, documents, zarr.open_array(store, path=path, mode="r", zarr_format=zarr_format))
    except DtrainError:
        raise
    except Exception as error:  # zarr raises whatever its first wrong guess leads to
        return Node(path, documents, None, key, f"it cannot be read: {one_line(error)}")


def _without_document(
    store: ReadStore, path: str, documents: Mapping[str, bytes], promised: Kind | None
) -> Node | None:
    """Return the fault of a node that lacks its document; None if nothing says that it should have one."""
    if promised is not None:
        return Node(path, documents, None, path, f"the consolidated metadata list this {promised}, which is not there")
    is_file = store.facts.is_local and not os.path.isdir(os.path.join(store.path, path))
    is_hidden = path.rpartition("/")[2].startswith(".")
    if (
        path
        and not is_file
        and not is_hidden
        and any(CHUNK_NAME.fullmatch(name.strip("/")) for name in store.names(path))
    ):
        return Node(path, documents, None, path, "it has chunks and no metadata document")
    return None
