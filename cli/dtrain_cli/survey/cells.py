"""AnnData: the genes of a cell, and which column of ``obs`` they tell."""

from __future__ import annotations

from collections.abc import Iterator

from dtrain.data.dataset import NamedArray, find_named
from dtrain.data.layouts import anndata
from dtrain.data.read.tree import nodes_in
from dtrain.errors import ChunkMissing, ChunkUndecodable, NotZarr, UnsuitableVariable, UsageError, listed
from dtrain_cli.survey.contents import AT, Place, contents_of, groups_below, layout_of
from dtrain_cli.survey.draft import Draft, unused
from dtrain_cli.survey.roles import ArrayFacts, Contents, has_word, words
from dtrain_cli.survey.values import Look

MATRICES = ("X", "layers/counts", "raw/X")
"""Names of matrices of cells x genes; the first that can be read is the input."""
PREFERRED = ("cell type", "celltype", "cell class", "subclass", "annotation", "label", "cluster", "leiden", "louvain")
"""Texts in names of columns that people predict, first ones first."""
GROUPS = ("donor", "patient", "individual", "subject", "mouse", "animal", "site", "sample", "library", "batch", "plate")
"""Words of columns that say where a cell comes from, first ones first."""
NO_TYPES = {*GROUPS, "id", "barcode", "barcodes", "index", "well", "lane", "replicate", "channel", "run", "chemistry"}
DERIVED = {"n", "counts", "genes", "pct", "percent", "log", "total", "mito", "umi", "umis", "size", "factor", "doublet"}
"""Words of numbers that are computed from the matrix itself."""
FEWEST_TYPES, MOST_TYPES = 2, 200
FEWEST_GROUPS = 3
"""Groups of which one can be held out for validation and one for test."""
LARGE_COUNT = 30
"""Values that reach it are no logarithms."""
CURE = 'adata.obs["cell_type"] = adata.obs["cell_type"].astype("category"); adata.write_zarr("new.zarr")'


# What a store holds -----------------------------------------------------------------------------------------


def cells_at_root(place: Place) -> Contents | None:
    """Return the matrices and the columns of a store that is an AnnData object; None if it is none."""
    return _contents(place, "") if layout_of(place, "") == anndata.NAME else None


def cells_below(place: Place) -> Contents | None:
    """Return the same of the only AnnData object in the groups of a store; None if there is none.

    Raises
    ------
    UsageError
        There are several.
    """
    found = [name for name, _ in groups_below(place.root) if layout_of(place, name) == anndata.NAME]
    if len(found) > 1:
        raise UsageError(
            f"{place.path} holds several AnnData objects: {listed(found)}.", f"{AT} {place.path}/{found[0]}."
        )
    return _contents(place, found[0]) if found else None


def _contents(place: Place, group: str) -> Contents:
    arrays: dict[str, NamedArray] = {}
    strange: dict[str, str] = {}
    for name in _names(place, group):
        try:
            named = find_named(place.store, group, name)
        except UnsuitableVariable as error:
            strange[name] = "a mask beside its values" if "mask" in error.message else "no axes that are known"
        except (NotZarr, ChunkMissing, ChunkUndecodable):
            strange[name] = "cannot be opened"
        else:
            if named is not None and named.matrix is not None and named.matrix.axis == 1:
                strange[name] = "CSC, gene by gene"
            elif named is not None:
                arrays[name] = named
    return contents_of(place, group, arrays, strange, anndata.NAME)


def _names(place: Place, group: str) -> Iterator[str]:
    """Yield the names of arrays that may be inputs or targets; not all of them may be there."""
    prefix = f"{group}/" if group else ""
    yield from MATRICES
    for part in ("layers", "obsm"):
        names = (f"{part}/{name}" for name in nodes_in(place.store, f"{prefix}{part}"))
        yield from (name for name in names if name not in MATRICES)
    columns = place.hierarchy.attributes(f"{prefix}obs").get("column-order", [])
    yield from (f"obs/{name}" for name in columns if isinstance(name, str))


# What is learned --------------------------------------------------------------------------------------------


