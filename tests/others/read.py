"""Read a store with `anndata`, and write what it says to a file: python read.py STORE FILE.npz."""

from __future__ import annotations

import sys

import anndata
import numpy as np

adata = anndata.read_zarr(sys.argv[1])
column, nested = adata.obs["obs_cat"].cat, adata.obsm["df"]["cat"].cat
np.savez(
    sys.argv[2],
    x=adata.X.toarray(),
    codes=column.codes.to_numpy(),
    names=np.array(column.categories, dtype="U"),
    nested=nested.codes.to_numpy(),
    int64=adata.obs["int64"].to_numpy(),
    layer=adata.layers["array"],
    obsm=adata.obsm["array"],
)
