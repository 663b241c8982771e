"""What verifying needs to know of an array: its grid of stored objects, and how an absent chunk is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from dtrain.data.cf import encoding_of
from dtrain.data.plan.missing import judged, stands_for
from dtrain.data.read.pieces import Place, variable_of
from dtrain.data.read.shards import ArrayLike
from dtrain.data.variable import Variable
from dtrain.errors import UnsuitableVariable

Missing = Literal["auto", "error", "fill", "skip"]
"""``data.missing``."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An array, as verifying sees it."""

    array: ArrayLike
    variable: Variable
    reads_as: str
    """What a chunk that is not stored decodes to."""
    needs_all: bool
    """Whether a chunk that is not stored is a fault."""

    @property
    def name(self) -> str:
        """Its path in the store."""
        return str(self.array.path)


def stored_array(array: ArrayLike, missing: Missing) -> Stored:
    """Describe an array, and judge its absent chunks as ``data.missing`` does.

    Which integers are labels, and which dimension is that of the samples, a store does not say. So those that are not
    packed may leave chunks out here, and training refuses some of them. NaN is left to ``data.non_finite``.

    Raises
    ------
    Undecodable
        Its chunks have no values, or there are too many of them.
    """
    variable = variable_of(array)
    dtype = np.dtype(array.dtype)
    if dtype.kind not in "fiub":
        return Stored(array, variable, repr(array.fill_value), missing == "error")
    attributes = dict(array.attrs)
    fill = None if array.fill_value is None else np.asarray(array.fill_value, dtype).item()
    if array.metadata.zarr_format == 2 and fill is not None:
        attributes["_FillValue"] = fill
    try:
        encoding = encoding_of("", variable.name, attributes, dtype, zarr_format=array.metadata.zarr_format)
    except UnsuitableVariable:
        encoding = None
    described = replace(
        variable,
        encoding=encoding,
        fill_value=None if fill is None or fill != fill else fill,
        means_bool=dtype.kind in "iu" and attributes.get("dtype") == "bool",
    )
    if dtype.kind != "f" and fill is None:
        described = replace(described, fill_value=0)  # as zarr fills it
    needs_all = missing == "error" or (missing == "auto" and judged(described, may_be_label=True) == "error")
    return Stored(array, variable, stands_for(described), needs_all)


def places(grid: tuple[int, ...]) -> Iterator[Place]:
    """Yield all places of a grid in C order, without a list of them.

    >>> list(places((2, 2))), list(places(()))
    ([(0, 0), (0, 1), (1, 0), (1, 1)], [()])
    """
    if not grid:
        yield ()
        return
    for first in range(grid[0]):
        for rest in places(grid[1:]):
            yield first, *rest
