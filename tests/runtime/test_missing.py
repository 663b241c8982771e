"""Chunks that are not stored, in whole runs: filled, refused, left out, counted and told, wherever data are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Client

import dtrain
from dtrain.calls import job_from_python
from dtrain.data.plan.partition import cell_anchors
from dtrain.data.read.presence import check_presence
from dtrain.errors import ChunkMissing, DataChanged, NonFiniteData, TooFewSamples
from dtrain.events import ChunksFilled
from dtrain.job import job_from_config, with_scheduler
from dtrain.planning import plan_job
from dtrain.planrecord import plan_record
from dtrain.plantext import plan_rows
from dtrain.prepare import open_runner
from dtrain.runs import load_run
from dtrain.trainer import train_job
from tests.runtime import models
from tests.training import evaluated, rewrite, shas, trained

ROWS, CHUNK = 400, 20
LABELS = (np.arange(ROWS) // 7) % 3
LABELS[100:160] = 0


@pytest.fixture
def store(tmp_path: Path, write_store: Callable[..., Path]) -> Callable[..., Path]:
    """A function that writes x(n, f) and y(n), without the chunks of y that hold only zeros if so told."""

    def write(name: str = "a.zarr", *, sparse: bool = True, **arrays: Any) -> Path:
        x = np.random.default_rng(1).normal(size=(ROWS, 6)).astype("float32")
        usual = {
            "x": {"dims": ("n", "f"), "values": x, "chunks": (CHUNK, 6)},
            "y": {"dims": ("n",), "values": LABELS.astype("int32"), "chunks": (CHUNK,)},
        }
        path = write_store(tmp_path / name, {**usual, **arrays})
        for chunk in range(100 // CHUNK, 160 // CHUNK) if sparse else ():
            (path / "y/c" / str(chunk)).unlink()
        return path

    return write


def samples_of(path: Path | str, **data: Any) -> dtrain.Samples:
    return dtrain.open_samples(path, inputs=["x"], targets=["y"], **data)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., dtrain.Run]:
    """Train: start(samples, "name", rounds=2)."""

    def run(
        samples: dtrain.Samples, name: str = "r", cluster: Any = "serial", rounds: int = 2, **more: Any
    ) -> dtrain.Run:
        table = {"loss": "cross_entropy", "rounds": rounds, "batch_size": 16}
        return trained(models.small, samples, tmp_path / "runs", table, cluster, run=name, **more)

    return run


def job_of(samples: dtrain.Samples, **tables: Any) -> Any:
    config = dtrain.TrainConfig(
        train={"loss": "cross_entropy", "rounds": 2, "batch_size": 16}, average={"replicas": 2}, **tables
    )
    return job_from_python(models.small, samples, {}, with_scheduler(config, "serial"))


def planned(samples: dtrain.Samples) -> tuple[dict[str, Any], list[str], str]:
    """The plan as an object, its lines of missing chunks, and its line of all chunks."""
    job = job_of(samples)
    plan = plan_job(job)
    rows = plan_rows(job, plan)
    return plan_record(plan), [text for label, text in rows if label == "not stored"], dict(rows)["chunks"]


def events(run: dtrain.Run) -> list[dict[str, Any]]:
    lines = (run.directory / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "ChunksFilled"]


# Filled -----------------------------------------------------------------------------------------------------


def test_labels_that_a_writer_left_out_are_filled_with_the_same_bits(
    store: Callable[..., Path], start: Callable[..., dtrain.Run], client: Client
) -> None:
    sparse, whole = samples_of(store("sparse.zarr")), samples_of(store("whole.zarr", sparse=False))
    told: list[Any] = []
    run = start(sparse, "sparse", report=told.append)
    expected = start(whole, "whole")
    assert shas(run) == shas(expected) == shas(start(sparse, "cluster", client))
    (event,) = events(run)
    assert {key: event[key] for key in ("path", "variable", "chunks", "of", "value")} == {
        "path": sparse.path,
        "variable": "y",
        "chunks": 3,
        "of": 20,
        "value": 0,
    }
    assert [(e.variable, e.chunks) for e in told if isinstance(e, ChunksFilled)] == [("y", 3)]
    assert events(expected) == []
    stored = json.loads((run.directory / "plan.json").read_text())
    assert stored["filled"] == [{"y": {"chunks": 3, "value": 0}}]
    resumed = start(sparse, "sparse", rounds=3)
    assert shas(resumed) == shas(start(whole, "whole", rounds=3))
    assert len(events(resumed)) == 2  # at every start
    assert run.evaluate(split="all") == expected.evaluate(split="all")
    assert run.evaluate(whole, split="all") == expected.evaluate(sparse, split="all")


def test_the_plan_counts_missing_chunks_whatever_becomes_of_them(store: Callable[..., Path]) -> None:
    sparse = store()
    record, lines, chunks = planned(samples_of(sparse))
    assert record["absent_chunks"] == {"y": {"chunks": 3, "of": 20, "missing": "fill"}}
    assert lines == ['3 of 20 chunks of y read as 0 (data.missing = "auto")']
    assert chunks == "some are not stored; no checksums in x, y"
    assert record["resolved"]["data.missing"]["value"] == "x error, y fill"
    record, lines, _ = planned(samples_of(sparse, missing="fill"))
    assert record["absent_chunks"] == {"y": {"chunks": 3, "of": 20, "missing": "fill"}}
    assert lines == ['3 of 20 chunks of y read as 0 (data.missing = "fill")']
    record, lines, _ = planned(samples_of(sparse, missing="skip"))
    assert (record["absent_chunks"]["y"]["missing"], record["absent_rows"]) == ("skip", 60)
    assert lines == ['3 of 20 chunks of y are left out, 60 rows with those of all variables (data.missing = "skip")']
    with pytest.raises(ChunkMissing, match=r"chunk y/c/5 of y is missing \(3 of 20 are\)"):
        planned(samples_of(sparse, missing="error"))
    record, lines, chunks = planned(samples_of(store("whole.zarr", sparse=False)))
    assert (record["absent_chunks"], lines, chunks) == ({}, [], "all chunks are there; no checksums in x, y")


def test_the_plan_counts_the_chunks_of_every_store(store: Callable[..., Path]) -> None:
    sparse, held_out = samples_of(store()), store("val.zarr")
    (held_out / "y/c/0").unlink()
    record, lines, _ = planned(replace(sparse, config=sparse.config.model_copy(update={"val_path": str(held_out)})))
    assert record["held_out_absent_chunks"] == {"y": {"chunks": 4, "of": 20, "missing": "fill"}}
    assert lines == [
        f'3 of 20 chunks of y of {sparse.path} read as 0 (data.missing = "auto")',
        f'4 of 20 chunks of y of {held_out} read as 0 (data.missing = "auto")',
    ]


def test_a_mask_without_the_sample_dimension_is_filled(
    tmp_path: Path, write_store: Callable[..., Path], start: Callable[..., dtrain.Run]
) -> None:
    arrays = {
        "t": {"dims": ("n", "a", "b"), "values": np.random.default_rng(0).normal(size=(60, 4, 4)), "chunks": (6, 4, 4)},
        "land": {"dims": ("a", "b"), "values": np.zeros((4, 4), bool), "chunks": (4, 2)},
    }
    shas_of = []
    for name in ("whole", "sparse"):
        path = write_store(tmp_path / name, arrays)
        if name == "sparse":
            shutil.rmtree(path / "land/c")
        samples = dtrain.open_samples(
            path, inputs=["t", "land"], targets=["t"], sample_dim="n", input_offsets=[-1, 0], target_offsets=1
        )
        run = dtrain.train(
            models.forecast,
            samples,
            train={"loss": "mse", "rounds": 1},
            average={"replicas": 2},
            cluster="serial",
            run_dir=tmp_path / name / "runs",
            progress=False,
        )
        shas_of.append(shas(run))
        for missing in ("auto", "skip"):  # no sample can do without it
            config = samples.config.model_copy(update={"missing": missing})
            found = check_presence(replace(samples, config=config))
            assert [(v, c.chunks, c.of) for v, c in found.items()] == ([("land", 2, 2)] if name == "sparse" else [])
    assert shas_of[0] == shas_of[1]


def test_inner_chunks_of_shards_are_filled_and_counted(
    tmp_path: Path, write_store: Callable[..., Path], store: Callable[..., Path]
) -> None:
    import zarr

    path = store(sparse=False)
    shutil.rmtree(path / "y")
    with zarr.config.set({"array.write_empty_chunks": False}):
        array = zarr.open_group(path, mode="a").create_array(
            "y", shape=(ROWS,), chunks=(10,), shards=(50,), dtype="int32", dimension_names=("n",)
        )
        array[...] = LABELS
    (path / "y/c/0").unlink()
    record, lines, _ = planned(samples_of(path))
    assert record["absent_chunks"] == {"y": {"chunks": 5 + 6, "of": 40, "missing": "fill"}}
    assert lines == ['11 of 40 chunks of y read as 0 (data.missing = "auto")']
    expected = np.where(np.arange(ROWS) < 50, 0, LABELS)
    for reader in ("zarr", "numcodecs", "zarrs"):
        samples = samples_of(path, reader=reader, split={"val": 0.0, "test": 0.0}, shuffle=False)
        found = torch.cat([targets.clone() for _, targets in dtrain.batches(samples, batch_size=64)])
        assert found.tolist() == expected.tolist()


@pytest.mark.slow
def test_of_several_stores_each_is_judged_by_itself(
    store: Callable[..., Path], tmp_path: Path, own_client: Client
) -> None:
    worker = sorted(own_client.nthreads())[0]
    paths = [{"path": str(store("one.zarr", sparse=False))}, {"path": str(store("two.zarr")), "workers": [worker]}]
    config = dtrain.TrainConfig(
        model="tests.runtime.models:small",
        data={"path": paths, "inputs": ["x"], "targets": ["y"]},
        train={"loss": "cross_entropy", "rounds": 1, "batch_size": 16},
    )
    run = train_job(job_from_config(config, Path.cwd()), tmp_path / "run", client=own_client)
    assert json.loads((run.directory / "plan.json").read_text())["filled"] == [{}, {"y": {"chunks": 3, "value": 0}}]
    assert [event["path"] for event in events(run)] == [paths[1]["path"]]


# Refused ----------------------------------------------------------------------------------------------------


def test_packed_values_are_never_filled_by_themselves(
    store: Callable[..., Path], start: Callable[..., dtrain.Run]
) -> None:
    x = np.random.default_rng(0).integers(-999, 999, (ROWS, 6)).astype("int16")
    attributes = {"scale_factor": 0.01, "add_offset": 280.0}
    packed = {"dims": ("n", "f"), "values": x, "chunks": (CHUNK, 6), "attributes": attributes}
    path = store(sparse=False, x=packed)
    samples = samples_of(path)
    run = start(samples)
    (path / "x/c/3/0").unlink()
    said = r"chunk x/c/3/0 of x is missing \(1 of 20\); Zarr would read it as the fill value, which means 280\."
    for read in (
        lambda: start(samples, "other"),
        lambda: planned(samples),
        lambda: dtrain.batches(samples),
        lambda: run.evaluate(split="all"),
        lambda: run.evaluate(samples, split="all"),
    ):
        with pytest.raises(ChunkMissing, match=said) as caught:
            read()
        assert caught.value.code == 5
        assert 'data.missing = "fill"' in caught.value.hint


@pytest.mark.parametrize("name", ["x", "y"])
def test_what_reads_as_nan_is_left_to_non_finite(
    store: Callable[..., Path], start: Callable[..., dtrain.Run], name: str
) -> None:
    x = np.random.default_rng(0).normal(size=(ROWS, 6)).astype("float32")
    of_nan = {"dims": ("n", "f"), "values": x, "chunks": (CHUNK, 6), "fill_value": np.nan}
    path = store(sparse=False, **{name: of_nan})
    key = f"{name}/c/3/0"
    (path / key).unlink()
    samples = samples_of(path)
    for read in (lambda: start(samples), lambda: planned(samples), lambda: dtrain.batches(samples)):
        with pytest.raises(NonFiniteData, match=f"chunk {key} of {name} is missing .*, which means NaN") as caught:
            read()
        assert caught.value.code == 5
        assert 'data.non_finite = "allow"' in caught.value.hint
    allowed = samples_of(path, non_finite="allow", split={"val": 0.0, "test": 0.0}, shuffle=False)
    assert {n: c.chunks for n, c in check_presence(allowed).items()} == {name: 1}
    batch = next(iter(dtrain.batches(allowed, batch_size=ROWS)))
    found = batch.inputs[0] if name == "x" else batch.targets
    assert isinstance(found, torch.Tensor)
    assert torch.isnan(found).any(1).nonzero().ravel().tolist() == list(range(60, 80))


def test_a_run_goes_on_only_with_the_same_chunks_filled(
    store: Callable[..., Path], start: Callable[..., dtrain.Run]
) -> None:
    path = store()
    samples = samples_of(path)
    run = start(samples)
    plan = run.directory / "plan.json"
    stored = json.loads(plan.read_text())
    (path / "y/c/0").unlink()
    with pytest.raises(DataChanged, match="chunks of y have been modified"):
        start(samples, rounds=3)
    rewrite(run.directory, plan={**stored, "contents": []})  # as of a remote store
    job = job_of(samples)
    with (
        pytest.raises(
            DataChanged, match="of the chunks of y, 4 are missing and filled; 3 were when the run was started"
        ),
        open_runner(job, "id", known=load_run(run.directory).resolved),
    ):
        pass


# Left out ---------------------------------------------------------------------------------------------------


def test_rows_of_the_validation_store_are_left_out(
    store: Callable[..., Path], start: Callable[..., dtrain.Run], client: Client
) -> None:
    held_out = store("val.zarr", sparse=False)
    for key in ("x/c/2/0", "y/c/7", "x/c/19/0"):
        (held_out / key).unlink()
    path = store(sparse=False)
    samples = samples_of(path, val_path=str(held_out), missing="skip", split={"val": 0.0, "test": 0.1})
    run = start(samples)
    assert run.resolved.held_out is not None
    assert run.resolved.held_out.absent == ((40, 60), (140, 160), (380, 400))
    assert shas(run) == shas(start(samples, "cluster", client))
    values, _, count = evaluated(run, None, "val")
    assert (count, values["loss"]) == (340, run.rows[-1]["val_loss"])
    record, lines, _ = planned(samples)
    assert record["held_out_samples"] == 340
    assert record["held_out_absent_chunks"]["x"] == {"chunks": 2, "of": 20, "missing": "skip"}
    assert len(lines) == 2
    resumed = start(samples, rounds=3)
    assert [row["round"] for row in resumed.rows] == [1, 2, 3]


@pytest.mark.parametrize("where", ["serial", "client"])
def test_rows_of_other_data_are_left_out(
    store: Callable[..., Path], start: Callable[..., dtrain.Run], where: str, request: pytest.FixtureRequest
) -> None:
    run = start(samples_of(store(sparse=False)))
    other = store("other.zarr", sparse=False)
    (other / "x/c/2/0").unlink()
    place = request.getfixturevalue("client") if where == "client" else "serial"
    with pytest.raises(ChunkMissing):
        run.evaluate(samples_of(other), split="all", cluster=place)
    samples = samples_of(other, missing="skip")
    values, _, count = evaluated(run, samples, "all", place)
    assert count == 380
    parts = [{"start": 0, "stop": 40}, {"start": 60, "stop": ROWS}]
    halves = [evaluated(run, samples_of(other, isel={"n": part}), "all") for part in parts]
    expected = sum(found["loss"] * n for found, _, n in halves) / 380
    assert values["loss"] == pytest.approx(expected, rel=1e-6)
    assert 0 < evaluated(run, samples, "test", place)[2] <= 40


def test_rows_of_a_runs_own_data_that_were_lost_later_are_left_out_of_each_split(
    store: Callable[..., Path], start: Callable[..., dtrain.Run]
) -> None:
    path = store(sparse=False)
    run = start(samples_of(path, split={"val": 0.2, "test": 0.2}))
    plan = run.plan.plans[0]
    before = {split: evaluated(run, None, split)[2] for split in ("val", "test")}
    for chunk in (2, 9, 15):
        (path / f"x/c/{chunk}/0").unlink()
    with pytest.raises(ChunkMissing):
        run.evaluate(split="test")
    skipping = load_run(run.directory, model=models.small, settings=("data.missing=skip",))
    after = {split: evaluated(skipping, None, split)[2] for split in before}
    gone = {row for chunk in (2, 9, 15) for row in range(chunk * CHUNK, (chunk + 1) * CHUNK)}
    for split in ("val", "test"):
        part = cell_anchors(plan, split)
        rows = {
            row
            for first, count in zip(part.first.tolist(), part.count.tolist(), strict=True)
            for row in range(first, first + count)
        }
        assert before[split] == len(rows)
        assert after[split] == len(rows - gone)  # no row has changed its split
    assert skipping.plan.fingerprint == run.plan.fingerprint
    for chunk in range(20):
        (path / f"x/c/{chunk}/0").unlink(missing_ok=True)
    with pytest.raises(TooFewSamples):
        skipping.evaluate(split="test")


# Other ways in ----------------------------------------------------------------------------------------------


def test_batches_fill_refuse_and_leave_out(store: Callable[..., Path]) -> None:
    path = store()
    options: dict[str, Any] = {"split": {"val": 0.0, "test": 0.0}, "shuffle": False}
    for missing, expected in (("auto", LABELS), ("fill", LABELS), ("skip", np.delete(LABELS, np.s_[100:160]))):
        samples = samples_of(path, missing=missing, **options)
        found = torch.cat([targets.clone() for _, targets in dtrain.batches(samples, batch_size=32)])
        assert found.tolist() == expected.tolist()
    with pytest.raises(ChunkMissing, match="chunk y/c/5 of y"):
        dtrain.batches(samples_of(path, missing="error", **options))


def test_tokens_that_are_input_and_target_are_refused(tmp_path: Path, write_store: Callable[..., Path]) -> None:
    tokens = {"dims": ("n",), "values": np.arange(1000) % 250 + 1, "chunks": (100,)}
    path = write_store(tmp_path / "t.zarr", {"tokens": {**tokens, "values": tokens["values"].astype("uint8")}})
    (path / "tokens/c/4").unlink()
    offsets = {"input_offsets": {"start": 0, "stop": 8}, "target_offsets": {"start": 1, "stop": 9}, "stride": 8}
    samples = dtrain.open_samples(path, inputs=["tokens"], targets=["tokens"], **offsets)
    with pytest.raises(ChunkMissing, match="chunk tokens/c/4 of tokens is missing .* fill value, 0"):
        dtrain.batches(samples)
