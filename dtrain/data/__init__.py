"""What a sample is and where it lies: Zarr -> units -> partitions -> batches of numpy arrays.

Nothing in this folder knows torch or Dask.

    open_samples      source.py      metadata of a Zarr group, through xarray
    Samples           samples.py     which variables make a sample, how many there are, how they are stored
    check_presence    presence.py    the stored objects of a Zarr group
    plan_data         partition.py   units, splits and partitions: integer arithmetic on that metadata
    epoch_order       order.py       the order of one pass: a pure, seekable function of (seed, partition, epoch)
    read_batches      loader.py      partition + cursor -> numpy batches, in bounded memory
"""
