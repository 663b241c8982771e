"""Predictions: which samples, which arrays, lazily as an `xarray.Dataset` or written to Zarr by tasks.

request.py   the store that is predicted, and what is known of the targets
heads.py     outputs of the model x targets x ``values`` -> arrays
prepare.py   everything that is resolved before the first unit, and the settings that a continued output is compared by
write.py     predictions to Zarr: created or continued, by tasks
lazy.py      predictions as dask arrays
"""
