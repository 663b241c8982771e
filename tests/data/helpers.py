"""Stores, samples and streams of batches for the tests of the data path."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from dtrain.config.schema import TrainConfig
from dtrain.data.dataset import list_named
from dtrain.data.load.loader import read_batches
from dtrain.data.paths import locate
from dtrain.data.plan.partition import plan_data, train_partitions
from dtrain.data.plan.units import box_shape
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import Samples
from dtrain.data.source import open_samples
from dtrain.data.variable import Variable
from dtrain.errors import InvalidConfig
from dtrain.types import Cursor

START = Cursor(0, 0)
WHOLE = {"val": 0.0, "test": 0.0}
readers = st.sampled_from(["zarr", "zarrs", "auto"])
DTYPES = ["float32", "float64", "float16", "uint8", "int16", "int32", "int64", "bool"]


# Stores -----------------------------------------------------------------------------------------------------


def vector(values, chunk, **options):
    """Describe an array along n alone."""
    return {"dims": ("n",), "values": values, "chunks": (chunk,), **options}


@st.composite
def stores(draw, max_samples=50):
    """Draw (zarr format, arrays): one to three variables, stored in different ways, and the index of each sample."""
    count = draw(st.integers(1, max_samples))
    zarr_format = draw(st.sampled_from([2, 3]))
    arrays = {}
    for name, dtype in [*((f"v{i}", None) for i in range(draw(st.integers(1, 3)))), ("index", "int32")]:
        dtype = dtype or draw(st.sampled_from(DTYPES))
        others = tuple(draw(st.lists(st.integers(1, 3), max_size=2))) if name != "index" else ()
        axis = draw(st.integers(0, len(others)))
        places = int(np.prod(others, dtype=int))
        values = np.arange(count * places).reshape(count, *others)
        values = (values * 37 % 251 + (values if dtype in ("float64", "int32", "int64") else 0)).astype(dtype)
        values = np.arange(count, dtype=dtype) if name == "index" else np.moveaxis(values, 0, axis)
        rows = draw(st.integers(1, 20))
        chunks = tuple(rows if dim == axis else draw(st.integers(1, size)) for dim, size in enumerate(values.shape))
        dims = [f"{name}_{dim}" for dim in range(values.ndim)]
        dims[axis] = "n"
        arrays[name] = {"dims": tuple(dims), "values": values, "chunks": chunks}
        if zarr_format == 3 and draw(st.booleans()):
            arrays[name]["shards"] = tuple(size * draw(st.integers(1, 3)) for size in chunks)
    return zarr_format, arrays


def by_sample(arrays, name):
    """The values of a variable with the sample axis first."""
    return np.moveaxis(arrays[name]["values"], arrays[name]["dims"].index("n"), 0)


def open_all(path, arrays, **data):
    """Open all arrays as inputs, the first one and the index as targets."""
    names = [name for name in arrays if name != "index"]
    return open_samples(path, inputs=names, targets=[names[0], "index"], **{"split": WHOLE, "sample_dim": "n", **data})


def opened(write_store, folder, store, replicas, window, **data):
    """Write a drawn store and return (arrays, samples, plan)."""
    zarr_format, arrays = store
    path = write_store(Path(folder, "s.zarr"), arrays, zarr_format=zarr_format)
    samples = open_all(path, arrays, **data)
    plan = plan_data(samples, replicas=min(replicas, samples.num_samples), seed=3)
    return arrays, samples, replace(plan, window=window)


def reader_of(samples, reader="auto", **options):
    """The reader asked for; "auto" where it does not read a variable."""
    try:
        return UnitReader(samples, reader, **options)
    except InvalidConfig:
        return UnitReader(samples, "auto", **options)


# Metadata alone ----------------------------------------------------------------------------------------------


def variable(name, num_samples, object_rows, *, row=(), dtype="float32", chunk_rows=None, **facts):
    """Describe an array along n that is not written."""
    return Variable(
        name=name,
        dims=("n", *(f"d{i}" for i in range(len(row)))),
        shape=(num_samples, *row),
        dtype=dtype,
        chunks=(chunk_rows or object_rows, *row),
        objects=(object_rows, *row),
        sample_axis=0,
        checksums=False,
        select=tuple((0, n, 1) for n in (num_samples, *row)),
        **facts,
    )


def make_samples(num_samples, *object_rows, row=(), val=0.0, test=0.0, path="p.zarr", chunk_rows=None, **data):
    """Describe the samples of arrays v0, v1, ... that are not written."""
    variables = tuple(
        variable(f"v{i}", num_samples, rows, row=row, chunk_rows=chunk_rows) for i, rows in enumerate(object_rows)
    )
    names = [v.name for v in variables]
    table = {"path": path, "inputs": names, "targets": ["v0"], "split": {"val": val, "test": test}, **data}
    config = TrainConfig(data=table).data
    return Samples(path=path, config=config, sample_dim="n", num_samples=num_samples, variables=variables)


# Batches ----------------------------------------------------------------------------------------------------


def batches(reader, partition, sizes, *, cursor=START, replica=0, shuffle=True, **options):
    """Copies of the batches of a stream: a loader uses its memory again."""
    stream = read_batches(reader, partition, cursor, sizes, replica=replica, shuffle=shuffle, **options)
    return [
        replace(batch, inputs=tuple(a.copy() for a in batch.inputs), targets=tuple(a.copy() for a in batch.targets))
        for batch in stream
    ]


def index_of(found):
    """The samples that batches hold: the last target, named index, says it."""
    return np.concatenate([batch.targets[-1] for batch in found]).tolist() if found else []


def one_pass(partition, batch=7):
    """Sizes of the batches of one pass."""
    full, rest = divmod(partition.num_samples, batch)
    return [batch] * full + [rest] * (rest > 0)


def same_bits(first, second):
    """Whether two streams of batches have the same bits, shapes and dtypes."""
    pairs = list(zip(first, second, strict=True))
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for one, other in pairs
        for a, b in zip((*one.inputs, *one.targets), (*other.inputs, *other.targets), strict=True)
    )


def remembering(samples, **options):
    """A reader that decodes each unit once and hands it out again: for tests of many streams over one store."""
    reader = UnitReader(samples, **options)
    read, kept = reader.read_into, {}

    def read_once(box, out):
        if box not in kept:
            read(box, out)
            kept[box] = {v.name: out[v.name][: box_shape(samples, v, box)[0]].copy() for v in samples.moving}
        for name, rows in kept[box].items():
            out[name][: len(rows)] = rows
        return 0

    reader.read_into = read_once
    return reader


class Spy:
    """Stands between a loader and its reader: records which rows are read, and when reads begin and end."""

    def __init__(self, reader):
        self.reader = reader
        self.reads = []
        self.bytes_decoded = 0
        self.now = 0
        self.most = 0
        self._lock = threading.Lock()
        self._read = reader.read_into
        reader.read_into = self

    def __call__(self, box, out):
        with self._lock:
            self.reads.append((box.start, box.stop))
            self.now += 1
            self.most = max(self.most, self.now)
        decoded = 0
        try:
            decoded = self._read(box, out)
            return decoded
        finally:
            with self._lock:
                self.now -= 1
                self.bytes_decoded += decoded

    def units(self, plan):
        """How often each unit was read."""
        return Counter(first // plan.unit_rows for first, _ in self.reads)


def threads():
    """The threads of loaders that are alive."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("dtrain-")}


def only_partition(samples, **changes):
    """(plan, partition) of a run with one replica, changed as told."""
    plan = replace(plan_data(samples, replicas=1, seed=0), **changes)
    (partition,) = train_partitions(plan)
    return plan, partition


def list_variables(path):
    """Names and dimensions of the data variables of a group, not of its coordinates."""
    arrays, _ = list_named(locate(str(path), Path.cwd()))
    return {name: named.dims for name, named in arrays.items() if named.dims != (name,)}
