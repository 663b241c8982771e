"""From a job to a runner: in order, once each, and refused before anything trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dtrain
from dtrain import prepare
from dtrain.calls import job_from_python
from dtrain.data.plan import footprint, partition
from dtrain.data.plan.partition import JointPlan, plan_data
from dtrain.data.read import presence, units
from dtrain.data.samples import Samples
from dtrain.errors import ChunkMissing, DataChanged, OutOfMemory
from dtrain.job import Job, with_scheduler
from dtrain.prepare import open_runner
from tests.runtime import models


def job_of(samples: Samples, **tables: Any) -> Job:
    train = {"loss": "cross_entropy", "rounds": 2, "local_steps": 2, "batch_size": 16}
    config = dtrain.TrainConfig(**{"train": train, "average": {"replicas": 3}, **tables})
    return job_from_python(models.small, samples, {}, with_scheduler(config, "serial"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of functions on the way to the first round, by name."""
    counts: Counter[str] = Counter()

    def count(module: Any, name: str, label: str | None = None) -> None:
        original = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counts[label or name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, counting)

    count(partition, "train_partitions")
    count(units.UnitReader, "__init__", "readers opened")
    count(footprint, "choose_readers", "readers chosen for a budget")
    count(units, "choose_readers", "readers chosen to open")
    count(prepare, "resolve")
    count(prepare, "take_inventory")
    return counts


def test_nothing_is_computed_twice_on_the_way_to_the_first_round(
    samples: Samples, tmp_path: Path, counted: Counter[str]
) -> None:
    dtrain.train(
        models.small,
        samples,
        train={"loss": "cross_entropy", "rounds": 2, "local_steps": 2, "batch_size": 16},
        average={"replicas": 3},
        cluster="serial",
        run_dir=tmp_path,
        progress=False,
    )
    assert counted == {
        "train_partitions": 1,
        "readers opened": 1,
        "readers chosen to open": 1,
        "readers chosen for a budget": 2,  # that of training and that of evaluation
        "resolve": 1,
        "take_inventory": 1,
    }


def test_a_continued_run_resolves_nothing(samples: Samples, tmp_path: Path, counted: Counter[str]) -> None:
    options: dict[str, Any] = {"cluster": "serial", "run": "r", "run_dir": tmp_path, "progress": False}
    for rounds in (1, 2):
        table = {"loss": "cross_entropy", "rounds": rounds, "local_steps": 2, "batch_size": 16}
        counted.clear()
        dtrain.train(models.small, samples, train=table, average={"replicas": 3}, **options)
    assert counted["resolve"] == 0
    assert counted["train_partitions"] == 1


def test_the_runner_has_what_was_resolved(samples: Samples) -> None:
    job = job_of(samples)
    with open_runner(job, "id") as (runner, resolved):
        assert runner.spec.plan is resolved.plan
        assert runner.spec.run_id == "id"
        (source,) = runner.spec.sources
        assert source.samples == job.samples
        assert source.plan == resolved.plan.plans[0]
        assert (resolved.held_out, runner.spec.held_out) == (None, None)
        assert resolved.code == job.code
        assert runner.spec.threads == 1


def test_normalisation_is_resolved_by_one_pass_and_kept(blobs: Path) -> None:
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"], normalize=["x"])
    steps: list[Any] = []
    with open_runner(job_of(samples), "id", on_progress=steps.append) as (runner, resolved):
        assert resolved.scalings.keys() == runner.spec.scalings.keys() == {"x"}
    with open_runner(job_of(samples), "id", known=resolved) as (again, _):
        assert again.spec.scalings == resolved.scalings


def test_a_run_decides_what_is_standardised_of_other_data(blobs: Path) -> None:
    with_means, without = (
        dtrain.open_samples(blobs, inputs=["x"], targets=["y"], normalize=normalize)
        for normalize in ({"x": ["f"], "y": []}, [])
    )
    with open_runner(job_of(with_means), "id") as (_, normalised):
        pass
    with open_runner(job_of(without), "id") as (_, plain):
        pass
    for samples, known in ((without, normalised), (with_means, normalised)):
        known = replace(known, plan=JointPlan((plan_data(samples, replicas=1, seed=0),)), contents=())
        with open_runner(job_of(samples), "id", known=known) as (runner, _):
            (source,) = runner.spec.sources
            assert [v.mean_axes for v in source.samples.variables] == [(0,), ()]
            assert [str(v.kept_dtype) for v in source.samples.variables] == ["float64", "int32"]
    known = replace(plain, plan=JointPlan((plan_data(with_means, replicas=1, seed=0),)), contents=())
    job = job_of(with_means)
    config = job.config.model_copy(update={"data": without.config})  # that of the run
    with open_runner(replace(job, config=config), "id", known=known) as (runner, _):
        (source,) = runner.spec.sources
        assert source.samples.variables == without.variables


def test_a_budget_that_does_not_suffice_is_refused(blobs: Path) -> None:
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"], memory="2kB")
    with pytest.raises(OutOfMemory, match=r"data\.memory is 2\.0 kB"), open_runner(job_of(samples), "id"):
        pass


def test_missing_chunks_are_found_before_a_runner_is_there(
    tmp_path: Path, write_store: Callable[..., Path], blobs: Path
) -> None:
    import shutil

    store = tmp_path / "holes.zarr"
    shutil.copytree(blobs, store)
    (store / "x/c/3/0").unlink()
    samples = dtrain.open_samples(store, inputs=["x"], targets=["y"])
    with pytest.raises(ChunkMissing, match="x/c/3/0"), open_runner(job_of(samples), "id"):
        pass


def test_data_that_were_modified_since_the_start_are_refused(tmp_path: Path, blobs: Path) -> None:
    import shutil

    store = tmp_path / "copy.zarr"
    shutil.copytree(blobs, store)
    job = job_of(dtrain.open_samples(store, inputs=["x"], targets=["y"]))
    with open_runner(job, "id") as (_, resolved):
        pass
    with (store / "y/c/2").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataChanged, match="chunks of y have been modified"), open_runner(job, "id", known=resolved):
        pass


def test_each_stored_object_is_looked_up_once_at_a_start(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    original = presence.facts_of

    def counting(folder: str, names: Iterable[str]) -> Iterator[Any]:
        listed = list(names)
        seen.update(f"{Path(folder).name}/{name}" for name in listed)
        return original(folder, listed)

    monkeypatch.setattr(presence, "facts_of", counting)
    objects = sum(v.num_objects for v in samples.variables)
    with open_runner(job_of(samples), "id") as (_, resolved):
        assert (len(seen), set(seen.values())) == (objects, {1})
    with open_runner(job_of(samples), "id", known=resolved):
        assert (len(seen), set(seen.values())) == (objects, {2})


def test_a_chunk_that_is_missing_when_a_run_continues_is_named(tmp_path: Path, blobs: Path) -> None:
    import shutil

    store = tmp_path / "copy.zarr"
    shutil.copytree(blobs, store)
    job = job_of(dtrain.open_samples(store, inputs=["x"], targets=["y"]))
    with open_runner(job, "id") as (_, resolved):
        pass
    (store / "x/c/3/0").unlink()
    with pytest.raises(ChunkMissing, match="x/c/3/0 of x"), open_runner(job, "id", known=resolved):
        pass


def test_the_counters_can_count(samples: Samples, counted: Counter[str]) -> None:
    job = job_of(samples)
    for _ in range(2):
        with open_runner(job, "id") as (runner, _):
            runner.initialise()
    assert counted["resolve"] == counted["readers opened"] == 2
