"""A run is followed by its files alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.events import ReplicaRejected, RoundCommitted, SegmentReplayed
from dtrain.report.history import row_of
from dtrain.report.journal import journal, read_events
from dtrain.report.table import RoundTable
from dtrain.report.watch import FIRST_ROUNDS, Look, Watch, follow
from tests.report.helpers import result_of

EMPTY = Watch(RoundTable(rounds=30, width=80))
LOST = SegmentReplayed(round=2, reason="worker tcp://a is gone")


def rows(*numbers: int, **changes: object) -> list[dict[str, object]]:
    return [row_of(result_of(n, retried=0, **changes)) for n in numbers]


def look(*numbers: int, events: tuple[object, ...] = (), running: bool = True, silent: float = 0.0) -> Look:
    return Look(rows(*numbers), events, running, silent)  # type: ignore[arg-type]


def rounds_in(lines: list[str]) -> list[int]:
    return [int(line.split()[0]) for line in lines if line.split()[0].isdigit()]


def test_each_round_and_fault_comes_once() -> None:
    watch, lines = EMPTY.after(look(1, 2))
    assert rounds_in(lines) == [1, 2]
    assert lines[0].split()[:3] == ["round", "train", "val"]
    watch, lines = watch.after(look(1, 2))
    assert lines == []
    commit = RoundCommitted(round=2, bytes=1, seconds=0.1)
    watch, lines = watch.after(look(1, 2, 3, events=(commit, LOST)))
    assert lines[0] == "lost work with a worker; going on from round 2 (worker tcp://a is gone)"
    assert rounds_in(lines) == [3]
    assert watch.after(look(1, 2, 3, events=(commit, LOST)))[1] == []


def test_of_many_rounds_before_the_last_ones_are_shown_and_the_best_of_all_is_known() -> None:
    many = [row_of(result_of(n, metrics={"val_loss": abs(n - 3.0)})) for n in range(1, 101)]
    watch, lines = EMPTY.after(Look(many, (), True, 0.0))
    assert rounds_in(lines) == list(range(101 - FIRST_ROUNDS, 101))
    assert not any("*" in line for line in lines)
    assert watch.table.best_round == 3


def test_a_run_that_is_continued_shows_its_lost_rounds_again() -> None:
    watch, _ = EMPTY.after(look(1, 2, 3, 4))
    watch, lines = watch.after(look(1, 2))
    assert lines == ["continued after round 2"]
    assert watch.table.seconds == pytest.approx(2 * 1.2346)
    assert rounds_in(watch.after(look(1, 2, 3))[1]) == [3]
    other = Look([*rows(1), *rows(2, train_loss=9.0)], (), True, 0.0)
    assert rounds_in(watch.after(other)[1]) == [2]


def test_no_progress_is_told_of() -> None:
    watch, _ = EMPTY.after(look(1, 2))
    assert watch.doing(59.0) == "round 2 of 30 is finished; 16 samples/s, 0:35 left"
    assert watch.doing(300.0) == "no progress for 5 min"
    slow = Watch(EMPTY.table, tuple(rows(1, seconds=200.0)))
    assert "no progress" not in slow.doing(599.0)
    assert slow.doing(601.0) == "no progress for 10 min"
    assert EMPTY.doing(1.0) == "no round is finished yet"


def test_without_a_terminal_it_is_told_of_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([10.0, 61.0, 90.0, 121.0, 123.0, 300.0])
    looks = (look(1, running=silent < 300, silent=silent) for silent in seconds)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dtrain.report.watch.POLL_SECONDS", 0.0)
        follow(EMPTY, lambda: next(looks), color=False)
    lines = capsys.readouterr().out.splitlines()
    assert rounds_in(lines[1:2]) == [1]
    assert lines[2:] == ["no progress for 1 min", "no progress for 2 min"]


def test_events_are_read_back(tmp_path: Path) -> None:
    written = [LOST, ReplicaRejected(round=3, replica=1), RoundCommitted(round=3, bytes=9, seconds=0.5)]
    for event in written:
        journal(tmp_path, event)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write(json.dumps({"event": "OfTomorrow", "time": "", "a": 1}) + "\n")
        file.write(json.dumps({"event": "RoundCommitted", "time": "", "a": 1}) + "\n")
        file.write(json.dumps({"event": "journal", "time": ""}) + "\n")
    assert read_events(tmp_path) == written
    assert read_events(tmp_path / "none") == []
    watch, lines = EMPTY.after(replace(look(1), events=read_events(tmp_path)))
    assert (watch.faults, len(lines)) == (2, 4)
