"""Whole runs on archives, references and repositories have the bits of a run on the directory."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import icechunk
import numpy as np
import pytest
import zarr
from distributed import Client

import dtrain
from dtrain.config.schema import TrainConfig
from dtrain.errors import DataChanged, RunConflict
from dtrain.job import Job, job_from_config
from dtrain.planning import plan_job
from dtrain.planrecord import plan_record
from dtrain.plantext import plan_rows
from dtrain.resolve import described
from dtrain.runtime.place import SerialPlace
from dtrain.trainer import train_job
from tests.training import shas

KINDS = ("zip", "kerchunk", "icechunk")
EVERY = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def convert(blobs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A function that writes the blobs as a store of a kind, and returns its path."""

    def write(kind: str) -> Path:
        return {"directory": lambda: blobs, "zip": pack, "kerchunk": refer, "icechunk": commit}[kind]()

    def pack() -> Path:
        path = tmp_path / "blobs.zarr.zip"
        with zipfile.ZipFile(path, "w") as packed:
            for file in sorted(blobs.rglob("*")):
                if file.is_file():
                    packed.write(file, file.relative_to(blobs).as_posix())
        return path

    def refer() -> Path:
        refs: dict[str, Any] = {}
        for file in sorted(blobs.rglob("*")):
            if file.is_file():
                whole = [str(file), 0, file.stat().st_size]
                refs[file.relative_to(blobs).as_posix()] = file.read_text() if file.name == "zarr.json" else whole
        path = tmp_path / "blobs.json"
        path.write_text(json.dumps({"version": 1, "refs": refs}))
        return path

    def commit() -> Path:
        copy_into(tmp_path / "blobs.icechunk", blobs)
        return tmp_path / "blobs.icechunk"

    return write


def copy_into(path: Path, blobs: Path, factor: float = 1.0, **branch: Any) -> str:
    """Commit the blobs to a repository, x times a factor, and return the snapshot."""
    repository = icechunk.Repository.open_or_create(icechunk.local_filesystem_storage(str(path)))
    session = repository.writable_session("main")
    there, here = zarr.open_group(blobs, mode="r"), zarr.open_group(session.store, mode="a")
    for name in ("x", "y"):
        old = there[name]
        assert isinstance(old, zarr.Array)
        options = {"chunks": old.chunks, "dimension_names": old.metadata.dimension_names, "overwrite": True}
        array = here.create_array(name, shape=old.shape, dtype=old.dtype, **options)
        with zarr.config.set({"array.write_empty_chunks": True}):
            array[...] = old[...] * (factor if name == "x" else 1)
    snapshot: str = session.commit("blobs")
    return snapshot


def job_of(path: Any, base: Path, rounds: int = 3, **tables: Any) -> Job:
    data = {
        "path": str(path) if isinstance(path, Path) else path,
        "inputs": ["x"],
        "targets": ["y"],
        **tables.pop("data", {}),
    }
    config = TrainConfig(
        **{
            "model": "tests.runtime.models:small",
            "data": data,
            "train": {"loss": "cross_entropy", "rounds": rounds, "batch_size": 16},
            "average": {"replicas": 2},
            "cluster": {"scheduler": "serial"},
            **tables,
        }
    )
    return job_from_config(config, base)


