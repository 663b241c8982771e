"""Sparse matrices as they are planned and read: how often each chunk is decoded, and in how much memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import zarr
from scipy import sparse

from dtrain.data.load.loader import Loader, read_batches
from dtrain.data.plan.footprint import scratch_bytes, slot_arrays, slot_bytes, static_bytes, tables_bytes
from dtrain.data.plan.memory import Limits, Reading, plan_memory
from dtrain.data.plan.partition import Partition, eval_partitions, plan_data, train_partitions
from dtrain.data.plan.summary import describe_plan
from dtrain.data.read.decode import Decoder
from dtrain.data.read.joined import values_counted
from dtrain.data.read.store import ReadStore
from dtrain.data.read.units import UnitReader
from dtrain.data.samples import Samples
from dtrain.data.source import open_samples
from dtrain.data.sparse import PIECE_VALUE_BYTES, PIECE_VALUES
from dtrain.errors import ChunkTooLarge
from tests.data.helpers import START, WHOLE
from tests.data.layouts.fixtures import encoding, write, write_cells

pytestmark = pytest.mark.filterwarnings("ignore")  # zarr's own, of strings that version 3 does not specify
COLUMNS = 600

LENGTHS = {
    "even": lambda rng, rows: np.full(rows, 40),
    "unequal": lambda rng, rows: np.minimum(rng.lognormal(2.5, 1.5, rows).astype(int), COLUMNS),
    "sorted": lambda rng, rows: np.sort(np.minimum(rng.lognormal(2.5, 1.5, rows).astype(int), COLUMNS)),
    "a heavy part": lambda rng, rows: np.where(np.arange(rows) // (rows // 10) == 3, 400, 1),
    "many empty": lambda rng, rows: np.where(np.arange(rows) % 11 < 9, 0, 200),
    "one value in three rows": lambda rng, rows: (np.arange(rows) % 3 == 0).astype(int),
}


def matrix_of(kind, rows=3000, seed=0):
    rng = np.random.default_rng(seed)
    lengths = LENGTHS[kind](rng, rows)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    within = np.arange(indptr[-1]) - np.repeat(indptr[:-1], lengths)
    columns = (np.repeat(rng.integers(0, COLUMNS, rows), lengths) + within) % COLUMNS
    values = rng.integers(1, 90, indptr[-1]).astype("float32")
    return sparse.csr_matrix((values, columns.astype("int32"), indptr), shape=(rows, COLUMNS))


def chunks_for(matrix, count, indices=1.0):
    """Chunk lengths that cut the values into so many chunks; those of the columns into more."""
    length = max(1, -(-matrix.nnz // count))
    return {"data": length, "indices": max(1, int(length * indices)), "indptr": 1000}


def opened(path, **data) -> Samples:
    return open_samples(path, inputs=["X"], targets=["obs/y"], **{"split": WHOLE, **data})


class Decoded:
    """Which stored objects are read, and how often; by numcodecs each time that a chunk is decoded."""

    def __init__(self, monkeypatch):
        self.read, self.chunks = Counter(), Counter()
        read_file, noted, decode = ReadStore.read_file, ReadStore._noted, Decoder.decode

        def count_file(store, key, *args):
            self.read[key] += 1
            return read_file(store, key, *args)

        def count_object(store, key, *args):
            self.read[key] += 1
            return noted(store, key, *args)

        def count_chunk(decoder, stored, chunk, *args):
            self.chunks[decoder.dtype.str, decoder.chunks, chunk.place] += 1
            return decode(decoder, stored, chunk, *args)

        monkeypatch.setattr(ReadStore, "read_file", count_file)
        monkeypatch.setattr(ReadStore, "_noted", count_object)
        monkeypatch.setattr(Decoder, "decode", count_chunk)

    def of(self, part):
        return {key: count for key, count in self.read.items() if key.startswith(f"X/{part}/c/")}


def one_pass(samples, parts: tuple[Partition, ...], reader, limits=None):
    for replica, part in enumerate(parts):
        sizes = [part.num_samples]
        for _ in read_batches(
            reader, part, START, sizes, replica=replica, shuffle=True, limits=limits or Limits(threads=2)
        ):
            pass


# Chunks -----------------------------------------------------------------------------------------------------


@pytest.mark.sampled(2)
@pytest.mark.parametrize("which", ["numcodecs", "zarr"])
@pytest.mark.parametrize("indices", [1.0, 0.45])
@pytest.mark.parametrize("kind", LENGTHS)
def test_a_pass_decodes_a_quarter_more_chunks_than_there_are_at_most(tmp_path, monkeypatch, kind, indices, which):
    matrix = matrix_of(kind)
    samples = opened(write_cells(tmp_path / "s.zarr", matrix, chunks=chunks_for(matrix, 200, indices)))
    plan = values_counted(samples, plan_data(samples, replicas=2, seed=0))
    assert plan.num_units >= 20 * 2
    rows = samples.variable("X").object_rows
    assert plan.unit_rows == (-(-rows // 8) * 8 if samples.variable("obs/y") in samples.streamed else rows)
    reader, seen = UnitReader(samples, which), Decoded(monkeypatch)
    one_pass(samples, train_partitions(plan), reader)
    for part in ("data", "indices"):
        counts = seen.of(part)
        assert len(counts) == samples.variable(f"X/{part}").num_objects
        assert sum(counts.values()) <= 1.25 * len(counts) + 1
    assert set(seen.of("indptr").values()) == {1}
    first = sum(seen.of("data").values())
    one_pass(samples, train_partitions(plan), reader)
    assert set(seen.of("indptr").values()) == {1}  # once for all passes
    assert sum(seen.of("data").values()) == 2 * first


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["even", "unequal", "a heavy part"])
def test_splits_and_replicas_together_decode_hardly_more(tmp_path, monkeypatch, kind):
    matrix = matrix_of(kind, rows=6000)
    path = write_cells(tmp_path / "s.zarr", matrix, chunks=chunks_for(matrix, 400))
    samples = opened(path, split={"val": 0.2, "test": 0.1})
    plan = values_counted(samples, plan_data(samples, replicas=3, seed=0))
    parts = (*train_partitions(plan), *eval_partitions(plan, "val"), *eval_partitions(plan, "test"))
    seen = Decoded(monkeypatch)
    one_pass(samples, parts, UnitReader(samples))
    assert sum(seen.of("data").values()) <= 1.3 * samples.variable("X/data").num_objects


@pytest.mark.sampled(2)
@pytest.mark.parametrize("reader", ["numcodecs", "zarrs", "zarr"])
def test_of_shards_inner_chunks_count(tmp_path, monkeypatch, reader):
    matrix = matrix_of("unequal")
    shards = {"data": 10, "indices": 10, "indptr": 4}
    path = write_cells(tmp_path / "s.zarr", matrix, chunks=chunks_for(matrix, 250), shards=shards)
    samples = opened(path)
    plan = values_counted(samples, plan_data(samples, replicas=1, seed=0))
    assert plan.num_units > 40  # not as long as a shard
    seen = Decoded(monkeypatch)
    one_pass(samples, train_partitions(plan), UnitReader(samples, reader))
    if reader == "numcodecs":
        counts = [count for (dtype, _, _), count in seen.chunks.items() if dtype == "<f4"]
        assert len(counts) == -(-matrix.nnz // samples.variable("X/data").chunks[0])
        assert sum(counts) <= 1.25 * len(counts) + 1


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", LENGTHS)
def test_the_amplification_that_the_plan_says_is_nearly_that_of_the_pass(tmp_path, monkeypatch, kind):
    matrix = matrix_of(kind)
    path = write_cells(tmp_path / "s.zarr", matrix, chunks=chunks_for(matrix, 193))
    samples = opened(path, split={"val": 0.1, "test": 0.0})
    plan = values_counted(samples, plan_data(samples, replicas=2, seed=0))
    said = describe_plan(samples, plan)["read_amplification"]
    seen = Decoded(monkeypatch)
    one_pass(samples, train_partitions(plan), UnitReader(samples))
    counts = seen.of("data")
    tolerance = 0.04 if kind == "even" else 0.12  # rows with few values share chunks
    assert said == pytest.approx(sum(counts.values()) / len(counts), abs=tolerance)
    assert 1.0 < said <= 1.3


def test_chunks_of_dense_variables_are_decoded_once_beside_a_sparse_one(tmp_path, monkeypatch):
    matrix = matrix_of("unequal")
    path = write_cells(tmp_path / "s.zarr", matrix, chunks=chunks_for(matrix, 200))
    root = zarr.open_group(path, mode="r+")
    write(root.create_group("obsm"), "X_pca", np.ones((3000, 20), "float32"), (16, 20))
    samples = open_samples(path, inputs=["X", "obsm/X_pca"], targets=["obs/y"], split=WHOLE)
    plan = values_counted(samples, plan_data(samples, replicas=1, seed=0))
    assert plan.unit_rows % 16 == 0
    seen = Decoded(monkeypatch)
    one_pass(samples, train_partitions(plan), UnitReader(samples))
    dense = {key: count for key, count in seen.read.items() if key.startswith("obsm/X_pca/c/")}
    assert set(dense.values()) == {1}
    assert sum(seen.of("data").values()) <= 1.25 * len(seen.of("data")) + 1


def test_a_large_shard_beside_a_sparse_variable_is_cut_where_enough_chunks_are_together(tmp_path):
    matrix = matrix_of("even")
    path = write_cells(tmp_path / "s.zarr", matrix, chunks=chunks_for(matrix, 10), y_chunk=10)
    array = zarr.open_group(path, mode="r+").create_array(
        "obsm/wide", shape=(3000, 1000), chunks=(10, 1000), shards=(3000, 1000), dtype="float32"
    )
    array.attrs.update(encoding("array", "0.2.0"))
    samples = open_samples(path, inputs=["X", "obsm/wide"], targets=["obs/y"], split=WHOLE)
    assert samples.variable("X").object_rows == 1200
    # of the lengths that divide a shard of 12 MB, 750 would hold 4 MB at most, and too few chunks of X
    assert plan_data(samples, replicas=1, seed=0).unit_rows == 1500


def test_where_there_are_few_units_cells_are_shorter(tmp_path):
    matrix = matrix_of("even", rows=300)
    samples = opened(write_cells(tmp_path / "s.zarr", matrix, chunks=matrix.nnz, y_chunk=5))
    plan = values_counted(samples, plan_data(samples, replicas=2, seed=0))
    assert (plan.num_units, plan.cell_rows) == (1, 1)
    assert [part.num_samples for part in train_partitions(plan)] == [150, 150]


# Plans ------------------------------------------------------------------------------------------------------


def test_the_largest_unit_by_hand(tmp_path):
    lengths = [1, 2, 0, 0, 5, 1, 1, 1, 0, 4]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    matrix = sparse.csr_matrix((np.ones(15, "f4"), np.concatenate([np.arange(n) for n in lengths]), indptr), (10, 6))
    path = write_cells(tmp_path / "s.zarr", matrix, chunks=1, y_chunk=1)
    cases = [
        ({}, 3, 6),  # rows 3 to 5
        ({}, 1, 5),
        ({}, 100, 15),
        ({"isel": {"cell": {"start": 5, "stop": 10}}}, 3, 4),  # row 5, rows 6 to 8, and row 9
        ({"input_offsets": [-1, 1], "split_order": "sequential"}, 2, 7),  # rows 4 and 5 with 3 and 6
    ]
    for data, unit_rows, most in cases:
        samples = opened(path, **data)
        plan = replace(plan_data(samples, replicas=1, seed=0), unit_rows=unit_rows, cell_rows=unit_rows)
        assert values_counted(samples, plan).values == (most,)


def test_fewer_units_are_mixed_where_one_is_much_larger_than_most(tmp_path):
    rows = 60_000
    lengths = np.where((np.arange(rows) >= 30_000) & (np.arange(rows) < 33_000), COLUMNS, 4)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    columns = (np.arange(indptr[-1]) % COLUMNS).astype("int32")
    matrix = sparse.csr_matrix((np.ones(indptr[-1], "f4"), columns, indptr), (rows, COLUMNS))
    columns = np.concatenate([np.arange(4)] * 30_000 + [np.arange(COLUMNS)] * 3000 + [np.arange(4)] * 27_000)
    path = write_cells(tmp_path / "s.zarr", matrix, chunks=8000, y_chunk=100, indices=columns.astype("int32"))
    samples = opened(path)
    before = plan_data(samples, replicas=1, seed=0)
    plan = values_counted(samples, before)
    (most,) = plan.values
    assert most > 10 * before.unit_rows * matrix.nnz / rows
    assert before.window > plan.window == max(8, (64 << 20) // slot_bytes(samples, plan))


def test_a_plan_without_a_sparse_variable_is_as_it_was(tmp_path):
    root = zarr.open_group(tmp_path / "s.zarr", mode="w")
    root.create_array("x", shape=(40, 2), chunks=(4, 2), dtype="float32", dimension_names=("n", "k"))
    samples = open_samples(tmp_path / "s.zarr", inputs=["x"], targets=["x"], split=WHOLE)
    plan = plan_data(samples, replicas=1, seed=0)
    assert values_counted(samples, plan) is plan


# Memory -----------------------------------------------------------------------------------------------------


def reading(samples, plan, parts, **changes):
    options = {"loaders": 1, "units": len(parts[0].units), "batch_size": 30, "shuffle": True, **changes}
    return Reading(samples=samples, plan=plan, tables=tables_bytes(samples, plan, parts[0].nbytes), **options)


def test_the_terms_of_the_budget_by_hand(tmp_path):
    matrix = matrix_of("even", rows=1000)  # 40,000 values
    path = write_cells(tmp_path / "s.zarr", matrix, chunks={"data": 500, "indices": 500, "indptr": 100}, y_chunk=10)
    samples = opened(path)
    plan = replace(plan_data(samples, replicas=1, seed=0), unit_rows=50, cell_rows=50, window=4)
    plan = values_counted(samples, plan)
    assert plan.values == (2000,)
    x = samples.variable("X")
    assert slot_arrays(samples, plan, x) == {
        "X/indptr": ((51,), np.dtype("int64")),
        "X/indices": ((2000,), np.dtype("int32")),
        "X/data": ((2000,), np.dtype("float32")),
    }
    assert slot_bytes(samples, plan) == 51 * 8 + 2000 * 8 + 50 * 8
    assert x.row_bytes == 40 * 8 + 8
    looking = PIECE_VALUE_BYTES * (PIECE_VALUES + COLUMNS)
    assert scratch_bytes(samples, plan) == 2 * 500 * 4 + looking  # a chunk after the other
    by_zarr = replace(samples, config=samples.config.model_copy(update={"reader": "zarr"}))
    assert scratch_bytes(by_zarr, plan) == 4 * (2000 // 500 + 2) * 500 * 4 + looking
    marks = 8 * (80 + 80 + 11 + 100)
    indptr = 8 * 1001 + 2 * 100 * 4 + PIECE_VALUE_BYTES * PIECE_VALUES
    assert tables_bytes(samples, plan, 0) == 32 * plan.num_cells + marks + indptr
    assert static_bytes(samples) == 0
    unknown = replace(plan, values=())
    assert slot_arrays(samples, unknown, x)["X/data"][0] == (40_000,)
    standardised = opened(path, normalize=["X"], isel={"gene": {"stop": 5}})
    assert slot_arrays(standardised, plan, standardised.variable("X"))["X/data"] == ((2000,), np.dtype("float32"))
    with pytest.raises(ChunkTooLarge, match="one chunk of X/indptr"):
        plan_memory(reading(samples, plan, train_partitions(plan)), None, 399, "memory")


@pytest.mark.sampled(6)
@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_a_loader_allocates_no_more_than_the_budget_says(tmp_path, kind, index):
    matrix = matrix_of(kind, rows=1000)
    chunks = chunks_for(matrix, 60)
    path = write_cells(tmp_path / "s.zarr", matrix, chunks=chunks, y_chunk=5, indices=matrix.indices.astype(index))
    samples = opened(path)
    plan = values_counted(samples, replace(plan_data(samples, replicas=1, seed=0), window=3))
    parts = train_partitions(plan)
    budget = reading(samples, plan, parts).budget(kept=1, ahead=2, threads=1)
    loader = Loader(UnitReader(samples), parts[0], START, [30] * 20, replica=0, shuffle=True, limits=budget.limits)
    for _ in range(20):
        loader.take()
    arenas = sum(array.nbytes for array in loader._threads.arena.values())
    loader.close()
    assert arenas <= budget.moving * budget.unit


LINUX = pytest.mark.skipif(
    not sys.platform.startswith("linux") or find_spec("torch") is None,
    reason="peak memory is read from /proc, of a process with torch",
)
MEASURE = """
import json, sys
import torch, dtrain, dtrain.batching, dtrain.data.read.files

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

