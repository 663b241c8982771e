"""What `cluster=` takes: clusters, clients, addresses, files; and what it says of anything else."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask
import pytest
from distributed import Client, LocalCluster
from distributed.core import Status
from torch import nn

import dtrain
from dtrain.data.samples import Samples
from dtrain.errors import ClusterLost, ClusterUnreachable, DtrainError, InvalidConfig, OutOfMemory
from dtrain.events import RoundFinished
from dtrain.runtime import client as task_client
from dtrain.runtime import connect
from dtrain.runtime.connect import OWNED
from dtrain.runtime.script import is_guarded
from dtrain.runtime.where import Where, with_protocol
from dtrain.runtime.workers import Pauses, worker_states
from tests.runtime import models

OPTIONS: dict[str, Any] = {"dashboard_address": "127.0.0.1:0", "silence_logs": logging.CRITICAL}


def build() -> nn.Module:
    return nn.Linear(6, 3)


def in_threads(workers: int) -> LocalCluster:
    with dask.config.set(OWNED):  # no worker is paused or resumed by its memory
        return LocalCluster(n_workers=workers, threads_per_worker=2, processes=False, **OPTIONS)


@pytest.fixture
def own() -> Iterator[LocalCluster]:
    """A cluster of one worker in this process, to break."""
    with in_threads(1) as started:
        yield started


@pytest.fixture
def train(samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dtrain.Run]:
    monkeypatch.chdir(tmp_path)

    def train(cluster: Any, model: Any = build, **options: Any) -> dtrain.Run:
        table = {"loss": "cross_entropy", "rounds": 2, "batch_size": 40, **options.pop("train", {})}
        tables = {} if "config" in options else {"train": table}
        return dtrain.train(model, samples, cluster=cluster, progress=False, **tables, **options)

    return train


# What works ---------------------------------------------------------------------------------------------------------


def test_a_cluster_is_used_and_left_open(train: Callable[..., dtrain.Run], samples: Samples) -> None:
    with in_threads(2) as started:
        run = train(started)
        assert run.plan.replicas == 2
        assert run.config.cluster.scheduler == "local"  # as for a client: where a run is trained is no part of it
        with Client(started, set_as_default=False) as connected:
            again = train(connected)
        table = {"loss": "cross_entropy", "rounds": 2, "batch_size": 40}
        shas = [r.params_sha256 for r in dtrain.train_rounds(build, samples, train=table, cluster=started)]
        values = run.evaluate(split="val", cluster=started)
        assert started.status == Status.running
    assert again.rows[-1]["params_sha256"] == run.rows[-1]["params_sha256"] == shas[-1]
    assert values["loss"] == run.rows[-1]["val_loss"] == run.evaluate(split="val")["loss"]


def test_a_cluster_of_another_kind_is_used_by_its_scheduler_address(
    train: Callable[..., dtrain.Run], own: LocalCluster
) -> None:
    assert len(train(SimpleCluster(own)).rows) == 2


class SimpleCluster:
    """What Dask's Client asks of a cluster, and no more."""

    def __init__(self, started: LocalCluster) -> None:
        self._started = started
        self.status = started.status

    @property
    def scheduler_address(self) -> str:
        return str(self._started.scheduler_address)

    def __await__(self) -> Any:
        return asyncio.sleep(0).__await__()


def test_a_client_need_not_be_the_default_one(train: Callable[..., dtrain.Run], own: LocalCluster) -> None:
    with in_threads(1) as other, Client(own, set_as_default=False) as mine, Client(other):
        assert len(train(mine).rows) == 2


def test_a_client_of_a_scheduler_file(train: Callable[..., dtrain.Run], client: Client, tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    file.write_text(json.dumps({"address": client.scheduler.address}))
    with Client(scheduler_file=str(file), set_as_default=False) as connected:
        runs = [train(where) for where in (connected, file, str(file), client.scheduler.address)]
    bare = client.scheduler.address.removeprefix("tcp://")
    runs.append(train(bare))
    assert len({run.rows[-1]["params_sha256"] for run in runs}) == 1


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8786", "tcp://127.0.0.1:8786"),
        ("localhost:1", "tcp://localhost:1"),
        ("[::1]:8786", "tcp://[::1]:8786"),
        ("tcp://a:1", "tcp://a:1"),
        ("serial", "serial"),
        ("scheduler.json", "scheduler.json"),
        ("C:/a", "C:/a"),
    ],
)
def test_an_address_may_leave_its_protocol_out(text: str, address: str) -> None:
    assert with_protocol(text) == address


def test_an_adaptive_cluster_without_workers_grows(train: Callable[..., dtrain.Run]) -> None:
    with in_threads(0) as started, in_threads(2) as fixed:
        started.adapt(minimum=0, maximum=2, interval="100ms")
        run = train(started)
        assert run.plan.replicas == 2  # as many as it may grow to, whatever has come when it starts
        assert train(fixed).rows[-1]["params_sha256"] == run.rows[-1]["params_sha256"]
        assert train(started, average={"replicas": 3}).plan.replicas == 3


