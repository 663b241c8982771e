"""Open stores, groups and arrays. `KINDS` lists the kinds of stores: a new kind is one file here and one line below."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable

import zarr

from dtrain.data.read.bounded import bounded
from dtrain.data.read.documents import REMEMBERED_STORES, Documents
from dtrain.data.read.icechunk import ICECHUNK
from dtrain.data.read.kerchunk import KERCHUNK
from dtrain.data.read.kind import NO_OPTIONS, StorageOptions, StoreKind, at_snapshot
from dtrain.data.read.local import DIRECTORY
from dtrain.data.read.remote import FSSPEC, HTTP
from dtrain.data.read.retry import settle
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore
from dtrain.data.read.zip import ZIP
from dtrain.data.samples import Samples, StoreFacts
from dtrain.errors import DataNotFound, DtrainError, NotZarr, UnsuitableVariable, one_line

UNSUPPORTED = ("nknown codec", "codec not available", "No Zarr data type", "An implementation for codec")
"""How zarr says that it lacks a codec, or knows no such dtype."""
KINDS: list[StoreKind] = [ZIP, KERCHUNK, ICECHUNK, DIRECTORY, HTTP, FSSPEC]
"""The first kind that matches a path opens it."""


def register_kind(kind: StoreKind) -> None:
    """Read stores of another kind from now on, in this process; it takes precedence over the kinds that are there.

    Workers are other processes: the module that registers the kind must be imported there too.
    """
    KINDS.insert(0, kind)


def kind_of(path: str) -> StoreKind:
    """Return the kind of the store at a path or URL."""
    return next(kind for kind in KINDS if kind.matches(path))


def open_store(path: str, storage_options: StorageOptions = NO_OPTIONS, facts: StoreFacts | None = None) -> ReadStore:
    """Open a store, given its located path or URL, without any metadata that this process remembers.

    Its facts are looked for, unless they are given.

    Raises
    ------
    InvalidConfig
        The path or the options cannot be used.
    """
    kind = kind_of(path)
    store = kind.open(path, storage_options)
    if facts is None:
        facts = kind.facts(store) if callable(kind.facts) else kind.facts
    return ReadStore(store, path, facts)


# Groups and arrays --------------------------------------------------------------------------------------


def open_group(path: str, group: str = "", storage_options: StorageOptions = NO_OPTIONS) -> zarr.Group:
    """Open a group for reading."""
    return group_in(open_store(path, storage_options), group)


def open_arrays(samples: Samples) -> tuple[ReadStore, dict[str, ArrayLike]]:
    """Open the store of samples and the arrays of their variables, by name.

    Metadata documents that this process has read before are used again, if they have not changed.

    Raises
    ------
    DataNotFound, NotZarr
        The group or an array is not there any more, or its metadata cannot be read.
    StoreForbidden, StoreUnavailable
        The server refuses or fails.
    """
    config = samples.config
    options = at_snapshot(config.storage_options, samples.store.snapshot)
    store = open_store(samples.path, options, samples.store)
    remembered = _REMEMBERED.get(_identity(samples.path, options))
    if remembered is not None and _is_unchanged(store, remembered):
        store.documents = remembered.copy()
    group = group_in(store, config.group)
    arrays = {v.name: array_in(store, group, v.array_path) for v in samples.stored}
    remember(store, options, config.group, (v.array_path for v in samples.stored))
    return store, arrays


def group_in(store: ReadStore, name: str) -> zarr.Group:
    """Open a group that has been there before.

    Raises
    ------
    DataNotFound, NotZarr
        It is not there any more, or not on this machine; or its metadata cannot be read.
    """
    try:
        return any_group(store, name)
    except DtrainError:
        raise
    except FileNotFoundError:
        raise DataNotFound(
            f"{store.path}: no Zarr group there any more, or not on this machine.",
            "Every worker must see the same path.",
        ) from None
    except Exception as error:  # broken metadata make zarr raise whatever its first wrong guess leads to
        raise NotZarr(
            f"{store.path}: its Zarr metadata cannot be read: {one_line(error)}",
            "Restore it from a copy of the store.",
        ) from None


def any_group(store: ReadStore, name: str) -> zarr.Group:
    """Open a group, whatever its consolidated metadata hold: an array that zarr cannot open, or what was true once.

    Each array has documents of its own. Consolidated metadata save requests to a server, and no others.
    """
    if not store.facts.is_local:
        try:
            return zarr.open_group(store, path=name or None, mode="r")
        except (DtrainError, FileNotFoundError):
            raise
        except Exception:
            settle()
    return zarr.open_group(store, path=name or None, mode="r", use_consolidated=False)


def node_in(store: ReadStore, group: zarr.Group, name: str) -> ArrayLike | zarr.Group | None:
    """Return what a group holds under a name or path, also if its consolidated metadata do not list it.

    Raises
    ------
    Exception
        Whatever zarr raises for metadata that it cannot read; KeyError for such that lack a key.
    """
    if name.strip("/") != name or not {"", ".", ".."}.isdisjoint(name.split("/")):
        return None
    try:
        return _read_safely(group[name])
    except KeyError:
        path = f"{group.path}/{name}".lstrip("/")
        documents = ("zarr.json",) if group.metadata.zarr_format == 3 else (".zarray", ".zgroup")
        if not any(store.has_document(f"{path}/{document}") for document in documents):
            return None
        plain = zarr.open_group(store, path=group.path or None, mode="r", use_consolidated=False)
        return _read_safely(plain[name])


def _read_safely(node: ArrayLike | zarr.Group) -> ArrayLike | zarr.Group:
    return bounded(node) if isinstance(node, zarr.Array) else node


def array_in(store: ReadStore, group: zarr.Group, name: str) -> ArrayLike:
    """Open an array that has been there before.

    Raises
    ------
    DataNotFound, NotZarr, UnsuitableVariable
        It is not there any more, or its metadata cannot be read.
    """
    try:
        node = node_in(store, group, name)
    except DtrainError:
        raise
    except Exception as error:
        raise unreadable_metadata(store.path, name, error) from None
    if not isinstance(node, zarr.Array):
        raise array_gone(store.path, name)
    return node


def array_gone(path: str, name: str) -> DataNotFound:
    """Return the error for an array that has been there before."""
    return DataNotFound(f"{path}: {name} is not there any more.", "Restore it from a copy.")


def unreadable_metadata(path: str, name: str, error: Exception) -> DtrainError:
    """Return the error for an array whose metadata are damaged, or say something that this zarr does not know."""
    if any(text in str(error) for text in UNSUPPORTED):
        return UnsuitableVariable(
            f"{path}: {name} cannot be read here: {one_line(error)}",
            "If it is a codec: install the package that has it, here and on the workers. Else write the "
            "variable with a dtype of numbers.",
        )
    return NotZarr(
        f"{path}: the metadata of {name} cannot be read: {one_line(error)}", "Restore it from a copy of the store."
    )


# Metadata that have been read in this process -----------------------------------------------------------

_REMEMBERED: OrderedDict[tuple[str, str], Documents] = OrderedDict()
_LOCK = threading.Lock()


def remember(store: ReadStore, storage_options: StorageOptions, group: str, paths: Iterable[str]) -> None:
    """Remember the metadata documents of some arrays of a group for `open_arrays`."""
    parts = group.strip("/").split("/") if group.strip("/") else []
    groups = ["/".join(parts[:depth]) for depth in range(len(parts) + 1)]
    nodes = [*groups, *("/".join([*parts, path]) for path in paths)]
    identity = _identity(store.path, storage_options)
    with _LOCK:
        _REMEMBERED[identity] = store.documents.of_nodes(nodes)
        _REMEMBERED.move_to_end(identity)
        if len(_REMEMBERED) > REMEMBERED_STORES:
            _REMEMBERED.popitem(last=False)


def _identity(path: str, storage_options: StorageOptions) -> tuple[str, str]:
    return path, json.dumps(storage_options, sort_keys=True, default=repr)


def _is_unchanged(store: ReadStore, documents: Documents) -> bool:
    """Return True if documents may be used again.

    Size and time of a file say if it has been modified. Of another store the root document alone is requested again:
    then the server still gives access to the same store. An array that was replaced below an unchanged root is read
    as the samples describe it, and its chunks are checked as always.
    """
    if store.facts.is_local:
        return documents.unchanged_files(store.version)
    root = documents.root()
    if root is None or not store.has_document(root[0]):
        return False
    now = store.documents[root[0]]
    return now is not None and now.to_bytes() == root[1].to_bytes()
