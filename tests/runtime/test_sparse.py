"""Runs over the rows of sparse matrices."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from distributed import Client
from scipy import sparse
from torch import nn

import dtrain
from dtrain.config.schema import TrainConfig
from dtrain.data.plan.partition import train_partitions
from dtrain.errors import ChunkMissing, ChunkUndecodable, LengthsDiffer, RunConflict
from dtrain.job import job_from_config
from dtrain.trainer import train_job
from tests.data.layouts.fixtures import encoding, frame, strings, write_categorical, write_cells, write_sparse
from tests.runtime.test_averaging import lose_rounds
from tests.training import bits, shas

pytestmark = pytest.mark.filterwarnings("ignore")  # zarr's own, of strings that version 3 does not specify
GENES = 24


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * GENES, 3)

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(torch.cat([x, counts], 1))
        return logits


def write(path: Path, rows: int, genes: int = GENES, seed: int = 0) -> Path:
    """Write cells of three kinds: X holds floats in chunks, layers/counts integers in shards; some cells are empty."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, rows)
    counts = rng.poisson(0.2 + 0.6 * (np.arange(genes)[None] % 3 == kind[:, None]))
    counts[rng.random(rows) < 0.1] = 0
    write_cells(path, sparse.csr_matrix(np.log1p(counts).astype("float32")), chunks=500, y_chunk=100)
    root: Any = zarr.open_group(path, mode="r+")
    root.create_group("layers").attrs.update(encoding("dict", "0.1.0"))
    shards = {"data": 2, "indices": 2, "indptr": 2}
    write_sparse(root["layers"], "counts", sparse.csr_matrix(counts), chunks=300, shards=shards)
    write_categorical(root["obs"], "kind", kind, ["a", "b", "c"])
    return path


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("cells") / "cells.zarr", 6000)


def train(path: Any, run: Path, client: Client | None = None, replicas: Any = 2, **data: Any) -> dtrain.Run:
    fields = {"inputs": ["X", "layers/counts"], "targets": ["obs/kind"], "normalize": {"X": ["gene"]}}
    config = TrainConfig(
        model="tests.runtime.test_sparse:Net",
        data={"path": path, **fields, **data},
        train={"loss": "cross_entropy", "rounds": 3, "local_steps": 20, "batch_size": 16, "eval_every": 1},
        average={"replicas": replicas},
        cluster={"scheduler": "serial"},
    )
    return train_job(job_from_config(config, run.parent), run, client=client)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_serial_equals_cluster_equals_resumed(cells: Path, tmp_path: Path, client: Client, replicas: int) -> None:
    serial = train(str(cells), tmp_path / "serial", replicas=replicas)
    (plan,) = serial.plan.plans
    assert len(plan.values) == 2
    assert len(train_partitions(plan)) == replicas
    cluster = train(str(cells), tmp_path / "cluster", client, replicas)
    assert bits(cluster.rows) == bits(serial.rows)
    lose_rounds(cluster, 1)
    assert bits(train(str(cells), tmp_path / "cluster", client, replicas).rows) == bits(serial.rows)
    assert serial.evaluate(split="test") == cluster.evaluate(split="test")
    with pytest.raises(RunConflict):
        train(str(cells), tmp_path / "serial", replicas=replicas, isel={"gene": {"start": 1}})


@pytest.mark.slow
def test_reader_cache_and_kind_of_store_change_no_bit(cells: Path, tmp_path: Path) -> None:
    plain = shas(train(str(cells), tmp_path / "plain"))
    packed = shutil.make_archive(str(tmp_path / "cells.zarr"), "zip", cells)
    for name, path, data in (
        ("zarr", str(cells), {"reader": "zarr", "cache": "0"}),
        ("zarrs", str(cells), {"reader": "zarrs", "memory": "16MB"}),
        ("zip", packed, {}),
        ("URL", f"file://{cells}", {"cache": "0"}),
    ):
        assert shas(train(path, tmp_path / name, **data)) == plain, name


def test_stores_of_several_sites(cells: Path, tmp_path: Path, client: Client) -> None:
    other = write(tmp_path / "other.zarr", 4000, seed=1)
    both = [{"path": str(cells)}, {"path": str(other)}]
    serial = train(both, tmp_path / "serial", replicas="auto")
    assert [plan.num_samples for plan in serial.plan.plans] == [6000, 4000]
    assert all(len(plan.values) == 2 for plan in serial.plan.plans)
    assert bits(train(both, tmp_path / "cluster", client, "auto").rows) == bits(serial.rows)


@pytest.mark.slow
def test_several_stores_as_one(tmp_path: Path, client: Client) -> None:
    paths = [str(write(tmp_path / f"{rows}.zarr", rows, seed=rows)) for rows in (1900, 2000, 700)]
    serial = train(paths, tmp_path / "serial", replicas=2)
    assert bits(train(paths, tmp_path / "workers", client, replicas=2).rows) == bits(serial.rows)
    samples = dtrain.open_samples(paths, inputs=["X", "layers/counts"], targets=["obs/kind"])
    assert serial.evaluate(samples, split="test") == serial.evaluate(split="test")
    sites = train([{"path": paths[:2]}, {"path": paths[2]}], tmp_path / "sites", replicas="auto")
    assert [len(plan.members) for plan in sites.plan.plans] == [2, 0]


def test_sites_with_other_genes_are_refused(cells: Path, tmp_path: Path) -> None:
    both = [{"path": str(cells)}, {"path": str(write(tmp_path / "other.zarr", 300, GENES + 1))}]
    with pytest.raises(LengthsDiffer, match=rf"a row of X is float32\[{GENES + 1}\]; in .* it is float32\[{GENES}\]"):
        train(both, tmp_path / "run", replicas="auto")


def test_sites_with_other_genes_in_the_same_number_are_refused(cells: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.zarr", 300, seed=1)
    names = [f"gene {number}" for number in range(GENES)]
    for path in (cells, other):
        swapped = [*names[:4], names[5], names[4], *names[6:]] if path == other else names
        store = shutil.copytree(path, tmp_path / f"named-{path.name}")
        var = frame(zarr.open_group(store, mode="r+"), "var", GENES, [])
        var["_index"][...] = strings(swapped)
    both = [{"path": str(tmp_path / f"named-{path.name}")} for path in (cells, other)]
    with pytest.raises(LengthsDiffer, match=r"column 4 of X is the gene gene 5; in .* it is gene 4") as caught:
        train(both, tmp_path / "run", replicas="auto")
    assert "adata[:, genes]" in caught.value.hint


@pytest.mark.parametrize("part", ["data", "indices", "indptr"])
def test_a_chunk_that_workers_cannot_read_stops_the_run(cells: Path, tmp_path: Path, client: Client, part: str) -> None:
    store = shutil.copytree(cells, tmp_path / "cells.zarr")
    chunk = store / "X" / part / "c" / "3"
    chunk.write_bytes(chunk.read_bytes()[:9])
    with pytest.raises(ChunkUndecodable, match=f"chunk X/{part}/c/3 of X/{part} cannot be decoded") as caught:
        train(str(store), tmp_path / "damaged", client)
    assert caught.value.code == 5
    chunk.unlink()
    with pytest.raises(ChunkMissing, match=f"chunk X/{part}/c/3 of X/{part} is missing"):
        train(str(store), tmp_path / "missing", client)
