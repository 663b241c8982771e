from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:  # as the script finds the modules beside it
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from benchmarks import elastic, elastic_report
    from benchmarks.elastic_report import Kill, Life

BEGAN, ENDED = 100.0, 120.0
LIVES = {
    1: Life(0, 90.0, died=111.0, ready=95.0, tasks=[((1, 0), 100.0, 105.0), ((2, 0), 109.0, None)]),
    2: Life(1, 90.0, died=None, ready=95.0, tasks=[((1, 1), 101.0, 106.0), ((1, 0), 106.0, 108.0)]),
    3: Life(0, 111.0, died=None, ready=115.0, tasks=[((2, 0), 115.0, 120.0)]),
}
"""Replica 0 of round 1 was trained twice, that of round 2 was cut after 2 s."""


def test_each_kill_has_its_cut_and_its_absence() -> None:
    assert elastic_report.losses([Kill(111.0, 1, 3)], LIVES, BEGAN, ENDED) == [(11.0, 2.0, 4.0)]


def test_a_successor_that_is_not_ready_is_absent_up_to_the_end() -> None:
    lives = {**LIVES, 3: Life(0, 111.0)}
    assert elastic_report.losses([Kill(111.0, 1, 3)], lives, BEGAN, ENDED) == [(11.0, 2.0, 9.0)]


def test_the_time_of_the_workers_is_shared_out() -> None:
    found = elastic_report.shares(LIVES, BEGAN, ENDED)
    parts = {name: found[name] for name in ("useful", "cut", "repeated", "absent", "idle")}
    assert parts == {"useful": 12.0, "cut": 2.0, "repeated": 5.0, "absent": 4.0, "idle": 17.0}
    assert sum(parts.values()) == elastic_report.WORKERS * (ENDED - BEGAN)
    assert found["begun_again"] == 2


def test_the_bound_counts_kills_before_it() -> None:
    assert elastic_report.bound(10.0, [(4.0, 1.0, 3.0), (11.5, 1.0, 1.0), (20.0, 9.0, 9.0)]) == 13.0


def test_a_calm_run_is_taken_at_the_speed_of_the_run_beside_it() -> None:
    calm, slower = {"seconds": 200.0, "task": 1.5}, {"seconds": 300.0, "task": 1.8}
    assert elastic_report.calm_seconds(calm, calm) == 200.0
    assert elastic_report.calm_seconds(calm, slower) == pytest.approx(240.0)


def test_kills_take_turns_at_equal_distances() -> None:
    times = elastic.kill_times(elastic.Cell("dtrain", 10.0, 3), 0.0)
    (first, one), (second, other), (third, again) = (next(times) for _ in range(3))
    assert 3.0 <= first < 10.0
    assert (second - first, third - second) == pytest.approx((10.0, 10.0))
    assert {one, other} == {0, 1}
    assert again == one


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_systems_train_and_a_restart_keeps_the_bits(tmp_path: Path) -> None:
    file = tmp_path / "runs.json"
    options = ["--rounds", "5", "--steps", "60", "--every", "20", "--json", str(file)]
    subprocess.run([sys.executable, elastic.__file__, *options], check=True, cwd=tmp_path)
    runs = {(one["system"], one["every"]): one for one in json.loads(file.read_text())}
    hashes = {key: one["result"]["params_sha256"] for key, one in runs.items()}
    calm = {hashes[system, 0.0] for system in elastic_report.SYSTEMS}
    assert len(calm) == 1
    assert {hashes["dtrain", 20.0], hashes["restart", 20.0]} == calm
