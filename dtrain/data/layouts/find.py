"""Ask the known layouts: what dimensions an array has, which array a node stands for, under which names arrays go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import zarr

from dtrain.data.layouts import anndata, ome, sparse
from dtrain.data.layouts.hierarchy import Hierarchy
from dtrain.data.layouts.stored import HasAxes, Matrix, Stored
from dtrain.data.read.shards import ArrayLike


def layout_at(hierarchy: Hierarchy, path: str) -> str:
    """Return the name of the layout of a group; empty if it has none that is known."""
    known = ((ome.NAME, ome.is_root), (anndata.NAME, anndata.is_root))
    return next((name for name, is_root in known if is_root(hierarchy, path)), "")


def dims_of(hierarchy: Hierarchy, array: HasAxes) -> list[Any] | None:
    """Return the names of dimensions that the groups around an array give it, as stored; None if they give none."""
    return ome.dims_of(hierarchy, array) or anndata.dims_of(hierarchy, array)


def array_of(hierarchy: Hierarchy, node: ArrayLike | zarr.Group) -> Stored | Matrix | None:
    """Return the array or the matrix that stands for a node; None if the node is what it seems to be.

    Raises
    ------
    DtrainError
        It is of a kind that cannot be trained on, or it cannot be read.
    """
    return sparse.matrix_of(hierarchy, node) or anndata.array_of(hierarchy, node)


def irrelevant_axis(hierarchy: Hierarchy, array: ArrayLike) -> int | None:
    """Return an axis of length 1 that an array has only by convention; None if there is none."""
    return ome.irrelevant_axis(hierarchy, array)


def variable_paths(paths: Iterable[str]) -> list[str]:
    """Return the paths by which arrays are named, given the paths of all arrays."""
    return sparse.without_parts(anndata.without_parts(paths))
