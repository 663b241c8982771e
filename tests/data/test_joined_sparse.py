"""Sparse matrices and weights of several stores as one: the same rows as in one store, counted over all stores."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from scipy import sparse

import dtrain
from dtrain.data.load.loader import read_batches
from dtrain.data.load.statistics import merge_moments, partition_moments, scalings_of
from dtrain.data.plan.footprint import row_starts_together, scratch_bytes, slot_arrays, tables_bytes
from dtrain.data.plan.partition import Partition, count_units, eval_partitions, plan_data, train_partitions
from dtrain.data.plan.summary import describe_plan
from dtrain.data.plan.units import DataPlan
from dtrain.data.read import joined
from dtrain.data.read.inventory import take_inventory
from dtrain.data.read.joined import open_reader, values_counted
from dtrain.data.read.store import ReadStore
from dtrain.data.samples import Samples
from dtrain.data.weight import weight_text
from dtrain.errors import ChunkMissing, DataChanged, NonFiniteData, UnsuitableVariable
from tests.data.helpers import START, WHOLE
from tests.data.layouts.fixtures import encoding, write, write_cells

pytestmark = pytest.mark.filterwarnings("ignore")  # zarr's own, of strings that version 3 does not specify
GENES = 12
SIZES = (70, 1, 45, 130)


def matrix_of(rows: int, seed: int) -> Any:
    """Cells of which a tenth has no values."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.5, (rows, GENES))
    counts[rng.random(rows) < 0.1] = 0
    return sparse.csr_matrix(counts.astype("float32"))


def write_stores(
    folder: Path, sizes: Sequence[int] = SIZES, dtypes: Sequence[str] = ("float32",) * 4, y_chunk: int = 8, **keys: Any
) -> tuple[list[Path], Any]:
    """Write a store for each number of cells; X is sparse, and dense in layers/dense; obs/y numbers the cells."""
    paths, before, whole = [], 0, [matrix_of(rows, seed) for seed, rows in enumerate(sizes)]
    for number, (matrix, dtype) in enumerate(zip(whole, dtypes, strict=False)):
        path = write_cells(
            folder / f"{number}.zarr", matrix.astype(dtype), y_chunk=y_chunk, **{"chunks": 16 + number, **keys}
        )
        root: Any = zarr.open_group(path, mode="r+")
        root.create_group("layers").attrs.update(encoding("dict", "0.1.0"))
        write(root["layers"], "dense", matrix.toarray(), (8, GENES))
        rows = matrix.shape[0]
        root["obs/y"][...] = np.arange(before, before + rows)
        before += rows
        paths.append(path)
    return paths, sparse.vstack(whole).toarray()


def opened(paths: Any, inputs: Sequence[str] = ("X", "layers/dense"), **data: Any) -> Samples:
    return dtrain.open_samples(paths, inputs=list(inputs), targets=["obs/y"], **{"split": WHOLE, **data})


def planned(samples: Samples, replicas: int = 1, **changes: Any) -> Any:
    return values_counted(samples, replace(plan_data(samples, replicas=replicas, seed=0), **changes))


def read(samples: Samples, part: Partition, reader: str = "auto", **keys: Any) -> tuple[Any, ...]:
    """All inputs and targets of a partition."""
    sizes = [min(7, part.num_samples - done) for done in range(0, part.num_samples, 7)]
    stream = read_batches(open_reader(samples, reader), part, START, sizes, replica=0, shuffle=True, **keys)
    found = [(*(x.copy() for x in batch.inputs), batch.targets[0].copy()) for batch in stream]
    return tuple(np.concatenate(some) for some in zip(*found, strict=True))


# Rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("unit_rows", [1, 24, 64, 400])
@pytest.mark.parametrize("dtypes", [("float32",) * 4, ("float32", "float64", "int32", "uint8")])
@pytest.mark.parametrize("reader", ["numcodecs", "zarr"])
def test_each_cell_stands_once_with_its_values(tmp_path: Path, unit_rows: int, dtypes: Any, reader: str) -> None:
    paths, dense = write_stores(tmp_path, dtypes=dtypes)
    samples = opened(paths)
    plan = planned(samples, 2, unit_rows=unit_rows, cell_rows=unit_rows)
    seen = []
    for part in (part for part in train_partitions(plan) if part.num_samples):
        x, layer, cells = read(samples, part, reader)
        assert x.tobytes() == layer.tobytes() == dense[cells].tobytes()
        seen += cells.tolist()
    assert sorted(seen) == list(range(sum(SIZES)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("offsets", [[-2, 0], [0, 3], {"start": 1, "stop": 4}, {"start": -4, "stop": -1}])
@pytest.mark.parametrize("unit_rows", [1, 16, 100])
def test_windows_do_not_leave_a_store(tmp_path: Path, offsets: Any, unit_rows: int) -> None:
    paths, dense = write_stores(tmp_path)
    samples = opened(paths, input_offsets=offsets, split_order="sequential", gaps="allow")
    (part,) = train_partitions(planned(samples, unit_rows=unit_rows, cell_rows=unit_rows))
    x, layer, cells = read(samples, part)
    window = np.arange(offsets["start"], offsets["stop"]) if isinstance(offsets, dict) else np.array(offsets)
    assert x.tobytes() == layer.tobytes() == dense[cells[:, None] + window].tobytes()
    wanted, before = [], 0
    for rows in SIZES:
        whole = range(max(0, -window.min()), rows - max(0, window.max()))
        wanted += [before + row for row in whole]
        before += rows
    assert sorted(cells.tolist()) == wanted


@pytest.mark.sampled(2)
@pytest.mark.parametrize("isel", [{"gene": {"start": 1, "step": 3}}, {"gene": 5}, {"cell": {"start": 30, "stop": 200}}])
def test_some_genes_and_some_cells(tmp_path: Path, isel: dict[str, Any]) -> None:
    paths, dense = write_stores(tmp_path, dtypes=("float32", "float64", "float32", "float32"))
    samples = opened(paths, isel=isel)
    take_inventory(samples, full=True, digests=True, presence=True)
    (part,) = train_partitions(planned(samples))
    x, layer, cells = read(samples, part)
    genes = isel.get("gene", slice(None))
    expected = dense[:, slice(1, None, 3) if isinstance(genes, dict) else genes]
    assert x.tobytes() == layer.tobytes() == expected[cells].tobytes()
    assert sorted(cells.tolist()) == list(range(*((30, 200) if "cell" in isel else (sum(SIZES),))))


@pytest.mark.parametrize("dims", [[], ["gene"]])
def test_means_are_those_of_the_dense_rows(tmp_path: Path, dims: list[str]) -> None:
    paths, dense = write_stores(tmp_path, dtypes=("float32", "float64", "int32", "float32"))
    samples = opened(paths, normalize={"X": dims, "layers/dense": dims})
    parts, reader = train_partitions(planned(samples, 3, unit_rows=40, cell_rows=8)), open_reader(samples)
    moments = merge_moments([partition_moments(reader, part, ["X", "layers/dense"]) for part in parts])
    found = scalings_of(moments, samples.variables)
    axis = 0 if dims else None
    np.testing.assert_allclose(found["X"].mean, np.atleast_1d(dense.astype("float64").mean(axis)), rtol=1e-12)
    np.testing.assert_allclose(found["X"].std, np.atleast_1d(dense.astype("float64").std(axis)), rtol=1e-12)
    np.testing.assert_allclose(found["X"].mean, found["layers/dense"].mean, rtol=1e-12)
    x, layer, _ = read(samples, parts[0], scalings={"X": found["X"], "layers/dense": found["X"]})
    assert x.tobytes() == layer.tobytes()


def test_a_small_matrix_is_kept_in_memory(tmp_path: Path) -> None:
    paths, dense = write_stores(tmp_path, chunks=10**6)
    for path in paths:
        root: Any = zarr.open_group(path, mode="r+")
        write(root.create_group("obsm"), "X_pca", np.ones((root["obs/y"].shape[0], 500), "float32"), (8, 500))
    samples = opened(paths, ["X", "obsm/X_pca"])
    assert "X" in [v.name for v in samples.preloaded]
    (part,) = train_partitions(planned(samples))
    x, _, cells = read(samples, part)
    assert x.tobytes() == dense[cells].tobytes()


# Units ----------------------------------------------------------------------------------------------------------


def test_the_largest_unit_is_counted_over_stores_by_hand(tmp_path: Path) -> None:
    lengths = [[1, 2, 0, 5], [4, 3], [1, 1, 6]]
    paths = []
    for number, own in enumerate(lengths):
        indptr = np.concatenate([[0], np.cumsum(own)])
        columns = np.concatenate([np.arange(n) for n in own])
        matrix = sparse.csr_matrix((np.ones(indptr[-1], "f4"), columns, indptr), (len(own), GENES))
        paths.append(write_cells(tmp_path / f"{number}.zarr", matrix, chunks=1, y_chunk=1))
    cases: list[tuple[dict[str, Any], int, int]] = [
        ({}, 3, 12),  # rows 3 to 5: the last of the first store, and the second store
        ({}, 1, 6),
        ({}, 100, 23),
        ({"isel": {"cell": {"start": 4, "stop": 8}}}, 3, 8),  # the second store, and the first row of the third
        ({"input_offsets": [-1, 0], "split_order": "sequential"}, 3, 12),  # row 2, of no values, with rows 3 to 5
    ]
    for data, unit_rows, most in cases:
        samples = opened(paths, ["X"], **data)
        plan = planned(samples, unit_rows=unit_rows, cell_rows=unit_rows)
        x = samples.variable("X")
        assert plan.values == (most,)
        assert slot_arrays(samples, plan, x)["X/data"] == ((most,), np.dtype("float32"))


def files_read(samples: Samples, plan: DataPlan, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """By store and key: how many times a pass reads from it."""
    seen: Counter[str] = Counter()
    read_file = ReadStore.read_file

    def count(store: ReadStore, key: str, *args: Any) -> Any:
        seen[f"{store.path} {key}"] += 1
        return read_file(store, key, *args)

    monkeypatch.setattr(ReadStore, "read_file", count)
    (part,) = train_partitions(plan)
    read(samples, part)
    return seen


def test_where_rows_begin_is_read_once_and_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "KEPT_STORES", 1)
    paths, _ = write_stores(tmp_path, sizes=(50, 60, 70), chunks={"data": 16, "indices": 16, "indptr": 200})
    samples = opened(paths, ["X"])
    plan = planned(samples, unit_rows=20, cell_rows=20)
    seen = files_read(samples, plan, monkeypatch)
    starts = {key: number for key, number in seen.items() if "X/indptr/c/" in key}
    assert (len(starts), set(starts.values())) == (3, {1})
    smaller = opened(paths[:2], ["X"])
    own = planned(smaller, unit_rows=20, cell_rows=20)
    indptr = smaller.members[0].variable("X/indptr")
    assert row_starts_together(indptr) >= 200
    more = tables_bytes(samples, plan, 0) - tables_bytes(smaller, own, 0)
    marks = 8 * sum(array.num_objects for array in samples.members[2].stored)
    assert more == 8 * 71 + marks + 32 * (plan.num_cells - own.num_cells)
    assert scratch_bytes(samples, plan) == scratch_bytes(smaller, own)


@pytest.mark.slow
def test_small_stores_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of one chunk each: units hold four of them, so that few chunks lie in two units."""
    paths, _ = write_stores(tmp_path, sizes=tuple(range(60, 100)), dtypes=("float32",) * 40, chunks=10**5, y_chunk=1)
    samples = opened(paths, ["X"])
    assert len(samples.members) == 40
    plan = planned(samples)
    assert plan.num_units <= count_units(samples) <= 11
    seen = files_read(samples, plan, monkeypatch)
    counts = [number for key, number in seen.items() if "X/data/c/" in key]
    assert len(counts) == 40
    assert sum(counts) <= 1.3 * 40
    assert describe_plan(samples, plan)["read_amplification"] >= 1


# Refused --------------------------------------------------------------------------------------------------------


def test_a_matrix_that_is_dense_in_one_store_is_refused(tmp_path: Path) -> None:
    paths, dense = write_stores(tmp_path, sizes=(20, 30))
    root: Any = zarr.open_group(paths[1], mode="r+")
    del root["X"]
    write(root, "X", dense[20:], (8, GENES))
    with pytest.raises(UnsuitableVariable, match=r"1\.zarr: X is dense; in .*0\.zarr it is a sparse matrix"):
        opened(paths)


def test_faults_name_the_store(tmp_path: Path) -> None:
    paths, _ = write_stores(tmp_path, sizes=(20, 30))
    samples = opened(paths, ["X"])
    (part,) = train_partitions(planned(samples))
    array: Any = zarr.open_group(paths[1], path="X", mode="r+")["data"]
    array[3] = np.nan
    with pytest.raises(NonFiniteData, match=r"1\.zarr"):
        read(samples, part)
    (paths[1] / "X" / "data" / "c" / "0").unlink()
    with pytest.raises(ChunkMissing, match=r"1\.zarr.*X/data"):
        take_inventory(samples, full=True, digests=False, presence=True)


def test_more_values_than_planned_are_refused_with_the_number_that_was_planned(tmp_path: Path) -> None:
    paths, dense = write_stores(tmp_path, sizes=(20, 30))
    samples = opened(paths, ["X"])
    plan = planned(samples, unit_rows=64, cell_rows=64)
    first, both = int((dense[:20] != 0).sum()), int((dense != 0).sum())
    assert plan.values == (both,)
    (part,) = train_partitions(replace(plan, values=(both - 1,)))
    own = rf"1\.zarr: rows 0 to 29 of X hold {both - first} values \({both} with the stores before it\), more than"
    with pytest.raises(DataChanged, match=rf"{own} when the run was planned \({both - 1}\)"):
        read(samples, part)
    (part,) = train_partitions(replace(plan, values=(first - 1,)))
    with pytest.raises(
        DataChanged, match=rf"0\.zarr: rows 0 to 19 of X hold {first} values, more than .*\({first - 1}\)"
    ):
        read(samples, part)


# Weights --------------------------------------------------------------------------------------------------------

LAT = np.linspace(-60, 60, 5)


def write_weights(write_store: Callable[..., Path], folder: Path, sizes: Sequence[int], **lats: Any) -> list[Path]:
    paths, before = [], 0
    for number, rows in enumerate(sizes):
        of_all = np.arange(before, before + rows)
        weights = of_all % 5
        packed = {"attributes": {"scale_factor": 0.5}, "values": (2 * weights).astype("int16")}
        arrays = {
            "x": {"dims": ("t", "lat"), "values": of_all[:, None] + np.zeros(5, "float32"), "chunks": (8, 5)},
            "w": {"dims": ("t",), "chunks": (8 + number,), **(packed if number == 1 else {"values": weights * 1.0})},
            "area": {"dims": ("lat",), "values": np.arange(5) + lats.get(f"area{number}", 0), "chunks": (5,)},
            "lat": {"dims": ("lat",), "values": LAT, "chunks": (5,), "attributes": {"units": "degrees_north"}},
        }
        paths.append(write_store(folder / f"w{number}.zarr", arrays))
        before += rows
    return paths


def open_weights(paths: Any, weight: str, **data: Any) -> Samples:
    keys = {"sample_dim": "t", "weight": weight, "split": WHOLE, **data}
    return dtrain.open_samples(paths, inputs=["x"], targets=["x"], **keys)


@pytest.mark.parametrize("weight", ["w", "area", "cos(lat)"])
def test_weights_are_those_of_the_rows_of_all_stores(
    write_store: Callable[..., Path], tmp_path: Path, weight: str
) -> None:
    samples = open_weights(write_weights(write_store, tmp_path, (20, 11, 33)), weight)
    (part,) = eval_partitions(plan_data(samples, replicas=1, seed=0), "all")
    (batch,) = read_batches(open_reader(samples), part, START, [64], replica=0, shuffle=False)
    (found,) = np.broadcast_arrays(batch.weights[0], batch.targets[0])[:1]
    row = batch.targets[0]
    wanted = {"w": row % 5, "area": np.arange(5), "cos(lat)": np.cos(np.deg2rad(LAT))}[weight]
    np.testing.assert_array_equal(found, np.broadcast_to(wanted, row.shape).astype("float32"))
    assert sorted(row[:, 0].tolist()) == list(range(64))
    said = {"w": "checked as it is read: finite, not negative", "area": "0 to 4", "cos(lat)": "0.5 to 1"}
    assert weight_text(samples) == said[weight]


def test_a_static_weight_must_be_the_same_in_all_stores(write_store: Callable[..., Path], tmp_path: Path) -> None:
    samples = open_weights(write_weights(write_store, tmp_path, (9, 9), area1=1), "area")
    with pytest.raises(UnsuitableVariable, match=r"w1\.zarr: area has other values than in .*w0\.zarr"):
        weight_text(samples)


def test_a_weight_that_is_none_is_named_by_its_store(write_store: Callable[..., Path], tmp_path: Path) -> None:
    paths = write_weights(write_store, tmp_path, (9, 9))
    array: Any = zarr.open_group(paths[1], mode="r+")["w"]
    array[4] = -2
    samples = open_weights(paths, "w")
    (part,) = eval_partitions(plan_data(samples, replicas=1, seed=0), "all")
    with pytest.raises(UnsuitableVariable, match=r'w1\.zarr.*data\.weight = "w" needs 0 or a positive'):
        list(read_batches(open_reader(samples), part, START, [18], replica=0, shuffle=False))
