"""User code that ends, freezes or fills its process: named with its place and the exit code that fits."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Client

import dtrain
from dtrain.data.samples import Samples
from dtrain.errors import OutOfMemory, UserCodeFailed
from dtrain.events import Event, RoundFinished, RunStarted, WorkerEvicted
from dtrain.runtime import client as clients
from dtrain.runtime import frozen as frozen_module
from tests.clusters import new_cluster
from tests.faults import models
from tests.runtime import models as calm_models

pytestmark = [pytest.mark.alone, pytest.mark.timeout(280)]
ENDS = ("sys.exit", "KeyboardInterrupt", "BaseException", "GeneratorExit")


def start(samples: Samples, where: Path, cluster: Any, model: Any, report: Any = None, **more: Any) -> dtrain.Run:
    table = {"loss": "cross_entropy", "rounds": 3, "batch_size": 16, **more.pop("train", {})}
    return dtrain.train(
        model,
        samples,
        train=table,
        average={"replicas": 2},
        cluster=cluster,
        run_dir=where,
        progress=False,
        report=report,
        **more,
    )


@pytest.mark.parametrize("act", ENDS)
def test_an_exception_that_would_end_a_process_is_one_of_the_users_code(
    samples: Samples, tmp_path: Path, client: Client, act: str
) -> None:
    with pytest.raises(UserCodeFailed, match=r"Round \d, replica \d raised .*models\.py"):
        start(samples, tmp_path, client, models.acting, model_args={"act": act, "token": act})
    with pytest.raises(UserCodeFailed, match="The function given as model raised"):
        start(samples, tmp_path, client, models.built, model_args={"act": act})
    if act != "KeyboardInterrupt":  # in this process it is Ctrl-C
        with pytest.raises(UserCodeFailed, match=r"Round \d, replica \d raised .*models\.py"):
            start(samples, tmp_path, "serial", models.acting, model_args={"act": act, "token": f"{act} here", "at": 50})


def test_a_model_that_ends_its_process_when_it_is_built(samples: Samples, tmp_path: Path) -> None:
    with (
        new_cluster(2) as cluster,
        Client(cluster) as client,
        pytest.raises(UserCodeFailed, match=r"The first step, model \(.*built\): [23] workers that ran it ended"),
    ):
        start(samples, tmp_path, client, models.built, model_args={"act": "os._exit"})


@pytest.mark.slow
@pytest.mark.parametrize("act", ["os._exit", "abort", "segfault"])
@pytest.mark.parametrize("trains", [True, False])
def test_a_model_that_ends_its_process_is_named_with_its_place(
    samples: Samples, tmp_path: Path, act: str, trains: bool
) -> None:
    at, train = (30, {"local_steps": 40}) if trains else (12, {"batch_size": 2})  # before a process finishes a task
    where = r"replica \d" if trains else "evaluation"
    named = rf"Round \d, {where}, batch \d+, model \(.*acting\): [234] workers that ran it"
    arguments = {"act": act, "token": "", "at": at, "trains": trains}
    with (
        new_cluster(2) as cluster,
        Client(cluster) as client,
        pytest.raises(UserCodeFailed, match=named),
    ):
        start(samples, tmp_path, client, models.acting, model_args=arguments, train=train)


def test_a_model_that_ends_its_process_while_it_is_evaluated_or_predicts(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(samples, tmp_path, "serial", models.later)
    monkeypatch.setenv("DTRAIN_TESTS_END", "1")
    with new_cluster(2) as cluster, Client(cluster) as client:
        with pytest.raises(UserCodeFailed, match=r"Evaluation, batch 1, model \(.*later\): [23] workers that ran it"):
            run.evaluate(split="test", cluster=client)
        with pytest.raises(UserCodeFailed, match=r"Trying the model, .*later\): [23] workers that ran it"):
            run.predict_to(tmp_path / "out.zarr", cluster=client)


@pytest.mark.slow
def test_a_model_that_fills_the_memory_is_named_with_it(samples: Samples, tmp_path: Path) -> None:
    with (
        new_cluster(2, memory_limit="700MB") as cluster,
        Client(cluster) as client,
        pytest.raises(OutOfMemory, match="ran out of memory|their memory was full|want of memory"),
    ):
        start(samples, tmp_path, client, models.acting, model_args={"act": "fill", "token": ""})


@pytest.mark.slow
def test_a_model_that_freezes_its_process_is_named(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_module.Heartbeats.__init__, "__defaults__", (4.0, time.monotonic))
    monkeypatch.setattr(clients, "WATCHED_FROM", 1)
    with (
        new_cluster(3) as cluster,
        Client(cluster) as client,
        pytest.raises(UserCodeFailed, match="[23] workers that ran it did not answer any more"),
    ):
        start(samples, tmp_path, client, models.acting, model_args={"act": "hold the lock", "token": "", "at": 20})


def test_a_frozen_worker_is_given_up_and_its_tasks_run_elsewhere(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen_module.Heartbeats.__init__, "__defaults__", (4.0, time.monotonic))
    calm = start(samples, tmp_path / "calm", "serial", calm_models.slow, model_args={"seconds": 0.0})
    with new_cluster(2) as cluster, Client(cluster) as client:
        pids = client.run(os.getpid)
        frozen, pid = next(iter(pids.items()))
        events: list[Event] = []
        began: list[Event] = []

        def report(event: Event) -> None:
            events.append(event)
            if type(event).__name__ == "RoundFinished" and not began:
                began.append(event)
                os.kill(pid, signal.SIGSTOP)

        try:
            run = start(samples, tmp_path, client, calm_models.slow, report, model_args={"seconds": 0.02})
        finally:
            os.kill(pid, signal.SIGCONT)
    assert [row["params_sha256"] for row in run.rows] == [row["params_sha256"] for row in calm.rows]
    (evicted,) = [event for event in events if isinstance(event, WorkerEvicted)]
    assert evicted.worker == frozen
    assert evicted.seconds >= 4.0
    logged = [json.loads(line) for line in (run.directory / "events.jsonl").read_text().splitlines()]
    assert [event["worker"] for event in logged if event["event"] == "WorkerEvicted"] == [frozen]


def test_workers_that_are_frozen_before_a_run_and_at_its_end(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Dask's own calls of all workers wait for a frozen one for five minutes."""
    monkeypatch.setattr(frozen_module.Heartbeats.__init__, "__defaults__", (4.0, time.monotonic))
    calm = start(samples, tmp_path / "calm", "serial", calm_models.slow, model_args={"seconds": 0.0})
    with new_cluster(3) as cluster, Client(cluster) as client:
        pids = dict(sorted(client.run(os.getpid).items()))
        (frozen, first), (_, last), _ = pids.items()
        caplog.handler.setLevel(logging.NOTSET)  # the cluster has raised it
        started: list[tuple[int, int]] = []

        def report(event: Event) -> None:
            if isinstance(event, RunStarted):
                started.append((event.workers, len(client.nthreads())))
            if isinstance(event, RoundFinished) and event.result.stop is not None:
                with suppress(ProcessLookupError):  # on a busy machine its nanny may have started another
                    os.kill(last, signal.SIGSTOP)

        os.kill(first, signal.SIGSTOP)
        began = time.monotonic()
        try:
            run = start(samples, tmp_path, client, calm_models.slow, report, model_args={"seconds": 0.0})
        finally:
            for pid in (first, last):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        assert time.monotonic() - began < 100
    assert [row["params_sha256"] for row in run.rows] == [row["params_sha256"] for row in calm.rows]
    assert [text for text in caplog.messages if f"{frozen} has not answered for" in text]
    [(told, alive)] = started
    assert told == alive


