"""What is asked of a sparse matrix: rows that are samples, and whole; and how many of them are read at once.

A unit is a constant number of rows, which hold `LEAST_CHUNKS` stored chunks in the mean. Neighbouring units share at
most one chunk of each array, which is decoded for both. So a pass decodes at most a quarter more than there is, however
unequal the rows.
"""

from __future__ import annotations

import math

from dtrain.config.schema import DataConfig
from dtrain.data.layouts.stored import Matrix
from dtrain.data.variable import Sparse, Variable
from dtrain.errors import InvalidConfig, UnsuitableVariable

LEAST_CHUNKS = 4
"""Stored chunks of a unit, in the mean."""
MOST_ROWS = 4 << 20
"""Rows that are read at once, at most: a matrix may hold next to nothing."""


def rows_together(sparse: Sparse) -> int:
    """Return how many rows hold `LEAST_CHUNKS` chunks of each array in the mean."""
    chunk = max(sparse.data.chunks[0], sparse.indices.chunks[0])
    rows = math.ceil(LEAST_CHUNKS * chunk * sparse.rows / max(1, sparse.count))
    return max(1, min(rows, sparse.rows, MOST_ROWS))


def check_order(path: str, name: str, dims: tuple[str, ...], matrix: Matrix, sample_dim: str) -> None:
    """Refuse a matrix whose samples are not stored one after the other.

    Raises
    ------
    UnsuitableVariable
        Names the way to convert it.
    """
    kind, other = ("CSR", "csc") if matrix.axis == 0 else ("CSC", "csr")
    if sample_dim not in dims:
        raise UnsuitableVariable(
            f"{path}: {name} is a sparse matrix without {sample_dim}, the dimension of the samples: {', '.join(dims)}.",
            "Write it dense, or name another array.",
        )
    if dims[matrix.axis] != sample_dim:
        raise UnsuitableVariable(
            f"{path}: {name} is stored {dims[matrix.axis]} by {dims[matrix.axis]} ({kind}), and the samples lie along "
            f"{sample_dim}: for a single one all of it would be read.",
            f"Convert it with anndata: {_converted(name, other)}; adata.write_zarr(...).",
        )


def _converted(name: str, kind: str) -> str:
    """Return the statement that converts a matrix of an AnnData object."""
    *_, group, last = ("", *name.split("/"))
    attribute = f"adata.{last}" if last == "X" else f'adata.{group}["{last}"]' if group else last
    return f"{attribute} = {attribute}.to{kind}()"


def check_sparse(path: str, config: DataConfig, variables: tuple[Variable, ...]) -> None:
    """Refuse keys of ``[data]`` that a sparse matrix among the variables cannot follow.

    Raises
    ------
    InvalidConfig
    """
    sparse = next((variable for variable in variables if variable.sparse is not None), None)
    if sparse is None:
        return
    if config.patch:
        raise InvalidConfig(
            f"data.patch = {{ {', '.join(f'{dim} = {size}' for dim, size in config.patch.items())} }}: {path} holds "
            f"{sparse.name} as a sparse matrix, whose samples are whole rows.",
            f"Leave data.patch out, or write {sparse.name} dense.",
        )
    if config.missing == "skip":
        raise InvalidConfig(
            f'data.missing = "skip": {path} holds {sparse.name} as a sparse matrix, whose chunks are no runs of rows.',
            'Set data.missing = "error", or restore what is missing.',
        )
    if config.min_valid is not None:
        raise InvalidConfig(
            f"data.non_finite: {path} holds {sparse.name} as a sparse matrix, in which values that are not finite "
            "are not looked for sample by sample.",
            f'Set data.non_finite = "error", which names them, or "allow"; or write {sparse.name} dense.',
        )
    parts = {array.name for variable in variables for array in variable.arrays if array.part_of}
    twice = next((variable.name for variable in variables if variable.name in parts), "")
    if twice:
        raise InvalidConfig(f"{twice} is a part of {sparse.name}, a sparse matrix.", f"Name {sparse.name} alone.")
