"""The state of a round as files: of workers where they share the run's directory, else of the driver."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from safetensors.numpy import load_file

import dtrain
from dtrain import rounds
from dtrain.algorithm.params import params_sha256
from dtrain.checkpoint import load_round
from dtrain.data.samples import Samples
from dtrain.errors import DiskFull
from dtrain.runfiles import round_directory
from dtrain.runtime import client as task_client
from dtrain.runtime import storing
from dtrain.runtime.cluster import ClusterRunner
from dtrain.runtime.runner import SegmentLost
from tests.clusters import new_cluster
from tests.runtime import models
from tests.training import bits

ROUNDS = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "averaged states": {"inner_state": "average"},
    "ring": {"mix": {"topology": "ring"}},
    "hierarchical": {"mix": {"topology": "hierarchical", "groups": 2, "period": 3}},
    "outer": {"outer": {"optimizer": "sgd", "args": {"lr": 0.7, "momentum": 0.9, "nesterov": True}}},
    "ring, outer": {
        "mix": {"topology": "ring"},
        "outer": {"optimizer": "sgd", "args": {"lr": 0.7, "momentum": 0.9, "nesterov": True}},
    },
    "codec": {"codec": {"name": "int8"}},
    "control": {"control": True, "optimizer": "sgd"},
    "ema": {"ema": 0.9},
    "slices": {"outer": {"optimizer": "adamw", "args": {"lr": 0.1}}, "slices": 3},
    "frozen": {"freeze": ["0.*"], "outer": {"optimizer": "sgd", "args": {"lr": 0.7, "momentum": 0.9}}},
}
"""What a state may hold: changes to ``[average]``, ``train.freeze`` and ``cluster.slices``."""


def configured(table: dict[str, Any], **changes: Any) -> dtrain.TrainConfig:
    average = dict(changes)
    every = average.pop("commit_every", 1)
    own = {"rounds": average.pop("rounds", ROUNDS), "optimizer": average.pop("optimizer", "adamw")}
    frozen = {"freeze": average.pop("freeze")} if "freeze" in average else {}
    slices = {"slices": average.pop("slices")} if "slices" in average else {}
    return dtrain.TrainConfig(
        train={**table, **own, "optimizer_args": {"lr": 0.01}, **frozen},
        average={"replicas": 4, **average},
        cluster=slices,
        run={"commit_every": every, "keep": ROUNDS},
    )


@pytest.fixture
def train(tmp_path: Path, samples: Samples, train_table: dict[str, Any]) -> Callable[..., dtrain.Run]:
    def start(cluster: Any = "serial", run: str | None = None, **changes: Any) -> dtrain.Run:
        config = configured(train_table, **changes)
        where = tmp_path / "runs"
        return dtrain.train(
            models.small, samples, config=config, cluster=cluster, run=run, run_dir=where, progress=False
        )

    return start


def files(run: dtrain.Run) -> dict[str, str]:
    """Return the digest of each file of all rounds."""
    rounds = run.directory / "rounds"
    return {
        str(path.relative_to(rounds)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(rounds.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", "state.json")
    }


def events(run: dtrain.Run, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run.directory / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def written_by(run: dtrain.Run) -> list[str]:
    return [event["by"] for event in events(run, "RoundCommitted")]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", VARIANTS)
def test_workers_write_the_files_that_the_driver_would(
    train: Callable[..., dtrain.Run], client: Client, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = train(**VARIANTS[name])
    run = train(client, **VARIANTS[name])
    assert bits(run.rows) == bits(expected.rows)
    assert files(run) == files(expected)
    assert written_by(run) == ["workers"] * ROUNDS
    monkeypatch.setattr(storing, "write_file", lambda *given: None)  # as a worker that does not see the directory
    other = train(client, **VARIANTS[name])
    assert bits(other.rows) == bits(expected.rows)
    assert files(other) == files(expected)
    assert written_by(other) == ["driver"] * ROUNDS
    for one in (run, other):
        assert not [path for path in (one.directory / "rounds").iterdir() if path.name.startswith(".")]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_goes_on_from_files(train: Callable[..., dtrain.Run], client: Client, name: str) -> None:
    expected = train(**VARIANTS[name])
    train(client, run="halves", rounds=2, **VARIANTS[name])
    run = train(client, run="halves", **VARIANTS[name])
    assert bits(run.rows) == bits(expected.rows)
    assert written_by(run) == ["workers"] * ROUNDS


def test_a_worker_that_does_not_see_a_file_is_sent_the_value(
    train: Callable[..., dtrain.Run], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train()

    def unreadable(*given: Any) -> None:
        raise storing.NotSeen("there is no such file here")

    monkeypatch.setattr(storing, "read_file", unreadable)
    run = train(client)
    assert bits(run.rows) == bits(expected.rows)
    replayed = events(run, "SegmentReplayed")
    assert {event["reason"] for event in replayed} == {"there is no such file here"}
    assert [event["round"] for event in replayed] == [1, 2, 3]  # once each: then the driver sends it


def test_a_replay_that_ends_sooner_commits_a_round_that_was_yielded(
    train: Callable[..., dtrain.Run], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of 1 and 3 rounds; the second is lost at its end, and replayed as three."""
    expected = train()
    monkeypatch.setattr(rounds, "commit_cadence", lambda *given: 3)
    collect, lost = ClusterRunner.collect, [ROUNDS]

    def losing(self: ClusterRunner, held: Any, finished: int | None = None) -> Any:
        outcome = collect(self, held)
        if f"-r{ROUNDS:05d}-" in held.summary.key and lost:
            lost.clear()
            raise SegmentLost("worker gone", gone=True)
        return outcome

    monkeypatch.setattr(ClusterRunner, "collect", losing)
    run = train(client, commit_every="auto")
    assert [event["round"] for event in events(run, "RoundCommitted")] == [1, 2, 4]
    assert [row["round"] for row in run.rows] == [1, 2, 3, 4]
    assert bits(run.rows) == bits(expected.rows)


