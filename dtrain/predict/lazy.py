"""Predictions as an `xarray.Dataset` whose variables are computed when they are asked for."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from dtrain.predict.prepare import Prepared, group_attributes
from dtrain.runtime.lazy import LazyPayload, lazy_arrays

if TYPE_CHECKING:
    import xarray as xr


def lazy_dataset(prepared: Prepared) -> xr.Dataset:
    """Return predictions with their coordinates; the coordinates alone are read."""
    import xarray as xr

    arrays = lazy_arrays(LazyPayload(prepared.spec, prepared.facts.params, prepared.work))
    variables = {}
    for head in prepared.work.heads:
        for array in head.arrays:
            marked = {} if array.fill is None or array.numpy_dtype.kind == "f" else {"_FillValue": array.fill}
            variables[array.name] = xr.Variable(array.dims, arrays[array.name], dict(array.attributes), encoding=marked)
    return xr.Dataset(variables, _coordinates(prepared), group_attributes(prepared))


def _coordinates(prepared: Prepared) -> dict[str, xr.Variable]:
    """Return the coordinates, decoded as xarray does."""
    import xarray as xr

    total = prepared.work.plan.anchors.total
    stored = {
        one.name: xr.Variable(one.dims, np.asarray(prepared.values_of(one, 0, total)), dict(one.attributes))
        for one in prepared.beside
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dates that numpy does not hold
        try:
            decoded = xr.decode_cf(xr.Dataset(coords=stored), decode_coords=False)
        except ValueError:  # a calendar for which a package is missing
            decoded = xr.decode_cf(xr.Dataset(coords=stored), decode_coords=False, decode_times=False)
    return {str(name): decoded[name].variable for name in decoded.variables}