path, reader, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
data = {"inputs": ["X"], "targets": ["obs/y"], "split": {"val": 0.0, "test": 0.0}, **options}
samples = dtrain.open_samples(path, **data)
base = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here on
batches = dtrain.batches(samples, batch_size=64, epochs=2, memory="100MB", cache="0", reader=reader)
count = sum(batch.size for batch in batches)
print(json.dumps({"used": status("VmHWM") - base, "law": batches.memory.total, "count": count}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """120,000 rows with very unequal numbers of values: 6 million."""
    matrix = matrix_of("unequal", rows=120_000)
    matrix.indices = matrix.indices.astype("int64")
    path = tmp_path_factory.mktemp("large") / "s.zarr"
    chunks = {"data": 40_000, "indices": 30_000, "indptr": 120_001}
    return write_cells(path, matrix, chunks=chunks, y_chunk=10_000, indices=matrix.indices)


def check_budget(path, reader, data):
    """Measure two passes in a process of their own."""
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, str(path), reader, json.dumps(data)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["count"] == 2 * 120_000
    assert found["used"] <= 1.10 * found["law"]
    assert found["used"] >= 0.4 * found["law"]  # and the budget is no guess


@pytest.mark.sampled(1)
@LINUX
@pytest.mark.parametrize("reader", ["numcodecs", "zarrs", "zarr"])
@pytest.mark.parametrize("data", [{}, {"normalize": {"X": ["gene"]}, "isel": {"gene": {"start": 0, "step": 2}}}])
def test_a_process_keeps_to_its_budget(large, reader, data):
    check_budget(large, reader, data)


@pytest.mark.slow
@LINUX
def test_a_process_that_reads_an_archive_keeps_to_its_budget(large, tmp_path):
    check_budget(shutil.make_archive(str(tmp_path / "large.zarr"), "zip", large), "auto", {})
