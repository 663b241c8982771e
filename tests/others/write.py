"""Write stores with `anndata` and `ome-zarr`: run by an environment that has them, python write.py FOLDER.

Beside the stores lies truth.npz, with the values that they hold.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import zarr
from ome_zarr.format import FormatV04, FormatV05
from ome_zarr.writer import write_image, write_labels
from scipy import sparse

COUNT, GENES = 240, 12
TYPES = ["B cell", "T cell", "monocyte"]


def write_cells(folder: Path) -> dict[str, np.ndarray]:
    """Write cells of three types, some of which have none, in both versions of Zarr; and the same with a sparse X."""
    rng = np.random.default_rng(3)
    codes = rng.integers(0, 3, COUNT)
    x = (rng.normal(size=(3, GENES))[codes] * 2 + rng.normal(size=(COUNT, GENES))).astype("float32")
    few = np.where(np.abs(x) > 2, x, 0)
    few[5:9] = 0
    names = pd.Categorical.from_codes(np.where(np.arange(COUNT) % 9 == 0, -1, codes), TYPES)
    obs = {"cell_type": names, "n_counts": x.sum(1), "age": np.arange(COUNT), "control": np.arange(COUNT) % 2 == 0}
    obs["visits"] = pd.array([None, *range(1, COUNT)], dtype="Int64")
    adata = anndata.AnnData(
        X=x,
        obs=pd.DataFrame(obs, index=[f"cell-{i}" for i in range(COUNT)]),
        var=pd.DataFrame({"mean": x.mean(0)}, index=[f"gene-{i}" for i in range(GENES)]),
        layers={"counts": x * 2},
        obsm={"X_pca": x[:, :3].astype("float64")},
    )
    for zarr_format in (2, 3):
        anndata.settings.zarr_write_format = zarr_format
        adata.write_zarr(folder / f"cells-v{zarr_format}.zarr", chunks=(32, GENES))
        thin = adata.copy()
        thin.X = sparse.csr_matrix(few)
        thin.obsm["regions"] = thin.X[:, :4]
        thin.raw = thin
        thin.layers["columns"] = sparse.csc_matrix(few)
        thin.write_zarr(folder / f"sparse-v{zarr_format}.zarr")
    return {"x": x, "thin": few, "codes": np.asarray(names.codes), "n_counts": adata.obs["n_counts"].to_numpy()}


def write_nuclei(folder: Path) -> dict[str, np.ndarray]:
    """Write images of two channels with discs, and the discs as label images, by versions 0.4 and 0.5."""
    rng = np.random.default_rng(2)
    y, x = np.mgrid[:32, :32]
    centre = rng.integers(8, 24, (2, 48, 1, 1))
    mask = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < 64).astype("uint8")
    noise = rng.integers(1, 900, (48, 2, 32, 32))
    image = (np.stack([20_000 * mask.astype("int64"), np.full(mask.shape, 9_000)], axis=1) + noise).astype("uint16")
    for fmt, zarr_format in ((FormatV04(), 2), (FormatV05(), 3)):
        root = zarr.open_group(folder / f"image-{fmt.version}.zarr", mode="w", zarr_format=zarr_format)
        write_image(image, root, axes="tcyx", fmt=fmt, storage_options={"chunks": (4, 2, 32, 32)})
        options = {"chunks": (4, 32, 32)}
        write_labels(mask, root, name="nuclei", axes="tyx", fmt=fmt, storage_options=options)
        options = {"chunks": (4, 1, 32, 32)}
        write_labels(mask[:, None], root, name="channel", axes="tcyx", fmt=fmt, storage_options=options)
    return {"image": image, "mask": mask}


if __name__ == "__main__":
    target = Path(sys.argv[1])
    np.savez(target / "truth.npz", **write_cells(target), **write_nuclei(target))
