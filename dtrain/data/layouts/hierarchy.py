"""The groups of a store by their path: what encloses an array, and the attributes there. Nothing is listed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import zarr

from dtrain.data.read.open import node_in, unreadable_metadata
from dtrain.data.read.retry import settle
from dtrain.data.read.shards import ArrayLike
from dtrain.data.read.store import ReadStore
from dtrain.errors import DtrainError, StoreForbidden

Attributes: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Enclosing:
    """A group that holds an array, directly or below."""

    path: str
    """Of the group, from the root of the store."""
    inside: str
    """Path of the array from there."""
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """The groups and arrays of a store; consolidated metadata of its root save requests."""

    store: ReadStore
    root: zarr.Group

    def node(self, path: str) -> ArrayLike | zarr.Group | None:
        """Return the group or array at a path from the root of the store; None if nothing is there.

        Raises
        ------
        NotZarr, UnsuitableVariable
            Its metadata cannot be read.
        """
        try:
            return node_in(self.store, self.root, path) if path else self.root
        except StoreForbidden:  # a bucket that may not be listed also forbids what is not there
            return None
        except DtrainError:
            raise
        except Exception as error:
            settle()
            raise unreadable_metadata(self.store.path, path, error) from None

    def attributes(self, path: str) -> Attributes:
        """Return the attributes of a group; none if there is no group at the path."""
        node = self.node(path)
        return dict(node.attrs) if isinstance(node, zarr.Group) else {}

    def enclosing(self, path: str) -> Iterator[Enclosing]:
        """Yield the groups that hold an array, the nearest first, up to the root of the store."""
        parts = path.split("/")
        for depth in range(len(parts) - 1, -1, -1):
            group = "/".join(parts[:depth])
            yield Enclosing(group, "/".join(parts[depth:]), self.attributes(group))
