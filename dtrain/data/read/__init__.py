"""Bytes of a Zarr store -> units in memory.

A kind of store is one file, a reader of chunks another one, and all sentences about faults stand in two places.

    open        the kinds of stores, and groups and arrays in them
    kind        `StoreKind`: all that a kind of store consists of
    local       directories of this machine
    remote      URLs, through fsspec
    retry       requests that fail are retried
    store       `ReadStore`: a store while it is read
    documents   metadata that this process has read before
    tree        arrays and groups of a store, by their documents alone
    shards      indices of shards
    codecs      codecs of chunks
    presence    which chunks there are, looked up before training
    rows        `ChunkReader`: what a reader of chunks does
    files       reader: files of a local store, decoded by numcodecs (`decode`)
    zarr        reader: through zarr, or zarrs
    faults      missing, truncated, undecodable, modified objects: by name
    values      values that are not finite, no weights, or too large: by name
    kept        what outlives a reader: preloaded rows, row starts, versions of files
    sparse      rows of sparse matrices
    boxes       `BoxReader`: what every reader of units does
    units       `UnitReader`: chooses readers, reads units, checks values
    joined      `JoinedReader`: the same for several stores that are one
    inventory   what is stored, of one store or of several
"""
