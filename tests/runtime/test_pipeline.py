"""Rounds ahead, segments and commits change when things happen, never what."""

from __future__ import annotations

import gc
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, SchedulerPlugin

import dtrain
from dtrain import rounds
from dtrain.data.samples import Samples
from dtrain.events import Event, RoundCommitted, RoundFinished
from dtrain.runtime import client as client_module
from tests.runtime import models
from tests.training import bits

OUTER = {"optimizer": "sgd", "args": {"lr": 0.7, "momentum": 0.9, "nesterov": True}}
TRAIN = {"loss": "cross_entropy", "rounds": 12, "local_steps": 2, "batch_size": 16, "eval_every": 1}


def start(samples: Samples, tmp_path: Path, cluster: Any, **more: Any) -> dtrain.Run:
    report = more.pop("report", None)
    tables = {
        "train": {**TRAIN, **more.pop("train", {})},
        "average": {"replicas": 3, "outer": OUTER},
        **more,
    }
    config = dtrain.TrainConfig(**tables)
    return dtrain.train(
        models.small, samples, config=config, cluster=cluster, run_dir=tmp_path, progress=False, report=report
    )


def rows(run: dtrain.Run) -> list[dict[str, Any]]:
    return bits(run.rows)


@pytest.fixture(scope="module")
def calm(samples: Samples, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return rows(start(samples, tmp_path_factory.mktemp("calm"), "serial"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("every", [1, 3, 10])
def test_look_ahead_and_commits_change_no_bit(
    samples: Samples,
    tmp_path: Path,
    client: Client,
    calm: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    ahead: int,
    every: int,
) -> None:
    monkeypatch.setattr(rounds, "LOOK_AHEAD", ahead)
    committed: list[int] = []

    def note(event: Event) -> None:
        if isinstance(event, RoundCommitted):
            committed.append(event.round)

    run = start(samples, tmp_path, client, run={"commit_every": every}, report=note)
    assert rows(run) == calm
    assert committed == sorted({*range(every, 13, every), 12})


@pytest.mark.sampled(3)
@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("every", [1, 10])
def test_a_stop_rule_gives_the_same_last_round(
    samples: Samples,
    tmp_path: Path,
    client: Client,
    calm: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    ahead: int,
    every: int,
) -> None:
    monkeypatch.setattr(rounds, "LOOK_AHEAD", ahead)
    losses = [row["val_loss"] for row in calm]
    target = sorted(losses)[len(losses) // 2]
    last = next(i for i, loss in enumerate(losses, start=1) if loss <= target)
    assert 1 < last < 12
    run = start(samples, tmp_path, client, run={"commit_every": every}, stop={"target": target})
    assert rows(run) == calm[:last]
    assert run.model is not None
    assert sorted(path.name for path in (run.directory / "rounds").iterdir())[-1] == f"round-{last:06d}"


def test_large_results_are_taken_apart_to_the_same_bits(
    samples: Samples, tmp_path: Path, client: Client, calm: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrain.runtime import handles

    keys: set[str] = set()
    submit, get = Client.submit, Client.get

    def watched(self: Client, *arguments: Any, **options: Any) -> Any:
        keys.add(options["key"].split("-")[1])
        return submit(self, *arguments, **options)

    def watched_get(self: Client, graph: Any, names: list[str], **options: Any) -> Any:
        keys.update(name.split("-")[1] for name in names)
        return get(self, graph, names, **options)

    monkeypatch.setattr(Client, "submit", watched)
    monkeypatch.setattr(Client, "get", watched_get)
    assert rows(start(samples, tmp_path, client, run={"commit_every": 5})) == calm
    assert keys == {"initialise", "train", "reduce", "summary", "eval", "merge", "write", "read"}
    monkeypatch.setattr(handles, "SMALL_BYTES", -1)
    assert rows(start(samples, tmp_path, client, run={"commit_every": 5})) == calm
    assert keys >= {"parameters", "replica", "mixed", "outer"}


def test_workers_that_fetch_what_others_were_sent_change_no_bit(
    samples: Samples, tmp_path: Path, client: Client, calm: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "HOLDERS", 1)
    assert rows(start(samples, tmp_path, client, run={"commit_every": 3})) == calm


def test_a_run_that_has_stopped_stays_stopped(
    samples: Samples, tmp_path: Path, calm: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = {"target": calm[4]["val_loss"]}
    config = {"train": TRAIN, "average": {"replicas": 3, "outer": OUTER}}
    events: list[Event] = []

    def again(**stopping: Any) -> dtrain.Run:
        given = dtrain.TrainConfig(**config, **stopping)
        return dtrain.train(
            models.small,
            samples,
            config=given,
            cluster="serial",
            run="r",
            run_dir=tmp_path,
            progress=False,
            report=events.append,
        )

    first = rows(again(stop=stop))
    assert first == calm[: len(first)]
    assert len(first) < 12
    assert events[-1].reason == "target"
    events.clear()
    assert rows(again(stop=stop)) == first
    assert [type(event).__name__ for event in events] == ["RunFinished"]
    assert events[-1].reason == "target"
    assert rows(again()) == calm  # without the rule it goes on, and ends as if it had never stopped


def test_resume_with_an_outer_optimizer(samples: Samples, tmp_path: Path, calm: list[dict[str, Any]]) -> None:
    def until(rounds: int) -> dtrain.Run:
        return dtrain.train(
            models.small,
            samples,
            train={**TRAIN, "rounds": rounds},
            average={"replicas": 3, "outer": OUTER},
            cluster="serial",
            run="r",
            run_dir=tmp_path,
            progress=False,
        )

    until(5)
    assert rows(until(12)) == calm


def test_the_next_round_is_submitted_before_the_last_one_is_evaluated(
    samples: Samples, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrain.runtime.cluster import ClusterRunner

    seen: list[tuple[str, int]] = []
    submit, collect = ClusterRunner.submit, ClusterRunner.collect

    def watched_submit(self: ClusterRunner, held: Any, plan: Any) -> Any:
        seen.append(("submit", plan.round))
        return submit(self, held, plan)

    def watched_collect(self: ClusterRunner, held: Any, finished: int | None = None) -> Any:
        seen.append(("collect", sum(kind == "collect" for kind, _ in seen) + 1))
        return collect(self, held)

    monkeypatch.setattr(ClusterRunner, "submit", watched_submit)
    monkeypatch.setattr(ClusterRunner, "collect", watched_collect)
    start(samples, tmp_path, client, run={"commit_every": 12})
    order = {step: i for i, step in enumerate(seen)}
    for number in range(1, 12):
        assert order["submit", number + 1] < order["collect", number]


@pytest.mark.slow
def test_scheduler_tasks_are_bounded_and_no_old_task_runs_again(
    samples: Samples, tmp_path: Path, own_client: Client
) -> None:
    """300 rounds; near the end the holder of the parameters is killed, and only its own segment is repeated."""
    counts: list[int] = []
    client, scheduler = own_client, own_client.cluster.scheduler
    started: list[int] = []
    before: list[int] = []

    class Recorder(SchedulerPlugin):
        def transition(self, key: Any, start: str, finish: str, *arguments: Any, **options: Any) -> None:
            if finish == "processing" and (found := re.match(r"dtrain-train-r(\d+)", str(key))):
                started.append(int(found[1]))

    scheduler.add_plugin(Recorder())

    def watch(event: Event) -> None:
        if isinstance(event, RoundFinished):
            counts.append(len(scheduler.tasks))
            if event.result.round == 295:
                before.append(len(started))
                kill_holder(client)

    table = {"rounds": 300, "optimizer_args": {"lr": 0.001}}
    run = start(samples, tmp_path, client, train=table, run={"commit_every": 10}, report=watch)
    tasks_a_round = 3 * 3 + 3 + 1 + 3  # local, parameters, inner; reduce, mixed, summary; outer; evaluation
    assert max(counts) <= 12 * tasks_a_round + 30
    assert set(started) == set(range(1, 301))
    assert len(started) <= 900 + 30  # one segment at most is repeated
    assert min(started[before[0] :]) > 290
    assert rows(run) == rows(start(samples, tmp_path / "calm", "serial", train=table))


def test_futures_of_long_rounds_do_not_wait_for_the_garbage_collector(
    samples: Samples, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver waits for each round in many short steps; afterwards nothing may refer to its futures."""
    monkeypatch.setattr(client_module, "POLL_SECONDS", 0.001)
    counts: list[int] = []

    def watch(event: Event) -> None:
        if isinstance(event, RoundFinished):
            counts.append(len(client.futures))

    gc.collect()
    gc.disable()
    try:
        start(samples, tmp_path, client, train={"rounds": 12}, report=watch)
    finally:
        gc.enable()
    assert max(counts) <= 2 * 3 * 3  # of two rounds


def kill_holder(client: Client) -> None:
    import os
    import signal

    pids = client.run(os.getpid)
    holders = {
        address
        for key, addresses in client.who_has().items()
        if str(key).startswith(("dtrain-mixed", "dtrain-reduce"))
        for address in addresses
    }
    assert holders
    for address in list(holders)[:1]:
        os.kill(pids[address], signal.SIGKILL)


def test_auto_commits_less_often_when_rounds_are_short(samples: Samples, tmp_path: Path) -> None:
    committed: Counter[int] = Counter()

    def note(event: Event) -> None:
        if isinstance(event, RoundCommitted):
            committed[event.round] += 1

    start(samples, tmp_path, "serial", train={"rounds": 40, "local_steps": 1}, report=note)
    assert committed[1] == 1
    assert committed[40] == 1
    assert len(committed) < 30