@pytest.mark.slow
def test_hand_started_workers_that_go_and_come(
    samples: Samples, tmp_path: Path, restarted_workers: Callable[..., Any]
) -> None:
    """As on a cluster without nannies: both workers end again and again, and others come seconds later."""
    calm = start(samples, tmp_path / "calm", "serial", calm_models.slow, model_args={"seconds": 0.0})
    with restarted_workers(kills=6) as address:
        run = start(samples, tmp_path, address, calm_models.slow, model_args={"seconds": 0.02}, train={"rounds": 3})
    assert [row["params_sha256"] for row in run.rows] == [row["params_sha256"] for row in calm.rows]


@pytest.mark.parametrize(
    ("end", "needed", "silent_for", "others", "given_up"),
    [
        (False, [], 31.0, True, ["a"]),
        (False, [], 31.0, False, []),  # nobody could take its tasks over
        (False, [], 121.0, False, ["a"]),
        (False, [["a"]], 31.0, True, []),
        (False, [["a", "b"], ["b"]], 31.0, True, ["a"]),
        (False, [["a"]], 121.0, True, ["a"]),
        (True, [], 31.0, False, ["a"]),  # its nanny starts another
    ],
)
def test_a_worker_whose_tasks_nobody_can_take_over_is_given_up_later(
    monkeypatch: pytest.MonkeyPatch,
    end: bool,
    needed: list[list[str]],
    silent_for: float,
    others: bool,
    given_up: list[str],
) -> None:
    clock = [0.0]
    seen = {"a": 0.0, **({"b": 0.0} if others else {})}
    monkeypatch.setattr(frozen_module.Heartbeats.__init__, "__defaults__", (30.0, lambda: clock[0]))
    monkeypatch.setattr(frozen_module, "known_workers", lambda _: {at: {"last_seen": s} for at, s in seen.items()})
    client: Any = SimpleNamespace(sync=lambda *_: None)
    frozen, found = frozen_module.FrozenWorkers(client, end=end, needed=needed), list[str]()
    while clock[0] < silent_for + 3:
        clock[0] += 1.5
        seen |= {"b": clock[0]} if others else {}
        found += frozen.give_up()
    assert sorted(set(found)) == given_up


def test_heartbeats_by_hand() -> None:
    clock = [0.0]
    beats = frozen_module.Heartbeats(30.0, lambda: clock[0])
    assert not beats.is_due(1)
    seen = {"a": 1.0, "b": 1.0}
    for second in range(1, 31):
        clock[0] = float(second)
        assert beats.silent({**seen, "b": float(second)}) == {}
    clock[0] = 32.0
    assert beats.silent({**seen, "b": 32.0}) == {"a": 31.0}
    clock[0] = 33.0
    assert beats.silent({"a": 33.0, "b": 33.0}) == {}  # it was slow, and is alive
    clock[0] = 99.0  # this process slept
    assert beats.silent({"a": 33.0, "b": 33.0}) == {}
