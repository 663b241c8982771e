"""A kind of store, in one value: how to recognise its paths, open it, and say that nothing is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from zarr.abc.store import Store

from dtrain.config.names import VERSION_OPTIONS
from dtrain.data.samples import StoreFacts
from dtrain.errors import DataNotFound, DtrainError, NotZarr, did_you_mean

StorageOptions: TypeAlias = Mapping[str, Any]
"""``data.storage_options``, as fsspec and the packages behind it define them."""

NO_OPTIONS: StorageOptions = MappingProxyType({})

METADATA_FILES = ("zarr.json", ".zgroup", ".zmetadata")
"""A Zarr group has at least one of these documents."""


def local_path(path: str, base: Path) -> str:
    """Return the absolute path of a file or directory; a relative one is relative to `base`.

    Raises
    ------
    DataNotFound
        There is nothing at the path.
    """
    located = Path(base, Path(path).expanduser()).absolute()
    if not located.exists():
        beside: list[str] = []
        with suppress(OSError):
            alike = partial(get_close_matches, located.stem, n=1)  # all stores end with ".zarr", which says nothing
            beside = [name for name in os.listdir(located.parent) if alike([Path(name).stem])]
        raise DataNotFound(
            f"{path}: no such file or directory{did_you_mean(located.name, beside) or '.'}", f"Looked for {located}"
        )
    return str(located)


def is_local_path(path: str) -> bool:
    """Return True for a path of this machine's file system, also as a URL."""
    return path.startswith("file://") or "://" not in path


def not_a_group(path: str) -> DtrainError:
    """Return the error for something that is there, and is no Zarr group."""
    return NotZarr(
        f"{path} is not a Zarr group: it has none of {', '.join(METADATA_FILES)}.",
        "Give the path of a group of variables, for example as xarray writes it: dataset.to_zarr(path).",
    )


def split_versions(storage_options: StorageOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that choose a version of a repository, and the others."""
    versions = {key: value for key, value in storage_options.items() if key in VERSION_OPTIONS}
    return versions, {key: value for key, value in storage_options.items() if key not in versions}


def at_snapshot(storage_options: StorageOptions, snapshot: str) -> StorageOptions:
    """Return the options that open one snapshot of a repository; without one, the options as they are."""
    if not snapshot:
        return storage_options
    return {**split_versions(storage_options)[1], "snapshot": snapshot}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreKind:
    """A kind of store that dtrain reads; `dtrain.data.read.open.register_kind` adds another one."""

    matches: Callable[[str], bool]
    """True for the paths and URLs of this kind."""
    open: Callable[[str, StorageOptions], Store]
    """Opens a store, given its located path and ``data.storage_options``; the returned store can be read at once.

    Raises InvalidConfig if the path or the options cannot be used. The store's own methods raise StoreForbidden or
    StoreUnavailable where a server refuses or fails, and return None for an object that is not there. Undecodable, or
    any other exception, is a fault of the object, which readers name.
    """
    facts: StoreFacts | Callable[[Any], StoreFacts]
    """The facts of all stores of the kind, or a function that returns those of an opened one."""
    locate: Callable[[str, Path], str] = local_path
    """Turns ``data.path`` and a base directory into an absolute path or a URL. Raises DataNotFound, InvalidConfig."""
    nothing_there: Callable[[str], DtrainError] = not_a_group
    """The error for a located path at which there is no Zarr group."""
