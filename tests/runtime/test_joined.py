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
from dtrain.errors import DataChanged, InvalidConfig
from dtrain.job import Job
from dtrain.planning import plan_job
from dtrain.planrecord import plan_record
from dtrain.plantext import plan_rows
from dtrain.trainer import train_job
from tests.runtime.test_store_kinds import job_of
from tests.training import evaluated, shas

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


# Samples that are left out or repeated ---------------------------------------------------------------------------

COUNTED = {
    "skip": {"non_finite": "skip", **NORMALISED},
    "min_valid": {"non_finite": {"min_valid": 0.7}, **NORMALISED},
    "balance": {"non_finite": "skip", "balance": "y"},
    "weight": {"non_finite": "skip", "weight": "w", "balance": "y"},
}
BY_SHARE = {"val": 0.2, "test": 0.2}
BY_COORDINATE = {"val": {"n": {"start": 200, "stop": 259}}, "test": {"n": {"start": 400}}, "gap": 5}


def write_faulty(write_store: Callable[..., Path], blobs: Path, folder: Path, cuts: tuple[int, ...]) -> list[str]:
    """The blobs with 61 rows that are not finite, 30 of them in one value, a coordinate and a weight."""
    whole = zarr.open_group(blobs, mode="r")
    x, y = (np.asarray(whole[name]) for name in ("x", "y"))
    x[::20, 2], x[7::20, :5] = np.nan, np.inf
    arrays = {
        "x": (("n", "f"), x, (40, 6)),
        "y": (("n",), y, (60,)),
        "n": (("n",), np.arange(611), (60,)),
        "w": (("n",), 1.0 + y, (60,)),
    }
    paths = []
    for start, stop in itertools.pairwise(cuts):
        own = {
            name: {"dims": dims, "values": values[start:stop], "chunks": chunks}
            for name, (dims, values, chunks) in arrays.items()
        }
        paths.append(write_store(folder / f"rows{start}-{stop}.zarr", own).name)
    return paths


def counted_job(path: Any, base: Path, rounds: int = 3, **tables: Any) -> Job:
    """A job of which no batch is too short for the model's normalisation."""
    train = {"loss": "cross_entropy", "rounds": rounds, "batch_size": 16, "drop_last": True}
    return job_of(path, base, train=train, **tables)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("split", [BY_SHARE, BY_COORDINATE], ids=["share", "coordinate"])
@pytest.mark.parametrize("keys", COUNTED)
def test_runs_that_count_samples_have_the_bits_of_a_run_on_one_store(
    blobs: Path, tmp_path: Path, write_store: Callable[..., Path], keys: str, split: dict[str, Any]
) -> None:
    data = {**COUNTED[keys], "split": split, "sample_dim": "n"}
    (one,) = write_faulty(write_store, blobs, tmp_path, (0, 611))
    several = write_faulty(write_store, blobs, tmp_path, CUTS)
    alone = train_job(counted_job(one, tmp_path, data=data), tmp_path / "alone")
    run = train_job(counted_job(several, tmp_path, data=data), tmp_path / "several")
    assert shas(run) == shas(alone)
    assert run.evaluate(split="test") == alone.evaluate(split="test")
    left_out, of_one = (left_out_of(own.directory) for own in (run, alone))
    assert [left_out[key] for key in ("samples", "of", "by_variable")] == (
        [31, 611, {"x": 31}] if keys == "min_valid" else [62, 611, {"x": 62}]
    )
    assert {**left_out, "path": ""} == {**of_one, "path": ""}
    assert left_out["path"].endswith("rows0-240.zarr and 2 more stores")
    plans = [json.loads((own.directory / "plan.json").read_text())["data"] for own in (run, alone)]
    assert plans[0]["multiplicity"] == plans[1]["multiplicity"]
    train_job(counted_job(several, tmp_path, rounds=1, data=data), tmp_path / "cut")
    again = train_job(counted_job(several, tmp_path, data=data), tmp_path / "cut")
    assert shas(again) == shas(alone)


def left_out_of(directory: Path) -> dict[str, Any]:
    """What a run said once about samples that are left out."""
    events = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    (said,) = [event for event in events if event["event"] == "SamplesLeftOut"]
    return {key: value for key, value in said.items() if key != "time"}


def test_workers_count_the_samples_of_stores_of_any_length(
    blobs: Path, tmp_path: Path, write_store: Callable[..., Path], client: Client
) -> None:
    data = {**COUNTED["weight"], "split": BY_COORDINATE, "sample_dim": "n"}
    paths = write_faulty(write_store, blobs, tmp_path, (0, 101, 120, 611))
    serial = train_job(counted_job(paths, tmp_path, data=data), tmp_path / "serial")
    workers = train_job(counted_job(paths, tmp_path, cluster={}, data=data), tmp_path / "workers", client=client)
    assert shas(workers) == shas(serial)
    assert left_out_of(workers.directory) == left_out_of(serial.directory)
    plan = serial.plan.plans[0]
    assert plan.num_samples > 611
    (alone,) = write_faulty(write_store, blobs, tmp_path, (0, 611))
    one = train_job(counted_job(alone, tmp_path, data=data), tmp_path / "alone")
    assert sum(serial.plan.sizes) == sum(one.plan.sizes)
    assert serial.rows[-1]["samples"] == one.rows[-1]["samples"]


def test_validation_stores_that_are_one_are_counted_in_their_order(
    blobs: Path, tmp_path: Path, write_store: Callable[..., Path]
) -> None:
    first, second, third = write_faulty(write_store, blobs, tmp_path, (0, 230, 460, 611))
    data = {"non_finite": "skip", "val_path": [first, second], "split": {"val": 0.0, "test": 0.0}, "sample_dim": "n"}
    run = train_job(counted_job(third, tmp_path, rounds=1, data=data), tmp_path / "run")
    keys: dict[str, Any] = {"inputs": ["x"], "targets": ["y"], "sample_dim": "n"}
    # of rows 0, 7, 20, 27 ... 24 lie in the first store and 22 in the second one, which has the same shape
    for paths, wanted in (([first, second], 414), ([second, first], 414), ([second], 208), ([first], 206)):
        samples = dtrain.open_samples([str(tmp_path / name) for name in paths], **keys)
        means, _, count = evaluated(run, samples, "val")
        assert count == wanted
        assert np.isfinite(means["loss"])


def test_plan_counts_the_classes_of_all_stores(blobs: Path, tmp_path: Path, write_store: Callable[..., Path]) -> None:
    data = {**COUNTED["balance"], "split": BY_COORDINATE, "sample_dim": "n"}
    cuts = ((0, 611), CUTS, (0, 101, 120, 611))
    jobs = [
        counted_job(write_faulty(write_store, blobs, tmp_path / str(i), own), tmp_path / str(i), data=data)
        for i, own in enumerate(cuts)
    ]
    plans = [plan_job(job) for job in jobs]
    assert [dict(plan_rows(job, plan))["balance"] for job, plan in zip(jobs, plans, strict=True)] == [
        str(plans[0].balance)
    ] * 3
    assert plans[0].initial.loss == plans[1].initial.loss


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
