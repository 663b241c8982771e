"""Whole runs on several stores that are one: the bits of a run on one store of the same rows."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from distributed import Client

import dtrain
from dtrain.config.schema import TrainConfig
from dtrain.errors import DataChanged, InvalidConfig
from dtrain.job import Job, job_from_config
from dtrain.planning import plan_job
from dtrain.planrecord import plan_record
from dtrain.plantext import plan_rows
from dtrain.trainer import train_job
from tests.training import shas

CUTS = (0, 240, 480, 611)


@pytest.fixture
def parts(blobs: Path, tmp_path: Path, write_store: Callable[..., Path]) -> list[str]:
    """The blobs in three stores, the second one as an archive; units of the whole begin where a store begins."""
    whole = zarr.open_group(blobs, mode="r")
    x, y = (np.asarray(whole[name]) for name in ("x", "y"))
    paths = []
    for number, (start, stop) in enumerate(itertools.pairwise(CUTS)):
        arrays = {
            "x": {"dims": ("n", "f"), "values": x[start:stop], "chunks": (40, 6)},
            "y": {"dims": ("n",), "values": y[start:stop], "chunks": (60,)},
        }
        paths.append(write_store(tmp_path / f"part{number}.zarr", arrays))
    paths[1] = packed(paths[1])
    return [path.name for path in paths]


def packed(store: Path) -> Path:
    path = store.with_suffix(".zarr.zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(store.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(store).as_posix())
    return path


def job_of(path: Any, base: Path, rounds: int = 3, **tables: Any) -> Job:
    data = {"path": path, "inputs": ["x"], "targets": ["y"], **tables.pop("data", {})}
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


NORMALISED = {"normalize": ["x"]}


def test_runs_have_the_bits_of_a_run_on_one_store_also_cut_and_on_a_cluster(
    parts: list[str], blobs: Path, tmp_path: Path, client: Client
) -> None:
    alone = train_job(job_of(str(blobs), tmp_path, data=NORMALISED), tmp_path / "alone")
    serial = train_job(job_of(parts, tmp_path, data=NORMALISED), tmp_path / "serial")
    assert shas(serial) == shas(alone)
    assert serial.evaluate(split="test") == alone.evaluate(split="test")
    workers = train_job(job_of(parts, tmp_path, cluster={}, data=NORMALISED), tmp_path / "workers", client=client)
    assert shas(workers) == shas(alone)
    train_job(job_of(parts, tmp_path, rounds=1, data=NORMALISED), tmp_path / "cut")
    assert shas(train_job(job_of(parts, tmp_path, data=NORMALISED), tmp_path / "cut")) == shas(alone)


@pytest.mark.parametrize("keys", [{"sel": {"n": slice(300, 700)}}, {"isel": {"n": slice(300, 600)}}])
def test_a_run_that_leaves_out_a_store_goes_on(parts: list[str], tmp_path: Path, keys: dict[str, Any]) -> None:
    if "sel" in keys:
        for path, start in zip(parts, CUTS[:-1], strict=True):
            if path.endswith(".zip"):
                continue
            group = zarr.open_group(tmp_path / path, mode="a")
            rows = np.asarray(group["y"]).shape[0]
            array = group.create_array("n", shape=(rows,), dtype="int64", chunks=(rows,), dimension_names=("n",))
            array[...] = np.arange(start, start + rows)
        parts = [parts[0], parts[2]]
    whole = train_job(job_of(parts, tmp_path, data=keys), tmp_path / "whole")
    assert len(whole.resolved.plan.plans[0].members) == (1 if "sel" in keys else 2)
    train_job(job_of(parts, tmp_path, rounds=2, data=keys), tmp_path / "cut")
    run = train_job(job_of(parts, tmp_path, data=keys), tmp_path / "cut")
    assert shas(run) == shas(whole)
    own = [str(tmp_path / name) for name in parts]
    samples = dtrain.open_samples(own, inputs=["x"], targets=["y"], **keys)
    assert run.evaluate(samples, split="test") == run.evaluate(split="test")


def test_a_weight_gives_the_bits_of_a_run_on_one_store(parts: list[str], blobs: Path, tmp_path: Path) -> None:
    data = {"weight": "y"}
    alone = train_job(job_of(str(blobs), tmp_path, data=data), tmp_path / "alone")
    run = train_job(job_of(parts, tmp_path, data=data), tmp_path / "parts")
    assert shas(run) == shas(alone)
    assert run.evaluate(split="test") == alone.evaluate(split="test")


def test_plan_lists_the_stores(parts: list[str], tmp_path: Path) -> None:
    job = job_of(parts, tmp_path)
    plan = plan_job(job)
    text = dict(plan_rows(job, plan))
    assert text["rows"] == "611 along n"
    assert "3, one after the other, with their rows: " in text["stores"]
    assert "part1.zarr.zip 240" in text["stores"]
    assert json.loads(json.dumps(plan_record(plan)))["partition_samples"]


@pytest.mark.parametrize("rows", [120, 140])
def test_a_store_of_other_rows_is_refused_by_name(
    parts: list[str], tmp_path: Path, write_store: Callable[..., Path], rows: int
) -> None:
    train_job(job_of(parts, tmp_path, rounds=1), tmp_path / "run")
    arrays = {
        "x": {"dims": ("n", "f"), "values": np.ones((rows, 6)), "chunks": (40, 6)},
        "y": {"dims": ("n",), "values": np.ones(rows, "int32"), "chunks": (60,)},
    }
    (tmp_path / "part2.zarr").rename(tmp_path / "old.zarr")
    write_store(tmp_path / "part2.zarr", arrays)
    with pytest.raises(DataChanged, match=rf"part2\.zarr has {rows} rows; 131 when the run was started"):
        train_job(job_of(parts, tmp_path), tmp_path / "run")


def test_a_store_that_was_modified_is_refused_by_name(parts: list[str], tmp_path: Path) -> None:
    train_job(job_of(parts, tmp_path, rounds=1), tmp_path / "run")
    chunk = tmp_path / "part2.zarr" / "x" / "c" / "1" / "0"
    chunk.write_bytes(chunk.read_bytes() + b"0")
    with pytest.raises(DataChanged, match=r"part2\.zarr: chunks have been modified"):
        train_job(job_of(parts, tmp_path), tmp_path / "run")


def test_a_part_of_the_runs_stores_has_no_splits_of_its_own(parts: list[str], tmp_path: Path) -> None:
    run = train_job(job_of(parts, tmp_path, rounds=1), tmp_path / "run")
    keys: dict[str, Any] = {"inputs": ["x"], "targets": ["y"]}
    own = [str(tmp_path / name) for name in parts]
    assert run.evaluate(dtrain.open_samples(own, **keys), split="test") == run.evaluate(split="test")
    for some in (own[0], own[:2], own[::-1]):
        samples = dtrain.open_samples(some, **keys)
        assert run.evaluate(samples, split="all")["loss"] > 0
        with pytest.raises(InvalidConfig, match="trained on other stores beside it"):
            run.evaluate(samples, split="test")


def test_several_stores_are_one_in_federated_data_and_for_validation(
    parts: list[str], blobs: Path, tmp_path: Path
) -> None:
    stores = [{"path": parts[:2], "replicas": 1}, {"path": parts[2]}]
    run = train_job(job_of(stores, tmp_path, average={}), tmp_path / "federated")
    assert len(run.rows) == 3
    data = {"val_path": parts[1:], "split": {"val": 0.0, "test": 0.0}}
    validated = train_job(job_of(parts[0], tmp_path, data=data), tmp_path / "validated")
    assert validated.rows[-1]["val_loss"] > 0
    assert validated.resolved.held_out is not None
    assert validated.resolved.held_out.num_rows == 371


def test_samples_of_several_stores_are_trained_from_python(parts: list[str], blobs: Path, tmp_path: Path) -> None:
    own = [str(tmp_path / name) for name in parts]
    runs = []
    for number, path in enumerate((own, str(blobs))):
        samples = dtrain.open_samples(path, inputs=["x"], targets=["y"])
        runs.append(
            dtrain.train(
                "tests.runtime.models:small",
                samples,
                train={"loss": "cross_entropy", "rounds": 2, "batch_size": 16},
                average={"replicas": 2},
                cluster="serial",
                run_dir=tmp_path / str(number),
                progress=False,
            )
        )
    assert shas(runs[0]) == shas(runs[1])
    assert dtrain.load_run(runs[0].directory).evaluate(split="val") == runs[1].evaluate(split="val")
