"""What a sample is and where it lies: Zarr -> units -> partitions -> batches of numpy arrays.

Nothing in this folder knows torch or Dask.

    source.py      `open_samples`: the metadata of a Zarr group -> `Samples`
    coordinate.py  the coordinate of the sample dimension: where it jumps, no window may cross
    variable.py    `Variable`: an array as its metadata describe it
    members.py     several stores as one: one axis of rows, and what must be alike in all
    joined.py      describes several stores as one
    samples.py     `Samples`: which variables make a sample, how many there are, how they are stored
    sampletext.py  samples as a person reads them
    encoding.py    stored values -> what the model sees: CF packing, missing values, normalisation
    selection.py   the sample dimension, isel and patches, checked against the dimensions
    paths.py       a configured path -> the store, once there is a group
    dataset.py     the named arrays of a group, their dimensions and attributes; no other array is opened
    dimensions.py  the names of dimensions: of the store, of a layout, or of data.dims
    names.py       a name that is no array: which are, and where it lies
    categories.py  what the codes of categoricals stand for, compared between a run and its stores
    genes.py       the names of genes, compared between the stores of a run
    matrix.py      what is asked of a sparse matrix, and how many of its rows are read at once
    sparse.py      rows of a sparse matrix in memory
    layouts/       OME-Zarr, AnnData: what the groups of a store say about its arrays
    cf.py          what CF attributes mean, by xarray
    plan/          which samples are read by whom, in which order, in how much memory: pure arithmetic
    read/          bytes of a Zarr store -> units in memory
    load/          batches in time
"""