@EVERY
def test_a_serial_run_has_the_bits_of_one_on_the_directory(
    convert: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    run = train_job(job_of(convert(kind), tmp_path), tmp_path / "here")
    plain = train_job(job_of(convert("directory"), tmp_path), tmp_path / "there")
    assert shas(run) == shas(plain)
    assert run.evaluate(split="test") == plain.evaluate(split="test")


@EVERY
def test_workers_read_it_by_themselves(
    convert: Callable[[str], Path], tmp_path: Path, client: Client, kind: str
) -> None:
    run = train_job(job_of(convert(kind), tmp_path, cluster={}), tmp_path / "here", client=client)
    assert shas(run) == shas(train_job(job_of(convert("directory"), tmp_path), tmp_path / "there"))


@pytest.mark.sampled(2)
@EVERY
def test_a_run_that_is_cut_goes_on(convert: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    path = convert(kind)
    train_job(job_of(path, tmp_path, rounds=2), tmp_path / "cut")
    run = train_job(job_of(path, tmp_path), tmp_path / "cut")
    assert shas(run) == shas(train_job(job_of(convert("directory"), tmp_path), tmp_path / "there"))


def rows_of(path: Path, base: Path, **tables: Any) -> tuple[dict[str, str], dict[str, Any]]:
    job = job_of(path, base, **tables)
    planned = plan_job(job)
    return dict(plan_rows(job, planned)), plan_record(planned)


def test_the_plan_of_an_archive_says_its_checksum(convert: Callable[[str], Path], tmp_path: Path) -> None:
    rows, record = rows_of(convert("zip"), tmp_path)
    assert rows["chunks"] == "all chunks are there; all have checksums (CRC-32)"
    assert rows["continuing"] == "sizes and CRC-32 of stored chunks are compared"
    assert record["checksums"] == {"x": True, "y": True}
    rows, record = rows_of(convert("directory"), tmp_path)
    assert rows["chunks"] == "all chunks are there; no checksums in x, y"
    assert record["checksums"] == {"x": False, "y": False}


def test_the_plan_of_references_says_where_they_lead(
    convert: Callable[[str], Path], blobs: Path, tmp_path: Path
) -> None:
    rows, record = rows_of(convert("kerchunk"), tmp_path)
    assert rows["refers to"] == f"{blobs} (27 files)"
    assert record["notes"] == {"refers to": rows["refers to"]}
    assert rows["continuing"] == "the references are compared, not the files that they lead to"


# A run that continues on other data ---------------------------------------------------------------------------


def test_a_chunk_of_an_archive_that_is_replaced_by_one_of_the_same_size(
    convert: Callable[[str], Path], blobs: Path, tmp_path: Path
) -> None:
    path = convert("zip")
    train_job(job_of(path, tmp_path, rounds=1), tmp_path / "run")
    with zipfile.ZipFile(path) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    files["x/c/1/0"], files["x/c/2/0"] = files["x/c/2/0"], files["x/c/1/0"]
    os.remove(path)
    with zipfile.ZipFile(path, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    with pytest.raises(DataChanged, match="chunks of x have been modified since the run was started"):
        train_job(job_of(path, tmp_path), tmp_path / "run")


def test_a_commit_made_meanwhile_is_no_fault(convert: Callable[[str], Path], blobs: Path, tmp_path: Path) -> None:
    path = convert("icechunk")
    train_job(job_of(path, tmp_path, rounds=1), tmp_path / "run")
    (snapshot,) = json.loads((tmp_path / "run/plan.json").read_text())["snapshots"]
    assert copy_into(path, blobs, factor=2) != snapshot
    run = train_job(job_of(path, tmp_path), tmp_path / "run")
    assert shas(run) == shas(train_job(job_of(blobs, tmp_path), tmp_path / "there"))
    assert shas(run) != shas(train_job(job_of(path, tmp_path), tmp_path / "new"))
    assert run.evaluate(split="val")["loss"] == pytest.approx(run.rows[-1]["val_loss"])
    assert json.loads((tmp_path / "run/plan.json").read_text())["snapshots"] == [snapshot]


def test_a_repository_that_only_its_workers_see_is_read_at_the_snapshot_of_the_run(
    convert: Callable[[str], Path], blobs: Path, tmp_path: Path
) -> None:
    job = job_of(convert("icechunk"), tmp_path)
    first = job.samples.store.snapshot
    second = copy_into(tmp_path / "blobs.icechunk", blobs, factor=2)
    unseen = replace(job, sources=(replace(job.sources[0], samples=None),))
    assert described(unseen, SerialPlace(), [first]).samples.store.snapshot == first
    assert described(unseen, SerialPlace()).samples.store.snapshot == second


def test_another_version_of_a_repository_is_another_run(
    convert: Callable[[str], Path], blobs: Path, tmp_path: Path
) -> None:
    path = convert("icechunk")
    train_job(job_of(path, tmp_path, rounds=1), tmp_path / "run")
    other = copy_into(path, blobs, factor=2)
    with pytest.raises(RunConflict, match=f'data.storage_options.snapshot was not given, is "{other}"') as caught:
        train_job(job_of(path, tmp_path, data={"storage_options": {"snapshot": other}}), tmp_path / "run")
    assert caught.value.code == 4


def test_the_plan_of_a_repository_says_the_snapshot(convert: Callable[[str], Path], tmp_path: Path) -> None:
    path = convert("icechunk")
    rows, record = rows_of(path, tmp_path)
    snapshot = rows["snapshot"].partition(",")[0]
    assert rows["snapshot"] == f"{snapshot}, the newest of branch main"
    assert rows["checksums"].startswith("icechunk verifies none")
    assert "no checksums in x, y" in rows["chunks"]
    assert rows["continuing"] == f"snapshot {snapshot} is read again, whatever has been committed"
    assert record["notes"]["snapshot"] == rows["snapshot"]


def test_samples_of_python_keep_their_snapshot(convert: Callable[[str], Path], blobs: Path, tmp_path: Path) -> None:
    path = convert("icechunk")
    samples = dtrain.open_samples(path, inputs=["x"], targets=["y"])
    copy_into(path, blobs, factor=2)
    with dtrain.batches(samples, batch_size=100) as batches:
        (x,) = next(iter(batches)).inputs
    there = zarr.open_group(blobs, mode="r")["x"]
    assert isinstance(there, zarr.Array)
    assert np.isin(x.numpy(), np.asarray(there[...]).astype("float32")).all()
