"""The scripts of examples/slurm, with stubs in place of Slurm: jobs run here, and end by SIGTERM as at a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.helpers import SCRIPT, Project, history, kept
from tests.training import bits

pytestmark = pytest.mark.alone
SCRIPTS = Path(__file__).parents[2] / "examples" / "slurm"
ROUNDS = 8
MANY = ("--set", f"train.rounds={ROUNDS}", "--set", "average.replicas=2")
STUBS = {
    "scontrol": 'echo "$@" >> scontrol.log',
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "hostname": "echo 127.0.0.1",
    # the job runs at once, in a session of its own; the script is read before `sbatch` returns, as Slurm does
    "sbatch": 'script=$(mktemp "$PWD/job-XXXX")\ncat "$1" > "$script"\nsetsid bash "$script" > "$script.log" 2>&1 &\n'
    'echo "Submitted batch job $!"',
    "scancel": 'for job in "$@"; do kill -TERM -- "-$job"; done\nexit 0',
    "squeue": "exit 0",
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose commands stand in for Slurm's; return the log of `scontrol`."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in STUBS.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(commands), str(SCRIPT.parent), os.environ["PATH"]]))
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("NAP", "0.1")
    return tmp_path / "scontrol.log"


def batch_job(script: str, job: Project, rounds_before_term: int | None = None) -> int:
    """Run a batch script as Slurm does and return its exit code; a time limit ends it after some committed rounds."""
    command = ["bash", str(SCRIPTS / script), str(job.config), *MANY]
    with subprocess.Popen(command, start_new_session=True) as running:  # SIGTERM goes to the script alone
        while rounds_before_term is not None and running.poll() is None:
            time.sleep(0.05)
            if len(kept(job.run)) >= rounds_before_term:
                running.send_signal(signal.SIGTERM)
                break
        return running.wait(timeout=200)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.sbatch", pytest.param("nodes.sbatch", marks=pytest.mark.slow)])
def test_a_job_that_reaches_its_time_limit_is_queued_again_and_goes_on(
    script: str, slurm: Path, project: Callable[..., Project], cli: Callable[..., Any]
) -> None:
    job, calm = project(name="job"), project(name="calm")
    assert batch_job(script, job, rounds_before_term=2) == 75
    assert slurm.read_text() == "requeue 4711\n"
    committed = kept(job.run)
    assert 2 <= committed[-1] < ROUNDS
    assert not (job.run / "LOCK").exists()

    assert batch_job(script, job) == 0
    assert slurm.read_text() == "requeue 4711\n"  # a run that is done is not queued again
    assert kept(job.run)[-1] == ROUNDS
    assert cli("-q", "train", calm.config, *MANY).code == 0
    assert bits(history(job.run)) == bits(history(calm.run))


def test_a_job_that_fails_is_not_queued_again(slurm: Path, project: Callable[..., Project]) -> None:
    job = project({"data": {"inputs": ["y"]}})
    assert batch_job("train.sbatch", job) == 3
    assert not slurm.exists()


@pytest.mark.slow
def test_workers_that_are_jobs_of_dask_jobqueue(
    slurm: Path, tmp_path: Path, project: Callable[..., Project], cli: Callable[..., Any]
) -> None:
    job = project({"train": {"rounds": ROUNDS}, "average": {"replicas": 2}}, without=("cluster",))
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "jobqueue.py"), "interface=lo"],
        cwd=job.dir,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run = job.dir / "runs" / "slurm"
    assert list(job.dir.glob("job-*"))  # workers were submitted
    assert cli("-q", "train", job.config, "--scheduler", "serial").code == 0
    assert bits(history(run)) == bits(history(job.run))
