"""Names of the genes of cells x genes: a column must be one gene in all stores that a run trains on and evaluates."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeAlias

from dtrain.data.dataset import hierarchy_of
from dtrain.data.layouts.anndata import gene_names
from dtrain.data.layouts.stored import read_names
from dtrain.data.read.kind import at_snapshot
from dtrain.data.read.open import open_store
from dtrain.data.samples import Samples
from dtrain.errors import DataChanged, LengthsDiffer, shortened

MOST_GENES = 1 << 18
"""Names of genes that are compared."""
MOST_LETTERS = 40
Genes: TypeAlias = Mapping[str, tuple[str, ...]]
"""By variable, the names of its selected genes; only of variables of AnnData."""


def genes_of(samples: Samples) -> Genes:
    """Read the names of the genes that are selected.

    Raises
    ------
    ChunkMissing, ChunkUndecodable
        Names the array.
    StoreForbidden, StoreUnavailable
        The server refuses or fails.
    """
    config, found, one = samples.config, {}, samples.stores[0]  # several that are one have been compared
    store = open_store(one.path, at_snapshot(config.storage_options, one.store.snapshot), one.store)
    hierarchy = hierarchy_of(store)
    for variable in samples.moving:
        path = "/".join(filter(None, (config.group.strip("/"), variable.array_path)))
        array = gene_names(hierarchy, path)
        if array is not None and len(variable.shape) == 2 and variable.sample_axis == 0:
            names = read_names(hierarchy, array, MOST_GENES, "the names of genes")
            found[variable.name] = names[slice(*variable.select[1 - variable.sample_axis])]
    return found


def check_genes(path: str, genes: Genes, first_path: str, first: Genes) -> None:
    """Refuse a store whose genes are others, or in another order, than those of the first store.

    Raises
    ------
    LengthsDiffer
        Names the first column that differs.
    """
    for name, own in genes.items():
        pairs = enumerate(zip(own, first.get(name, own), strict=False))
        column = next((column for column, (here, there) in pairs if here != there), None)
        if column is not None:
            here, there = (shortened(names[column], MOST_LETTERS) for names in (own, first[name]))
            raise LengthsDiffer(
                f"{path}: column {column:,} of {name} is the gene {here}; in {first_path} it is {there}.",
                "Bring the genes of all stores into one order, with anndata: adata[:, genes].write_zarr(...).",
            )


def gene_digests(genes: Genes) -> dict[str, str]:
    """Return, by variable, the SHA-256 of the names of its genes in their order: a plan keeps it."""
    return {name: hashlib.sha256("\0".join(own).encode()).hexdigest() for name, own in genes.items()}


def check_digests(path: str, genes: Genes, known: Mapping[str, str]) -> None:
    """Refuse a store whose genes are others, or in another order, than those that a run was started with.

    Raises
    ------
    DataChanged
    """
    for name, digest in gene_digests(genes).items():
        if known.get(name, digest) != digest:
            raise DataChanged(
                f"{path}: the columns of {name} are other genes, or in another order, than those that the run was "
                "trained on.",
                "Bring them into that order, with anndata: adata[:, genes].write_zarr(...), genes the var_names of a "
                "store of the run.",
            )
