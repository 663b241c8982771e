"""AnnData: what its groups mean. X is cells x genes, obs describes cells, var describes genes.

References
----------
"On-disk format" of AnnData (https://anndata.readthedocs.io/en/stable/fileformat-prose.html): attributes
``encoding-type`` of groups and arrays. Version 0.7 marks data frames alone, and keeps the names of a categorical in
``obs/__categories/NAME``.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable

import zarr

from dtrain.data.layouts.hierarchy import Hierarchy
from dtrain.data.layouts.stored import HasAxes, Stored, read_categories
from dtrain.data.read.shards import ArrayLike
from dtrain.errors import NotZarr, UnsuitableVariable

NAME = "AnnData"
CELL, GENE, RAW_GENE = "cell", "gene", "raw_gene"
"""The names of AnnData's axes obs and var; ``raw`` may have other genes than X."""
ENCODING = "encoding-type"
FRAME, CATEGORICAL = "dataframe", "categorical"
NULLABLE = "nullable-"
INDEX = "_index"
"""The attribute of a data frame that names the column of its row names, and the usual name of that column."""


def is_root(hierarchy: Hierarchy, path: str) -> bool:
    """Return True if a group holds an AnnData object, as any version writes it."""
    prefix = f"{path}/" if path else ""
    return _encoding(hierarchy, path) == "anndata" or all(
        _encoding(hierarchy, f"{prefix}{name}") == FRAME for name in ("obs", "var")
    )


# Dimensions -----------------------------------------------------------------------------------------------


def dims_of(hierarchy: Hierarchy, array: HasAxes) -> list[str] | None:
    """Return the names of an array's axes; None if AnnData does not say what they are."""
    place = _place(hierarchy, array.path)
    if place is None:
        return None
    root, inside = place
    if inside[-1] == "codes" and _encoding(hierarchy, posixpath.dirname(array.path)) == CATEGORICAL:
        inside = inside[:-1]
    match inside:
        case ["X"] | ["layers", _]:
            return [CELL, GENE]
        case ["raw", "X"]:
            return [CELL, RAW_GENE]
        case ["obs", _]:
            return [CELL]
        case ["var", _]:
            return [GENE]
        case ["raw", "var", _]:
            return [RAW_GENE]
        case ["obsm" | "varm" as of, name]:
            others = [name, *(f"{name} axis {axis}" for axis in range(2, array.ndim))]
            return [CELL if of == "obsm" else GENE, *others]
        case ["obsm" | "varm" as of, _, _] if _encoding(hierarchy, posixpath.join(root, *inside[:2])) == FRAME:
            return [CELL if of == "obsm" else GENE]
    return None


def gene_names(hierarchy: Hierarchy, path: str) -> ArrayLike | None:
    """Return the array that names the genes of a matrix of cells x genes; None if AnnData names none.

    Parameters
    ----------
    hierarchy : Hierarchy
    path : str
        Of the matrix, from the root of the store.
    """
    place = _place(hierarchy, path)
    match place[1] if place is not None else []:
        case ["X"] | ["layers", _]:
            return row_names(hierarchy, path, GENE)
        case ["raw", "X"]:
            return row_names(hierarchy, path, RAW_GENE)
    return None


FRAMES = {CELL: "obs", GENE: "var", RAW_GENE: "raw/var"}
"""By axis: the data frame that describes it."""


def row_names(hierarchy: Hierarchy, path: str, axis: str) -> ArrayLike | None:
    """Return the array that names the places of an axis: cells or genes; None if AnnData names none.

    Parameters
    ----------
    hierarchy : Hierarchy
    path : str
        Of an array that has the axis, from the root of the store.
    axis : str
    """
    place = _place(hierarchy, path)
    if place is None or axis not in FRAMES:
        return None
    frame = posixpath.join(place[0], FRAMES[axis])
    names = hierarchy.node(posixpath.join(frame, str(hierarchy.attributes(frame).get(INDEX, INDEX))))
    return names if isinstance(names, zarr.Array) and names.ndim == 1 else None


def _place(hierarchy: Hierarchy, path: str) -> tuple[str, list[str]] | None:
    """Return the AnnData object that a path lies in, and the parts of the path from there; None if it lies in none."""
    groups = list(hierarchy.enclosing(path))
    marked = (group for group in groups if group.attributes.get(ENCODING) == "anndata")
    legacy = (group for group in groups if is_root(hierarchy, group.path))
    found = next(marked, None) or next(legacy, None)
    return None if found is None else (found.path, found.inside.split("/"))


def _encoding(hierarchy: Hierarchy, path: str) -> object:
    return hierarchy.attributes(path).get(ENCODING)


# Columns --------------------------------------------------------------------------------------------------


def array_of(hierarchy: Hierarchy, node: ArrayLike | zarr.Group) -> Stored | None:
    """Return the codes of a categorical, with the names that they stand for; None if a node is none.

    Raises
    ------
    UnsuitableVariable
        It is a column with a mask.
    NotZarr, ChunkMissing, ChunkUndecodable
        Codes or names cannot be read.
    """
    path = hierarchy.store.path
    if isinstance(node, zarr.Group):
        encoding = str(node.attrs.get(ENCODING))
        if encoding.startswith(NULLABLE):
            raise UnsuitableVariable(
                f"{path}: {node.path} is a column of {encoding} values, which have a mask beside them.",
                'Write it as floats, in which NaN is missing: adata.obs["n"] = adata.obs["n"].astype("float64").',
            )
        return _categorical(hierarchy, node.path) if encoding == CATEGORICAL else None
    parent, _, name = node.path.rpartition("/")
    if name == "codes" and _encoding(hierarchy, parent) == CATEGORICAL:
        return _categorical(hierarchy, parent)
    names = node.attrs.get("categories")
    if isinstance(names, str) and _encoding(hierarchy, parent) == FRAME:  # AnnData 0.7
        return Stored(node, read_categories(hierarchy, posixpath.join(parent, names).strip("/")))
    return None


def _categorical(hierarchy: Hierarchy, path: str) -> Stored:
    codes = hierarchy.node(f"{path}/codes")
    if not isinstance(codes, zarr.Array):
        raise NotZarr(
            f"{hierarchy.store.path}: {path} is a categorical without codes: {path}/codes is no array.",
            "Restore it from a copy of the store.",
        )
    return Stored(codes, read_categories(hierarchy, f"{path}/categories"))


def without_parts(paths: Iterable[str]) -> list[str]:
    """Return the paths by which arrays are named: a categorical by its group, not by its codes and names."""
    given = list(dict.fromkeys(paths))
    known = set(given)
    whole = {
        path.removesuffix("/codes")
        for path in given
        if path.endswith("/codes") and f"{path.removesuffix('codes')}categories" in known
    }
    parts = {f"{path}/{part}" for path in whole for part in ("codes", "categories")}
    columns = [path for path in given if path not in parts and "/__categories/" not in f"/{path}"]
    return [*columns, *whole]
