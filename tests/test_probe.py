"""Measuring rounds, what is fitted to them, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from hypothesis import given
from hypothesis import strategies as st

import dtrain
from dtrain import probe as module
from dtrain.algorithm.cadence import Costs
from dtrain.algorithm.traffic import Traffic
from dtrain.calls import job_from_python
from dtrain.config.schema import TrainConfig
from dtrain.errors import Diverged, UsageError
from dtrain.events import Event, RoundsMeasured
from dtrain.job import Job, with_scheduler
from dtrain.planning import RunPlan, plan_job
from dtrain.planrecord import plan_record
from dtrain.plantext import plan_rows
from dtrain.probe import FEWEST, MOST, MOST_STEPS, Probe, limit_of, measured_by, probe_job
from dtrain.probetext import cadence_text
from dtrain.runtime.serial import SerialRunner
from dtrain.types import RoundResult
from tests.report.helpers import result_of
from tests.runtime import models

PROBE = Probe(step=0.01, overhead=0.03, reduce=0.004, waiting=0.02, local_steps=90)
TRAFFIC = Traffic(sent=400, received=200, busiest=250, all_reduce=200)


# The fit ----------------------------------------------------------------------------------------------------------


class Rounds:
    """Rounds that take `overhead` seconds, and `step` seconds for each step."""

    def __init__(self, step: float, overhead: float, noise: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        self.step, self.overhead, self.noise = step, overhead, noise
        self.asked: list[int] = []

    def __call__(self, local_steps: int) -> list[RoundResult]:
        self.asked.append(local_steps)
        seconds = self.overhead + local_steps * self.step
        return [
            result_of(n, seconds=seconds + noise, reduce_seconds=0.001 * (n + local_steps))
            for n, noise in enumerate(self.noise, start=1)
        ]


def test_short_and_long_rounds_by_hand() -> None:
    rounds = Rounds(step=1 / 128, overhead=14 / 128)
    probe = measured_by(rounds, in_turn=1)
    # 15/128 s: a second is 9 of them; 23/128 s: 105 steps of 1/128 s more take the second
    assert rounds.asked == [1, 9, 114]
    assert (probe.step, probe.overhead, probe.local_steps) == (1 / 128, 14 / 128, 114)
    assert probe.reduce == pytest.approx(0.116)  # the second of three rounds of 114 steps
    assert probe.waiting == pytest.approx(0.05 / 0.3)
    assert (probe.fetch, probe.decode, probe.gather) == pytest.approx((0.03 / 0.3, 0.02 / 0.3, 0.01 / 0.3))


def test_a_step_is_that_of_one_of_the_replicas_that_take_turns() -> None:
    probe = measured_by(Rounds(step=1 / 128, overhead=14 / 128), in_turn=4)
    assert (probe.step, probe.overhead) == (1 / 512, 14 / 128)


def test_slow_steps_are_few() -> None:
    rounds = Rounds(step=2.0, overhead=0.5)
    probe = measured_by(rounds, in_turn=1)
    assert rounds.asked == [1, 2]
    assert (probe.step, probe.overhead) == (2.0, 0.5)


def test_rounds_grow_until_steps_show_beside_the_rest() -> None:
    rounds = Rounds(step=1 / 256, overhead=0.5)
    probe = measured_by(rounds, in_turn=1)
    assert rounds.asked == [1, 2, 52]  # 2 steps are 1.5 % of their round, less than noise: 2 % at most is believed
    assert (probe.step, probe.overhead) == (1 / 256, 0.5)


def test_a_round_that_is_disturbed_does_not_count() -> None:
    probe = measured_by(Rounds(step=1 / 128, overhead=14 / 128, noise=(0.0, 7.0, 0.0)), in_turn=1)
    assert (probe.step, probe.overhead) == (1 / 128, 14 / 128)


def test_rounds_without_a_difference_still_have_steps() -> None:
    rounds = Rounds(step=0.0, overhead=0.5)
    probe = measured_by(rounds, in_turn=1)
    assert rounds.asked[-1] == MOST_STEPS
    assert probe.step > 0
    assert 0 < probe.overhead <= 0.5


def test_after_a_while_rounds_grow_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBE_SECONDS", -1.0)
    rounds = Rounds(step=1 / 128, overhead=14 / 128)
    assert measured_by(rounds, in_turn=1).step == 1 / 128
    assert rounds.asked == [1, 9]


@given(st.floats(1e-4, 10), st.floats(0, 10), st.integers(1, 8))
def test_any_step_and_overhead_are_found(step: float, overhead: float, in_turn: int) -> None:
    probe = measured_by(Rounds(step, overhead), in_turn)
    assert probe.step * in_turn == pytest.approx(step, rel=1e-6)
    assert probe.overhead == pytest.approx(overhead, rel=1e-6, abs=1e-6)


def costs(overhead: float, bandwidth: float | None = None) -> Costs:
    return Costs(step=0.01, overhead=overhead, traffic=TRAFFIC, bandwidth=bandwidth)


def stages(probe: Probe, costs: Costs, local_steps: int, evaluated: float = 0.0) -> tuple[str, ...]:
    limit = limit_of(probe, costs, local_steps, evaluated)
    assert limit is not None
    return limit.stages


def test_what_limits_rounds_by_hand() -> None:
    waits = replace(PROBE, waiting=0.6, fetch=0.5, decode=0.1)
    assert stages(PROBE, costs(0.04), 5) == ("model",)  # 0.05 s of steps
    assert stages(PROBE, costs(0.051), 5) == ("reduce", "model")
    assert stages(PROBE, costs(0.06), 5) == ("reduce",)
    assert stages(PROBE, costs(0.06), 7) == ("model",)
    assert stages(waits, costs(0.02), 5) == ("fetch",)  # 0.025 s
    assert stages(waits, costs(0.03), 5) == ("reduce",)
    assert stages(PROBE, costs(0.0, bandwidth=2500.0), 5) == ("reduce",)  # 250 bytes take 0.1 s
    assert stages(PROBE, costs(0.0, bandwidth=25000.0), 5) == ("model",)


def test_evaluation_is_estimated_by_hand() -> None:
    waits = replace(PROBE, fetch=0.25, gather=0.15)
    limit = limit_of(waits, costs(0.0), 10, evaluated=5.0)
    assert limit is not None
    # 0.1 s of steps: 0.04 of data, 0.06 of the model; five times as many samples: 5 x (0.04 + 0.06 / 3) = 0.3
    assert limit.shares == pytest.approx(
        {"fetch": 0.025 / 0.4, "decode": 0.0, "gather": 0.015 / 0.4, "model": 0.15, "reduce": 0.0, "evaluate": 0.75}
    )
    assert limit.stages == ("evaluate",)


# Real rounds ------------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes that take a moment, and say little of the machine."""
    monkeypatch.setattr(module, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(module, "MOST", 3)
    monkeypatch.setattr(module, "PROBE_SECONDS", 0.5)


def job_of(samples: dtrain.Samples, **tables: Any) -> Job:
    train = {"loss": "cross_entropy", "batch_size": 16, "rounds": 2, "optimizer": "adamw", **tables.pop("train", {})}
    average = {"replicas": 3, **tables.pop("average", {})}
    config = TrainConfig(train=train, average=average, **tables)
    return job_from_python(models.small, samples, {}, with_scheduler(config, "serial"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "tables",
    [
        {"train": {"local_epochs": 2, "drop_last": True}},
        {"train": {"local_steps": 40, "sync_rounds": 2, "schedule": "cosine"}},
        {"train": {"batch_size": "full", "micro_batch": 50}},
        {"average": {"codec": {"name": "int4"}, "inner_state": "average", "outer": {"schedule": "linear"}}},
        {
            "train": {"local_steps": 4},
            "average": {"recalibrate_batchnorm": True, "ema": 0.5, "mix": {"topology": "ring"}},
        },
        {"train": {"local_steps": 4}, "stop": {"metric": "train_loss", "target": 99.0}},  # met by the first round
    ],
)
@pytest.mark.usefixtures("short")
def test_a_probe_evaluates_keeps_and_writes_nothing(
    samples: dtrain.Samples, tables: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError("a round is evaluated or gathered")

    monkeypatch.chdir(tmp_path)
    job = job_of(samples, **tables)
    planned = plan_job(job)
    before = planned.initial.params.flat.copy()
    monkeypatch.setattr(SerialRunner, "evaluate", refused)
    monkeypatch.setattr(SerialRunner, "gather", refused)
    events: list[Event] = []
    probe = probe_job(job, planned.initial.params, report=events.append)
    assert probe.step > 0
    assert 0 <= probe.waiting <= 1
    assert probe.reduce > 0
    measured = [event for event in events if isinstance(event, RoundsMeasured)]
    assert measured[0].local_steps == 1
    assert measured[-1].local_steps == probe.local_steps > 1
    assert all(FEWEST <= event.rounds <= module.MOST for event in measured)
    assert (planned.initial.params.flat == before).all()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("short")
def test_rounds_that_take_long_are_few(samples: dtrain.Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LENGTH_SECONDS", -1.0)
    job, events = job_of(samples, train={"local_steps": 3}), list[Event]()
    probe_job(job, plan_job(job).initial.params, report=events.append)
    assert {event.rounds for event in events if isinstance(event, RoundsMeasured)} == {FEWEST}
    assert FEWEST < MOST


@pytest.mark.usefixtures("short")
def test_a_model_that_diverges_is_refused_as_by_the_run(samples: dtrain.Samples) -> None:
    job = job_of(samples, train={"local_steps": 2, "optimizer": "sgd", "optimizer_args": {"lr": 1e38}})
    with pytest.raises(Diverged):
        probe_job(job, plan_job(job).initial.params)


@pytest.mark.alone
@pytest.mark.usefixtures("short")
def test_a_probe_on_a_cluster(samples: dtrain.Samples, client: Client, tmp_path: Path) -> None:
    plan = dtrain.plan(
        models.small,
        samples,
        train={"loss": "cross_entropy", "local_steps": 4, "batch_size": 16},
        average={"replicas": 3},
        cluster=client,
        probe=True,
        bandwidth="200Mbit",
    )
    assert plan.probe is not None
    assert plan.costs is not None
    assert plan.in_turn == 2
    assert plan.costs.step == 2 * plan.probe.step > 0
    assert plan.record["cadence"]["pays_from"] >= 1


# What is said -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(samples: dtrain.Samples) -> Job:
    return job_of(samples, train={"local_steps": 5}, average={"replicas": 2})


@pytest.fixture(scope="module")
def planned(job: Job) -> RunPlan:
    """A plan of two workers, whose busiest link carries 250 kB a round."""
    traffic = Traffic(sent=500_000, received=125_000, busiest=250_000, all_reduce=200_000)
    plan = plan_job(job)
    return replace(plan, traffic=traffic, processes=2, initial=replace(plan.initial, seconds=0.02))


def test_a_plan_alone_says_nothing_of_rounds(job: Job, planned: RunPlan) -> None:
    assert planned.costs is None
    assert cadence_text(planned) == ""
    assert not {"probe", "estimate", "limited by", "bandwidth"} & dict(plan_rows(job, planned)).keys()
    assert (plan_record(planned)["probe"], plan_record(planned)["cadence"]) == (None, None)


def test_a_probe_in_words(job: Job, planned: RunPlan) -> None:
    plan = replace(planned, probe=PROBE)
    rows = dict(plan_rows(job, plan))
    assert rows["probe"] == (
        "a local step of a replica takes 10 ms, a round 30 ms beyond its steps, of which 4 ms to average (2 workers, "
        "rounds of 1 and 90 steps)"
    )
    # 5 steps of 10 ms, 30 ms beyond them
    assert rows["limited by"].startswith("model (60% of the time); then reduce 36%. The data are not the cause: a GPU")
    assert "bandwidth" not in rows
    assert "local_epochs" not in rows
    assert (
        cadence_text(plan)
        == """\
local_steps  in steps  MB/s a worker
          1       25%           6.25
          2       40%           5.00
          5       62%           3.12  <- as configured
         10       77%           1.92
         20       87%           1.09
         27       90%           0.83  <- recommended
         50       94%           0.47
        100       97%           0.24
        200       99%           0.12
        500       99%           0.05
      1,000      100%           0.02

--bandwidth 200Mbit compares with synchronous training on such a network
steps have 90% of the time or more from local_steps = 27 on; to paste:

[train]
local_steps = 27"""
    )


def test_a_bandwidth_in_words(job: Job, planned: RunPlan) -> None:
    plan = replace(planned, probe=PROBE, bandwidth=1e6)
    rows, text = dict(plan_rows(job, plan)), cadence_text(plan)
    assert rows["bandwidth"] == (
        "8 Mbit/s for the link of each worker: 250.0 kB or 250 ms a round for the busiest one; synchronous training "
        "would send 200.0 kB or 200 ms a step"
    )
    assert rows["limited by"].startswith("reduce (84% of the time); then model 15%. Larger train.local_steps")
    for line in [
        "local_steps  in steps  MB/s a worker  x synchronous",
        "          1        3%           0.86           0.72",  # 0.21 s of 0.29 s
        "          5       15%           0.76           3.18  <- as configured",  # 5 x 0.21 s of 0.33 s
        "        260       90%           0.09          18.96  <- recommended",
        "pays from local_steps = 2 on: steps are faster than in synchronous training",
        "local_steps = 260",
    ]:
        assert line in text.splitlines()


def test_an_estimate_in_words(job: Job, planned: RunPlan) -> None:
    plan = replace(planned, bandwidth=1e6)
    rows = dict(plan_rows(job, plan))
    assert rows["estimate"].startswith("a local step of a replica takes 20 ms (2 workers), by a single one; ")
    assert "limited by" not in rows
    assert "          1        7%           0.93           0.81" in cadence_text(plan).splitlines()  # 0.22 of 0.27 s


def test_the_recommended_number_may_be_the_configured_one(planned: RunPlan) -> None:
    plan = replace(planned, probe=PROBE, steps=(27, 27))
    assert "         27       90%           0.83  <- recommended, as configured" in cadence_text(plan).splitlines()


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({}, "a pass is 16 local steps; local_steps takes the place of local_epochs"),
        ({"local_epochs": 3}, "3 passes are 48 local steps; local_steps takes the place of local_epochs"),
        ({"batch_size": "full"}, "a pass is 1 local step; local_steps takes the place of local_epochs"),
    ],
)
def test_passes_are_said_in_local_steps(samples: dtrain.Samples, train: dict[str, Any], said: str) -> None:
    job = job_of(samples, train=train, average={"replicas": 2})
    rows = dict(plan_rows(job, replace(plan_job(job), probe=PROBE)))
    assert rows["local_epochs"] == said
    assert ("a local step of a replica, a whole pass, takes" in rows["probe"]) == ("batch_size" in train)


def test_one_worker_sends_nothing(planned: RunPlan) -> None:
    alone = Traffic(sent=250_000, received=250_000, busiest=0, all_reduce=0)
    plan = replace(planned, probe=PROBE, bandwidth=1e6, traffic=alone)
    assert "one worker has nobody to send to: synchronous training costs as much" in cadence_text(plan)
    assert plan_record(plan)["cadence"]["pays_from"] is None


def test_the_record_has_the_numbers_of_the_table(planned: RunPlan) -> None:
    plan = replace(planned, probe=PROBE, bandwidth=1e6)
    record, limit = plan_record(plan), plan.limit
    assert limit is not None
    assert record["probe"] == {
        "step_seconds": 0.01,
        "overhead_seconds": 0.03,
        "reduce_seconds": 0.004,
        "waiting_share": 0.02,
        "measured_local_steps": 90,
        "limited_by": asdict(limit),
    }
    assert (limit.stages, round(limit.shares["reduce"], 2)) == (("reduce",), 0.84)
    assert json.loads(json.dumps(record["probe"]))["limited_by"]["stages"] == ["reduce"]
    cadence = record["cadence"]
    assert {key: cadence[key] for key in ("measured", "bandwidth", "local_steps", "recommended", "pays_from")} == {
        "measured": True,
        "bandwidth": 1e6,
        "local_steps": 5,
        "recommended": 260,
        "pays_from": 2,
    }
    assert cadence["table"][2] == pytest.approx(
        {
            "local_steps": 5,
            "seconds": 0.33,
            "share": 0.05 / 0.33,
            "bytes_per_second": 250e3 / 0.33,
            "speedup": 1.05 / 0.33,
        }
    )
    assert plan_record(replace(planned, bandwidth=1e6))["cadence"]["measured"] is False


@pytest.mark.usefixtures("short")
def test_a_plan_of_python_shows_the_table(samples: dtrain.Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(samples.path).parent)  # a path is not broken, and from here it is short
    train, events = {"loss": "cross_entropy", "batch_size": 16}, list[Event]()
    plan = dtrain.plan(
        models.small, samples, train=train, cluster="serial", probe=True, bandwidth="25MB/s", report=events.append
    )
    assert plan.bandwidth == 25e6
    assert any(isinstance(event, RoundsMeasured) for event in events)
    assert max(map(len, str(plan).splitlines())) <= 80
    assert str(plan).endswith(f"[train]\nlocal_steps = {plan.record['cadence']['recommended']}")
    assert ">x synchronous</th>" in plan._repr_html_()
    with pytest.raises(UsageError, match="bandwidth '25Mb'"):
        dtrain.plan(models.small, samples, train=train, cluster="serial", bandwidth="25Mb")
