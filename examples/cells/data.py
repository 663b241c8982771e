"""Write 700 blood cells as an AnnData store in Zarr, with a sparse matrix. Run: python data.py

Needs the file that scanpy ships: pip install --no-deps "scanpy==1.11.*"; pip install h5py
68k PBMC, reduced to 700 cells x 765 genes: Zheng et al. 2017, https://doi.org/10.1038/ncomms14049, data of 10x Genomics
(CC BY 4.0). With anndata, `anndata.read_h5ad(FILE).write_zarr("cells.zarr")` writes the same layout from any file.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import zarr


def open_file():
    """Return the file that scanpy ships."""
    import h5py

    package = find_spec("scanpy")  # found, not imported: its dependencies are not needed
    if package is None:
        raise SystemExit('scanpy holds the data: pip install --no-deps "scanpy==1.11.*"')
    return h5py.File(Path(package.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad")


def marked(node, kind, version="0.2.0", **attributes):
    """Mark a group or an array as AnnData does."""
    node.attrs.update({"encoding-type": kind, "encoding-version": version, **attributes})
    return node


def write_array(group, name, values, chunk=1000):
    if values.dtype.kind == "S":
        values = np.array([value.decode() for value in values], np.dtypes.StringDType())
    array = group.create_array(name, shape=values.shape, dtype=values.dtype, chunks=(min(chunk, len(values)),))
    array[:] = values
    marked(array, "string-array" if values.dtype.kind == "T" else "array")


def write_frame(root, name, index, numbers, categoricals):
    """Write a data frame; a categorical is its codes, and the names of its categories."""
    columns = [*numbers, *categoricals]
    frame = marked(root.create_group(name), "dataframe", **{"_index": "_index", "column-order": columns})
    write_array(frame, "_index", index)
    for column, values in numbers.items():
        write_array(frame, column, values)
    for column, (codes, names) in categoricals.items():
        group = marked(frame.create_group(column), "categorical", ordered=False)
        write_array(group, "codes", codes)
        write_array(group, "categories", names)


def main(directory):
    """Write cells.zarr: X as CSR, the logarithm of normalised counts; obs with the types of the cells; var."""
    with open_file() as file, zarr.config.set({"array.write_empty_chunks": True}):
        root = marked(
            zarr.create_group(Path(directory, "cells.zarr"), zarr_format=2, overwrite=True), "anndata", "0.1.0"
        )
        obs, raw = file["obs"][:], file["raw.X"]
        shape = [len(obs), len(file["raw.var"])]
        matrix = marked(root.create_group("X"), "csr_matrix", "0.1.0", shape=shape)
        for part in ("data", "indices", "indptr"):
            write_array(matrix, part, raw[part][:], chunk=4096)
        types = {name: (obs[name], file[f"uns/{name}_categories"][:]) for name in ("bulk_labels", "louvain")}
        write_frame(root, "obs", obs["index"], {name: obs[name] for name in ("n_counts", "percent_mito")}, types)
        write_frame(root, "var", file["raw.var"]["index"], {}, {})
    counts = np.bincount(types["bulk_labels"][0])
    print(
        f"cells.zarr: {shape[0]} cells, {shape[1]} genes, {len(counts)} types of {counts.min()} to {counts.max()} cells"
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent)
