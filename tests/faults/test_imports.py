"""Workers that import PyTorch for longer than a frozen worker is waited for, or cannot import it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import dtrain
from dtrain.data.samples import Samples
from dtrain.errors import ClusterUnsuitable
from dtrain.events import Event, RoundFinished, StepsTaken, WorkerEvicted
from dtrain.runtime import frozen
from tests.clusters import new_cluster
from tests.runtime import models

pytestmark = [pytest.mark.alone, pytest.mark.timeout(280)]
CUSTOM = """
import sys, time

class Custom:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            {what}

sys.meta_path.insert(0, Custom())
"""


@pytest.fixture
def on_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Give a function that lets processes which start from now on do something before they import PyTorch."""

    def do(what: str) -> None:
        (tmp_path / "custom").mkdir()
        (tmp_path / "custom" / "sitecustomize.py").write_text(CUSTOM.format(what=what))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "custom"))

    return do


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_workers_that_cannot_import(
    samples: Samples, tmp_path: Path, on_import: Callable[[str], None], error: str
) -> None:
    on_import(f"raise {error}('libtorch.so: no such file')")
    with (
        new_cluster(1) as cluster,
        Client(cluster) as client,
        pytest.raises(ClusterUnsuitable, match=r"^Worker tcp://\S+ cannot import dtrain or PyTorch: libtorch.so: no"),
    ):
        dtrain.train(models.small, samples, train={"loss": "mse"}, cluster=client, run_dir=tmp_path, progress=False)
    assert not list(tmp_path.glob("*/rounds"))


def test_workers_that_import_for_long_are_not_frozen_and_hold_no_round_up(
    samples: Samples,
    tmp_path: Path,
    on_import: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(frozen.Heartbeats.__init__, "__defaults__", (8.0, time.monotonic))
    monkeypatch.setattr(frozen, "ALL_FROZEN_SECONDS", 8.0)
    on_import("time.sleep(12)")
    evicted: list[Event] = []
    trained: set[str] = set()
    meanwhile: list[int] = []  # rounds that are finished while a worker joins

    def train(cluster: Any, where: str, **more: Any) -> dtrain.Run:
        table = {"loss": "cross_entropy", "rounds": 25, "batch_size": 16}
        return dtrain.train(
            models.slow, samples, train=table, average={"replicas": 3}, cluster=cluster, run_dir=tmp_path / where,
            progress=False, **more,
        )  # fmt: skip

    calm = train("serial", "calm", model_args={"seconds": 0.0})
    with new_cluster(2) as cluster, Client(cluster) as client:
        first = client.run(os.getpid)

        def report(event: Event) -> None:
            if isinstance(event, WorkerEvicted):
                evicted.append(event)
            if isinstance(event, StepsTaken):
                trained.add(event.worker)
            if isinstance(event, RoundFinished):
                if event.result.round == 1:
                    cluster.scale(3)
                if any(worker.status.name == "init" for worker in cluster.scheduler.workers.values()):
                    meanwhile.append(event.result.round)

        run = train(client, "run", model_args={"seconds": 0.05}, report=report)
        assert first.items() <= client.run(os.getpid).items()
    assert [row["params_sha256"] for row in run.rows] == [row["params_sha256"] for row in calm.rows]
    assert not evicted
    assert not [text for text in caplog.messages if "has not answered" in text]
    assert len(meanwhile) >= 3
    assert len(trained) == 3
