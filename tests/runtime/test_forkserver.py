"""Local workers are copies of a process that has imported torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.runtime.forkserver import start
from dtrain_cli.arguments import _scheduler_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


SCRIPT = """
import json, os, sys
from multiprocessing import forkserver
from pathlib import Path
from dtrain.config.schema import ClusterConfig
from dtrain.runtime.connect import open_cluster

def facts():
    import torch
    status = Path("/proc/self/status").read_text()
    parent = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid"))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_")
    return {"parent": parent, "threads": torch.get_num_threads(), **{name: os.environ.get(name) for name in names}}

with open_cluster(ClusterConfig(workers=2), Path(sys.argv[1])) as connection:
    workers = connection.client.run(facts)
    server = forkserver._forkserver._forkserver_pid
    status = Path(f"/proc/{server}/status").read_text()
print(json.dumps({"workers": list(workers.values()), "server": server, "is_single": "Threads:\\t1\\n" in status}))
"""
"""In a process of its own: in this one, another test may have started the server of forks in another environment."""
NAMES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_")
"""Dask's nannies set them in the process that starts a cluster."""


def test_workers_are_forked_from_a_process_of_one_thread_with_the_environment_of_dask(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["is_single"]
    assert len(seen["workers"]) == 2
    for worker in seen["workers"]:
        assert worker == {
            "parent": seen["server"],
            "threads": 1,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_TRIM_THRESHOLD_": None,
        }


def test_the_environment_of_the_driver_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    start()
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


@pytest.mark.parametrize(
    ("text", "settings", "scheduler"),
    [
        ("", [], "local"),
        ('[cluster]\nscheduler = "serial"', [], "serial"),
        ('[cluster]\nscheduler = "serial"', ["cluster.scheduler=local"], "local"),
        ("[cluster]\nworkers = 2", ['cluster.scheduler = "tcp://h:1"'], "tcp://h:1"),
        ("cluster = 3", [], ""),
        ("[cluster", [], ""),
    ],
)
def test_the_scheduler_of_a_config_at_a_glance(tmp_path: Path, text: str, settings: list[str], scheduler: str) -> None:
    (tmp_path / "dtrain.toml").write_text(text)
    assert _scheduler_of(tmp_path / "dtrain.toml", settings) == scheduler


def test_a_config_that_is_not_there_starts_nothing(tmp_path: Path) -> None:
    assert _scheduler_of(tmp_path / "absent.toml", []) == ""