def test_an_adaptive_cluster_that_has_shrunk_to_nothing_grows_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may do so between the start of a run and its first task."""
    monkeypatch.setattr("dtrain.runtime.client.NO_WORKERS_SECONDS", 20.0)
    with in_threads(0) as started, Client(started) as client:
        started.adapt(minimum=0, maximum=2, interval="100ms")
        assert len(task_client.TaskClient(client, "x").workers()) in (1, 2)


def test_tasks_that_wait_for_a_worker_are_given_to_the_next_one(
    train: Callable[..., dtrain.Run], own: LocalCluster
) -> None:
    """Dask alone gives them to a worker that starts with what they ask for, not to one that gets it a moment later."""
    expected = train("serial", average={"replicas": 2}, train={"rounds": 4})

    def report(event: Any) -> None:
        if isinstance(event, RoundFinished) and event.result.round == 1:
            own.scale(0)
            while own.scheduler.workers:
                pass
            own.scale(1)

    run = train(own, average={"replicas": 2}, train={"rounds": 4}, report=report)
    assert run.rows[-1]["params_sha256"] == expected.rows[-1]["params_sha256"]


# What does not -----------------------------------------------------------------------------------------------------


def refused(train: Callable[..., dtrain.Run], where: Where | Any, error: type[DtrainError]) -> str:
    with pytest.raises(error) as caught:
        train(where)
    assert not Path("runs").exists()
    assert "0x" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (4, "cluster is an object of int"),
        ({"n_workers": 2}, "cluster is an object of dict"),
        (LocalCluster, "cluster is the class LocalCluster"),
        (object(), "cluster is an object of object"),
        (in_threads, "cluster is the function in_threads"),
    ],
)
def test_what_is_no_cluster_is_named(train: Callable[..., dtrain.Run], where: Any, said: str) -> None:
    text = refused(train, where, InvalidConfig)
    assert said in text
    assert "LocalCluster(n_workers=4)" in text


def test_a_text_that_is_none_gets_a_guess(train: Callable[..., dtrain.Run]) -> None:
    assert 'did you mean "local"?' in refused(train, "locla", ClusterUnreachable)
    assert 'did you mean "serial"?' in refused(train, "sreial", ClusterUnreachable)
    assert "no such scheduler file." in refused(train, "nothing.json", ClusterUnreachable)
    assert "tcp:// and tls://" in refused(train, "http://127.0.0.1:1", InvalidConfig)
    assert "neither encrypted nor on this machine" in refused(train, "tcp://10.0.0.1:8786", InvalidConfig)


def test_what_is_closed_is_named(train: Callable[..., dtrain.Run]) -> None:
    with in_threads(1) as started:
        with Client(started, set_as_default=False) as first:
            pass
        assert "a client that is closed" in refused(train, first, ClusterUnreachable)
        second = Client(started, set_as_default=False)
    assert "a LocalCluster that is closed" in refused(train, started, ClusterUnreachable)
    assert "whose cluster is closed" in refused(train, second, ClusterUnreachable)
    second.close()


def test_what_is_asynchronous_is_named(train: Callable[..., dtrain.Run]) -> None:
    async def both() -> list[str]:
        options = {**OPTIONS, "n_workers": 1, "threads_per_worker": 2, "processes": False}
        async with (
            LocalCluster(asynchronous=True, **options) as started,
            Client(started, asynchronous=True, set_as_default=False) as connected,
        ):
            return [refused(train, one, InvalidConfig) for one in (started, connected)]

    cluster, connected = asyncio.run(both())
    assert "a LocalCluster that is asynchronous" in cluster
    assert "a client that is asynchronous" in connected


def test_a_cluster_that_stays_empty(train: Callable[..., dtrain.Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "WORKERS_TIMEOUT", 0.5)
    with in_threads(0) as started:
        assert "cluster.scale(2)" in refused(train, started, ClusterUnreachable)


# Paused workers -----------------------------------------------------------------------------------------------------


def pause(started: LocalCluster) -> None:
    for worker in started.workers.values():
        worker.status = Status.paused


def test_paused_workers_are_named_with_their_memory(
    train: Callable[..., dtrain.Run], own: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect, "WORKERS_TIMEOUT", 0.5)
    with Client(own, set_as_default=False) as connected:
        pause(own)
        (address,) = connected.nthreads()
        text = refused(train, connected, OutOfMemory)
    assert f"Every worker is paused, because its memory is nearly full: {address} (" in text
    assert "iB in use)" in text


@pytest.mark.parametrize("commit_every", [1, 50])
def test_workers_that_are_paused_while_they_are_waited_for(
    train: Callable[..., dtrain.Run], own: LocalCluster, monkeypatch: pytest.MonkeyPatch, commit_every: int
) -> None:
    monkeypatch.setattr(task_client, "NO_WORKERS_SECONDS", 1.0)
    monkeypatch.setattr(task_client, "PAUSES_SECONDS", 0.0)

    def report(event: Any) -> None:
        if isinstance(event, RoundFinished):
            pause(own)

    table = {"loss": "cross_entropy", "rounds": 50, "batch_size": 40}
    config = dtrain.TrainConfig(train=table, run={"commit_every": commit_every})
    with (
        Client(own, set_as_default=False, timeout=1) as connected,
        pytest.raises(OutOfMemory, match="Every worker is paused"),
    ):
        train(connected, config=config, report=report)


def test_pauses_count_from_the_last_time_that_a_worker_ran(own: LocalCluster) -> None:
    clock = SimpleNamespace(now=0.0)
    with Client(own, set_as_default=False) as connected:
        pauses = Pauses(connected, 10.0, lambda: clock.now)
        for clock.now in (5.0, 9.0):
            pauses.check(1.0)
        pause(own)
        while any(worker.status == "running" for worker in worker_states(connected)):
            pass
        for clock.now in (9.5, 18.0, 19.0):
            pauses.check(1.0)
        clock.now = 19.5
        pauses.check(1.0)  # it has looked half a second ago
        clock.now = 20.5
        with pytest.raises(OutOfMemory):
            pauses.check(1.0)


# Clusters that go away ----------------------------------------------------------------------------------------------


@pytest.mark.sampled(1)
@pytest.mark.parametrize("what", ["cluster", "client"])
@pytest.mark.parametrize("processes", [True, False])
def test_a_cluster_that_is_closed_while_a_run_is_trained(
    train: Callable[..., dtrain.Run], what: str, processes: bool
) -> None:
    host = {"host": "127.0.0.1"} if processes else {}
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=processes, **host, **OPTIONS) as started,
        Client(started, set_as_default=False) as connected,
    ):
        closing = threading.Thread(target=started.close if what == "cluster" else connected.close)

        def report(event: Any) -> None:
            if isinstance(event, RoundFinished) and event.result.round == 2:
                closing.start()

        with pytest.raises(ClusterLost, match=r"Committed rounds are safe") as caught:
            train(connected, models.slow, report=report, train={"rounds": 500})
        closing.join()
    assert caught.value.code == 75
    assert dtrain.last_run().rows


# Scripts ------------------------------------------------------------------------------------------------------------

SCRIPT = """
    import sys
    import dtrain
    from torch import nn

    def build():
        return nn.Linear(6, 3)

    def main():
        samples = dtrain.open_samples(sys.argv[1], inputs=["x"], targets=["y"])
        config = dtrain.TrainConfig(train={"loss": "cross_entropy", "rounds": 1}, cluster={"workers": 1})
        print(dtrain.train(build, samples, config=config))

    main()
