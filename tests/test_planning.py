"""The numbers of a plan equal those of the run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import dtrain
from dtrain.algorithm.params import without_frozen
from dtrain.calls import job_from_python
from dtrain.data.samples import Samples
from dtrain.errors import InvalidConfig
from dtrain.job import Job, with_scheduler
from dtrain.planning import RunPlan, plan_job
from dtrain.planrecord import plan_record
from dtrain.plantext import plan_rows
from dtrain.trainer import train_job
from tests.runtime import models
from tests.training import evaluated


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
    assert planned.traffic.sent == planned.reduced_bytes == first.bytes_reduced
    assert planned.commit.parameters == first.bytes_reduced // 3 + 4 * (12 * 12 + 12)  # tied ones are written twice
    val = evaluated(run, None, "val")[2]
    assert planned.stores[0].counts["val_samples"] == val


ADAMW = {"train": {"optimizer": "adamw"}}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"average": {"replicas": 1}},
        {"average": {"codec": {"name": "bf16"}}},
        {"average": {"codec": {"name": "int8", "error_feedback": False}}},
        {"average": {"codec": {"name": "int4"}, "outer": {}}},
        {**ADAMW, "average": {"inner_state": "average"}},
        {**ADAMW, "average": {"inner_state": "average", "codec": {"name": "int8"}}},
        {**ADAMW, "average": {"inner_state": "reset", "weights": "uniform"}},
        {"train": {"optimizer": "rprop", "local_steps": 2}, "average": {"inner_state": "average"}},
        {"average": {"control": True}},
        {**ADAMW, "average": {"control": True, "inner_state": "average"}},
        {"train": {"freeze": ["0.*"]}},
        {**ADAMW | {"train": {"optimizer": "adamw", "freeze": ["3.*", "5.*"]}}, "average": {"inner_state": "average"}},
        {"average": {"mix": {"topology": "ring"}}},
        {"average": {"mix": {"topology": "exponential"}, "outer": {}}},
        {"average": {"mix": {"topology": "hierarchical", "groups": 2, "period": 2}}},
    ],
)
def test_the_traffic_of_a_plan_is_that_of_the_rounds(samples: Samples, tables: dict[str, Any]) -> None:
    train = {"loss": "cross_entropy", "rounds": 2, "batch_size": 64, **tables.get("train", {})}
    average = {"replicas": 4, **tables.get("average", {})}
    plan = dtrain.plan(models.wide, samples, train=train, average=average, cluster="serial")
    results = list(dtrain.train_rounds(models.wide, samples, train=train, average=average, cluster="serial"))
    assert [result.bytes_reduced for result in results] == [plan.traffic.sent] * 2
    state = results[-1].state
    assert state is not None
    start, inner = state.broadcast[0], state.replicas[0].inner  # an averaged state lies with the replicas
    given = replace(start, params=without_frozen(start.params), inner=inner if "inner_state" in average else None)
    assert plan.traffic.received == given.nbytes


def test_batch_norm_is_named(samples: Samples) -> None:
    def rows(model: Any, average: dict[str, Any]) -> dict[str, str]:
        plan = dtrain.plan(model, samples, train={"loss": "cross_entropy"}, average=average, cluster="serial")
        return dict(plan.rows)

    said = rows(models.small, {"replicas": 2})["batch norm"]
    assert said.startswith("its running statistics are averaged; average.recalibrate_batchnorm = true takes them anew")
    assert "batch norm" not in rows(models.small, {"replicas": 2, "recalibrate_batchnorm": True})
    assert "batch norm" not in rows(lambda: nn.Linear(6, 3), {"replicas": 2})
    assert "batch norm" not in rows(lambda: nn.BatchNorm1d(6, track_running_stats=False), {"replicas": 2})
    assert "batch norm" not in rows(models.small, {"replicas": 1})  # there is nothing to average


@pytest.mark.parametrize("call", [dtrain.plan, dtrain.train])
def test_a_model_without_batch_norm_is_not_recalibrated(
    samples: Samples, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    average = {"replicas": 2, "recalibrate_batchnorm": True}
    with pytest.raises(InvalidConfig, match="recalibrate_batchnorm = true is for layers .* Linear has none"):
        call(lambda: nn.Linear(6, 3), samples, train={"loss": "cross_entropy"}, average=average, cluster="serial")


@pytest.mark.parametrize(
    ("paths", "average", "said"),
    [
        ((2, 1), {}, 'replicas take 8 to 16 steps; average.weights = "fednova" divides their updates by them'),
        ((1, 1), {}, None),
        ((2, 1), {"weights": "fednova"}, None),
        ((2, 1), {"weights": "uniform"}, None),
        ((2, 1), {"reduce": "median"}, None),  # ignores weights
        ((2, 1), {"mix": {"topology": "ring"}}, None),  # cannot go with fednova
    ],
)
def test_uneven_steps_name_fednova(
    blobs: Path, paths: tuple[int, int], average: dict[str, Any], said: str | None
) -> None:
    data = {
        "path": [{"path": str(blobs), "replicas": count} for count in paths],
        "inputs": ["x"],
        "targets": ["y"],
    }
    config = dtrain.TrainConfig(train={"loss": "cross_entropy", "batch_size": 32}, average=average, data=data)
    plan = dtrain.plan(models.small, config=config, cluster="serial")
    assert dict(plan.rows).get("weights") == said


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


def test_a_round_takes_its_steps_its_evaluation_and_what_is_beside(planned: RunPlan) -> None:
    numbers = {"seconds": 0.5, "evaluate_seconds": 0.01, "process_bytes": 300_000_000, "inner_bytes": 1000}
    known = replace(planned, initial=replace(planned.initial, **numbers), steps=(4, 3, 3), eval_every=2)
    serial, three, two = (replace(known, processes=count, workers=max(2, count)) for count in (1, 3, 2))
    evaluation = 0.01 * known.validation_samples / 2
    assert known.validation_samples == planned.stores[0].counts["val_samples"] > 0
    assert [plan.steps_seconds for plan in (serial, two, three)] == [6.0, 4.0, 2.0]  # 3, 2 and 1 replicas in turn
    assert serial.evaluate_seconds == pytest.approx(evaluation)
    assert three.evaluate_seconds == pytest.approx(evaluation / 3)
    beside = 0.05 + 1.6e-9 * known.initial.params.nbytes
    assert three.round_seconds == pytest.approx(2.0 + evaluation / 3 + beside)
    assert serial.worker_bytes == 300_000_000 + serial.resident_bytes + 3 * 1000
    assert three.worker_bytes == 300_000_000 + three.resident_bytes + 1000


def test_replicas_of_a_serial_run_are_trained_in_turn(job: Job, planned: RunPlan) -> None:
    assert (planned.processes, planned.in_turn) == (1, 3)
    text = dict(plan_rows(job, planned))
    assert "2 rounds, in this process" in text["time"]
    assert " at its peak: " in text["worker memory"]
