"""Which samples are read by whom, in which order and in how much memory: pure arithmetic on metadata, numpy only.

Nothing in this folder knows zarr or xarray.

    hashing     the counter hash of every seeded draw
    units       `DataPlan`, units and cells, and the box of a read
    gaps        the rule for jumps of a coordinate
    cuts        how many rows make a unit and a cell
    splits      which cells belong to train, val and test
    anchors     which anchors each cell of a split holds
    parts       `Partition`: the samples of a replica or an evaluation task, unit by unit
    partition   `plan_data`; the partition of each replica and evaluation task
    order       the order of one pass over a partition
    bins        the rows of the parts that a shuffled pass holds open
    grid        which chunks and shards a selection touches
    readers     who reads a variable, and why
    footprint   bytes of samples, units and decoding
    memory      the memory budget of a worker
    table       a plan as plan.json keeps it
    summary     the counts of a plan that a person wants to see
"""
