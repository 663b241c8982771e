"""A run that ends leaves nothing on workers that the user keeps: no loaders, no threads, no errors in their logs."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Client, LocalCluster

import dtrain
from dtrain import rounds
from dtrain.data.samples import Samples
from dtrain.errors import Stopped
from dtrain.events import Event, RoundFinished
from tests.runtime import models


def loader_threads() -> set[threading.Thread]:
    gc.collect()  # an earlier test may have left a loader in a cycle
    return {thread for thread in threading.enumerate() if thread.name.startswith(("dtrain-assemble", "dtrain-r"))}


def residents() -> list[str]:
    from dtrain.runtime import resident

    return list(resident._RESIDENTS)


def forward_is_running() -> bool:
    from dtrain.runtime.resident import Resident

    return Resident.lock.locked()


@pytest.fixture
def start(samples: Samples, tmp_path: Path) -> Callable[..., dtrain.Run]:
    def start(client: Client, rounds: int = 9, model: Any = models.slow, **more: Any) -> dtrain.Run:
        options = {"report": more.pop("report", None), "run_dir": tmp_path / "runs", "progress": False}
        config = dtrain.TrainConfig(
            train={"loss": "cross_entropy", "rounds": rounds, "local_steps": 8, "batch_size": 16},
            average={"replicas": 4},
            run={"commit_every": 50},
            model_args={"seconds": 0.02} if model is models.slow else {},
            **more,
        )
        return dtrain.train(model, samples, config=config, cluster=client, **options)

    return start


def complaints(client: Client) -> list[str]:
    return [line for lines in client.get_worker_logs().values() for level, line in lines if level != "INFO"]


def everywhere(client: Client, function: Callable[[], Any]) -> list[Any]:
    return [value for values in client.run(function).values() for value in values]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("ahead", [1, 2])
def test_a_stop_rule_leaves_no_loader_on_the_workers(
    start: Callable[..., dtrain.Run], client: Client, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setattr(rounds, "LOOK_AHEAD", ahead)
    before = complaints(client)
    for _ in range(3):
        run = start(client, stop={"metric": "train_loss", "target": 100.0})
        assert len(run.rows) == 1  # tasks of further rounds were submitted, and some of them run
        assert everywhere(client, loader_threads) == []
        assert everywhere(client, residents) == []
    assert complaints(client) == before


def test_an_interrupted_run_leaves_no_loader_either(start: Callable[..., dtrain.Run], client: Client) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, RoundFinished):
            raise Stopped("as if by SIGTERM")

    with pytest.raises(Stopped):
        start(client, report=interrupt)
    assert everywhere(client, loader_threads) == []


def test_evaluations_leave_nothing(start: Callable[..., dtrain.Run], client: Client) -> None:
    run = start(client, rounds=1, model=models.small)
    for split in ("val", "test", "all"):
        run.evaluate(split=split, cluster=client)  # type: ignore[arg-type]
    assert everywhere(client, loader_threads) == []


def test_what_runs_when_a_run_ends_is_over_soon(start: Callable[..., dtrain.Run], client: Client) -> None:
    before = complaints(client)
    start(client, stop={"metric": "train_loss", "target": 100.0})
    again = start(client, rounds=1, model=models.small)  # it waits for the steps under way, and for no others
    assert len(again.rows) == 1
    assert not any(client.run(forward_is_running).values())
    assert complaints(client) == before


# Workers in one process -----------------------------------------------------------------------------------------


@pytest.fixture
def in_this_process() -> Iterator[Client]:
    options: dict[str, Any] = {"processes": False, "dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}
    with LocalCluster(n_workers=2, threads_per_worker=2, **options) as started, Client(started) as connected:
        yield connected


def test_a_worker_that_joins_at_the_end_may_lack_the_plugin(
    start: Callable[..., dtrain.Run], in_this_process: Client
) -> None:
    async def forget(dask_worker: Any) -> None:
        for name in [name for name in dask_worker.plugins if name.startswith("dtrain-")]:
            await dask_worker.plugin_remove(name=name)

    def report(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.result.round == 2:
            in_this_process.run(forget, workers=[min(in_this_process.nthreads())])

    assert len(start(in_this_process, rounds=2, model=models.small, report=report).rows) == 2


def test_workers_of_one_process_share_a_resident(
    start: Callable[..., dtrain.Run], in_this_process: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that leaves, or joins, takes nothing away from the others."""
    seen: list[int] = []
    left = loader_threads()  # of an earlier test that was interrupted

    def scale(event: Event) -> None:
        if isinstance(event, RoundFinished):
            seen.append(len(residents()))
            in_this_process.cluster.scale(1 if event.result.round % 2 else 3)

    run = start(in_this_process, rounds=4, model=models.small, report=scale)
    assert seen == [1] * 4
    assert len(run.rows) == 4
    assert (residents(), loader_threads() - left) == ([], set())
