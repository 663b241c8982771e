"""What a sample is and where it lies: Zarr -> units -> partitions -> batches of numpy arrays.

Nothing in this folder knows torch or Dask.

    source.py      `open_samples`: the metadata of a Zarr group -> `Samples`
    coordinate.py  the coordinate of the sample dimension: where it jumps, no window may cross
    variable.py    `Variable`: an array as its metadata describe it
    samples.py     `Samples`: which variables make a sample, how many there are, how they are stored
    encoding.py    stored values -> what the model sees: CF packing, missing values, normalisation
    selection.py   the sample dimension, isel and patches, checked against the dimensions
    paths.py       a configured path -> the store, once there is a group
    dataset.py     the named arrays of a group, their dimensions and attributes; no other array is opened
    cf.py          what CF attributes mean, by xarray
    plan/          which samples are read by whom, in which order, in how much memory: pure arithmetic
    read/          bytes of a Zarr store -> units in memory
    load/          batches in time
"""
