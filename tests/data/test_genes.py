"""The names of genes are read where AnnData keeps them, and compared column by column."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from dtrain.data.genes import check_genes, genes_of
from dtrain.data.source import open_samples
from dtrain.errors import ChunkMissing, LengthsDiffer
from tests.data.layouts.fixtures import frame, write, write_anndata, write_sparse
from tests.data.layouts.test_sparse import random

pytestmark = pytest.mark.filterwarnings("ignore")  # zarr's own, of strings that version 3 does not specify
NAMES = tuple(f"var-{i}" for i in range(6))


def genes(path, inputs=("X",), **data):
    return genes_of(open_samples(path, inputs=list(inputs), targets=["obs/age"], **data))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("how", ["v2", "v3", "legacy"])
@pytest.mark.parametrize("group", ["", "mod/rna"])
def test_dense_sparse_and_raw(tmp_path, how, group):
    path = write_anndata(tmp_path / "s.zarr", how, group=group)
    root = zarr.open_group(path, path=group or None, mode="r+")
    write_sparse(root["layers"], "thin", random(30, 6))
    write_sparse(root.create_group("raw"), "X", random(30, 8))
    frame(root["raw"], "var", 8, [])
    found = genes(path, ["X", "layers/thin", "raw/X", "obsm/X_pca"], group=group)
    assert found == {"X": NAMES, "layers/thin": NAMES, "raw/X": tuple(f"var-{i}" for i in range(8))}
    assert genes(path, isel={"gene": {"start": 1, "step": 2}}, group=group) == {"X": NAMES[1::2]}


def test_what_names_no_genes(tmp_path):
    path = write_anndata(tmp_path / "s.zarr")
    root = zarr.open_group(path, mode="r+")
    root["var"].attrs["_index"] = "nothing"
    assert genes(path) == {}
    del root["var"]
    assert genes(path) == {}
    rows = zarr.open_group(tmp_path / "rows.zarr", mode="w")
    for name, values in (("X", np.ones((5, 2))), ("obs/age", np.arange(5))):
        write(rows, name, values, values.shape)
    dims = {"X": ["cell", "gene"], "obs/age": ["cell"]}
    assert genes(tmp_path / "rows.zarr", dims=dims) == {}


def test_names_that_are_lost_are_an_error(tmp_path):
    path = write_anndata(tmp_path / "s.zarr")
    (path / "var" / "_index" / "c" / "0").unlink()
    with pytest.raises(ChunkMissing, match="chunk var/_index/c/0 of var/_index, the names of genes, is missing"):
        genes(path)


def test_the_first_column_that_differs_is_named():
    check_genes("b", {"X": ("p", "q")}, "a", {"X": ("p", "q")})
    check_genes("b", {}, "a", {"X": ("p", "q")})
    check_genes("b", {"X": ("p", "q")}, "a", {})
    with pytest.raises(LengthsDiffer, match="b: column 1 of X is the gene r; in a it is q"):
        check_genes("b", {"X": ("p", "r")}, "a", {"X": ("p", "q")})
