"""Find the store that a configured path or URL names, once there is a Zarr group."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dtrain.data.read.icechunk import ICECHUNK, PREFIX, repository_at
from dtrain.data.read.kind import METADATA_FILES, NO_OPTIONS, StorageOptions, split_versions
from dtrain.data.read.open import kind_of, open_store
from dtrain.data.read.store import ReadStore
from dtrain.errors import InvalidConfig, NotZarr
from dtrain.urls import is_redacted

NAME_THE_GROUP = (
    "If it lies in a group, give the path of the group, and its name in data.inputs or data.targets; else write it "
    "into one, with names for its dimensions."
)


def locate(path: str, base: Path, storage_options: StorageOptions = NO_OPTIONS) -> ReadStore:
    """Open the store at a path or URL; a relative path is relative to `base`.

    Returns
    -------
    ReadStore
        Its `path` is the absolute path or URL. Metadata documents that it has read are requested again.

    Raises
    ------
    DataNotFound, NotZarr
        There is nothing, or no Zarr group.
    StoreForbidden, StoreUnavailable
        A server refuses or fails.
    InvalidConfig
        The URL holds a password, or a run has not kept all of it, or its protocol or options cannot be used.
    """
    if is_redacted(path):
        raise _not_kept(path)
    located = kind_of(path).locate(path, base)
    kind = kind_of(located)
    versions, others = split_versions(storage_options)
    store = open_store(located, storage_options if kind is ICECHUNK else others)
    if any(store.has_document(name) for name in METADATA_FILES):
        if versions and kind is not ICECHUNK:
            raise InvalidConfig(
                f"{store.path} is no icechunk repository: data.storage_options.{next(iter(versions))} chooses nothing.",
                "Leave it out.",
            )
        return store
    if store.has_document(".zarray"):
        raise single_array(store.path)
    if repository := repository_at(store):
        return locate(repository, base, storage_options)
    raise kind.nothing_there(located)


def _not_kept(path: str) -> InvalidConfig:
    return InvalidConfig(
        f"{path}: a run keeps no user, query or fragment of a URL, since they may be secrets.",
        "Give the whole URL: --data URL or --set data.path=URL (in Python open_samples(URL)); or leave secrets out of "
        "it: data.storage_options and the environment can hold them.",
    )


ALIASES = {"s3a": "s3", "gcs": "gs"}
"""Other names of protocols."""
PORTS = {"http": ":80", "https": ":443"}


def identity(path: str, base: Path) -> str:
    """Return the one spelling of a path or URL that names a store, however it is written; nothing is opened.

    Paths are made absolute and free of links; file:// is a path; a slash at the end, aliases and the case of a
    protocol, and the case and default port of an HTTP server make no difference.
    """
    path = path.removeprefix(PREFIX)
    if "://" not in path or path.startswith("file://"):
        local = unquote(path.removeprefix("file://")) if "://" in path else path
        return os.path.realpath(Path(base, Path(local).expanduser()))
    protocol, _, rest = path.partition("://")
    protocol = ALIASES.get(protocol.lower(), protocol.lower())
    rest = rest.rstrip("/")
    if protocol == "memory":
        rest = rest.lstrip("/")
    if protocol in PORTS:
        host = urlsplit(f"{protocol}://{rest}").netloc
        rest = host.lower().removesuffix(PORTS[protocol]) + rest[len(host) :]
    return f"{protocol}://{rest}"


def single_array(path: str) -> NotZarr:
    """Return the error for a Zarr array in the place of a group."""
    return NotZarr(f"{path} is a single Zarr array; a group of named variables is needed.", NAME_THE_GROUP)
