"""Tasks are pure, and what travels travels from worker to worker."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from dask._task_spec import Alias, List
from distributed import Client, Event, Future
from distributed.comm.core import CommClosedError

import dtrain
from dtrain.algorithm.average import Update
from dtrain.config.average import AverageConfig
from dtrain.data.samples import Samples
from dtrain.errors import ClusterLost, DiskFull, DtrainError, OutOfMemory, UserCodeFailed
from dtrain.runtime import client as client_module
from dtrain.runtime import serial
from dtrain.runtime.client import TaskClient
from dtrain.runtime.runner import SegmentLost
from dtrain.types import Broadcast, InnerState, Layout, LocalTask, Parameters, ReplicaState, StateFile
from tests.runtime import models


def start(samples: Samples, tmp_path: Path, cluster: Any, replicas: int = 3, **train: Any) -> dtrain.Run:
    table = {"loss": "cross_entropy", "rounds": 2, "batch_size": 16, **train}
    return dtrain.train(
        models.small,
        samples,
        train=table,
        average={"replicas": replicas},
        cluster=cluster,
        run_dir=tmp_path / "runs",
        progress=False,
    )


def arrays_in(value: Any) -> list[np.ndarray]:
    if isinstance(value, Parameters):
        return [value.flat, value.extra]
    if isinstance(value, InnerState):
        return [value.data]
    if isinstance(value, Broadcast):
        return arrays_in(value.params)
    if isinstance(value, ReplicaState):
        return arrays_in(value.inner)
    if isinstance(value, Update):
        return arrays_in(value.payload)
    if isinstance(value, tuple | list):
        return [array for item in value for array in arrays_in(item)]
    return []


@pytest.mark.parametrize("name", ["train_local", "evaluate_piece", "reduce"])
def test_a_task_does_not_change_its_arguments(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    place = serial.tasks
    original, calls = getattr(place, name), []

    def watched(*arguments: Any) -> Any:
        arrays = [array for argument in arguments for array in arrays_in(argument)]
        assert arrays
        before = [array.copy() for array in arrays]
        for array in arrays:
            array.flags.writeable = False  # as Dask may hand them over
        result = original(*arguments)
        for old, array in zip(before, arrays, strict=True):
            np.testing.assert_array_equal(old, array)
        calls.append(name)
        return result

    monkeypatch.setattr(place, name, watched)
    start(samples, tmp_path, "serial")
    assert calls


def test_a_task_leaves_the_process_as_it_was(samples: Samples, tmp_path: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    threads = torch.get_num_threads()
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    start(samples, tmp_path, "serial")
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])
    assert torch.get_num_threads() == threads


def test_parameters_never_pass_through_the_scheduler_or_a_graph(
    samples: Samples, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, get, scatter, gather = Client.submit, Client.get, Client.scatter, Client.gather
    submitted, moved = [], []
    known = Future | Alias | str | int | float | LocalTask | AverageConfig | None
    known |= Path | FunctionType | StateFile | Layout  # to write and to read the files of a state

    def check(arguments: Any) -> None:
        for argument in arguments:
            if isinstance(argument, list | List):
                check(argument if isinstance(argument, list) else argument.args)
            else:
                assert isinstance(argument, known) or argument == (), argument

    def watched_submit(self: Client, function: Any, *arguments: Any, **options: Any) -> Any:
        submitted.append(options["key"])
        check(arguments)
        return submit(self, function, *arguments, **options)

    def watched_get(self: Client, graph: Any, keys: list[str], **options: Any) -> Any:
        submitted.extend(keys)
        for key in keys:
            check(graph[key].args)
        return get(self, graph, keys, **options)

    def watched_scatter(self: Client, *arguments: Any, **options: Any) -> Any:
        moved.append(options["direct"])
        return scatter(self, *arguments, **options)

    def watched_gather(self: Client, *arguments: Any, **options: Any) -> Any:
        moved.append(options["direct"])
        return gather(self, *arguments, **options)

    monkeypatch.setattr(Client, "submit", watched_submit)
    monkeypatch.setattr(Client, "get", watched_get)
    monkeypatch.setattr(Client, "scatter", watched_scatter)
    monkeypatch.setattr(Client, "gather", watched_gather)
    start(samples, tmp_path, client)
    assert {key.split("-")[1] for key in submitted} >= {"train", "reduce", "summary"}
    assert moved
    assert set(moved) == {True}


def test_a_round_takes_as_many_messages_however_many_replicas_it_has(
    samples: Samples, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dtrain.runtime import handles

    monkeypatch.setattr(handles, "SMALL_BYTES", -1)  # results are taken apart, replica by replica
    submit, get, sent = Client.submit, Client.get, []

    def watched_submit(self: Client, *arguments: Any, **options: Any) -> Any:
        sent.append(options["key"])
        return submit(self, *arguments, **options)

    def watched_get(self: Client, graph: Any, keys: list[str], **options: Any) -> Any:
        sent.append(keys[0])
        return get(self, graph, keys, **options)

    monkeypatch.setattr(Client, "submit", watched_submit)
    monkeypatch.setattr(Client, "get", watched_get)
    counts = set()
    for replicas in (2, 5):
        start(samples, tmp_path, client, replicas, local_steps=1)
        counts.add(len(sent))
        sent.clear()
    assert len(counts) == 1


def test_tasks_in_one_message_keep_place_resources_and_priority(client: Client) -> None:
    tasks, first = TaskClient(client, "x"), next(iter(client.nthreads()))
    never = tasks.submit(int, "never", resources={"nowhere": 1})  # so that the others wait, and can be looked at
    places, options = (first, (first,), None), {"resources": {"dtrain": 1}, "priority": 3}
    alone = [tasks.submit(str, f"alone-{n}", never, at=at, **options) for n, at in enumerate(places)]
    together = tasks.submit_each(str, {f"together-{n}": [never] for n in range(3)}, at=places, **options)
    tasks.submit(int, "later").result()  # the scheduler has read all messages before

    def seen(keys: list[str], dask_scheduler: Any) -> list[Any]:
        found = [dask_scheduler.tasks[key] for key in keys]
        return [
            (
                one.worker_restrictions or set(),
                one.loose_restrictions,
                one.resource_restrictions,
                one.priority[0],
                one.state,
            )
            for one in found
        ]

    expected = [({first}, True), ({first}, False), (set(), False)]
    for futures in (alone, together):
        states = client.run_on_scheduler(seen, [future.key for future in futures])
        assert states == [(at, loose, {"dtrain": 1}, -3, "waiting") for at, loose in expected]
    tasks.cancel()


def test_lost_work_ends_when_it_begins_again_though_somebody_refers_to_it(client: Client) -> None:
    tasks = TaskClient(client, "x")

    def known(dask_scheduler: Any) -> list[str]:
        return [key for key in dask_scheduler.tasks if key.startswith("dtrain-") and "later" not in key]

    for again, left in ((0, 3), (1, 0)):
        tasks.begin(again)
        done = tasks.submit(int, "done")
        never = tasks.submit(int, "never", resources={"nowhere": 1})
        held = [done, never, tasks.submit(str, "late", done, never)]
        assert done.result() == 0
        tasks.begin(again)
        tasks.submit(int, "later").result()  # the scheduler has read all messages before
        assert len(client.run_on_scheduler(known)) == left
        for future in held:
            future.release()


@pytest.mark.parametrize("error", [CommClosedError("closed"), OSError("refused"), RuntimeError("loop is closed")])
def test_tasks_at_workers_are_found_and_a_scheduler_that_ends_has_none(
    client: Client, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tasks, gate = TaskClient(client, "x"), Event(f"gate-{type(error).__name__}", client)
    tasks.begin()
    held = tasks.submit(Event.wait, "train-r00003-k0", gate)
    while not tasks._does(lambda key: key.startswith("dtrain-train-r00003")):
        time.sleep(0.01)
    assert not tasks._does(lambda key: key.startswith("dtrain-train-r00002"))
    tasks.begin()
    assert not tasks._does(lambda key: True)  # those of another attempt do not count

    def ending() -> Any:
        raise error

    monkeypatch.setattr(client, "processing", ending)
    assert not tasks._does(lambda key: True)
    gate.set()
    assert held.result()


def test_values_that_are_lost_when_they_are_fetched_are_watched_too(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask computes them again while it gathers them, however long that takes."""

    async def never(*given: Any, **options: Any) -> None:
        await asyncio.Event().wait()

    tasks, gate = TaskClient(client, "x"), Event("gate-values", client)
    tasks.begin()
    done, held = tasks.submit(int, "done"), tasks.submit(Event.wait, "train-r00001-k0", gate)
    monkeypatch.setattr(client, "gather", never)
    with monkeypatch.context() as patch:
        patch.setattr(tasks.guard, "gone", lambda live: "worker x ended")
        with pytest.raises(SegmentLost, match="worker x ended"):
            tasks.gather([done], lambda: None, lambda key: "r00001" in key)
    with monkeypatch.context() as patch:
        patch.setattr(client_module, "NO_WORKERS_SECONDS", 1.0)
        patch.setattr(client, "nthreads", dict)
        with pytest.raises(ClusterLost, match="no worker"):
            tasks.gather([done], lambda: None)
    gate.set()
    assert held.result()