def cells(contents: Contents, look: Look) -> Draft:
    """Return a draft that predicts a column of ``obs`` from the genes of a cell.

    Raises
    ------
    UsageError
        There is no matrix, or no column to predict.
    """
    matrix = _matrix(contents)
    columns = [array for array in contents.arrays.values() if array.name.startswith("obs/")]
    target, classes, why = _target(contents, columns, look)
    seen = look(matrix.name)
    is_genes = matrix.dims[1:] in ((anndata.GENE,), (anndata.RAW_GENE,))
    counts = is_genes and seen.minimum >= 0 and (seen.are_integers or seen.maximum > LARGE_COUNT)
    rest = [f"{array.name} ({array.categories})" for array in columns if array.categories and array is not target]
    beside = f"; other categoricals: {listed(rest, 12)}" if rest else ""
    are = "are counts" if seen.are_integers else f"reach {seen.maximum:.0f} and are no logarithms"
    why_counts = f"values of {matrix.name} {are}: the model scales each cell to a sum of 10,000 and takes log(1 + x)"
    return Draft(
        template="tabular",
        model="cells_model.py",
        args={"counts": bool(counts)},
        title=f"{'Classes of' if classes else 'A number:'} {target.name}, from {matrix.name} of each cell.",
        inputs=(matrix.name,),
        target=target.name,
        sample_dim=anndata.CELL,
        classes=classes,
        why_classes=f"the categories of {target.name}",
        no_means=bool(counts),
        others=unused(contents, matrix.name, target.name),
        notes={
            "data.targets": f"{why}{beside}",
            "model_args.outputs": f"the categories of {target.name}" if classes else "",
            "model_args.counts": why_counts if counts else "",
        },
        off=_offered(columns, target, classes),
    )


def _matrix(contents: Contents) -> ArrayFacts:
    """Return the matrix to learn from."""
    arrays = [array for array in contents.arrays.values() if not array.name.startswith("obs/")]
    matrices = [array for array in arrays if array.dims[:1] == (anndata.CELL,) and len(array.dims) == 2]
    if not matrices:
        said = listed([f"{name} ({why})" for name, why in contents.left_out.items() if not name.startswith("obs/")])
        raise UsageError(
            f"{contents.path}: AnnData without a matrix that can be read cell by cell: {said or 'there is none'}.",
            'Write X as rows: adata.X = adata.X.tocsr(); adata.write_zarr("new.zarr").',
        )
    return matrices[0]


def _target(contents: Contents, columns: list[ArrayFacts], look: Look) -> tuple[ArrayFacts, int, str]:
    """Return the column to predict, its number of classes (0: a number), and why it is taken."""
    count = max((array.shape[0] for array in columns), default=0)
    types = [a for a in columns if FEWEST_TYPES <= a.categories <= min(MOST_TYPES, count // 2)]
    types = sorted((a for a in types if not _is(a, NO_TYPES)), key=_preference)
    if types:
        is_named = _preference(types[0]) < len(PREFERRED)
        return types[0], types[0].categories, "chosen by its name" if is_named else "a guess: the first categorical"
    plain = [a for a in columns if not a.categories and not _is(a, NO_TYPES)]
    bools = [a for a in plain if a.kind == "b"]
    if bools:
        return bools[0], 2, "no categorical was found"
    numbers = [a for a in plain if a.kind != "b" and look(a.name).std > 0]
    if numbers:
        chosen = min(numbers, key=lambda a: (_is(a, DERIVED), a.kind != "f"))
        return chosen, 0, "a guess: no categorical was found"
    has = [f"{a.name} ({f'{a.categories} categories' if a.categories else 'numbers'})" for a in columns]
    has += [f"{name} ({why})" for name, why in contents.left_out.items() if name.startswith("obs/")]
    raise UsageError(
        f"{contents.path}: AnnData without a column of obs to predict: {listed(has, 12) or 'obs has no columns'}.",
        f"Write a categorical of {FEWEST_TYPES} to {MOST_TYPES} types: {CURE}.",
    )


def _is(array: ArrayFacts, wanted: set[str]) -> bool:
    return has_word(array.name.removeprefix("obs/"), wanted)


def _preference(array: ArrayFacts) -> int:
    text = " ".join(words(array.name.removeprefix("obs/")))
    return next((number for number, wanted in enumerate(PREFERRED) if wanted in text), len(PREFERRED))


def _offered(columns: list[ArrayFacts], target: ArrayFacts, classes: int) -> dict[str, tuple[object, str]]:
    """Return keys that are written as comments: groups held out as a whole, classes in equal numbers."""
    off: dict[str, tuple[object, str]] = {}
    groups = [a for a in columns if a.categories >= FEWEST_GROUPS and a is not target]
    by = next((a.name for word in GROUPS for a in groups if _is(a, {word})), "")
    if by:
        why = "all cells of a group in one split: cells of one resemble each other"
        off["data.split"] = ({"by": by, "val": 0.1, "test": 0.1}, why)
    if classes:
        off["data.balance"] = (target.name, "if some classes are rare: each comes about equally often in a pass")
    return off
