"""The numbers of a plan equal those of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dtrain
from dtrain.calls import job_from_python
from dtrain.data.samples import Samples
from dtrain.job import Job, with_scheduler
from dtrain.planning import RunPlan, plan_job, plan_record
from dtrain.plantext import plan_rows
from dtrain.trainer import train_job
from tests.runtime import models


@pytest.fixture(scope="module")
def job(samples: Samples) -> Job:
    config = dtrain.TrainConfig(train={"loss": "cross_entropy", "rounds": 2, "batch_size": 16}, average={"replicas": 3})
    return job_from_python(models.small, samples, {}, with_scheduler(config, "serial"))


@pytest.fixture(scope="module")
def planned(job: Job) -> RunPlan:
    return plan_job(job)


def test_the_plan_is_what_the_run_does(job: Job, planned: RunPlan, tmp_path: Path) -> None:
    rounds: list[Any] = []
    run = train_job(job, tmp_path / "r", report=lambda event: rounds.append(getattr(event, "result", None)))
    first = next(result for result in rounds if result is not None)
    assert run.plan == planned.data
    assert (sum(planned.steps), planned.samples) == (first.steps, first.samples)
    assert planned.reduced_bytes == first.bytes_reduced
    assert planned.commit_bytes == first.bytes_reduced // 3
    val = run.evaluation(None, split="val", round="last", cluster="serial")[2]
    assert planned.stores[0].counts["val_samples"] == val


def test_short_rounds_are_named_beside_the_others(samples: Samples) -> None:
    train = {"loss": "cross_entropy", "rounds": 8, "local_steps": 5, "batch_size": 16}
    texts, records = [], []
    for sync_rounds in (0, 3, 99):
        config = dtrain.TrainConfig(train={**train, "sync_rounds": sync_rounds}, average={"replicas": 2})
        job = job_from_python(models.small, samples, {}, with_scheduler(config, "serial"))
        plan = plan_job(job)
        texts.append(dict(plan_rows(job, plan))["round"])
        records.append(plan_record(plan))
    assert texts == [
        "5 local steps a replica, batch 16: 160 samples, 8 rounds",
        "5 local steps a replica, batch 16: 160 samples, 8 rounds; the first 3 have one step (train.sync_rounds)",
        "5 local steps a replica, batch 16: 160 samples, 8 rounds; the first 8 have one step (train.sync_rounds)",
    ]
    for record in records:  # of the rounds after the short ones
        assert (record["steps"], record["samples_a_round"], record["eval_every"]) == ([5, 5], 160, 2)


def test_every_auto_has_a_value_and_a_reason(planned: RunPlan) -> None:
    assert planned.choices["data.sample_dim"] == ("n", "the first dimension that all variables share")
    assert planned.choices["data.split_order"].value == "random"
    assert "average.replicas" not in planned.choices  # it was given
    assert "cluster.workers" not in planned.choices  # there is no local cluster
    assert all(choice.why for choice in planned.choices.values())


def test_the_lines_and_the_record_say_the_same(job: Job, planned: RunPlan) -> None:
    lines, record = dict(plan_rows(job, planned)), plan_record(planned)
    assert record["event"] == "plan"
    assert f"{record['samples_a_round']:,} samples, 2 rounds" in lines["round"]
    assert lines["partitions"].startswith("3 of ")
    assert record["replicas"] == len(record["partition_samples"]) == 3
    assert f"{record['num_params']:,} parameters" in lines["model"]
    assert f"{record['first_loss']:.4f}" in lines["first loss"]
    assert record["resident_bytes"] == record["memory"]["total"]
    assert {key for key in lines if key.startswith("auto ")} == {f"auto {key}" for key in record["resolved"]}