def test_work_is_lost_once_a_task_finds_no_worker_after_a_loss(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    gather = client.gather

    async def slowly(*given: Any, **options: Any) -> Any:
        await asyncio.sleep(2.0)
        return await gather(*given, **options)

    monkeypatch.setattr(client_module, "STUCK_SECONDS", 0.5)
    monkeypatch.setattr(client, "gather", slowly)
    tasks = TaskClient(client, "x")
    tasks.begin()
    monkeypatch.setattr(tasks.guard, "gone", lambda live: "worker x ended")
    assert tasks.gather([tasks.submit(int, "done")], lambda: None) == [0]  # nothing runs while values are fetched
    assert tasks.gather([tasks.submit(time.sleep, "runs", 2.0)], lambda: None) == [None]
    with pytest.raises(SegmentLost, match="worker x ended"):
        tasks.gather([tasks.submit(int, "never", resources={"nowhere": 1})], lambda: None)


def test_the_workers_of_a_store_are_waited_for(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others are there; they may not read it."""
    monkeypatch.setattr(client_module, "NO_WORKERS_SECONDS", 1.0)
    there, gone = next(iter(client.nthreads())), "tcp://127.0.0.1:1"
    stores = [("data.zarr", (there,)), ("data.zarr", (gone,))]  # of two places, each with its own
    tasks, named = TaskClient(client, "x", needed=stores), rf"^data.path data.zarr: none of its workers \({gone}\) has"
    with pytest.raises(ClusterLost, match=named) as caught:
        tasks.workers()
    assert "--worker-port" in str(caught.value)
    tasks.begin()
    with pytest.raises(ClusterLost, match=named):
        tasks.gather([tasks.submit(int, "there", at=(gone,))], lambda: None)
    assert there in TaskClient(client, "x", needed=[("data.zarr", (gone, there))]).workers()


def test_tasks_that_many_replicas_meet_in_have_a_place(
    samples: Samples, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, placed = Client.submit, {}

    def watched(self: Client, function: Any, *arguments: Any, **options: Any) -> Any:
        if any(isinstance(argument, list) for argument in arguments):
            placed[options["key"].split("-")[1]] = bool(options["workers"] and options["allow_other_workers"])
        return submit(self, function, *arguments, **options)

    monkeypatch.setattr(Client, "submit", watched)
    start(samples, tmp_path, client)
    assert placed == dict.fromkeys(("reduce", "summary", "merge"), True)


def test_values_are_sent_each_to_its_worker_and_shared_ones_to_few(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, workers = TaskClient(client, "x"), sorted(client.nthreads())
    places = [workers[n % 2] for n in range(5)]
    sent = tasks.scatter_each(list(range(5)), places)
    assert [client.who_has([future])[future.key] for future in sent] == [(at,) for at in places]
    assert tasks.gather(sent, lambda: None) == list(range(5))
    monkeypatch.setattr(client_module, "HOLDERS", 1)
    shared = tasks.scatter("shared", workers)
    assert client.who_has([shared])[shared.key] == (workers[0],)


def test_the_client_keeps_few_messages(client: Client) -> None:
    tasks = TaskClient(client, "x")
    for n in range(20):
        tasks.submit(int, f"n{n}").result()
    assert 0 < len(client.scheduler_comm.recent_message_log) <= client_module.KEPT_MESSAGES


def test_the_replicas_are_spread_and_one_trains_at_a_time(samples: Samples, tmp_path: Path, client: Client) -> None:
    seen: list[tuple[str, str]] = []
    client.subscribe_topic("placed", lambda event: seen.append(event[1]))

    def build() -> Any:
        from distributed import get_worker

        get_worker().log_event("placed", os.getpid())
        return models.small()

    dtrain.train(
        build,
        samples,
        train={"loss": "cross_entropy", "rounds": 1, "batch_size": 16},
        average={"replicas": 2},
        cluster=client,
        run_dir=tmp_path / "runs",
        progress=False,
    )
    assert len(set(seen)) == 2
    client.unsubscribe_topic("placed")


def test_nothing_of_a_run_stays_on_the_workers(samples: Samples, tmp_path: Path, client: Client) -> None:
    start(samples, tmp_path, client)

    def left() -> int:
        from dtrain.runtime import resident

        return len(resident._RESIDENTS)

    assert set(client.run(left).values()) == {0}

    def keys() -> list[str]:
        known = client.run_on_scheduler(lambda dask_scheduler: [str(key) for key in dask_scheduler.tasks])
        return [key for key in known if key.startswith("dtrain-")]

    deadline = time.monotonic() + 10  # futures are released in the background
    while keys() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert keys() == []


def test_tasks_in_the_scheduler_are_bounded_over_rounds(samples: Samples, tmp_path: Path, client: Client) -> None:
    counts: list[int] = []

    def count(event: Any) -> None:
        if hasattr(event, "result"):
            counts.append(client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)))

    config = dtrain.TrainConfig(
        train={"loss": "cross_entropy", "rounds": 60, "local_steps": 1},
        average={"replicas": 3},
        run={"commit_every": 2, "dir": str(tmp_path / "runs")},  # a segment keeps what its values are made of
    )
    dtrain.train(models.small, samples, config=config, cluster=client, progress=False, report=count)
    # one task that stays a round makes 30 more in the middle of the second half; how many rounds fly differs by a round
    assert statistics.median(counts[30:]) <= statistics.median(counts[:30]) + 9


@pytest.mark.parametrize("error", [UserCodeFailed("named"), OutOfMemory("named"), DiskFull("named")])
def test_what_is_found_out_while_values_are_sent_is_no_lost_value(
    client: Client, monkeypatch: pytest.MonkeyPatch, error: DtrainError
) -> None:
    def failing(self: TaskClient, value: object, addresses: list[str]) -> None:
        raise error

    monkeypatch.setattr(TaskClient, "_scatter", failing)
    with pytest.raises(type(error), match="named"):
        TaskClient(client, "x").scatter(1, list(client.nthreads()))