def test_a_file_that_is_not_on_the_drivers_disk_is_written_by_the_driver(
    train: Callable[..., dtrain.Run], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker of another machine may find a directory of that name on a disk of its own."""
    monkeypatch.setattr(storing, "_is_there", lambda file: False)
    run = train(client)
    assert written_by(run) == ["driver"] * ROUNDS
    assert files(run) == files(train())


def test_a_full_disk_is_named_once_the_driver_has_tried(
    train: Callable[..., dtrain.Run], client: Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*given: Any) -> None:
        raise DiskFull("inner-0000 could not be written", "Free some space")

    monkeypatch.setattr(storing, "write_file", lambda *given: None)
    monkeypatch.setattr(storing, "write_part", full)
    with pytest.raises(DiskFull, match="inner-0000"):
        train(client, run="full")
    assert list((tmp_path / "runs" / "full" / "rounds").iterdir()) == []


def test_the_driver_holds_a_few_parts_at_once(
    train: Callable[..., dtrain.Run], client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storing, "write_file", lambda *given: None)
    monkeypatch.setattr(storing, "AT_ONCE_BYTES", 1)
    held: list[int] = []
    gather = task_client.TaskClient.gather

    def counted(self: Any, futures: Any, meanwhile: Any, undone: Any = None) -> Any:
        values = gather(self, futures, meanwhile, undone)
        if any(future.key.startswith("dtrain-part-") for future in futures):
            held.append(len(values))
        return values

    monkeypatch.setattr(task_client.TaskClient, "gather", counted)
    run = train(client, rounds=1)
    assert held == [1] * 5  # the parameters, and what each of four replicas keeps
    state, _ = load_round(round_directory(run.directory, 1))
    assert params_sha256(state.model) == run.rows[-1]["params_sha256"]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", VARIANTS)
def test_plan_knows_the_bytes_of_a_commit(
    train: Callable[..., dtrain.Run], samples: Samples, train_table: dict[str, Any], name: str
) -> None:
    plan = dtrain.plan(models.small, samples, config=configured(train_table, **VARIANTS[name]), cluster="serial")
    largest = 0
    for directory in (train(**VARIANTS[name]).directory / "rounds").iterdir():
        parts = [load_file(path).values() for path in directory.glob("*.safetensors")]
        largest = max(largest, sum(tensor.nbytes for part in parts for tensor in part))
    assert plan.commit.total == pytest.approx(largest, rel=0.02)


def test_plan_says_who_writes(
    samples: Samples, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dtrain.TrainConfig(train={"loss": "cross_entropy"}, average={"replicas": 2}, run={"dir": str(tmp_path)})

    def said(cluster: Any) -> tuple[str, bool | None]:
        plan = dtrain.plan(models.small, samples, config=config, cluster=cluster)
        return dict(plan.rows)["commit"], plan.shared

    text, shared = said(client)
    assert (text.partition("; ")[2], shared) == (f"the workers write them, for they see {tmp_path}", True)
    text, shared = said("serial")
    assert ("; " in text, shared) == (False, None)
    monkeypatch.setattr("dtrain.runtime.cluster.look_at", lambda path: (str(path), os.getpid(), ()))
    text, shared = said(client)
    assert "the driver writes them, a few at a time" in text
    assert shared is False
    assert list(tmp_path.iterdir()) == []  # nothing is written to find out


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Callable[[int, int], Client]]:
    """A function that starts workers that see the directory of runs, and others that see an empty one."""
    runs = tmp_path / "runs"
    runs.mkdir()
    with ExitStack() as stack:

        def start(sharing: int, others: int) -> Client:
            cluster = stack.enter_context(new_cluster(0))
            worker = f"exec {sys.executable} -m distributed.cli.dask_worker {cluster.scheduler_address}"
            worker += " --no-nanny --nthreads 2 --host 127.0.0.1"
            commands = [["sh", "-c", worker]] * sharing
            commands += [["unshare", "-m", "sh", "-c", f"mount -t tmpfs none {runs} && {worker}"]] * others
            for command in commands:
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                process = stack.enter_context(subprocess.Popen(command, cwd=tmp_path, **quiet))  # type: ignore[call-overload]
                stack.callback(process.terminate)
            client = stack.enter_context(Client(cluster))
            client.wait_for_workers(sharing + others, timeout=60)
            return client

        yield start


def can_unshare() -> bool:
    done = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], check=False, capture_output=True)
    return done.returncode == 0


@pytest.mark.skipif(shutil.which("unshare") is None or not can_unshare(), reason="mounts are not allowed here")
@pytest.mark.sampled(1)
@pytest.mark.parametrize(("sharing", "others"), [(1, 1), (0, 2)])
def test_workers_with_another_file_system(
    train: Callable[..., dtrain.Run], elsewhere: Callable[[int, int], Client], sharing: int, others: int
) -> None:
    client = elsewhere(sharing, others)
    expected, run = train(), train(client)
    assert bits(run.rows) == bits(expected.rows)
    assert files(run) == files(expected)
    assert written_by(run) == ["driver"] * ROUNDS
    assert events(run, "SegmentReplayed") == []
