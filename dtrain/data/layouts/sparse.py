"""Sparse matrices as AnnData writes them: a group of the arrays ``data``, ``indices`` and ``indptr``, CSR or CSC.

References
----------
"On-disk format" of AnnData, "Sparse arrays": ``encoding-type`` is ``csr_matrix`` or ``csc_matrix``, ``shape`` the shape
of the matrix; the arrays are those of `scipy.sparse.csr_matrix`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import zarr

from dtrain.data.layouts.anndata import ENCODING
from dtrain.data.layouts.hierarchy import Hierarchy
from dtrain.data.layouts.stored import Matrix
from dtrain.data.read.shards import ArrayLike
from dtrain.errors import NotZarr, UnsuitableVariable

AXES: Mapping[object, int] = {"csr_matrix": 0, "csc_matrix": 1}
"""By encoding: the axis of which each place has its values side by side."""
MOST = 2**63
"""Columns are numbered by int64."""
PARTS = ("indptr", "indices", "data")


def matrix_of(hierarchy: Hierarchy, node: ArrayLike | zarr.Group) -> Matrix | None:
    """Return the sparse matrix that a group holds; None if it holds none.

    Raises
    ------
    NotZarr
        Its arrays and its shape do not fit together.
    UnsuitableVariable
        Its arrays are those of a matrix, and no attribute says of which kind.
    """
    if not isinstance(node, zarr.Group):
        return None
    axis = AXES.get(node.attrs.get(ENCODING))
    if axis is None:
        _check_marked(hierarchy, node)
        return None
    indptr, indices, data = (_array(hierarchy, f"{node.path}/{part}") for part in PARTS)
    shape = _shape(node.attrs.get("shape"))
    if shape is None or shape[axis] + 1 != indptr.shape[0] or indices.shape != data.shape:
        arrays = zip(PARTS, (indptr, indices, data), strict=True)
        lengths = ", ".join(f"{part} {array.shape[0]:,}" for part, array in arrays)
        raise NotZarr(
            f"{hierarchy.store.path}: {node.path} is a sparse matrix of shape {node.attrs.get('shape')}, and its "
            f"arrays do not fit it: {lengths} values.",
            "Restore it from a copy of the store.",
        )
    return Matrix(node.path, shape, axis, indptr, indices, data)


def _check_marked(hierarchy: Hierarchy, node: zarr.Group) -> None:
    """Refuse a group of the three arrays without a known encoding: CSR and CSC differ in nothing else."""
    if all(isinstance(hierarchy.node(f"{node.path}/{part}"), zarr.Array) for part in PARTS):
        found = node.attrs.get(ENCODING)
        raise UnsuitableVariable(
            f"{hierarchy.store.path}: {node.path} holds {', '.join(PARTS)}, and its attribute {ENCODING} is "
            f"{'absent' if found is None else repr(found)}: {' or '.join(map(str, AXES))} would say how to read them.",
            f"Write it again with anndata, or set the attributes {ENCODING} and shape of the group.",
        )


def _shape(given: Any) -> tuple[int, int] | None:
    """Return the shape of a matrix; None if it is none."""
    is_shape = (
        isinstance(given, list | tuple) and len(given) == 2 and all(type(n) is int and 0 <= n < MOST for n in given)
    )
    return (given[0], given[1]) if is_shape else None


def _array(hierarchy: Hierarchy, path: str) -> ArrayLike:
    """Return an array of one dimension."""
    array = hierarchy.node(path)
    kinds = "fiub" if path.endswith("/data") else "iu"
    if not isinstance(array, zarr.Array) or array.ndim != 1 or np.dtype(array.dtype).kind not in kinds:
        what = "there is none" if array is None else "it is something else"
        raise NotZarr(
            f"{hierarchy.store.path}: {path}, a part of a sparse matrix, should be an array of numbers: {what}.",
            "Restore it from a copy of the store.",
        )
    return array


def without_parts(paths: Iterable[str]) -> list[str]:
    """Return the paths by which arrays are named: a sparse matrix by its group, not by its three arrays."""
    given = list(paths)
    known = set(given)
    groups = {path.removesuffix("/indptr") for path in given if path.endswith("/indptr")}
    whole = {group for group in groups if all(f"{group}/{part}" in known for part in PARTS)}
    parts = {f"{group}/{part}" for group in whole for part in PARTS}
    return [*(path for path in given if path not in parts), *sorted(whole)]
