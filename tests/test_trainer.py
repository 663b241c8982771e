"""`train_job`: what is written and told, in which order, and what a second call finds."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Client

import dtrain
from dtrain.calls import job_from_python
from dtrain.committed import committed_rounds
from dtrain.data.samples import Samples
from dtrain.errors import DataChanged, DiskFull, InvalidConfig, RunConflict, RunDamaged, Stopped
from dtrain.events import ClusterOpening, RoundCommitted, RoundDamaged, RoundFinished, RunFinished, RunStarted
from dtrain.job import Job, with_scheduler
from dtrain.report.history import read_rows
from dtrain.trainer import train_job
from tests.runtime import models
from tests.training import bits, rewrite


def job_of(samples: Samples, rounds: int = 4, run: Any = None, stop: Any = None, **train: Any) -> Job:
    config = dtrain.TrainConfig(
        train={"loss": "cross_entropy", "rounds": rounds, "batch_size": 16, **train},
        average={"replicas": 2},
        stop=stop or {},
        run=run or {"commit_every": 2},
    )
    return job_from_python(models.small, samples, {}, with_scheduler(config, "serial"))


def names(events: list[Any]) -> str:
    return " ".join(type(event).__name__ for event in events if type(event).__name__ != "StepsTaken")


@pytest.fixture
def lines() -> Callable[[Path], list[Any]]:
    """A function that returns the history of a run without its timings."""
    return lambda run: bits(read_rows(run))


@pytest.fixture(scope="module")
def trained(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_job(job_of(samples), tmp_path_factory.mktemp("runs") / "r").directory


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained, tmp_path / "r")
    return tmp_path / "r"


def test_events_come_in_order_and_the_files_are_there(samples: Samples, tmp_path: Path) -> None:
    events: list[Any] = []
    train_job(job_of(samples), tmp_path / "r", report=events.append)
    assert names(events) == (
        "ClusterOpening RunStarted RoundFinished RoundFinished RoundCommitted RoundFinished RoundFinished "
        "RoundCommitted RunFinished"
    )
    opening, started, finished = events[0], next(e for e in events if isinstance(e, RunStarted)), events[-1]
    assert isinstance(opening, ClusterOpening)
    assert (opening.run, opening.scheduler) == (str(tmp_path / "r"), "serial")
    assert (started.round, started.rounds, started.replicas) == (0, 4, 2)
    assert started.samples == sum(dtrain.load_run(tmp_path / "r").plan.sizes)
    assert isinstance(finished, RunFinished)
    assert (finished.reason, finished.rounds) == ("rounds", 4)
    found = {path.name for path in (tmp_path / "r").iterdir()}
    assert found == {"config.toml", "env.json", "plan.json", "history.jsonl", "events.jsonl", "rounds"}
    logged = [json.loads(line)["event"] for line in (tmp_path / "r/events.jsonl").read_text().splitlines()]
    assert logged == ["RoundCommitted", "RoundCommitted"]


def test_a_complete_run_says_so_without_opening_a_place(
    run: Path, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.trainer.open_runner", None)
    before, events = (run / "history.jsonl").read_bytes(), list[Any]()
    train_job(job_of(samples), run, report=events.append)
    assert names(events) == "RunFinished"
    assert (run / "history.jsonl").read_bytes() == before


def test_rounds_after_the_newest_commit_are_done_again_to_the_same_lines(run: Path, samples: Samples) -> None:
    before = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    shutil.rmtree(run / "rounds/round-000004")
    events: list[Any] = []
    train_job(job_of(samples), run, report=events.append)
    again = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert bits(again) == bits(before)
    assert [event.result.round for event in events if isinstance(event, RoundFinished)] == [3, 4]


def test_a_damaged_round_is_named_and_the_one_before_is_used(run: Path, samples: Samples) -> None:
    (run / "rounds/round-000004/params.safetensors").write_bytes(b"?")
    events: list[Any] = []
    train_job(job_of(samples), run, report=events.append)
    (damaged,) = [event for event in events if isinstance(event, RoundDamaged)]
    assert damaged.round == 4
    assert [event.round for event in events if isinstance(event, RoundCommitted)] == [4]


@pytest.mark.parametrize(
    ("spoil", "error", "match"),
    [
        (
            lambda run: (run / "history.jsonl").write_text(""),
            RunDamaged,
            "does not hold the rounds up to 4 as they were committed",
        ),
        (
            lambda run: shutil.copy(run / "rounds/round-000002/state.json", run / "plan.json"),
            RunDamaged,
            r"plan\.json is not the one that round 4 was trained with",
        ),
    ],
)
def test_files_that_do_not_fit_each_other_are_refused(
    run: Path, samples: Samples, spoil: Any, error: type[Exception], match: str
) -> None:
    spoil(run)
    with pytest.raises(error, match=match):
        train_job(job_of(samples), run)


def test_another_plan_than_the_rounds_were_trained_with(run: Path, samples: Samples) -> None:
    plan = json.loads((run / "plan.json").read_text())
    plan["data"]["seed"] += 1
    rewrite(run, plan=plan)
    with pytest.raises(DataChanged, match=r"plan\.json is not the plan that round 4 was trained with"):
        train_job(job_of(samples), run)


def test_a_changed_job_is_refused_with_the_difference(run: Path, samples: Samples) -> None:
    with pytest.raises(RunConflict, match=r"train\.batch_size was 16, is 8"):
        train_job(job_of(samples, batch_size=8), run)
    other = job_from_python(models.forecast, samples, {}, job_of(samples).config.model_copy(update={"model": ""}))
    with pytest.raises(RunConflict, match=r"model was .*small.*, is .*forecast"):
        train_job(other, run)


@pytest.mark.parametrize("where", ["serial", pytest.param("cluster", marks=pytest.mark.slow)])
def test_when_the_time_is_over_the_round_being_trained_is_the_last_and_is_committed(
    samples: Samples, tmp_path: Path, where: str, request: pytest.FixtureRequest, lines: Callable[[Path], list[Any]]
) -> None:
    client = request.getfixturevalue("client") if where == "cluster" else None
    job = job_of(samples, run={"commit_every": 50})
    for number in (1, 2, 3):
        events: list[Any] = []
        with pytest.raises(Stopped, match=f"--max-time is over after round {number}"):
            train_job(job, tmp_path / "r", client=client, report=events.append, max_seconds=0.0)
        assert committed_rounds(tmp_path / "r")[-1] == number
        assert (events[-1].reason, events[-1].rounds) == ("max_time", number)
    train_job(job, tmp_path / "r", client=client, max_seconds=0.0)  # nothing would follow the last round
    train_job(job, tmp_path / "whole", client=client)
    assert lines(tmp_path / "r") == lines(tmp_path / "whole")


def test_time_that_ends_between_two_commits(
    samples: Samples, tmp_path: Path, lines: Callable[[Path], list[Any]]
) -> None:
    """The clock is that of the rounds: it is over once the second one has been written down."""
    job, seen = job_of(samples, rounds=6, run={"commit_every": 5}), list[int]()
    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(monotonic=lambda: 100.0 * len(seen), strftime=time.strftime)
        patch.setattr("dtrain.trainer.time", clock)

        def report(event: Any) -> None:
            if isinstance(event, RoundFinished):
                seen.append(event.result.round)

        with pytest.raises(Stopped, match="after round 3"):
            train_job(job, tmp_path / "r", report=report, max_seconds=150.0)
    assert seen == [1, 2, 3]
    assert committed_rounds(tmp_path / "r") == [3]
    train_job(job, tmp_path / "r")
    train_job(job, tmp_path / "whole")
    assert lines(tmp_path / "r") == lines(tmp_path / "whole")


# Rounds without an evaluation -----------------------------------------------------------------------------------


def evaluations(run: Path) -> dict[int, float]:
    return {row["round"]: row["val_loss"] for row in read_rows(run) if "val_loss" in row}


def shas(run: Path) -> list[str]:
    return [row["params_sha256"] for row in read_rows(run)]


def train_in_pieces(job: Job, run: Path, report: Any = None) -> int:
    """Train with a time that is over at once, until the run is complete; return how often that took."""
    for starts in range(1, 50):
        try:
            train_job(job, run, max_seconds=0.0, report=report)
        except Stopped:
            continue
        return starts
    raise AssertionError("the run does not end")


STOPS: list[tuple[dict[str, Any], dict[str, Any], int]] = [
    ({"patience": 2}, {"optimizer_args": {"lr": 0.0}}, 9),  # evaluated after 3, 6 and 9: no improvement after the first
    ({"target": 1e9}, {}, 3),  # met by any evaluation of the cadence
    ({"metric": "train_loss", "target": 1e9}, {}, 1),
    ({}, {}, 10),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(("stop", "train", "last"), STOPS)
def test_a_run_in_pieces_ends_on_the_same_round_with_the_same_bits(
    samples: Samples, tmp_path: Path, stop: Any, train: Any, last: int
) -> None:
    job = job_of(samples, rounds=10, stop=stop, eval_every=3, **train)
    assert train_in_pieces(job, tmp_path / "pieces") == last
    train_job(job, tmp_path / "whole")
    assert shas(tmp_path / "pieces") == shas(tmp_path / "whole")
    assert len(shas(tmp_path / "whole")) == last
    found, expected = evaluations(tmp_path / "pieces"), evaluations(tmp_path / "whole")
    assert list(found) == list(range(1, last + 1))  # the time ended on each of them
    assert list(expected) == ([*range(3, last, 3), last] if last > 1 else [1])
    assert all(found[number] == value for number, value in expected.items())


@pytest.mark.parametrize("where", ["serial", "cluster"])
def test_an_evaluation_outside_of_the_cadence_gives_the_values_of_the_round(
    samples: Samples, tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    client = request.getfixturevalue("client") if where == "cluster" else None
    train_job(job_of(samples, eval_every=1, metrics=["accuracy"]), tmp_path / "each")
    each = {row["round"]: row for row in read_rows(tmp_path / "each")}
    rule = {"metric": "train_loss", "target": each[2]["train_loss"]}
    events: list[Any] = []
    seldom = job_of(samples, eval_every=50, stop=rule, metrics=["accuracy"])
    train_job(seldom, tmp_path / "seldom", client=client, report=events.append)
    first, second = read_rows(tmp_path / "seldom")
    assert not [key for key in first if key.startswith("val")]
    assert list(second) == list(each[2])
    assert (second["val_loss"], second["val_accuracy"]) == (each[2]["val_loss"], each[2]["val_accuracy"])
    assert (events[-1].reason, events[-1].val_loss) == ("target", each[2]["val_loss"])
    assert committed_rounds(tmp_path / "seldom") == [2]


def test_the_round_that_the_time_ends_on_is_evaluated(samples: Samples, tmp_path: Path) -> None:
    job, events = job_of(samples, eval_every=3, run={"commit_every": 50}), list[Any]()
    with pytest.raises(Stopped):
        train_job(job, tmp_path / "r", max_seconds=0.0, report=events.append)
    assert events[-1].val_loss == evaluations(tmp_path / "r")[1]
    run = dtrain.load_run(tmp_path / "r", model=models.small)
    assert (run.best_round, run.evaluate(split="val", round="best")["loss"]) == (1, events[-1].val_loss)


def test_rounds_that_are_raised_later_change_no_decision(samples: Samples, tmp_path: Path) -> None:
    constant, patience = {"eval_every": 3, "optimizer_args": {"lr": 0.0}}, {"patience": 2}
    train_job(job_of(samples, rounds=5, stop=patience, **constant), tmp_path / "raised")
    assert list(evaluations(tmp_path / "raised")) == [3, 5]
    longer = job_of(samples, rounds=20, stop=patience, **constant)
    for run in ("raised", "whole"):
        train_job(longer, tmp_path / run)
    assert list(evaluations(tmp_path / "whole")) == [3, 6, 9]
    assert list(evaluations(tmp_path / "raised")) == [3, 5, 6, 9]  # the last of 5 rounds counts no more
    assert shas(tmp_path / "raised") == shas(tmp_path / "whole")
    events: list[Any] = []
    train_job(longer, tmp_path / "raised", report=events.append)
    assert (names(events), events[-1].reason) == ("RunFinished", "patience")


def test_commits_of_a_run_fall_on_evaluated_rounds(samples: Samples, tmp_path: Path) -> None:
    for name, run, commits in (("fixed", {"commit_every": 1, "keep": 9}, [3, 6, 8]), ("auto", {"keep": 9}, [3])):
        events: list[Any] = []
        train_job(job_of(samples, rounds=8, eval_every=3, run=run), tmp_path / name, report=events.append)
        found = [event.round for event in events if isinstance(event, RoundCommitted)]
        assert found[: len(commits)] == commits
        assert set(found) <= set(evaluations(tmp_path / name))


def test_a_directory_that_cannot_be_made(samples: Samples, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskFull, match="cannot be made"):
        train_job(job_of(samples), tmp_path / "file/r")


# A configuration in Python --------------------------------------------------------------------------------------


def given_config(blobs: Path, **tables: Any) -> dtrain.TrainConfig:
    data = {"path": str(blobs), "inputs": ["x"], "targets": ["y"], "split": {"val": 0.3, "test": 0.0}, "shuffle": False}
    train = {"loss": "cross_entropy", "rounds": 2, "batch_size": 16}
    return dtrain.TrainConfig(
        model="tests.runtime.models:small",
        data={**data, "normalize": ["x"]},
        train=train,
        **{"average": {"replicas": 2}, "cluster": {"scheduler": "serial"}, **tables},
    )


def opened_at(events: list[Any]) -> list[str]:
    return [event.scheduler for event in events if isinstance(event, ClusterOpening)]


def test_a_configuration_alone_says_everything(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Callable[[Path], list[Any]]
) -> None:
    monkeypatch.chdir(tmp_path)
    events: list[Any] = []
    given = given_config(blobs, run={"dir": "kept"})
    run = dtrain.train(config=given, progress=False, report=events.append)
    assert (run.directory, opened_at(events)) == (tmp_path / "kept/run-1", ["serial"])
    assert run.resolved.scalings.keys() == {"x"}
    assert (run.plan.plans[0].val, run.plan.plans[0].test, run.plan.plans[0].shuffle) == (0.3, 0.0, False)
    samples = dtrain.open_samples(blobs, inputs=["x"], targets=["y"])
    for arguments in (
        {"model": models.small, "samples": samples},
        {"cluster": "serial", "run_dir": tmp_path / "kept"},
        {"model": "tests.runtime.models:small", "run_dir": "kept"},
    ):
        again = dtrain.train(config=given, progress=False, **arguments)  # type: ignore[arg-type]
        assert again.directory.parent == tmp_path / "kept"
        assert lines(again.directory) == lines(run.directory)
    shas = [result.params_sha256 for result in dtrain.train_rounds(config=given)]
    assert shas == [row["params_sha256"] for row in run.rows]
    reused = dtrain.train(config=run.config, run="again", progress=False)
    assert lines(reused.directory) == lines(run.directory)
    assert dtrain.load_run(reused.directory).evaluate(split="val")["loss"] == run.rows[-1]["val_loss"]


def test_arguments_that_contradict_the_configuration_are_refused(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Client
) -> None:
    monkeypatch.chdir(tmp_path)
    given = given_config(blobs, run={"dir": "kept"})
    address = client.scheduler.address
    refused: list[tuple[dict[str, Any], str]] = [
        ({"cluster": "local"}, 'cluster = "local", and config has cluster.scheduler = "serial"'),
        ({"cluster": client}, f'cluster = "{address}", and config has cluster.scheduler = "serial"'),
        ({"cluster": "tcp://127.0.0.1:9"}, 'cluster = "tcp://127.0.0.1:9", and config has cluster.scheduler'),
        ({"model": models.forecast}, 'model = "tests.runtime.models:forecast", and config has model = "tests'),
        ({"model_args": {"a": 1}, "config": given.model_copy(update={"model_args": {"a": 2}})}, "model_args = "),
    ]
    for arguments, said in [*refused, ({"run_dir": "r"}, 'run_dir = "r", and config has run.dir = "kept"')]:
        with pytest.raises(InvalidConfig, match=re.escape(said)):
            dtrain.train(**{"config": given, **arguments}, progress=False)
    for arguments, said in refused:
        with pytest.raises(InvalidConfig, match=re.escape(said)):
            next(dtrain.train_rounds(**{"config": given, **arguments}))
    assert list(tmp_path.iterdir()) == []


def test_an_argument_counts_where_the_configuration_says_nothing(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Client
) -> None:
    monkeypatch.chdir(tmp_path)
    events: list[Any] = []
    open_given = given_config(blobs, cluster={"workers": 2}, run={"keep": 5})
    options: dict[str, Any] = {"progress": False, "report": events.append}
    first = dtrain.train(config=open_given, cluster="serial", run_dir="mine", **options)
    second = dtrain.train(config=open_given, cluster=client, **options)
    address = client.scheduler.address
    named = given_config(blobs, cluster={"scheduler": address})
    third = dtrain.train(config=named, cluster=client, **options)
    fourth = dtrain.train(config=named, **options)
    assert opened_at(events) == ["serial", address, address, address]
    assert [run.directory.relative_to(tmp_path) for run in (first, second, third, fourth)] == [
        *(Path("mine/run-1"), Path("runs/run-1"), Path("runs/run-2"), Path("runs/run-3"))
    ]
    assert len({run.rows[-1]["params_sha256"] for run in (first, second, third, fourth)}) == 1


def test_a_scheduler_file_is_relative_to_the_working_directory(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Client
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scheduler.json").write_text(json.dumps({"address": client.scheduler.address}))
    for given, cluster in (
        (given_config(blobs, cluster={"scheduler": "scheduler.json"}), None),
        (given_config(blobs, cluster={}), "scheduler.json"),
    ):
        run = dtrain.train(models.small, config=given, cluster=cluster, progress=False)
        assert run.config.cluster.scheduler == str(tmp_path / "scheduler.json")
