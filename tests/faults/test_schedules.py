"""Killed equals calm, over schedules drawn from seeds: ``make faults SEED=n COUNT=k`` plays as many as you like."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.nursery import Nursery
from tests.faults.play import ROUNDS, calm, ledger, play, write_config, write_project
from tests.faults.schedules import drawn
from tests.training import bits

pytestmark = [pytest.mark.alone, pytest.mark.timeout(290)]
FIRST, COUNT = int(os.environ.get("DTRAIN_FAULTS_SEED", "0")), int(os.environ.get("DTRAIN_FAULTS_COUNT", "20"))
IN_CI = 3


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    os.environ["NAP"] = "0.03"
    own = Nursery()
    del os.environ["NAP"]
    yield own
    own.close()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("faults")
    write_project(where)
    return where


SEEDS = [pytest.param(FIRST + n, marks=[] if n < IN_CI else pytest.mark.slow) for n in range(COUNT)]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_schedule_of_faults_changes_no_bit(nursery: Nursery, project: Path, seed: int) -> None:
    schedule = drawn(seed)
    where = project / f"seed-{seed}"
    write_config(where, schedule)
    undisturbed = calm(nursery, where)
    played = play(nursery, where, schedule)
    run = where / "runs/run"
    assert [row["params_sha256"] for row in played.rows] == [row["params_sha256"] for row in undisturbed], str(schedule)
    assert bits(played.rows) == bits(undisturbed)
    # each training sample once a round, no other sample at all
    seen = ledger(run)["ledger"]
    assert sorted(set(seen.tolist())) == [0, ROUNDS]
    assert (seen == ROUNDS).sum() == played.rows[-1]["samples"]
    # a driver that ends loses at most a segment
    most = 100 if schedule.commit_every == "auto" else max(int(schedule.commit_every), 2)
    assert all(lost <= most for lost in played.lost_rounds), played.lost_rounds
    # nothing is left behind
    assert played.tasks_left == 0
    assert not (run / "LOCK").exists()
    assert [path.name for path in run.rglob(".*")] == []
    assert {path.name for path in run.iterdir()} == {
        *("config.toml", "env.json", "events.jsonl", "history.jsonl", "plan.json", "rounds"),
    }
    assert "Traceback" not in played.errors