"""


def run_script(directory: Path, blobs: Path, text: str) -> subprocess.CompletedProcess[str]:
    (directory / "script.py").write_text(text)
    return subprocess.run(
        [sys.executable, "script.py", blobs], cwd=directory, capture_output=True, text=True, timeout=120, check=False
    )


def test_a_script_without_a_guard_gets_one_sentence(tmp_path: Path, blobs: Path) -> None:
    done = run_script(tmp_path, blobs, textwrap.dedent(SCRIPT))
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert len(done.stderr.splitlines()) < 30
    *_, sentence, cure = done.stderr.splitlines()
    assert (
        "script.py:14: local workers are processes that import this script; call dtrain below if __name__" in sentence
    )
    assert 'cluster="serial"' in cure
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


@pytest.mark.slow
def test_a_script_with_a_guard_trains(tmp_path: Path, blobs: Path) -> None:
    text = textwrap.dedent(SCRIPT).replace("\nmain()\n", '\nif __name__ == "__main__":\n    main()\n')
    done = run_script(tmp_path, blobs, text)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 rounds" in done.stdout


@pytest.mark.slow
def test_a_worker_that_runs_the_script_again_is_refused_too(tmp_path: Path, blobs: Path) -> None:
    """The guard is one that no look at the text finds: the condition is a function's."""
    hidden = 'def here():\n    return True\n\nif here() or __name__ == "":\n    main()\n'
    done = run_script(tmp_path, blobs, textwrap.dedent(SCRIPT).replace("\nmain()\n", f"\n{hidden}"))
    assert done.returncode != 0
    assert "call dtrain below if __name__" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"]


GUARD = 'if __name__ == "__main__":\n    '


@pytest.mark.parametrize(
    ("source", "line", "guarded"),
    [
        (f"import a\n{GUARD}run()\n", 3, True),
        (f"import a\n{GUARD}run(\n        1,\n    )\n", 4, True),
        ("if __name__ != '__main__':\n    raise SystemExit\nrun()\n", 3, True),
        ("import sys\nif __name__ != '__main__':\n    sys.exit()\nrun()\n", 4, True),
        ("__name__ == '__main__' and run()\n", 1, True),
        ("run() if __name__ == '__main__' else None\n", 1, True),
        ("if __name__ == '__main__' and x:\n  try:\n    with a:\n      run()\n  finally: pass\n", 4, True),
        ("import a\nrun()\n", 2, False),
        (f"{GUARD}a()\nrun()\n", 3, False),
        ("print(__name__)\nrun()\n", 2, False),
        ("if x:\n    run()\n", 2, False),
        ("def f(:\n", 1, True),
    ],
)
def test_a_guard_is_a_condition_on_the_name_of_the_module(source: str, line: int, guarded: bool) -> None:
    assert is_guarded(source, line) is guarded
